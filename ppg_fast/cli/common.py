"""What the commands share: a package that is missing, and warnings about the user's input."""

import contextlib
import sys
from collections.abc import Sequence

from ppg_fast.about import EXTRA, missing


def lacks(command: str, modules: Sequence[str] = EXTRA) -> bool:
    """Whether packages of the [train] extra are missing; says which."""
    lacking = missing(modules)
    if lacking:
        print(f"ppg-fast {command} needs {', '.join(lacking)}: pip install ppg_fast[train]", file=sys.stderr)
    return bool(lacking)


def show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
    """Our own warnings are about the user's input: one line, without a place in the source."""
    text = str(message) if "ppg_fast" in filename else f"{category.__name__}: {message}"
    with contextlib.suppress(OSError):  # a terminal that is gone ends nothing
        print(f"ppg-fast: warning: {text}", file=sys.stderr)

"""`ppg-fast compare`, whose flags are its own."""

import warnings
from collections.abc import Sequence

from ppg_fast.cli.common import lacks, show_warning


def run(flags: Sequence[str]) -> int:
    if not {"-h", "--help"} & set(flags) and lacks("compare"):
        return 1
    warnings.showwarning = show_warning
    from ppg_fast.compare.command import main

    return main(flags)

"""The JSON lines that a measuring or testing process appends as it goes: what it has begun, what came of it, what it
found.

``{"started": NAME, "limit_s": SECONDS}`` and ``{"ended": NAME, "outcome": ..., "seconds": ...}`` go round every piece
of work, one at a time. A process that is begun again leaves out what has ended: the file is all the state there is.
"""

import json
import os
from pathlib import Path
from typing import Any

RESTART = 75  # exit status: this process can use the device no more, another may


def append(path: Path, /, **line: Any) -> None:
    """One line, on the disk when this returns; half a line that a killed process left before it stays by itself."""
    with path.open("ab") as file:
        file.write(f"\n{json.dumps(line)}\n".encode())
        file.flush()
        os.fsync(file.fileno())


class Lines:
    """What others append to ``path``, as it comes."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.read = path, 0

    def new(self) -> list[dict[str, Any]]:
        """The lines since the last look; the last one may still be on its way."""
        if self.path is None or not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.read += len(whole)
        return [_line(line) for line in whole.splitlines() if line.strip()]


def _line(text: bytes) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError:
        line = None
    if isinstance(line, dict) and ("ended" not in line or {"outcome", "seconds"} <= line.keys()):
        return line
    return {"unreadable": text.decode(errors="replace")[:300]}


def ended(path: Path | None) -> set[str]:
    """Names of the work that need not be done again."""
    return {line["ended"] for line in Lines(path).new() if "ended" in line}

"""Where a command prints: what cannot be written never ends work that was going well."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

GONE = 141  # exit status of a command whose reader went away, as a shell counts: 128 + SIGPIPE


class Outlet:
    """A stream whose reader may go away, or whose disk may fill up: it says so once, and what follows is dropped.

    Everything else is the stream's own.
    """

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream, self._name, self.lost = stream, name, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write ``text``; the number of characters, written or not."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """Flush, or drop what cannot be written."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        drop(self._stream)
        first, self.lost = not self.lost, True
        if first and sys.stderr is not self:
            why = "nobody reads it any more" if error.errno == errno.EPIPE else error.strerror
            print(f"ppg-fast: warning: {self._name} is lost ({why}); the work goes on", file=sys.stderr, flush=True)


def drop(stream: TextIO) -> None:
    """Let everything that is written to ``stream`` from now on, and what it still holds, vanish."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # a stream without a file
        pass


def print_everything() -> None:
    """Characters that the terminal's encoding does not have are escapes (``\\u2026``) instead of an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextmanager
def keep_going() -> Iterator[None]:
    """While the block runs, an output that is lost is no reason to stop."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Outlet(before[0], "the output"), Outlet(before[1], "what goes wrong")  # type: ignore[assignment]
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def one_line(error: BaseException) -> str:
    """What an error says, in a line; of the system's, what it is about first."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{os.fspath(error.filename)!r}: {error.strerror}"
    return "; ".join(line.strip() for line in str(error).splitlines() if line.strip()) or type(error).__name__

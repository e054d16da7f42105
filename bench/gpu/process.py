"""One process of a part under supervision: what hangs is ended by name, and what is left is begun again without it."""

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .lines import RESTART, Lines, append

CASE = 40.0  # seconds for a piece of work whose line names no limit
GRACE = 3.0  # seconds from asking a process to end to making it, and from there to giving it up
LEAST = 5.0  # seconds under which nothing is begun
LOST = 3  # pieces of work in a row that hung or died: so will the next one


def start(
    words: Sequence[str], folder: Path | None, environment: dict[str, str], output: Any
) -> "subprocess.Popen[bytes] | None":
    """The process, at the head of a group of its own, or None where it cannot be started. It dies with the driver."""

    def alone() -> None:
        os.setpgrp()
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nobody else would end it

    try:
        return subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env={**os.environ, **environment}, cwd=folder, preexec_fn=alone,
        )  # fmt: skip
    except OSError as error:
        output.write(f"{words[0]}: {error}\n".encode())
        return None


def end(*processes: "subprocess.Popen[bytes] | None") -> bool:
    """End the processes and what they started; False where one stays, as one does that waits inside of the kernel's
    driver for a device that does not answer."""
    there = [process for process in processes if process is not None]
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in there:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, number)
        deadline = time.monotonic() + GRACE
        for process in there:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, deadline - time.monotonic()))
    return all(process.poll() is not None for process in there)


def attempt(words: Sequence[str], folder: Path | None, environment: dict[str, str], seconds: float, log: Path) -> bool:
    """Whether the command came to a good end within ``seconds``."""
    with log.open("ab") as output:
        process = start(words, folder, environment, output)
        if process is None:
            return False
        try:
            return process.wait(timeout=seconds) == 0
        except subprocess.TimeoutExpired:
            return False
        finally:
            end(process)


class Supervised:
    """A command until it is over. ``status``: its exit status, None where it was stopped; 127 where it cannot start."""

    def __init__(
        self, words: Sequence[str], lines: Path | None, log: Path, folder: Path | None, environment: dict[str, str]
    ) -> None:
        self.words, self.lines, self.log = words, Lines(lines), log
        self.folder, self.environment = folder, environment
        self.over, self.status, self.stuck = False, None, False
        self.work: tuple[str, float, float] | None = None  # name, when it began, its limit
        self.bad = self.progress = 0  # pieces of work in a row that hung or died; that ended in this process
        self.waiting = self._read()  # of a run before this one, whose last piece of work is done again
        self.work = None
        self._start()

    def _start(self) -> None:
        self.progress = 0
        with self.log.open("ab") as output:
            self.process = start(self.words, self.folder, self.environment, output)
        if self.process is None:
            self.over, self.status = True, 127

    def poll(self, left: float) -> list[dict[str, Any]]:
        """The lines since the last look. ``left``: seconds that a process begun again would have."""
        status = None if self.process is None else self.process.poll()  # before the lines, which it may still write
        lines, self.waiting = self.waiting + self._read(), []
        if self.over:
            return lines
        if status is None:
            if self.work and time.monotonic() - self.work[1] > self.work[2]:
                self.stuck |= not end(self.process)
                lines += self._read()
                lines += self._lose("hung", f"had not ended after {self.work[2]:.0f} s") if self.work else []
                self._again(None, left)
            return lines
        end(self.process)  # what it left behind
        if self.work:
            lines += self._lose("died", f"the process ended with status {status}")
            self._again(status, left)
        elif status == RESTART:
            self._again(status, left)
        else:
            self.over, self.status = True, status
        return lines

    def stop(self) -> list[dict[str, Any]]:
        """End it where it is not over; the last lines, and one for what it was at work on."""
        if not self.over:
            self.over = True
            self.stuck |= not end(self.process)
        lines, self.waiting = self.waiting + self._read(), []
        if self.work:
            lines.append(_ended(self.work, "stopped", "the time of the part was over"))
            self.work = None
        return lines

    def _read(self) -> list[dict[str, Any]]:
        lines = self.lines.new()
        for line in lines:
            if "started" in line:
                self.work = line["started"], time.monotonic(), line.get("limit_s", CASE)
            if "ended" in line:
                self.work, self.progress = None, self.progress + 1
                self.bad = self.bad + 1 if line["outcome"] in ("hung", "died") else 0
        return lines

    def _lose(self, outcome: str, message: str) -> list[dict[str, Any]]:
        """Write down what the process cannot any more; the next one reads it there."""
        assert self.work is not None
        assert self.lines.path is not None
        append(self.lines.path, **_ended(self.work, outcome, message))
        return self._read()

    def _again(self, status: int | None, left: float) -> None:
        if self.progress and self.bad < LOST and left > LEAST and not self.stuck:
            self._start()
        else:
            self.over, self.status = True, status


def _ended(work: tuple[str, float, float], outcome: str, message: str) -> dict[str, Any]:
    seconds = round(time.monotonic() - work[1], 1)
    return {"ended": work[0], "outcome": outcome, "seconds": seconds, "message": message}

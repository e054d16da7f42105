"""Our own command line as a user runs it, in a process of its own whose time and memory are counted."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LOOKS = 0.2  # seconds between two looks at a process that is to be stopped


@dataclass(frozen=True)
class Ran:
    """A process that has ended: its status, wall and processor seconds, and the largest resident set in bytes."""

    status: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int

    def __add__(self, other: "Ran") -> "Ran":
        peak = max(self.peak_bytes, other.peak_bytes)
        return Ran(other.status, self.seconds + other.seconds, self.cpu_seconds + other.cpu_seconds, peak)


def run(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    log: Path,
    stop_when: Callable[[], bool] | None = None,
) -> Ran:
    """`python -m ARGUMENTS`, what it says into ``log``; at ``stop_when`` it gets SIGTERM. RuntimeError where it fails,
    with the last line that it said."""
    start = time.perf_counter()
    with open(log, "ab") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments], env={**os.environ, **environment}, stdout=said, stderr=said
        )
        asked = _stop(process.pid, stop_when) if stop_when else None
        _, status, used = asked or os.wait4(process.pid, 0)
    process.returncode = code = os.waitstatus_to_exitcode(status)
    allowed = (0, 128 + signal.SIGTERM, -signal.SIGTERM) if stop_when else (0,)
    if code not in allowed:
        last = (log.read_text(errors="replace").strip().splitlines() or ["nothing said"])[-1]
        raise RuntimeError(f"{' '.join(arguments[:2])} ended with status {code}: {last[:300]}")
    return Ran(code, time.perf_counter() - start, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def _stop(pid: int, when: Callable[[], bool]) -> tuple[int, int, Any] | None:
    """What `os.wait4` gives where the process ends by itself, None once it was asked to stop."""
    while not when():
        done = os.wait4(pid, os.WNOHANG)
        if done[0]:
            return done
        time.sleep(LOOKS)
    os.kill(pid, signal.SIGTERM)
    return None


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as flags of `ppg-fast train`."""
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def rows(folder: Path, phase: str = "") -> list[dict[str, Any]]:
    """The metrics that a run has written so far, of one phase."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    found = [json.loads(line) for line in text.split("\n")[:-1]]
    return [row for row in found if phase in ("", row["phase"])]

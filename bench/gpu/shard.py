"""One of the processes that run the tests: `python -m bench.gpu.shard LINES N OF UNTIL LIMIT [options of pytest]`. It
imports neither the package nor torch: the tests do.

A line says which test has begun and another what came of it, so that one that hangs is known, and what ran before it is
not lost. Which tests are this process's own follows from their names; those that its lines say have ended are left out.
"""

import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from .lines import append, ended

KEPT = 1500  # characters of a failure
NO_TESTS = 5  # pytest's exit status


class Told:
    """What pytest tells, as lines."""

    def __init__(self, path: Path, number: int, of: int, until: float, limit: float) -> None:
        self.path, self.number, self.of, self.until, self.limit = path, number, of, until, limit
        self.done = ended(path)
        self.reports: list[pytest.TestReport] = []
        self.session: pytest.Session | None = None

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    @pytest.hookimpl(trylast=True)  # after `-m` and `-k`
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        own = [item for item in items if zlib.crc32(item.nodeid.encode()) % self.of == self.number]
        append(self.path, collected=len(own), shard=self.number)
        left = [item for item in own if item.nodeid not in self.done]
        config.hook.pytest_deselected(items=[item for item in items if item not in left])
        items[:] = left

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and report.nodeid not in self.done and self.number == 0:
            append(self.path, ended=report.nodeid, outcome="failed", seconds=0.0, message=_said(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.reports = []
        append(self.path, started=nodeid, limit_s=self.limit)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        bad = next((r for r in self.reports if r.failed), None) or next((r for r in self.reports if r.skipped), None)
        seconds = round(sum(report.duration for report in self.reports), 3)
        more = {} if bad is None else {"message": _said(bad)}
        append(self.path, ended=nodeid, outcome=bad.outcome if bad else "passed", seconds=seconds, **more)
        if bad is not None and bad.failed and "torch" in sys.modules:
            from .device import leave, lost

            if sys.modules["torch"].cuda.is_initialized() and lost():
                print(f"{nodeid} failed, and the device takes no more calls: {_said(bad)}")
                leave()

        if time.time() > self.until and self.session is not None:
            self.session.shouldstop = "no time left"


def _said(report: Any) -> str:
    """Why it was skipped, or the end of the traceback."""
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")[:KEPT]
    return report.longreprtext[-KEPT:]


def main(argv: list[str]) -> int:
    """pytest's exit status; 0 also where no test is left for this process."""
    lines, number, of, until, limit, *options = argv
    status = pytest.main(options, plugins=[Told(Path(lines), int(number), int(of), float(until), float(limit))])
    return 0 if status == NO_TESTS else int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

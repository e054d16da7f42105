"""What pytest, compute-sanitizer and ncu say, as numbers, and the command lines that make them say it."""

import csv
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

OURS = "policy_loss|logprobs|partial_returns|scale_rows|partial_policy"  # names of kernels of csrc/cuda
DRAM = ("dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum")
UNITS = {
    "byte": 1,
    "Kbyte": 1e3,
    "Mbyte": 1e6,
    "Gbyte": 1e9,
    "Tbyte": 1e12,
    "ns": 1e-9,
    "us": 1e-6,
    "ms": 1e-3,
    "s": 1.0,
    "nsecond": 1e-9,
    "usecond": 1e-6,
    "msecond": 1e-3,
    "second": 1.0,
}
TEST = 30.0  # seconds for a test, the compilation of its Triton kernels included
Collected = tuple[dict[str, Any], str | None]  # what a part found, and why it failed


# ---- pytest ----------------------------------------------------------------------------------------------------------
def pytest_commands(
    root: Path, files: Sequence[str], processes: int, args: Sequence[str], limit: float = TEST
) -> list[list[str]]:
    """The tests of ``files``, spread over processes, ``limit`` seconds for each; from outside of the repository, so
    that its folders do not stand in the way of the package."""
    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", f"--rootdir={root}"]
    options += [f"-c={root / 'pyproject.toml'}", *args, *files]
    shard = [sys.executable, "-m", "bench.gpu.shard", "{lines}"]
    return [[*shard, str(n), str(processes), "{until}", str(limit), *options] for n in range(processes)]


def tested(record: dict[str, Any]) -> Collected:
    """Counts and the names of what failed, from what the processes wrote while they went."""
    kinds: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for case in record["cases"]:
        kinds[case["outcome"] if case["outcome"] in ("passed", "skipped") else "failed"].append(case)
    bad, all_ = kinds["failed"], sum({line["shard"]: line["collected"] for line in _collected(record)}.values())
    reasons = sorted({case["message"] for case in kinds["skipped"]})
    found = {
        "passed": len(kinds["passed"]), "failed": len(bad), "skipped": len(kinds["skipped"]),
        "not_run": max(0, all_ - len(record["cases"])), "why_skipped": reasons[:20],
        "failures": [{"test": case["name"], "message": case["message"][-300:]} for case in bad[:50]],
        "slowest": sorted(((case["seconds"], case["name"]) for case in record["cases"]), reverse=True)[:5],
    }  # fmt: skip
    said = [] if kinds["passed"] else ["no test passed" + (f": {reasons[0]}" if reasons else "")]
    said += [f"{len(bad)} of {all_} tests failed, first {bad[0]['name']}"] if bad else []
    said += [f"{found['not_run']} of {all_} tests not run"] if found["not_run"] else []
    return found, "; ".join(said) or None


def _collected(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [line for line in record["results"] if "collected" in line]


# ---- compute-sanitizer -----------------------------------------------------------------------------------------------
def sanitizer_command(tool: str, worker: list[str]) -> list[str]:
    """Exit status 9 where the tool has found something."""
    return ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *worker]


def sanitized(text: str) -> list[dict[str, Any]]:
    """The summaries: memcheck's errors, racecheck's hazards."""
    found: list[dict[str, Any]] = [
        {"tool": "memcheck", "errors": int(n)} for n in re.findall(r"ERROR SUMMARY: (\d+) error", text)
    ]
    hazards = re.findall(r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)", text)
    return found + [
        {"tool": "racecheck", "hazards": int(n), "errors": int(e), "warnings": int(w)} for n, e, w in hazards
    ]


# ---- ncu -------------------------------------------------------------------------------------------------------------
def ncu_command(worker: list[str]) -> list[str]:
    """Bytes of memory of our kernels. The clocks stay as they are; caches are emptied before each pass, as ncu does by
    itself."""
    metrics = ["--metrics", ",".join(DRAM), "--kernel-name", f"regex:{OURS}", "--kernel-name-base", "function"]
    return ["ncu", "--clock-control", "none", "--csv", "--page", "raw", *metrics, *worker]


def ncu_kernels(text: str) -> list[dict[str, Any]]:
    """Each profiled launch with its metrics in bytes and seconds. Both of ncu's layouts: a column a metric, or a line a
    metric."""
    lines = text.splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    names, *rows = csv.reader(line for line in lines[start:] if line.startswith('"'))
    if "Metric Name" in names:
        column = {name: n for n, name in enumerate(names)}
        by_id: dict[str, dict[str, Any]] = {}
        for row in rows:
            kernel = by_id.setdefault(row[column["ID"]], {"kernel": row[column["Kernel Name"]]})
            kernel[row[column["Metric Name"]]] = _number(row[column["Metric Value"]], row[column["Metric Unit"]])
        return list(by_id.values())
    units, *rows = rows
    places = {name: names.index(name) for name in DRAM if name in names}
    name_at = names.index("Kernel Name")
    return [{"kernel": row[name_at], **{n: _number(row[at], units[at]) for n, at in places.items()}} for row in rows]


def _number(value: str, unit: str) -> float:
    return float(value.replace(",", "")) * UNITS.get(unit, 1)

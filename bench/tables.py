"""The parts that result tables are made of."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from . import intervals
from .result_file import processor

Results = dict[str, dict[str, Any]]  # "policy_loss.cpu.amd-epyc-25-17" -> the file
Entry = dict[str, Any]
NOT_MEASURED = "not measured yet\n"
DEVICES = ("cpu", "cuda")


def of(results: Results, op: str, devices: Sequence[str] = DEVICES) -> list[tuple[str, dict[str, Any]]]:
    """The files of an op, each with where it was measured: the processor that its name tells, else the device."""
    found = []
    for name in sorted(results):
        what, device, place = (*name.split(".", 2), "", "")[:3]
        if what == op and device in devices:
            found.append((processor(results[name]["machine_info"]) if place else device, results[name]))
    return found


# ---- one number ------------------------------------------------------------------------------------------------------
def duration(seconds: float) -> str:
    """Three digits with their unit."""
    value, unit = (seconds * 1e6, "µs") if seconds < 1e-3 else (seconds * 1e3, "ms") if seconds < 10 else (seconds, "s")
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}" if value < 10 else f"{value:.1f} {unit}"


def memory(info: dict[str, Any]) -> str:
    peak = info.get("peak_extra_bytes")
    return "" if peak is None else f"{peak / 2**20:,.0f} MiB"


def share(info: dict[str, Any]) -> str:
    return f"{info['share_of_ceiling']:.0%} of {info['ceiling']}" if "share_of_ceiling" in info else ""


def error(info: dict[str, Any]) -> str:
    return (
        "" if not info.get("error") else f"{max(info['error'].values()):.1e}" + ("" if info["correct"] else " (wrong)")
    )


def host(info: dict[str, Any]) -> str:
    """What a call costs the host of a GPU; where the GPU waited for it, the median is not the GPU's time alone."""
    known = duration(info["host_seconds"]) if "host_seconds" in info else ""
    return ", ".join(filter(None, (known, "the GPU waits" if info.get("host_bound") else "")))


def graph(info: dict[str, Any]) -> str:
    """What a CUDA graph of the call takes, and its share of the ceiling's."""
    if "graph_seconds" not in info:
        return info.get("not_captured", "")
    of_ceiling = f" ({info['graph_share_of_ceiling']:.0%})" if "graph_share_of_ceiling" in info else ""
    return duration(info["graph_seconds"]) + of_ceiling


def spread(stats: dict[str, Any]) -> str:
    return f"{duration(stats['p20'])} to {duration(stats['p80'])}"


def best_of_ours(entries: Iterable[Entry]) -> Entry | None:
    """The fastest of ours whose result was right in this run."""
    ours = [e for e in entries if e["extra_info"]["kind"] == "ours" and e["extra_info"].get("correct")]
    return min(ours, key=lambda e: e["stats"]["median"], default=None)


def speedup(entry: Entry, ours: Entry | None) -> str:
    """How many times our time a peer needs, and whether the rounds tell the two apart; nothing where either result was
    wrong."""
    info = entry["extra_info"]
    if ours is None or info["kind"] != "peer" or not info.get("correct"):
        return ""
    ratio = intervals.over(intervals.medians(entry), intervals.medians(ours))
    assert ratio is not None
    if intervals.interval(ratio) is None:
        return f"{ratio[0]:.2f} x (no interval)"
    return f"{ratio[0]:.2f} x" + (" (undecided)" if intervals.verdict(ratio, 1.0) is None else "")


def quotient(above: float | None, below: float | None) -> float | None:
    """None where either was not measured."""
    return None if above is None or not below or below < 0 else above / below


# ---- tables ----------------------------------------------------------------------------------------------------------
HEADINGS = (
    "",
    "median",
    "p20 to p80",
    "min",
    "rounds",
    "time / ours",
    "share of the ceiling",
    "peak extra memory",
    "error",
)
GPU_HEADINGS = ("as a CUDA graph", "host, a call")


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, numbers to the right."""
    head = list(headings)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def ordered(entries: list[Entry]) -> list[Entry]:
    rank = {"ceiling": 0, "ours": 1, "peer": 2}
    return sorted(entries, key=lambda e: (rank[e["extra_info"]["kind"]], e["stats"]["median"]))


def group_table(entries: list[Entry]) -> str:
    """Everybody who took part in one case."""
    ours = best_of_ours(entries)
    by_gpu = any("host_bound" in e["extra_info"] for e in entries)
    rows = []
    for entry in ordered(entries):
        info, stats = entry["extra_info"], entry["stats"]
        times = duration(stats["median"]), spread(stats), duration(stats["min"]), str(stats["rounds"])
        beside = (graph(info), host(info)) if by_gpu else ()
        rows.append((entry["param"], *times, speedup(entry, ours), share(info), memory(info), error(info), *beside))
    return table((*HEADINGS, *(GPU_HEADINGS if by_gpu else ())), rows)


def title(params: dict[str, Any]) -> str:
    names = {"partial_returns": ("dialogues", "turns")}.get(params["op"], ("N", "V"))
    parts = [f"{names[0]} {params['N']:,}", f"{names[1]} {params['V']:,}"] + (
        [f"D {params['D']:,}"] if params["D"] else []
    )
    parts += [f"{params['shape']} model"] if params.get("shape") else []
    parts += [params["variant"]] if params["variant"] else []
    parts += [params["dtype"]] if params["op"] != "partial_returns" else []
    parts += [f"{params['active']:.0%} of the rows active"] if params["active"] < 1 else []
    parts += [f"{params['zero']:.0%} of the turns with zero advantage"] if params["zero"] else []
    if params["device"] == "cpu":
        parts += [f"{params['threads']} thread{'s' * (params['threads'] > 1)}", f"{params['allocator']} allocator"]
    return ", ".join(parts)


def absent(device: str, file: dict[str, Any]) -> str:
    """Who did not take part, and why."""
    missing = sorted(file["ppg_fast"]["missing"].items())
    lines = "".join(f"- {name}: {reason}\n" for name, reason in missing)
    return f"\nDid not take part ({device}):\n\n{lines}" if missing else ""


def groups(file: dict[str, Any]) -> list[list[Entry]]:
    return [list(entries) for _, entries in groupby(file["benchmarks"], key=lambda e: e["group"])]


def by_case(files: Iterable[tuple[str, dict[str, Any]]]) -> list[tuple[str, list[Entry]]]:
    """The groups of several files with where they were measured, those of one case side by side."""
    cases: dict[str, list[tuple[str, list[Entry]]]] = {}
    for where, file in files:
        for entries in groups(file):
            cases.setdefault(entries[0]["group"], []).append((where, entries))
    return [pair for pairs in cases.values() for pair in pairs]

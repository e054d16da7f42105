"""GPU results as text: for the documents, and `python -m ppg_fast.bench.gpu.sections FILE` for the terminal."""

import sys
from pathlib import Path
from typing import Any

from .. import result_file
from ..tables import NOT_MEASURED, Results, duration, group_table, groups, table, title
from .bars import bars, lines, met

SUMMARY = "On a GPU, what was asked for and what `make gpu` measured, as shares of ceilings of the same run"


def merged(results: Results) -> dict[str, Any] | None:
    """All GPU runs as one: each part from the newest run in which it ran, so that parts can be measured one at a
    time."""
    files = sorted(
        (f for name, f in results.items() if name.startswith("gpu") and name.endswith(".cuda")),
        key=lambda f: f["datetime"],
    )
    if not files:
        return None
    one: dict[str, Any] = {"parts": {}, "benchmarks": [], "missing": {}}
    for file in files:
        for name, part in file["parts"].items():
            if part["status"] == "missing" and name in one["parts"]:
                continue
            one["parts"][name] = {**part, "commit": file["commit_info"]["id"][:12], "datetime": file["datetime"]}
            one["benchmarks"] = [e for e in one["benchmarks"] if e["part"] != name] + [
                e for e in file["benchmarks"] if e["part"] == name
            ]
        one["missing"] |= file["ppg_fast"]["missing"]
    return one


# ---- sections --------------------------------------------------------------------------------------------------------
def summary_section(results: Results) -> str:
    """For the README: what was asked for and what was measured; nothing before anything was."""
    file = merged(results)
    return "" if file is None else f"{SUMMARY}:\n\n{_bars(file)}"


def gpu_section(results: Results) -> str:
    """Everything that `make gpu` found."""
    file = merged(results)
    if file is None:
        return NOT_MEASURED
    makers = {
        "Parts": _parts, "Bars": _bars, "Launches and syncs": _counts, "Bytes of memory": _dram,
        "The head's chunks": _chunks,
        "Whole training steps": _steps, "Plans of the fused kernel": _plans, "Cases": _cases, "Not measured": _missing,
    }  # fmt: skip
    return "\n".join(f"### {name}\n\n{text}" for name, make in makers.items() if (text := make(file)))


def _parts(file: dict[str, Any]) -> str:
    rows = []
    for name, part in file["parts"].items():
        said = part.get("reason", f"{part['passed']} passed, {part['skipped']} skipped" if "skipped" in part else "")
        about, took = (f"{part[name]:.0f} s" if name in part else "" for name in ("estimate_s", "seconds"))
        rows.append((name, part["status"], about, took, part["commit"], part["datetime"], said))
    return table(("part", "", "estimated", "took", "commit", "at", ""), rows)


def _bars(file: dict[str, Any]) -> str:
    rows = []
    for bar in bars(file):
        what, relation, limit, measured, percent = bar
        show = "{:.0%}" if percent else "{:.0f}" if what.endswith(("launches", "syncs")) else "{:.2f}"
        rows.append(
            (what, f"{relation} {show.format(limit)}", "" if measured is None else show.format(measured), met(bar))
        )
    return table(("", "bar", "measured", ""), rows)


def _counts(file: dict[str, Any]) -> str:
    names = ("launches", "launches_with_backward")
    counted = [line for line in lines(file, "counts") if "launches" in line]
    rows = [(line["path"], *(str(len(line.get(name, ()))) for name in names), str(line["syncs"])) for line in counted]
    return table(("", "launches forward", "with the backward pass", "syncs"), rows) if rows else ""


def _dram(file: dict[str, Any]) -> str:
    rows = []
    for line in lines(file, "dram"):
        if "over_least" in line:
            least, moved = (line["read"] + line["write"]) / 1e9, line["bytes"] / 1e9
            rows.append(
                (f"`{line['op']}`", f"{line['V']:,}", f"{least:.2f} GB", f"{moved:.2f} GB", f"{line['over_least']:.3f}")
            )
    return table(("N 8,192, bfloat16", "V", "least", "moved", "moved / least"), rows) if rows else ""


def _chunks(file: dict[str, Any]) -> str:
    rows = [
        (f"{line['chunk_rows']:,}", duration(line["stats"]["median"]), f"{line['share_of_bare_gemms']:.0%}")
        for line in lines(file, "bench")
        if "chunk_rows" in line
    ]
    heads = ("rows of a chunk, N 8,192, V 128,256, D 4,096", "median", "share of three bare GEMMs")
    return table(heads, rows) if rows else ""


def _steps(file: dict[str, Any]) -> str:
    rows = []
    for line in lines(file, "steps"):
        if "fits" not in line:
            continue
        size = f"{line['model']}, {line['tokens']:,} tokens" + (", checkpoints on the host" if line["offload"] else "")
        if not line["fits"]:
            rows.append((size, line["provider"], "does not fit", "", "", ""))
            continue
        speed = (
            duration(line["seconds"]),
            f"{line['tokens'] / line['seconds']:,.0f}",
            f"{line['loss_seconds'] / line['seconds']:.0%}",
        )
        rows.append((size, line["provider"], *speed, f"{(line['peak_bytes'] or 0) / 2**30:.1f} GiB"))
    return table(("", "head and loss", "step", "tokens/s", "of it head and loss", "peak memory"), rows) if rows else ""


def _plans(file: dict[str, Any]) -> str:
    rows = []
    for line in lines(file, "plans"):
        plan = line["plan"]
        chosen = {-1: "as chosen", 0: f"two passes, {plan['threads']} threads"}
        name = chosen.get(
            plan["cluster"], f"cluster {plan['cluster']}, {plan['threads']} threads, {plan['slots']} slots"
        )
        shown = (
            (f"{line['ms']:.3f} ms", f"{line['share_of_copy']:.0%}", f"{line['difference']:.1e}")
            if line["launched"]
            else ("does not launch", "", "")
        )
        rows.append((f"{line['V']:,}", f"{line['full']}%", name, *shown))
    return (
        table(("V", "rows with a gradient", "plan", "median", "share of a copy", "log-probs differ by"), rows)
        if rows
        else ""
    )


def _cases(file: dict[str, Any]) -> str:
    text = ""
    for entries in groups({"benchmarks": sorted(file["benchmarks"], key=lambda e: e["group"])}):
        text += f"\n**`{entries[0]['params']['op']}`: {title(entries[0]['params'])}**\n\n{group_table(entries)}"
        text += _states(entries[0]["extra_info"])
    return text.lstrip("\n")


def _states(info: dict[str, Any]) -> str:
    """Clocks and power before and after the rounds of a case."""
    states = [(when, info[f"gpu_{when}"]) for when in ("before", "after") if f"gpu_{when}" in info]
    return "\nThe GPU " + "; ".join(f"{when}: {_state(state)}" for when, state in states) + ".\n" if states else ""


def _state(state: dict[str, Any]) -> str:
    units = {"sm_mhz": "MHz", "memory_mhz": "MHz of memory", "watts": "W", "celsius": "°C"}
    said = [f"{state[name]:,.0f} {unit}" for name, unit in units.items() if name in state]
    said += [f"slowed by {' and '.join(state['slowed_by'])}"] if state.get("slowed_by") else []
    return ", ".join(said + [f"no {name} ({why})" for name, why in state.get("missing", {}).items()])


def _missing(file: dict[str, Any]) -> str:
    return "".join(f"- {name}: {reason}\n" for name, reason in sorted(file["missing"].items()))


if __name__ == "__main__":
    print(gpu_section({"gpu.cuda": result_file.read(Path(sys.argv[1]))}))

"""The loss from hidden states in tables: what rows that do not count cost, and what each idea takes off."""

from typing import Any

from .tables import NOT_MEASURED, Entry, Results, duration, of, ordered, table

KEY = ("N", "V", "D", "dtype", "active", "zero", "provider")
EAGER, PICKED = "eager PyTorch", "eager PyTorch, caller compacts"
FOUR, KEPT = "{}, log-probs (four GEMMs)", "{}, skip_zero_advantages=False"
IDEAS = (  # what, without it, with it; "{}" is ours
    ("compaction: the rows that count are picked first (eager PyTorch)", EAGER, PICKED),
    ("chunks, one fused row kernel, three GEMMs (beside eager PyTorch on the same rows)", PICKED, "{}"),
    ("the gradient in the forward pass: three GEMMs for four", FOUR, "{}"),
    ("rows of zero advantage go through the first GEMM alone", "all advantages", KEPT),
    ("rows of zero advantage are skipped (`skip_zero_advantages`)", KEPT, "{}"),
)


def active_section(results: Results) -> str:
    """Time against the share of rows that count, one line a provider."""
    text = ""
    for device, file in of(results, "linear"):

        def size(entry: Entry) -> tuple[Any, ...]:
            return tuple(entry["params"][name] for name in ("N", "V", "D", "dtype", "threads"))

        for shape in dict.fromkeys(map(size, file["benchmarks"])):
            entries = [e for e in file["benchmarks"] if size(e) == shape]
            columns = list(dict.fromkeys((e["params"]["active"], e["params"]["zero"]) for e in entries))
            if len(columns) < 2:
                continue
            cell = {(e["param"], e["params"]["active"], e["params"]["zero"]): e for e in ordered(entries)}
            heads = [f"{active:.0%} active" + (f", {zero:.0%} zero" if zero else "") for active, zero in columns]
            rows = [
                [name, *(_right(cell.get((name, *column))) for column in columns)]
                for name in dict.fromkeys(name for name, *_ in cell)
            ]
            N, V, D, dtype, threads = shape
            text += (
                f"\n**N {N:,}, V {V:,}, D {D:,}, {dtype}** ({device}, {threads} threads; "
                f"medians)\n\n{table(['', *heads], rows)}"
            )
    return text.lstrip("\n") or NOT_MEASURED


def _right(entry: Entry | None) -> str:
    if entry is None:
        return ""
    return duration(entry["stats"]["median"]) + ("" if entry["extra_info"].get("correct", True) else " (wrong)")


def contributions_section(results: Results) -> str:
    """The same work with and without each idea, where both were measured and right."""
    text = ""
    for device, file in of(results, "linear"):
        right = [e for e in file["benchmarks"] if e["extra_info"].get("correct", True)]
        seconds = {tuple(e["params"][name] for name in KEY): e["stats"]["median"] for e in right}
        rows = []
        for *case, zero, provider in seconds:
            if provider not in ("ppg_fast cpu", "ppg_fast cuda", "ppg_fast triton"):
                continue
            for what, without, with_it in IDEAS if zero else IDEAS[:3]:
                before = (
                    (*case, 0.0, provider)
                    if without == "all advantages"
                    else (*case, zero, _named(without, provider, case[-1]))
                )
                pair = seconds.get(before), seconds.get((*case, zero, _named(with_it, provider, case[-1])))
                if None not in pair and pair[0] != pair[1] and not (zero and without in (PICKED, FOUR)):
                    N, V, _, dtype, active = case
                    rows.append(
                        (what, _case(N, V, dtype, active, zero), *map(duration, pair), f"{pair[0] / pair[1]:.2f} x")
                    )
        rows.sort(key=lambda row: [idea[0] for idea in IDEAS].index(row[0]))
        text += table((device, "case", "without", "with", "without / with"), rows) if rows else ""
    return text or NOT_MEASURED


def _named(name: str, ours: str, active: float) -> str:
    return EAGER if name == PICKED and active == 1 else name.format(ours)


def _case(N: int, V: int, dtype: str, active: float, zero: float) -> str:
    return f"N {N:,}, V {V:,}, {dtype}, {active:.0%} active" + (f", {zero:.0%} of the turns zero" if zero else "")

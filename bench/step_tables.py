"""The tables of whole steps: training steps with the loss swapped, whole trainers, other trainers with our head."""

from collections.abc import Callable
from typing import Any

from .tables import (
    NOT_MEASURED,
    Entry,
    Results,
    absent,
    best_of_ours,
    by_case,
    duration,
    error,
    memory,
    of,
    ordered,
    speedup,
    table,
    title,
)  # fmt: skip


def steps_section(results: Results, op: str) -> str:
    """Every case of ``op``, and who did not take part."""
    files = of(results, op)
    text = "".join(step_table(where, entries) for where, entries in by_case(files))
    text += "".join(absent(where, file) for where, file in files)
    return text.lstrip("\n") or NOT_MEASURED


def longest(info: dict[str, Any]) -> str:
    """Tokens, and whether they were measured or foreseen from the peaks of shorter dialogues."""
    found = info.get("longest")
    return "" if not found else f"{found['tokens']:,}" + ("" if found["measured"] else " (foreseen)")


def step_table(where: str, entries: list[Entry]) -> str:
    """Everybody who took part in one case; what was not measured there has no column."""
    first, ours = entries[0], best_of_ours(entries)
    info, hosts, whole = first["extra_info"], first["params"]["op"] == "hosts", bool(first["params"].get("shape"))
    budget = next((b for e in entries if (b := e["extra_info"].get("memory_budget_bytes"))), None)
    fits = f"longest that fits {budget / 2**20:,.0f} MiB" if budget else ""
    columns = {
        "forward, loss, backward" if hosts else "step": lambda e: duration(e["stats"]["median"]),
        "tokens/s": lambda e: f"{e['extra_info']['tokens_per_second']:,.0f}",
        "" if hosts or whole else "of it head and loss": lambda e: f"{e['extra_info']['loss_share']:.0%}",
        "" if hosts else "time / ours": lambda e: speedup(e, ours),
        "peak extra memory": lambda e: memory(e["extra_info"]),
        fits: lambda e: longest(e["extra_info"]),
        "error": lambda e: error(e["extra_info"]),
    }
    columns.pop("", None)
    lines = sorted(entries, key=lambda e: e["param"]) if hosts else ordered(entries)
    text = f"\n**{title(first['params'])}** ({where})" + (", whole trainers: one dialogue of " if whole else ": ")
    text += f"{info['tokens']:,} tokens, {info['active_tokens']:,} " + (
        "with a label" if hosts else "of them the policy's"
    )
    text += "\n\n" + table(("", *columns), [(e["param"], *(cell(e) for cell in columns.values())) for e in lines])
    return text + "".join(_parts_table(what, lines) for what in PARTS if all("parts" in e["extra_info"] for e in lines))


PARTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "seconds": ("time inside operators", duration),
    "kept_bytes": ("kept for the backward pass", lambda size: f"{size / 2**20:,.0f} MiB"),
}


def _parts_table(what: str, entries: list[Entry]) -> str:
    """Of everybody, the parts in the order of the first one's size, and their sum."""
    title, written = PARTS[what]
    found = [e["extra_info"]["parts"][what] for e in entries]
    names = list(dict.fromkeys(name for own in found for name in own))
    rows = [(name, *(written(own.get(name, 0.0)) for own in found)) for name in names]
    rows.append(("all", *(written(sum(own.values())) for own in found)))
    return "\n" + table((title, *(e["param"] for e in entries)), rows)

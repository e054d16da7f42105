"""The table of whole trainers: one step, tokens/s, peak of memory, and the longest dialogue that fits into a budget."""

from typing import Any

from .tables import Entry, best_of_ours, duration, error, memory, ordered, speedup, table, title


def longest(info: dict[str, Any]) -> str:
    """Tokens, and whether they were measured or foreseen from the peaks of shorter dialogues."""
    found = info.get("longest")
    return "" if not found else f"{found['tokens']:,}" + ("" if found["measured"] else " (foreseen)")


def whole_step_table(device: str, entries: list[Entry]) -> str:
    """Our trainer beside the others on one dialogue."""
    some, ours = entries[0]["extra_info"], best_of_ours(entries)
    text = (
        f"\n**{title(entries[0]['params'])}** ({device}), whole trainers: one dialogue of {some['tokens']:,} tokens, "
    )
    text += f"{some['active_tokens']:,} of them the policy's\n\n"
    budget = next(
        (e["extra_info"]["memory_budget_bytes"] for e in entries if "memory_budget_bytes" in e["extra_info"]), None
    )
    fits = [f"longest that fits {budget / 2**20:,.0f} MiB"] if budget else []
    rows = []
    for entry in ordered(entries):
        info = entry["extra_info"]
        cells = [
            duration(entry["stats"]["median"]),
            f"{info['tokens_per_second']:,.0f}",
            speedup(entry, ours),
            memory(info),
        ]
        rows.append((entry["param"], *cells, *([longest(info)] if fits else []), error(info)))
    return text + table(("", "step", "tokens/s", "time / ours", "peak extra memory", *fits, "error"), rows)

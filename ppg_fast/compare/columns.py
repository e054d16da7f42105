"""Tables of a comparison as text: columns are defined here, once for the page, the terminal and the documents."""

from typing import Any, NamedTuple

SCORES = {
    "per_turn": "weighted per turn",
    "per_dialogue": "weighted per dialogue",
    "plain": "plain",
    "contrast": "paid minus unpaid",
}


class Table(NamedTuple):
    """A row's first text is its name."""

    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]


def class_table(p: dict[str, Any]) -> Table:
    """The classes on one problem: returns, dialogues to a level, gradients at the start."""
    heads = ("", "final return", "mean return", "dialogues to level (seeds)")
    heads += ("variance", "bias", "cosine", "alignment")
    rows = []
    for name, c in p["classes"].items():
        g = (p["gradient"] or {}).get(name, {})
        level = "not reached" if c["level_samples"] is None else f"{c['level_samples']:,.0f}"
        reached = f"{level} ({c['level_reached']}/{len(c['seeds'])})"
        measured = (_number(g.get(key)) for key in ("cosine", "alignment"))
        row = name, _mean_std(c["final"], 2), _mean_std(c["area"], 2), reached, _number(g.get("variance")), _bias(g)
        rows.append((*row, *measured))
    return Table(heads, rows)


def across_table(entry: dict[str, Any]) -> Table:
    """The classes on many problems together, the largest mean share first."""
    rows = []
    for name, c in sorted(entry["classes"].items(), key=lambda item: -item[1]["mean"]):
        paired = c["minus_full"]
        versus = f"{paired['mean']:+.1%} ± {paired['error']:.1%}" if paired else ""
        shares = f"{c['mean']:.1%}", f"{c['worst']:.1%}", c["worst_problem"], f"{c['behind_best']:.1%}"
        rows.append((name, *shares, versus, least(c)))
    heads = ("class", "mean share", "worst share", "on", "behind the best", "minus full", "least")
    known = len(heads) if any(row[-1] for row in rows) else len(heads) - 1  # a file of an older version has none
    return Table(heads[:known], [row[:known] for row in rows])


def least(c: dict[str, Any]) -> str:
    """Where a class is furthest below full planning, or least above it."""
    found = c.get("least_minus_full")
    return f"{found['mean']:+.1%} ± {found['error']:.1%}, {found['problem']}" if found else ""


def share_table(entry: dict[str, Any], problems: list[dict[str, Any]]) -> Table:
    """The share of every class on each drawn problem, and what the problem is like."""
    about = {
        p["problem"]: f"{p['problem']} ({p['why'].removeprefix('drawn: ')}, {p['policy_class']})" for p in problems
    }
    shares = zip(*(c["each"] for c in entry["classes"].values()), strict=True)
    rows = [
        (f"{n} ({about[n]})", *(f"{x:.0%}" for x in each)) for n, each in zip(entry["problems"], shares, strict=True)
    ]
    return Table(("", *entry["classes"]), rows)


def credit_table(log: dict[str, Any]) -> Table:
    """What each class credits of logged dialogues."""
    turns, rows = log["credits"]["shown"], []
    for name, c in log["credits"]["classes"].items():
        by_turn = (_number(c["by_turn"][t - 1], 2) for t in turns)
        rows.append((name, f"{c['credited']:.0%}", f"{c['effective']:.0%}", *by_turn))
    return Table(("", "turns credited", "effective share", *(f"turn {t}" for t in turns)), rows)


def score_table(log: dict[str, Any]) -> Table:
    """Held-out scores after training with each class."""
    rows = [(name, *(_mean_std(c["final"][key], 3) for key in SCORES)) for name, c in log["classes"].items()]
    return Table(("", *SCORES.values()), rows)


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _mean_std(over_seeds: dict[str, Any], digits: int) -> str:
    return f"{over_seeds['mean']:.{digits}f} ± {over_seeds['std']:.{digits}f}"


def _bias(g: dict[str, Any]) -> str:
    """An exact bias, or the interval of a measured one."""
    if not g.get("bias_high"):  # exact, or the measure of all others
        return _number(g.get("bias"))
    return f"{g['bias_low']:.1f} to {g['bias_high']:.1f}" if g["bias_low"] else f"below {g['bias_high']:.1f}"

"""Many problems together: what a policy class is worth to somebody who does not know which problem it will be."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ppg_fast.compare.summary import difference
from ppg_fast.rollouts.problems import DRAWN

READING = """Share: mean return over training, 0 at the start and 1 at the best return there is. Behind the best:
mean distance to the best fixed class of each problem, picked after the fact, which favours it. Auto minus it:
paired, problem by problem, with its standard error."""


def across(problems: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each version, made and drawn problems apart, where there are at least two of them.

    ``each``: share of a problem, its mean return over training with 0 at the start and 1 at the best return there is.
    ``behind_best``: mean distance to the best fixed class of each problem, picked after the fact. ``auto_minus``: mean
    of auto's share minus that of the class, problem by problem, with its standard error.
    """
    kinds: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for p in problems:
        if p["classes"]:
            kinds.setdefault((p["version"], p["problem"].startswith(DRAWN)), []).append(p)
    return [_of_kind(version, drawn, mine) for (version, drawn), mine in kinds.items() if len(mine) > 1]


def _of_kind(version: str, drawn: bool, problems: list[dict[str, Any]]) -> dict[str, Any]:
    names = [c for c in problems[0]["classes"] if all(c in p["classes"] for p in problems)]
    shares = {c: np.array([_share(p, p["classes"][c]) for p in problems]) for c in names}
    fixed = [v for c, v in shares.items() if c != "auto"]
    classes = {}
    for c, v in shares.items():
        worst = int(v.argmin())
        row = {
            "mean": float(v.mean()),
            "worst": float(v[worst]),
            "worst_problem": problems[worst]["problem"],
            "each": v.tolist(),
        }
        row["behind_best"] = float((np.max(fixed, 0) - v).mean()) if fixed else 0.0
        row["auto_minus"] = difference(shares["auto"], v) if "auto" in shares and c != "auto" else None
        classes[c] = row
    seeds = sorted({len(c["seeds"]) for p in problems for c in p["classes"].values()})
    return {
        "version": version,
        "drawn": drawn,
        "problems": [p["problem"] for p in problems],
        "seeds": seeds,
        "classes": classes,
    }


def _share(p: dict[str, Any], c: dict[str, Any]) -> float:
    start = c["mean"][0]
    return (c["area"]["mean"] - start) / (p["best_return"] - start)


def title(entry: dict[str, Any]) -> str:
    """What an entry is about."""
    kind, seeds = "drawn" if entry["drawn"] else "made", " or ".join(map(str, entry["seeds"]))
    return f"{len(entry['problems'])} {kind} problems, {entry['version']}, seeds: {seeds}"

"""Many problems together: what a policy class is worth to somebody who does not know which problem it will be."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ppg_fast.compare.summary import difference
from ppg_fast.rollouts.problems import DRAWN

READING = """Share: mean return over training, 0 at the start and 1 at the best return there is. Behind the best:
mean distance to the best of each problem, picked after the fact, which favours it. Minus full: paired with full
planning, seed by seed where problems were made, problem by problem where they were drawn, with its standard error.
Least: on the problem where that is least, seed by seed."""


def across(problems: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry for each version, made and drawn problems apart, where there are at least two of them.

    ``each``: share of a problem, its mean return over training with 0 at the start and 1 at the best return there is.
    ``behind_best``: mean distance to the best of each problem, picked after the fact. ``minus_full``: mean share minus
    that of full planning, with its standard error: over seeds where problems were made, which are the ones there are,
    over problems where they were drawn, which stand for others. ``least_minus_full``: of the problem where that is
    least, picked after the fact, over seeds.
    """
    kinds: dict[tuple[str, bool], list[dict[str, Any]]] = {}
    for p in problems:
        if p["classes"]:
            kinds.setdefault((p["version"], p["problem"].startswith(DRAWN)), []).append(p)
    return [_of_kind(version, drawn, mine) for (version, drawn), mine in kinds.items() if len(mine) > 1]


def _of_kind(version: str, drawn: bool, problems: list[dict[str, Any]]) -> dict[str, Any]:
    names = [c for c in problems[0]["classes"] if all(c in p["classes"] for p in problems)]
    shares = {
        c: np.array([_share(p, p["classes"][c], p["classes"][c]["area"]["mean"]) for p in problems]) for c in names
    }
    by_seed = {c: _by_seed(problems, c) for c in names}
    classes = {}
    for c, v in shares.items():
        worst = int(v.argmin())
        row = {
            "mean": float(v.mean()),
            "worst": float(v[worst]),
            "worst_problem": problems[worst]["problem"],
            "each": v.tolist(),
        }
        row["behind_best"] = float((np.max(list(shares.values()), 0) - v).mean())
        one, full = (v, shares.get("full")) if drawn else (by_seed[c], by_seed.get("full"))
        row["minus_full"] = None if c == "full" or one is None or full is None else difference(one, full)
        row["least_minus_full"] = None if c == "full" or "full" not in shares else _least(problems, c)
        classes[c] = row
    seeds = sorted({len(c["seeds"]) for p in problems for c in p["classes"].values()})
    return {
        "version": version,
        "drawn": drawn,
        "problems": [p["problem"] for p in problems],
        "seeds": seeds,
        "classes": classes,
    }


def _least(problems: list[dict[str, Any]], name: str) -> dict[str, Any] | None:
    """The share minus that of full planning on the problem where that is least; None where seeds differ."""
    found = []
    for p in problems:
        one, full = p["classes"][name], p["classes"]["full"]
        if one["seeds"] != full["seeds"]:
            return None
        each = (_share(p, c, np.array(c["area"]["each"])) for c in (one, full))
        found.append({**difference(*each), "problem": p["problem"]})
    return min(found, key=lambda row: row["mean"])


def _by_seed(problems: list[dict[str, Any]], name: str) -> np.ndarray | None:
    """The mean share over the problems, seed by seed; None where their seeds differ."""
    found = [p["classes"][name] for p in problems]
    if len({tuple(c["seeds"]) for c in found}) > 1:
        return None
    return np.mean([_share(p, c, np.array(c["area"]["each"])) for p, c in zip(problems, found, strict=True)], 0)


def _share(p: dict[str, Any], c: dict[str, Any], area: Any) -> Any:
    """Of mean returns over training, 0 as at the start and 1 the best there is."""
    start = c["mean"][0]
    return (area - start) / (p["best_return"] - start)


def title(entry: dict[str, Any]) -> str:
    """What an entry is about."""
    kind, seeds = "drawn" if entry["drawn"] else "made", " or ".join(map(str, entry["seeds"]))
    return f"{len(entry['problems'])} {kind} problems, {entry['version']}, seeds: {seeds}"

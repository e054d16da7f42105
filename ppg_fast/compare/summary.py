"""From results to the numbers of a report: means over seeds with bands, samples to a level, differences within seeds,
verdicts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ppg_fast.compare.study import BY, is_class
from ppg_fast.rollouts.problems import DRAWN, REVIEW, problem

LEVEL = 0.8  # of the way from the start to the best return
RESAMPLES = 2000
CLEAR = 2.0  # standard errors
BESIDE = ("learning_rate", "soft_optimum", "soft_optimum_of_log")  # of a tabular run, where it is told


def band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile bootstrap interval of the mean over the first axis (seeds); the same values, the same
    interval."""
    rng = np.random.default_rng(0)
    means = values[rng.integers(0, len(values), (RESAMPLES, len(values)))].mean(1)
    return np.percentile(means, 2.5, 0), np.percentile(means, 97.5, 0)


def samples_to(level: float, steps: Sequence[int], returns: Sequence[float], dialogues: int) -> float | None:
    """Dialogues until the return first reached ``level``, between two evaluations on the straight line; None if it
    never did."""
    for (s0, r0), (s1, r1) in zip(
        zip(steps, returns, strict=True), list(zip(steps, returns, strict=True))[1:], strict=False
    ):
        if r1 >= level:
            return dialogues * (s0 + (s1 - s0) * max(0.0, level - r0) / max(r1 - r0, 1e-12))
    return None


def over_seeds(values: np.ndarray) -> dict[str, Any]:
    """Mean and standard deviation of a number over seeds, and each of them."""
    std = float(values.std(ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(values.mean()), "std": std, "each": values.tolist()}


def of_class(runs: list[dict[str, Any]], best: float) -> dict[str, Any]:
    """One class over its seeds. ``area``: mean return over training, by trapezoids; ``drop``: the largest fall between
    two evaluations; ``level_samples``: median, if most got there; and what a tabular run may say beside its curve."""
    steps, curves = runs[0]["steps"], np.array([r["returns"] for r in runs])
    low, high = band(curves)
    start = float(curves[:, 0].mean())
    level = start + LEVEL * (best - start)
    reached = [samples_to(level, r["steps"], r["returns"], r["dialogues_per_step"]) for r in runs]
    times = sorted(x for x in reached if x is not None)
    widths = np.diff(steps)
    areas = (curves[:, 1:] + curves[:, :-1]) @ widths / (2 * widths.sum())
    return {
        "seeds": [r["seed"] for r in runs],
        "steps": steps,
        "mean": curves.mean(0).tolist(),
        "low": low.tolist(),
        "high": high.tolist(),
        "final": over_seeds(curves[:, -1]),
        "area": over_seeds(areas),
        "drop": over_seeds((-np.diff(curves)).max(1).clip(min=0)),
        "level": level,
        "level_reached": len(times),
        "level_samples": float(np.median(times)) if len(times) > len(runs) / 2 else None,
        **({"weights": np.array([r["weights"] for r in runs]).mean(0).tolist()} if "weights" in runs[0] else {}),
        "seconds": sum(r["seconds"] for r in runs),
        **{name: over_seeds(np.array([r[name] for r in runs])) for name in BESIDE if name in runs[0]},
    }


def difference(one: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Mean of one - other within seeds (or problems), and its standard error."""
    d = np.array(one) - np.array(other)
    return {"mean": float(d.mean()), "error": float(d.std(ddof=1) / len(d) ** 0.5) if len(d) > 1 else float("nan")}


def of_problem(
    name: str, version: str, runs: dict[str, list[dict[str, Any]]], gradient: dict[str, Any] | None
) -> dict[str, Any]:
    """All classes on one problem."""
    of = problem(name)
    classes = {c: of_class(r, of.best_return) for c, r in runs.items() if r}
    own = of.policy_class
    common = {tuple(c["seeds"]) for c in classes.values()}
    if own in classes and len(common) == 1:
        for c in classes.values():
            c["against_own"] = {key: difference(c[key]["each"], classes[own][key]["each"]) for key in ("final", "area")}
    facts = {"problem": name, "version": version, "policy_class": own, "why": of.why, "best_return": of.best_return}
    words = [] if name.startswith((DRAWN, REVIEW)) else verdict(own, classes)  # nobody made it for a class
    if any(BY in c for c in classes):
        words = of_losses(classes)
    return {**facts, "classes": classes, "gradient": gradient, "verdict": words}


def verdict(own: str, classes: dict[str, Any]) -> list[str]:
    """Sentences: whether the window that the problem was made for wins, by the mean return over training and by the
    last one; and auto."""
    if own not in classes or "against_own" not in classes[own] or len(classes) < 2:
        return [f"{own}, for which the problem was made, did not run with the same seeds as the others: no verdict."]
    sentences = []
    rivals = [c for c in classes if c != own and is_class(c)]
    for key, words in (("area", "mean return over training"), ("final", "last return")):
        if not rivals:
            break
        rival = max(rivals, key=lambda c: classes[c][key]["mean"])
        d = classes[rival]["against_own"][key]
        text = (
            f"{words}: {own} {classes[own][key]['mean']:.2f}, the best other class ({rival}) "
            f"{classes[rival][key]['mean']:.2f}"
        )
        text += f", {-d['mean']:+.2f} ± {d['error']:.2f} within seeds"
        clear = abs(d["mean"]) > CLEAR * d["error"]
        kind = ("as it should be" if d["mean"] < 0 else "NOT as it should be") if clear else "no clear difference"
        sentences.append(f"{kind}: {text}.")
    if "auto" in classes:
        sentences.append(_of_auto(classes, [*rivals, own]))
    return sentences


def of_losses(classes: dict[str, Any]) -> list[str]:
    """Sentences: the last return of each class by another loss beside that of its policy gradient, and how far either
    fell on the way."""
    sentences = []
    for arm, c in classes.items():
        plain = classes.get(arm.partition(BY)[0])
        if BY not in arm or plain is None or plain["seeds"] != c["seeds"]:
            continue
        d = difference(c["final"]["each"], plain["final"]["each"])
        clear = abs(d["mean"]) > CLEAR * d["error"]
        kind = ("above" if d["mean"] > 0 else "below") if clear else "no clear difference to"
        kind = kind if len(c["seeds"]) > 1 else "beside"
        falls = ", ".join(f"{max(of['drop']['each']):.2f}" for of in (c, plain))
        text = f"{arm}: last return {c['final']['mean']:.2f}, {kind} the policy gradient's {plain['final']['mean']:.2f}"
        sentences.append(f"{text}, {d['mean']:+.2f} ± {d['error']:.2f} within seeds; largest falls {falls}.")
    return sentences


def _of_auto(classes: dict[str, Any], fixed: list[str]) -> str:
    """Where auto stands among the fixed classes, and the weights of the lags that it ended with."""
    order = sorted(fixed, key=lambda c: -classes[c]["area"]["mean"])
    mine = classes["auto"]["area"]["mean"]
    ahead = [c for c in order if classes[c]["area"]["mean"] > mine]
    level = [c for c in order if classes[c]["area"]["each"] == classes["auto"]["area"]["each"]]
    weights = ", ".join(f"{weight:.2f}" for weight in classes["auto"]["weights"])
    place = (
        f"behind {', '.join(ahead)}"
        if ahead
        else f"the same runs as {level[0]}"
        if level
        else "before every fixed class"
    )
    return f"auto: mean return over training {mine:.2f}, {place}; mean weights of its lags at the end: {weights}."


def of_log(looked: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What the classes credit of logged dialogues (``looked``), and held-out scores while training with each."""
    classes = {}
    for name, found in runs.items():
        scores = {key: np.array([r["scores"][key] for r in found]) for key in found[0]["scores"]}
        classes[name] = {
            "steps": found[0]["steps"],
            "curves": {key: values.mean(0).tolist() for key, values in scores.items()},
            "final": {key: over_seeds(values[:, -1]) for key, values in scores.items()},
            "seeds": [r["seed"] for r in found],
        }
    credits = looked["credits"]
    turns = len(next(iter(credits["classes"].values()))["by_turn"])
    credits["shown"] = sorted({1, *(t for t in (2, 5, 10, 20, 40) if t < turns), turns})
    return {"warnings": looked["warnings"], "credits": credits, "classes": classes}

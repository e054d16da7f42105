"""How good a reward model is on labels that it was not trained on."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppg_fast.rewards.labels import Label
from ppg_fast.rewards.links import link_loss

Z = 1.959964  # of a 95 % interval
BINS = 5  # of a probability from 0.5 to 1


@dataclass(frozen=True)
class Judged:
    """A label with what the model says of its dialogues: rewards (T,) of each, and how many tokens they have."""

    label: Label
    rewards: tuple[Tensor, ...]
    tokens: tuple[int, ...]


def measure(kind: str, judged: Sequence[Judged], center: float) -> dict[str, Any]:
    """Loss; of pairs (without ties) and demonstrations accuracy with a 95 % interval and calibration; of scores and
    ratings the correlation with its interval; and the correlation of rewards with length."""
    if not judged:
        return {}
    losses = [float(link_loss(kind, j.rewards, j.label.target, center)) for j in judged]
    found: dict[str, Any] = {"count": len(judged), "loss": sum(losses) / len(losses)}
    if kind == "pairs":
        decided = [j for j in judged if j.label.target is not None]
        odds = [float(j.rewards[0].sum() - j.rewards[1].sum()) for j in decided]
        found |= _decisions(odds)
        longer = [float(j.tokens[0] - j.tokens[1]) for j in decided]
        # each pair both ways: which side is called chosen is no part of a length
        signed = ([*odds, *(-o for o in odds)], [*longer, *(-n for n in longer)])
    elif kind == "demonstrations":
        returns = [float(j.rewards[0].sum()) for j in judged]
        found |= _decisions([r * float(j.label.target) for r, j in zip(returns, judged, strict=True)])  # type: ignore[arg-type]
        signed = (returns, [float(j.tokens[0]) for j in judged])
    else:
        pairs = [pair for j in judged for pair in _told(kind, j)]
        said, target = ([p[i] for p in pairs] for i in (0, 1))
        r = correlation(said, target)
        found |= {"correlation": r, "correlation_interval": fisher(r, len(pairs))}
        signed = ([float(j.rewards[0].sum()) for j in judged], [float(j.tokens[0]) for j in judged])
    return {**found, "length_correlation": correlation(*signed)}


def _told(kind: str, judged: Judged) -> list[tuple[float, float]]:
    """What the model says and what was said, of each rated thing."""
    target = judged.label.target
    if kind == "scores":
        return [(float(judged.rewards[0].sum()), float(target))]  # type: ignore[arg-type]
    rows = zip(judged.rewards[0].tolist(), target, strict=True)  # type: ignore[arg-type]
    return [(said, y) for said, y in rows if y is not None]


def _decisions(odds: Sequence[float]) -> dict[str, Any]:
    """``odds``: log-odds of what was said. An even one is half right."""
    right = sum(1.0 if o > 0 else 0.5 if o == 0 else 0.0 for o in odds)
    accuracy = right / max(1, len(odds))
    sure = [1 / (1 + math.exp(-min(abs(o), 50.0))) for o in odds]
    hits = [1.0 if o > 0 else 0.5 if o == 0 else 0.0 for o in odds]
    bins: list[dict[str, float]] = []
    for b in range(BINS):
        inside = [i for i, p in enumerate(sure) if b == min(BINS - 1, int((p - 0.5) * 2 * BINS))]
        if inside:
            mean = lambda values, inside=inside: sum(values[i] for i in inside) / len(inside)  # noqa: E731
            bins.append({"confidence": mean(sure), "accuracy": mean(hits), "count": len(inside)})
    error = sum(b["count"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / max(1, len(odds))
    return {
        "accuracy": accuracy,
        "accuracy_interval": wilson(right, len(odds)),
        "calibration": bins,
        "calibration_error": error,
    }


def wilson(right: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927)."""
    if not count:
        return 0.0, 1.0
    share, z2 = right / count, Z * Z / count
    middle, half = share + z2 / 2, Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
    return max(0.0, (middle - half) / (1 + z2)), min(1.0, (middle + half) / (1 + z2))


def fisher(r: float, count: int) -> tuple[float, float]:
    """The 95 % interval of a correlation (Fisher 1921)."""
    if count < 4 or math.isnan(r):
        return -1.0, 1.0
    half = Z / math.sqrt(count - 3)
    bounded = max(-1 + 1e-9, min(1 - 1e-9, r))
    return math.tanh(math.atanh(bounded) - half), math.tanh(math.atanh(bounded) + half)


def correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Pearson's; NaN where either does not vary."""
    if len(one) < 2:
        return math.nan
    a, b = (torch.tensor(v, dtype=torch.float64) for v in (one, other))
    a, b = a - a.mean(), b - b.mean()
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm else math.nan


def lines(kind: str, found: dict[str, Any]) -> list[str]:
    """The report as text."""
    if not found:
        return ["nothing was held out, so nothing is known of it"]
    if "accuracy" in found:
        low, high = found["accuracy_interval"]
        text = [f"held-out accuracy {found['accuracy']:.3f} (95 %: {low:.3f} to {high:.3f}) of {found['count']} {kind}"]
        text.append(f"calibration: off by {found['calibration_error']:.3f}")
        text += [
            f"  says {b['confidence']:.2f}, is right {b['accuracy']:.2f} ({b['count']})" for b in found["calibration"]
        ]
    else:
        low, high = found["correlation_interval"]
        interval = f"(95 %: {low:.3f} to {high:.3f})"
        what = "rated dialogues" if kind == "ratings" else kind
        text = [f"held-out correlation {found['correlation']:.3f} {interval} with {found['count']} {what}"]
    return [*text, f"correlation of the reward with length: {found['length_correlation']:.3f}"]

"""Which rewards a turn moves, measured: the gradient that the rewards of each lag give, from scores and rewards of
rollouts alone.

With s_t the score of turn t (any vectors whose inner products are those of the scores) and A_(t,d) the reward of turn
t + d minus its mean over the other rollouts of the group, the gradient of lag d is g_d = E sum_t s_t A_(t,d): what the
turns' scores and the rewards d turns later have in common. It is 0 where no turn moves a reward d turns later. A policy
class that credits lags with weights w has the gradient sum_d w_d g_d, so their inner products tell everything: of two
different groups of rollouts, whose noise is independent, <mean of one, mean of the other> is unbiased for <g_d, g_d'>
(a U-statistic). Sums of vectors give all pairs at once, linear in the rollouts; errors are those of the jackknife over
groups.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from ppg_fast.functional import partial_returns, turn_advantages
from ppg_fast.policy_classes import FullPlanning, Greedy, LagWeights, Lookahead, PolicyClass
from ppg_fast.spec import require

CLEAR = 2.0  # standard errors of an interval
ALARMS = 0.05  # share of measurements without any signal in which some lag may be called clear
FEWEST = 8  # groups
BY_LAG = (Greedy, Lookahead, FullPlanning, LagWeights)


class LagSignals:
    """Takes rollouts in; of each group it keeps one vector a lag, and one for each of ``classes`` that is no weights of
    lags."""

    def __init__(self, classes: Sequence[PolicyClass] = ()) -> None:
        self.others = [c for c in classes if not isinstance(c, BY_LAG)]
        self.gradients: list[Tensor] = []  # of each group (C + T, m) float64
        self.squares: list[Tensor] = []  # the mean of its rollouts' own inner products (C + T, C + T) float64
        self.rollouts = self.turns = self.longest = 0

    def add(self, scores: Tensor, rewards: Tensor, turn_counts: Tensor, group_ids: Tensor) -> None:
        """Rollouts of whole groups: scores (R, T, m), rewards (R, T), turn_counts (R,), group_ids (R,)."""
        turns = rewards.shape[1]
        lags = [single_lag(d) for d in range(turns)]
        each = [partial_returns(rewards, c, turn_counts=turn_counts) for c in (*self.others, *lags)]
        credit = torch.stack([turn_advantages(r, group_ids, "leave_one_out", turn_counts) for r in each])
        for group in group_ids.unique():
            mine = group_ids == group
            gradients = torch.einsum("crt,rtm->rcm", credit[:, mine], scores[mine]).double()
            self.gradients.append(gradients.mean(0))
            self.squares.append(torch.einsum("rcm,rdm->cd", gradients, gradients) / len(gradients))
        self.rollouts += len(rewards)
        self.turns += int(turn_counts.sum())
        self.longest = max(self.longest, turns)

    def products(self) -> "Products":
        """Inner products of the gradients of the other classes and of all lags. ValueError for fewer than 8 groups."""
        groups, count = len(self.gradients), len(self.others) + self.longest
        require(groups >= FEWEST, f"signals must be measured on at least {FEWEST} groups of rollouts", groups)
        X = torch.stack([_padded(x, count, 0) for x in self.gradients])
        squares = torch.stack([_padded(q, count, count) for q in self.squares])
        total, own = X.sum(0), torch.einsum("pkm,plm->pkl", X, X)
        pairs, cross = total @ total.T - own.sum(0), torch.einsum("pkm,lm->pkl", X, total)
        without = (pairs - cross - cross.mT + 2 * own) / ((groups - 1) * (groups - 2))
        inner = torch.cat([(pairs / (groups * (groups - 1)))[None], without])
        means = torch.cat([squares.mean(0)[None], (squares.sum(0) - squares) / (groups - 1)])
        each = torch.einsum("pkm,qkm->kpq", X, X)
        each = each - torch.diag_embed(each.diagonal(dim1=1, dim2=2))
        spread = (2 * each.square().sum((1, 2))).sqrt()
        skewness = 8 * torch.einsum("kpq,kqr,krp->k", each, each, each) / spread.clamp(min=1e-300) ** 3
        by_chance = spread / (groups * (groups - 1))
        return Products(inner, means, by_chance, skewness, [str(c) for c in self.others], self.longest)


def _padded(values: Tensor, rows: int, columns: int) -> Tensor:
    """Zeros for the lags of longer dialogues than a group has."""
    right = max(0, columns - values.shape[1]) if columns else 0
    return torch.nn.functional.pad(values, (0, right, 0, rows - values.shape[0]))


def single_lag(d: int) -> LagWeights:
    """The class that credits a turn for the reward d turns later alone."""
    return LagWeights([0.0] * d + [1.0])


@dataclass(frozen=True)
class Estimate:
    """Numbers with their standard errors, both (n,) float64; NaN where there is none."""

    value: Tensor
    error: Tensor

    @classmethod
    def jackknife(cls, values: Tensor) -> "Estimate":
        """From (1 + P, n): of all groups, and with each left out."""
        without, P = values[1:], len(values) - 1
        return cls(values[0], ((P - 1) / P * (without - without.mean(0)).square().sum(0)).sqrt())

    def rows(self) -> list[dict[str, float | None]]:
        """As JSON has them, None for NaN."""
        pairs = zip(self.value.tolist(), self.error.tolist(), strict=True)
        names = ("value", "error")
        return [{n: x if math.isfinite(x) else None for n, x in zip(names, pair, strict=True)} for pair in pairs]


@dataclass(frozen=True)
class Products:
    """``inner`` (1 + P, K, K): <g, g'> of all P groups, then with each left out; ``squares`` likewise of one dialogue's
    own. ``by_chance`` (K,): the standard error of |g|^2 where g is 0, from the products of groups in pairs, and
    ``skewness`` (K,): its third moment over that cubed; both over random signs of the groups. K: the ``others``, then
    the ``lags``."""

    inner: Tensor
    squares: Tensor
    by_chance: Tensor
    skewness: Tensor
    others: list[str]
    lags: int

    def weights(self, of: PolicyClass) -> Tensor:
        """(K,): the gradient of a class as a sum of those that were measured. ValueError for one that was not."""
        found = torch.zeros(len(self.others) + self.lags, dtype=torch.float64)
        if str(of) in self.others:
            found[self.others.index(str(of))] = 1.0
            return found
        require(isinstance(of, BY_LAG), "a class that is no weights of lags must be measured", str(of))
        own = of.weights if isinstance(of, LagWeights) else [1.0] * min(of.lookahead, self.lags)
        count = min(len(own), self.lags)
        found[len(self.others) :][:count] = torch.tensor(own[:count], dtype=torch.float64)
        return found

    def compare(self, classes: Sequence[PolicyClass], dialogues: int) -> dict[str, Estimate]:
        """Of each class: ``signal`` |g|^2; ``along`` <g, g_full>, and ``share``, that over |g_full|^2; ``bias`` |g_full
        - g|^2 over |g_full|^2; ``cosine`` with g_full; ``alignment``, the expected cosine of the mean over
        ``dialogues`` with g_full, to first order."""
        Z = torch.stack([self.weights(c) for c in (*classes, FullPlanning())])
        inner, squares = Z @ self.inner @ Z.T, Z @ self.squares @ Z.T
        signal, along, truth = inner.diagonal(dim1=1, dim2=2), inner[..., -1], inner[:, -1, -1:]
        noise = (squares.diagonal(dim1=1, dim2=2) - signal).clamp(min=0)
        truth = torch.where(truth > 0, truth, torch.nan)
        found = {
            "signal": signal,
            "along": along,
            "noise": noise,
            "share": along / truth,
            "bias": (signal - 2 * along + truth) / truth,
            "cosine": along / (torch.where(signal > 0, signal, torch.nan) * truth).sqrt(),
            "alignment": along / (truth * (signal.clamp(min=0) + noise / dialogues)).sqrt(),
        }
        return {name: Estimate.jackknife(values[:, :-1]) for name, values in found.items()}


def threshold(skewness: Tensor, lags: int) -> Tensor:
    """Standard errors by chance beyond which a lag is clear, (K,): two, and more where so many ``lags`` are looked at
    that one would often lie beyond by chance (Bonferroni), or where what chance gives is skewed.

    The products of groups that point in many directions add up to a normal number; of groups that all point one way or
    against it, to the square of one. In between lies chi-square of n degrees of freedom, centred and scaled, n by the
    skewness, sqrt(8 / n); its quantile by Wilson and Hilferty (1931).
    """
    z = NormalDist().inv_cdf(1 - ALARMS / lags)
    n = (8 / skewness.clamp(min=1e-3).square()).clamp(min=1.0)
    quantile = n * (1 - 2 / (9 * n) + z * (2 / (9 * n)).sqrt()) ** 3
    return ((quantile - n) / (2 * n).sqrt()).clamp(min=CLEAR)


def measure(signals: LagSignals, classes: Sequence[PolicyClass], dialogues: int) -> dict[str, Any]:
    """Lags, the window that they predict and the classes beside it, as a report has them. ``dialogues``: of a training
    step.

    The window ends with the last lag whose signal lies beyond its ``least``, `threshold` standard errors of one that is
    there by chance; without one it is full planning: what was not seen is not known to be absent, and full planning has
    no bias. Chosen on the same rollouts that it is judged on, which favours it.
    """
    products = signals.products()
    lags = products.compare([single_lag(d) for d in range(products.lags)], dialogues)
    by_chance, skewness = (x[len(products.others) :] for x in (products.by_chance, products.skewness))
    least = threshold(skewness, products.lags) * by_chance
    clear = (lags["signal"].value > least).tolist()
    last = max((d for d, yes in enumerate(clear) if yes), default=None)
    window = FullPlanning() if last is None or last + 1 >= products.lags else Lookahead(last + 1)
    window = Greedy() if last == 0 and products.lags > 1 else window
    names: dict[str, PolicyClass] = {str(c): c for c in (*classes, window, FullPlanning())}
    weights = shrunk_weights(lags, clear, dialogues)
    if weights is not None:
        names[str(weights)] = weights
    found = products.compare(list(names.values()), dialogues)
    return {
        "rollouts": signals.rollouts,
        "groups": len(signals.gradients),
        "turns": signals.turns,
        "dialogues_per_step": dialogues,
        "lags": [
            {"lag": d, "clear": clear[d], "by_chance": float(by_chance[d]), "least": float(least[d]), **row}
            for d, row in enumerate(_by_row(lags))
        ],
        "last_clear_lag": last,
        "window": str(window),
        "weights": None if weights is None else str(weights),
        "classes": dict(zip(names, _by_row(found), strict=True)),
    }


def shrunk_weights(lags: dict[str, Estimate], clear: Sequence[bool], dialogues: int) -> LagWeights | None:
    """w_d = signal_d / (signal_d + noise_d / dialogues), the largest 1, in hundredths: what a lag's gradient is to be
    multiplied with for the least squared error, were lags independent. None where no lag is clear."""
    signal, noise = lags["signal"].value.clamp(min=0), lags["noise"].value
    if not any(clear):
        return None
    w = signal / (signal + noise / dialogues).clamp(min=1e-300)
    rounded = [round(x, 2) for x in (w / w.max()).tolist()]
    while rounded[-1] == 0:
        rounded.pop()
    return LagWeights(rounded)


def _by_row(found: dict[str, Estimate]) -> list[dict[str, Any]]:
    return [dict(zip(found, row, strict=True)) for row in zip(*(e.rows() for e in found.values()), strict=True)]

"""`--policy-class auto`: how much each reward counts for each turn, estimated from the steps of training themselves.

With s_t the score of turn t and A_k the reward of turn k minus its mean over the other rollouts, s_t A_k is what
reward k says of turn t; its mean over the dialogues is a gradient that is 0 where turn t does not move reward k. Full
planning adds these up for all k >= t, with the noise of those that have no signal. For the least squared error each is
to be multiplied with

    signal / (signal + noise),    signal = |E x|^2,    noise = tr Cov of the mean of x over a step

(Wiener 1949). Two dialogues are independent, so <x_i, x_j> over i != j estimates the signal without bias, and what is
left of |mean x|^2 is noise; both are read of inner products alone. A step tells little, so they are averaged over
steps, each in units of what its dialogues' own gradients of full planning have. What is not seen yet is not known to be
absent: a standard error is added to each signal, so that all weights are equal as long as nothing is clear.

The same is asked of whole lags, the sum over t of s_t A_(t+d), where many turns tell together, and of single pairs
(t, k), where turns differ; a weight is the mean of both, each with its largest 1.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ppg_fast.policy_classes import FullPlanning, PolicyClass, RewardWeights
from ppg_fast.training.metrics import turn_ranges

MEMORY = 30.0  # steps that an average is over
WEIGHT = "auto/weight/"  # and a lag: names of metrics


@dataclass
class Evidence:
    """Of gradients, each the mean over a step's dialogues: ``signal``, its squared length without noise, ``noise``, the
    trace of its covariance, and ``variance``, of the estimate of a signal that is 0. Float64 tensors of one shape."""

    signal: Tensor
    noise: Tensor
    variance: Tensor

    @classmethod
    def of(cls, products: Tensor, factors: Tensor) -> "Evidence":
        """(..., K) from the inner products (..., S, S) of S dialogues' vectors and K factors (S, K) of each, all
        float64: gradient k of dialogue i is its vector times factor i, k. Dialogues of one group are not quite
        independent: signals come out larger by a share of at most 1 / (G - 1)^2."""

        def sums(products: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
            """Over all pairs of dialogues, and over each with itself."""
            own = products.diagonal(dim1=-2, dim2=-1)[..., None] * factors.square()
            return (products @ factors * factors).sum(-2), own.sum(-2)

        S = len(factors)
        pairs, own = sums(products, factors)
        squares, own_squares = sums(products.square(), factors.square())
        signal = (pairs - own) / (S * (S - 1))
        return cls(signal, (own / S - signal) / S, 2 * (squares - own_squares) / (S * (S - 1)) ** 2)

    def shrinkage(self) -> Tensor:
        """What each gradient is to be multiplied with, the largest 1; 1 where nothing is known."""
        most = (self.signal + self.variance.clamp(min=0).sqrt()).clamp(min=0)
        noise = self.noise.clamp(min=0)
        seen, factor = most + noise > 0, most / (most + noise).clamp(min=1e-300)
        largest = factor.max() if factor.numel() else factor.new_zeros(())
        return torch.where(seen & (largest > 0), factor / largest.clamp(min=1e-300), 1.0)


@dataclass(frozen=True)
class StepSignals:
    """What a step of S dialogues tells. ``scores`` (S, T, m): vectors whose inner products are those of the turns'
    scores, 0 where none was read; ``centred`` (S, T) float64: each reward minus its mean over the others of the group;
    ``coverage``: share of the turns with a reward beyond that mean to come whose score was read."""

    scores: Tensor
    centred: Tensor
    coverage: float

    @property
    def turns(self) -> int:
        """The turns of the longest dialogue."""
        return self.centred.shape[1]

    @cached_property
    def unit(self) -> float:
        """What all else is measured in: the squared lengths of the dialogues' own gradients of full planning, added up
        over S^2. Unlike that of their mean it is never 0 by chance."""
        return float(self._gradients(torch.ones(self.turns, self.turns, dtype=torch.float64).triu()).square().sum())

    def length_with(self, weights: Tensor) -> float:
        """Squared length of the step's gradient with ``weights`` (T, T)."""
        return float(self._gradients(weights).sum(0).square().sum()) / self.unit

    def _gradients(self, weights: Tensor) -> Tensor:
        """(S, m) float64: each dialogue's part of the step's gradient."""
        credit = (self.centred @ weights.T).to(self.scores.dtype)
        return torch.einsum("stm,st->sm", self.scores, credit).double() / len(credit)

    def by_lag(self) -> Evidence:
        """(T,): lag d is the sum over t of s_t A_(t + d)."""
        T = self.turns
        ahead = torch.nn.functional.pad(self.centred, (0, T - 1)).unfold(1, T, 1)  # [i, t, d] is A_(t + d) of i
        gradients = torch.einsum("stm,std->dsm", self.scores, ahead.to(self.scores.dtype))
        once = torch.ones(len(self.scores), 1, dtype=torch.float64)
        of = Evidence.of((gradients @ gradients.mT).double() / self.unit, once)
        return Evidence(*(values[:, 0] for values in vars(of).values()))

    def by_pair(self) -> Evidence:
        """(T, T): s_t A_k in row t and column k, 0 for k < t."""
        by_turn = self.scores.transpose(0, 1)
        of = Evidence.of((by_turn @ by_turn.mT).double() / self.unit, self.centred)
        return Evidence(*(values.triu() for values in vars(of).values()))


class CreditWeights:
    """What has been seen of which turns move which rewards, and the weights that follow. ``applied``: the next step is
    credited with them, not only logged beside a fixed class. Same steps, same weights."""

    def __init__(self, applied: bool = True) -> None:
        self.applied, self.keep = applied, 1 - 1 / MEMORY
        self.weight = 0.0  # of the steps in the sums below
        self.lengths = torch.zeros(2, dtype=torch.float64)  # squared, of gradients of full planning and of the weights
        zeros = lambda *shape: Evidence(*torch.zeros(3, *shape, dtype=torch.float64).unbind())  # noqa: E731
        self.lags, self.pairs = zeros(0), zeros(0, 0)

    @property
    def turns(self) -> int:
        """The turns of the longest dialogue that was seen."""
        return len(self.lags.signal)

    def matrix(self, turns: int) -> Tensor:
        """(T, T) float64 in [0, 1]: row t, how much each reward counts for turn t; ones, full planning, beyond what
        was seen."""
        whole = torch.ones(turns, turns, dtype=torch.float64)
        if self.weight:
            known = min(turns, self.turns)
            lag = torch.arange(known) - torch.arange(known)[:, None]
            by_lag, by_pair = self._averages()
            found = (by_lag.shrinkage()[lag.clamp(min=0)] + by_pair.shrinkage()[:known, :known]) / 2
            whole[:known, :known] = found
        return whole.triu()

    def policy_class(self, turns: int) -> PolicyClass:
        """What the next step should credit, of dialogues of at most ``turns`` turns."""
        return RewardWeights(self.matrix(turns)) if self.weight else FullPlanning()

    @property
    def scale(self) -> float:
        """What the next step's advantages are to be multiplied with: its gradients are then as long as those of full
        planning. Adam divides by the gradients that it remembers, and those become shorter as the weights fall."""
        of_full, of_weights = self.lengths.tolist()
        return (of_full / of_weights) ** 0.5 if of_full > 0 and of_weights > 0 else 1.0

    def _averages(self) -> tuple[Evidence, Evidence]:
        w = self.weight
        lags, pairs = (Evidence(e.signal / w, e.noise / w, e.variance / w**2) for e in (self.lags, self.pairs))
        return lags, pairs

    def observe(self, step: StepSignals) -> dict[str, Any]:
        """Take in one step's signals; metrics for the log."""
        row: dict[str, Any] = {"auto/coverage": step.coverage}
        if len(step.centred) < 2 or not 0 < step.unit < float("inf"):  # nothing was read, or nothing that is finite
            return row
        self.lags = self._taken_in(self.lags, step.by_lag())
        self.pairs = self._taken_in(self.pairs, step.by_pair())
        self.weight = self.keep * self.weight + 1 - self.keep
        weights = self.matrix(step.turns)
        lengths = [step.length_with(by) for by in (torch.ones_like(weights).triu(), weights)]
        self.lengths = self.keep * self.lengths + (1 - self.keep) * torch.tensor(lengths, dtype=torch.float64)
        row |= {f"{WEIGHT}{name}": value for name, value in mean_by_lag(weights)}
        lags = self._averages()[0]
        ratios = torch.where(lags.noise > 0, lags.signal / lags.noise, 0.0)
        ranges = turn_ranges(len(ratios))
        row |= {f"auto/signal_to_noise/{name}": float(ratios[first:end].mean()) for name, first, end in ranges}
        return {**row, "auto/scale": self.scale} if self.applied else row

    def _taken_in(self, known: Evidence, new: Evidence) -> Evidence:
        """The running sums with a step more; a variance is of a sum."""
        most, fresh = max(known.signal.shape[-1:] + new.signal.shape[-1:]), 1 - self.keep
        factors = {"signal": (self.keep, fresh), "noise": (self.keep, fresh), "variance": (self.keep**2, fresh**2)}
        found = {}
        for name, (old, now) in factors.items():
            wide = [_padded(getattr(of, name), most) for of in (known, new)]
            found[name] = old * wide[0] + now * wide[1]
        return Evidence(**found)

    def state_dict(self) -> dict[str, Any]:
        """Everything that weights depend on, of plain types and tensors."""
        sums = {"weight": self.weight, "lengths": self.lengths}
        return {**sums, "lags": vars(self.lags), "pairs": vars(self.pairs)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.weight, self.lengths = saved["weight"], saved["lengths"]
        self.lags, self.pairs = Evidence(**saved["lags"]), Evidence(**saved["pairs"])


def mean_by_lag(weights: Tensor) -> Iterator[tuple[str, float]]:
    """The mean over turns of the weights (T, T) at each lag, with its label."""
    T = len(weights)
    of_lag = [weights.diagonal(d) for d in range(T)]
    for name, first, end in turn_ranges(T):
        yield name, float(torch.cat(of_lag[first:end]).mean())


def _padded(values: Tensor, size: int) -> Tensor:
    """Zeros for turns that were not reached before."""
    lacking = size - values.shape[-1]
    return torch.nn.functional.pad(values, (0, lacking) * values.dim())

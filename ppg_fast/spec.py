"""What a policy loss is and which future rewards a turn is credited for. No torch, no kernels: everything else imports
this."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from numbers import Number
from typing import TYPE_CHECKING, Any

from ppg_fast.rules import fail as fail
from ppg_fast.rules import require, require_float32, require_integer, require_one_of
from ppg_fast.rules import require_number as require_number

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100  # the label of a token that takes no part


class LossType(IntEnum):
    """Per-token surrogate. The numbers are the wire format shared with Triton and C++."""

    REINFORCE = 0  # -A l                                              Williams (1992)
    PPO = 1  # -min(r A, clip(r, 1-low, 1+high) A)                     arXiv:1707.06347; clip-higher: arXiv:2503.14476
    CISPO = 2  # -sg[min(r, 1+high)] A l                               arXiv:2506.13585
    GSPO = 3  # as PPO with one ratio a sequence                       arXiv:2507.18071
    GSPO_TURN = 4  # as PPO with one ratio a turn of a sequence


class KLEstimator(IntEnum):
    """Estimator of KL(policy, reference) from one token, d = ref - l.  Source: joschu.net/blog/kl-approx.html"""

    K1 = 1  # -d
    K2 = 2  # d^2 / 2
    K3 = 3  # exp(d) - d - 1 with d = min(ref - l, MAX_LOG_RATIO)


# A log ratio is at most this before it is exponentiated, in ratios, importance weights and k3, so that an outlier gives
# a large number and not inf; beyond it, as of a torch.clamp, the derivative is 0. verl's number. Mirrored by
# csrc/policy_term.h.
MAX_LOG_RATIO = 20.0

# In a divergence a log-prob counts as at least this, in nats, so that a token that one of two distributions excludes
# gives a large number and not inf, and 0 where both do; and what a top-k teacher leaves to all other tokens as one
# counts as at least this, the last digit of a float32 near 1. Mirrored by csrc/cpu/distillation.cpp.
LEAST_LOGPROB, LEAST_TAIL = -1e4, 2.0**-23
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")

LOSS_TYPES = tuple(t.name.lower() for t in LossType)
KL_ESTIMATORS = tuple(k.name.lower() for k in KLEstimator)
LOSS_NUMBERS = {t.name.lower(): int(t) for t in LossType}
KL_NUMBERS = {k.name.lower(): int(k) for k in KLEstimator}
SEQUENCE_LEVEL = ("gspo", "gspo_turn")  # their ratio needs other rows, so they take two sweeps
REDUCTIONS = ("token_mean", "sequence_mean", "sequence_sum", "sum", "none")
BASELINES = ("none", "leave_one_out", "group_mean", "group_std")  # in the order of csrc/args.h, like the reductions
# what a NaN among the rollout log-probs of active tokens means, in the order of csrc/args.h
NAN_ROLLOUT = ("keep", "error", "one", "drop")
STD_EPS = 1e-6
# how a spec travels to the kernels, mirrored by csrc/args.h
SPEC_NUMBERS = (
    "clip_low",
    "clip_high",
    "dual_clip",
    "kl_coef",
    "entropy_coef",
    "importance_cap",
    "temperature",
    "logit_softcap",
)
SPEC_CHOICES = ("loss_type", "kl_estimator", "nan_rollout")


@dataclass(frozen=True)
class PolicyLossSpec:
    """A policy loss: the surrogate and its numbers.

    ``temperature`` is a number, or one per token as a tensor of the labels' shape; logits pass through the softcap
    first and are divided by the temperature then. ``dual_clip`` (> 1), ``importance_cap`` and ``logit_softcap`` are off
    at 0. ``kl_coef`` is the weight of ``kl_estimator``(l, ref), ``entropy_coef`` of the entropy bonus. Numbers in nats
    or ratios. Log ratios (l - old, also the mean of gspo; old - rollout; ref - l in k3) count as at most 20 where they
    are exponentiated, and have no slope beyond, so that an outlier keeps loss and gradient finite.

    ``nan_rollout`` says what a NaN rollout log-prob of an active token is (samplers report none for a token that was
    forced on them): "keep", it stays NaN in the loss and the token's gradient; "error", a ValueError that counts them
    and names the first row (on a GPU this reads the values: one sync); "one", its importance weight is 1; "drop", the
    token is masked: neither loss nor gradient, and it is in no count of active tokens (a given normalizer is what it
    was).
    """

    loss_type: str = "reinforce"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: str = "k3"
    entropy_coef: float = 0.0
    importance_cap: float = 0.0
    temperature: float | Tensor = 1.0
    logit_softcap: float = 0.0
    nan_rollout: str = "keep"

    def __post_init__(self) -> None:
        require_one_of("loss_type", self.loss_type, LOSS_TYPES)
        require_one_of("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        require_one_of("nan_rollout", self.nan_rollout, NAN_ROLLOUT)
        self._number("clip_low", 0.0, 1.0)
        self._number("clip_high", 0.0)
        self._number("dual_clip", 0.0)
        require(self.dual_clip == 0 or self.dual_clip > 1, "dual_clip must be 0 (off) or > 1", self.dual_clip)
        self._number("kl_coef", 0.0)
        self._number("entropy_coef", -math.inf)
        self._number("importance_cap", 0.0)
        self._number("logit_softcap", 0.0)
        # a tensor, and what else has a value a token, is for the ops to check
        t = self.temperature
        if isinstance(t, (int, float)) or not (hasattr(t, "requires_grad") or getattr(t, "shape", ())):
            self._number("temperature", 0.0, open_low=True)

    def _number(self, name: str, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
        value = getattr(self, name)
        number = require_float32(name, value, low, high, open_low=open_low)
        if number is not value:
            object.__setattr__(self, name, number)

    @property
    def needs_every_row(self) -> bool:
        """Whether a row of zero advantage still has a gradient."""
        return self.kl_coef != 0 or self.entropy_coef != 0

    @property
    def numbers(self) -> list[float]:
        """The numbers of a spec whose temperature is one, in the order of SPEC_NUMBERS: how kernels take them."""
        clips = self.clip_low, self.clip_high, self.dual_clip
        terms = self.kl_coef, self.entropy_coef, self.importance_cap
        return [*clips, *terms, self.temperature, self.logit_softcap]  # type: ignore[list-item]

    @property
    def choices(self) -> list[int]:
        """The enums of a spec, in the order of SPEC_CHOICES."""
        return [LOSS_NUMBERS[self.loss_type], KL_NUMBERS[self.kl_estimator], NAN_ROLLOUT.index(self.nan_rollout)]

    @classmethod
    def of(cls, numbers: Sequence[float], choices: Sequence[int]) -> PolicyLossSpec:
        """The spec that `numbers` and `choices` describe."""
        loss_type, kl_estimator = LossType(choices[0]).name.lower(), KLEstimator(choices[1]).name.lower()
        named = dict(zip(SPEC_NUMBERS, numbers, strict=True))
        return cls(loss_type=loss_type, kl_estimator=kl_estimator, nan_rollout=NAN_ROLLOUT[choices[2]], **named)


UNBOUNDED = 2**31 - 1


@dataclass(frozen=True)
class PolicyClass:
    """Which future rewards a turn is credited for, as a window.

    R_t = sum over k in S_t of gamma^(k-t) r_k, and S_t = {t, ..., end_t - 1} where end_t is the smallest of t +
    ``lookahead``, the end of t's segment and the end of the dialogue. ``str`` gives the name that `policy_class`
    reads: greedy, lookahead:3, segment:4, full.  Source: arXiv:2603.06138
    """

    lookahead: int = field(default=UNBOUNDED, init=False)
    segment_length: int = field(default=0, init=False)  # 0: segments, if any, are given by ids
    segment_ids: Any = field(default=None, init=False)

    def __str__(self) -> str:
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Greedy(PolicyClass):
    """S_t = {t}: a turn is credited for its own reward."""

    lookahead: int = field(default=1, init=False)


@dataclass(frozen=True)
class Lookahead(PolicyClass):
    """S_t = {t, ..., t + k - 1}: k rewards, the turn's own included. k = 1 is greedy, k >= turns is full planning."""

    k: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", require_integer("K of Lookahead", self.k, 1))
        object.__setattr__(self, "lookahead", min(self.k, UNBOUNDED))

    def __str__(self) -> str:
        return f"lookahead:{self.k}"


@dataclass(frozen=True)
class Segment(PolicyClass):
    """S_t = {t, ..., last turn of t's segment}.

    ``ids_or_length``: an integer >= 1 for segments of that many turns, or (B, T) integer ids, constant on contiguous
        runs.
    """

    ids_or_length: Any = 1

    def __post_init__(self) -> None:
        require(self.ids_or_length is not None, "Segment needs a length or ids", None)
        if isinstance(self.ids_or_length, (Number, str)) or getattr(self.ids_or_length, "shape", None) == ():
            length = require_integer("the length of Segment", self.ids_or_length, 1)
            object.__setattr__(self, "ids_or_length", length)
            object.__setattr__(self, "segment_length", min(length, UNBOUNDED))
        else:
            object.__setattr__(self, "segment_ids", self.ids_or_length)

    def __str__(self) -> str:
        """segment:ids for ids, which no name could tell."""
        return f"segment:{'ids' if self.segment_ids is not None else self.ids_or_length}"


@dataclass(frozen=True)
class FullPlanning(PolicyClass):
    """S_t = {t, ..., n}: a turn is credited for every reward from its own to the end of the dialogue."""

    def __str__(self) -> str:
        return "full"


@dataclass(frozen=True)
class RewardMask(PolicyClass):
    """S_t = {k : mask[t, k]}: any subset of the rewards. ``mask`` is a (T, T) boolean matrix, row t = the rewards
    credited to turn t."""

    mask: Any = None

    def __post_init__(self) -> None:
        require(self.mask is not None, "RewardMask needs a (T, T) boolean mask", None)

    def __str__(self) -> str:
        """mask, which is not enough to read it back."""
        return "mask"


# what auto chooses among
CANDIDATES = (Greedy(), Lookahead(2), Lookahead(3), Lookahead(4), Lookahead(6), Segment(4), FullPlanning())


def policy_classes(text: str) -> tuple[PolicyClass, ...]:
    """The policy classes that ``text`` names, separated by commas, each once."""
    return tuple(dict.fromkeys(policy_class(name) for name in text.split(",")))


def policy_class(text: str | PolicyClass) -> PolicyClass:
    """The policy class that ``text`` names: "greedy", "full", "lookahead:K" or "segment:LENGTH"."""
    if isinstance(text, PolicyClass):
        return text
    require(isinstance(text, str), "a policy class is a PolicyClass or its name", text)
    name, _, number = text.strip().lower().partition(":")
    if name in ("greedy", "full") and not number:
        return Greedy() if name == "greedy" else FullPlanning()
    digits = number.removeprefix("-").isdecimal()
    require(
        name in ("lookahead", "segment") and digits,
        'a policy class is "greedy", "full", "lookahead:K" or "segment:LENGTH"',
        text,
    )
    return Lookahead(int(number)) if name == "lookahead" else Segment(int(number))

"""Which future rewards a turn is credited for. No torch, no kernels."""

import re
from dataclasses import dataclass, field
from numbers import Number
from typing import Any, ClassVar

from ppg_fast.rules import require, require_integer, require_number

UNBOUNDED = 2**31 - 1
NAMES = '"greedy", "full", "lookahead:K", "segment:LENGTH" or "lags:W0,W1,..."'


@dataclass(frozen=True)
class PolicyClass:
    """Which future rewards a turn is credited for, as a window.

    R_t = sum over k in S_t of gamma^(k-t) r_k, and S_t = {t, ..., end_t - 1} where end_t is the smallest of t +
    ``lookahead``, the end of t's segment and the end of the dialogue. ``str`` gives the name that `policy_class`
    reads: greedy, lookahead:3, segment:4, full.  ``is_window``: whether S_t is one run of turns, each reward whole.
    Source: arXiv:2603.06138
    """

    is_window: ClassVar[bool] = True
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

    is_window: ClassVar[bool] = False
    mask: Any = None

    def __post_init__(self) -> None:
        require(self.mask is not None, "RewardMask needs a (T, T) boolean mask", None)

    def __str__(self) -> str:
        """mask, which is not enough to read it back."""
        return "mask"


@dataclass(frozen=True)
class LagWeights(PolicyClass):
    """R_t = sum over lags d of w_d gamma^d r_(t+d): a reward counts by how many turns ago the turn was.

    ``weights``: w_0, w_1, ..., finite numbers >= 0, one of them above 0; beyond the last, 0. Lookahead K is K ones. Its
    expected gradient is sum_d w_d grad J_d with J_d = sum_k E[r_k | turn k - d acts by theta, all others as now]:
    that of the true return for weights of 1 wherever grad J_d is not 0. ValueError for other weights.
    """

    is_window: ClassVar[bool] = False
    weights: Any = (1.0,)

    def __post_init__(self) -> None:
        given = self.weights.tolist() if hasattr(self.weights, "tolist") else self.weights
        require(isinstance(given, (list, tuple)) and bool(given), "LagWeights needs one weight a lag", given)
        weights = tuple(float(require_number("a weight of LagWeights", weight, 0.0)) for weight in given)
        require(any(weights), "one weight of LagWeights must be above 0", weights)
        object.__setattr__(self, "weights", weights)
        object.__setattr__(self, "lookahead", len(weights))

    def __str__(self) -> str:
        return "lags:" + ",".join(repr(weight).removesuffix(".0") for weight in self.weights)


@dataclass(frozen=True)
class RewardWeights(PolicyClass):
    """R_t = sum over k of w[t, k] gamma^(k-t) r_k: every turn weighs every reward in its own way.

    ``weights``: a (T, T) matrix of finite numbers >= 0, row t = how much each reward counts for turn t. RewardMask is
    ones and zeros, LagWeights a matrix that depends on k - t alone. ValueError without one.
    """

    is_window: ClassVar[bool] = False
    weights: Any = None

    def __post_init__(self) -> None:
        require(self.weights is not None, "RewardWeights needs a (T, T) matrix of weights", None)

    def __str__(self) -> str:
        """weights, which is not enough to read it back."""
        return "weights"


def policy_classes(text: str) -> tuple[PolicyClass, ...]:
    """The policy classes that ``text`` names, separated by commas, each once."""
    return tuple(dict.fromkeys(policy_class(name) for name in names_in(text)))


def names_in(text: str) -> list[str]:
    """The names of ``text``, separated by commas: one before a number is of the weights of lags."""
    return [name.strip() for name in re.split(r",(?!\s*[-+.\d])", text)]


def policy_class(text: str | PolicyClass) -> PolicyClass:
    """The policy class that ``text`` names: "greedy", "full", "lookahead:K", "segment:LENGTH" or "lags:W0,W1,..."."""
    if isinstance(text, PolicyClass):
        return text
    require(isinstance(text, str), "a policy class is a PolicyClass or its name", text)
    name, _, numbers = text.strip().lower().partition(":")
    if name in ("greedy", "full") and not numbers:
        return Greedy() if name == "greedy" else FullPlanning()
    if name == "lags":
        return LagWeights([_number(weight, text) for weight in numbers.split(",")])
    digits = numbers.removeprefix("-").isdecimal()
    require(name in ("lookahead", "segment") and digits, f"a policy class is {NAMES}", text)
    return Lookahead(int(numbers)) if name == "lookahead" else Segment(int(numbers))


def _number(weight: str, text: str) -> float:
    try:
        return float(weight)
    except ValueError as error:
        raise ValueError(f"the weights of lags must be numbers with commas, got {weight!r} in {text!r}") from error

"""The arguments of a policy loss by name, and the few lists they travel as through operators and into C++.

What is packed here is unpacked here, and by csrc/bindings.cpp in the order that csrc/args.h mirrors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from ppg_fast.spec import BASELINES, REDUCTIONS, SPEC_CHOICES, SPEC_NUMBERS, STD_EPS, PolicyLossSpec

if TYPE_CHECKING:
    from torch import Tensor


class Columns(NamedTuple):
    """What each token brings along: tensors (B, L), or (L,) where B is 1, in any strides, as the caller holds them;
    None where absent."""

    labels: Tensor  # int64, negative = masked
    loss_mask: Tensor | None  # any dtype, 0 = masked
    turn_ids: Tensor | None  # int32 or int64, negative = masked; None without turns
    advantages: Tensor | None  # float32, like the rest; None with turns
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    temperatures: Tensor | None
    nll_weights: Tensor | None = None  # of -l beside the reduction, divided already


class Turns(NamedTuple):
    """What the advantages of S dialogues of T turns are computed from; contiguous tensors or None."""

    rewards: Tensor  # (S, T) float32
    turn_counts: Tensor | None  # (S,) int32 or int64
    segment_ids: Tensor | None  # (S, T) int64
    reward_mask: Tensor | None  # (T, T) bool, in place of the window
    group_ids: Tensor | None  # (S,) int32 or int64
    lookahead: int
    segment_length: int
    gamma: float
    baseline: str
    std_eps: float = STD_EPS


class Reduction(NamedTuple):
    """How the losses of tokens become one: ``kind``, one of REDUCTIONS, over ``sequences`` equal ones or those that
    cu_seqlens bounds."""

    kind: str
    normalizer: float | Tensor | None  # a number > 0, or a 0-d float32 tensor on the device
    sequences: int
    cu_seqlens: Tensor | None  # (sequences + 1,) int32 or int64


class PerRow(NamedTuple):
    """What the loss needs of each row beside its label, (N,) float32 each."""

    advantages: Tensor
    weights: Tensor | None  # of the reduction; None: 1
    old_logprobs: Tensor | None  # None: on-policy
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    temperatures: Tensor | None  # None: the spec's number for all
    nll_weights: Tensor | None = None  # of -l, beside the reduction

    @property
    def live(self) -> Tensor:
        """(N,) bool: rows whose surrogate or likelihood has a gradient."""
        live = self.advantages != 0
        return live if self.nll_weights is None else live | (self.nll_weights != 0)


class RowArguments(NamedTuple):
    """The arguments of `policy_loss` beside the logits, as the contract in `backends` has them."""

    labels: Tensor  # (N,) int64, negative = masked
    per_row: PerRow
    spec: PolicyLossSpec  # of a token-level loss, with a number as temperature

    def pack(self) -> tuple[list[Tensor | None], list[float], list[int]]:
        """Tensors (labels first), and the spec's numbers and choices."""
        return [self.labels, *self.per_row], self.spec.numbers, self.spec.choices

    @classmethod
    def unpack(cls, tensors: Sequence[Tensor | None], numbers: Sequence[float], choices: Sequence[int]) -> RowArguments:
        """What `pack` packed."""
        labels, *per_row = tensors
        return cls(labels, PerRow(*per_row), PolicyLossSpec.of(numbers, choices))  # type: ignore[arg-type]


class TeacherRows(NamedTuple):
    """What the divergence of each row is measured from: a teacher's hidden states and head, or its k tokens."""

    hidden: Tensor | None  # (N, D')
    weight: Tensor | None  # (V, D')
    bias: Tensor | None  # (V,)
    ids: Tensor | None  # (N, k) int64, negative: none
    logprobs: Tensor | None  # (N, k) float32
    coefs: Tensor  # (N,) float32, of the divergence in the loss; rows where it is 0 are not read
    beta: float
    softcap: float
    top_k: int  # of the teacher's tokens are told apart; 0: all

    def pack(self) -> tuple[list[Tensor | None], list[float], int]:
        """Tensors, the coefficients last; numbers; the count."""
        return [*self[:6]], [self.beta, self.softcap], self.top_k

    @classmethod
    def unpack(cls, tensors: Sequence[Tensor | None], numbers: Sequence[float], top_k: int) -> TeacherRows:
        """What `pack` packed."""
        return cls(*tensors, *numbers, top_k)  # type: ignore[arg-type,call-arg]


class Chunks(NamedTuple):
    """How many rows of a linear head have their logits in memory at once, and in what precision."""

    rows: int
    max_active: int | None  # the caller's bound on the rows that are read
    float32: bool = False  # the logits, whatever the dtype of hidden states and weight; else that dtype

    def pack(self) -> list[int]:
        """The three as integers, -1 for no bound."""
        return [self.rows, -1 if self.max_active is None else self.max_active, int(self.float32)]

    @classmethod
    def unpack(cls, sizes: Sequence[int]) -> Chunks:
        """What `pack` packed."""
        rows, bound, float32 = sizes
        return cls(rows, None if bound < 0 else bound, bool(float32))


class Wanted(NamedTuple):
    """What a call of a policy loss is to give beside loss and log-probs, and whether it looks at values on a GPU."""

    entropy: bool
    score_norms: bool
    gradient: bool
    validate: bool
    lse: bool = False  # the log-sum-exp, differentiable like the log-prob


class FusedArguments(NamedTuple):
    """The arguments of `fused_policy_loss` beside the logits, as the contract in `backends` has them."""

    columns: Columns
    turns: Turns | None
    reduction: Reduction
    spec: PolicyLossSpec  # of a token-level loss, with a number as temperature
    skip_zero_advantages: bool

    def pack(self) -> tuple[list[Tensor | None], list[float], list[int]]:
        """Tensors, numbers and choices, in the order of FUSED_TENSORS, FUSED_NUMBERS and FUSED_CHOICES."""
        columns, turns, (kind, normalizer, sequences, cu_seqlens), spec, skip = self
        if turns is None:
            tensors, window, gamma, std_eps = NO_TURNS
        else:
            tensors, gamma, std_eps = turns[:5], turns.gamma, turns.std_eps
            window = turns.lookahead, turns.segment_length, BASELINES.index(turns.baseline)
        number, at = (normalizer, None) if isinstance(normalizer, (int, float)) else (0.0, normalizer)
        return (
            [*columns, *tensors, at, cu_seqlens],
            [gamma, std_eps, number, *spec.numbers],
            [*window, REDUCTIONS.index(kind), sequences, int(skip), *spec.choices],
        )

    @classmethod
    def unpack(
        cls, tensors: Sequence[Tensor | None], numbers: Sequence[float], choices: Sequence[int]
    ) -> FusedArguments:
        """What `pack` packed."""
        t = dict(zip(FUSED_TENSORS, tensors, strict=True))
        n = dict(zip(FUSED_NUMBERS, numbers, strict=True))
        c = dict(zip(FUSED_CHOICES, choices, strict=True))
        turns = None
        if t["rewards"] is not None:
            window = c["lookahead"], c["segment_length"], n["gamma"], BASELINES[c["baseline"]], n["std_eps"]
            turns = Turns(*(t[name] for name in TURN_TENSORS), *window)  # type: ignore[arg-type]
        normalizer = n["normalizer"] or None if t["normalizer_at"] is None else t["normalizer_at"]
        return cls(
            Columns(*(t[name] for name in Columns._fields)),  # type: ignore[arg-type]
            turns,
            Reduction(REDUCTIONS[c["reduction"]], normalizer, c["sequences"], t["cu_seqlens"]),
            PolicyLossSpec.of([n[name] for name in SPEC_NUMBERS], [c[name] for name in SPEC_CHOICES]),
            bool(c["skip_zero_advantages"]),
        )


TURN_TENSORS = Turns._fields[:5]
NO_TURNS = (None,) * 5, (1, 0, 0), 1.0, 0.0
FUSED_TENSORS = (*Columns._fields, *TURN_TENSORS, "normalizer_at", "cu_seqlens")
FUSED_NUMBERS = ("gamma", "std_eps", "normalizer", *SPEC_NUMBERS)
FUSED_CHOICES = (
    "lookahead",
    "segment_length",
    "baseline",
    "reduction",
    "sequences",
    "skip_zero_advantages",
    *SPEC_CHOICES,
)

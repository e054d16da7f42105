"""The active tokens of turns, and what a loss of turns sums, finds and masks by them."""

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor

from ppg_fast import ops, reference
from ppg_fast.contract import Turns
from ppg_fast.functional.loss import check_dialogues
from ppg_fast.functional.tokens import Tokens


class TurnOptions(TypedDict, total=False):
    """The keyword arguments that every loss of turns takes, see `turn_regression_loss`."""

    gamma: float
    turn_counts: Tensor | None
    loss_mask: Tensor | None
    cu_seqlens: Tensor | None
    normalizer: float | Tensor | None
    validate: bool


@dataclass(frozen=True)
class TurnTokens:
    """Which tokens of a call are active and of a turn, and of which one."""

    tokens: Tokens
    in_turn: Tensor  # (N,) bool
    turn_ids: Tensor  # (N,) int64
    shape: tuple[int, int]  # (S, T)

    @staticmethod
    def of(
        labels: Tensor,
        turn_ids: Tensor,
        turns: Turns,
        loss_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        validate: bool,
    ) -> "TurnTokens":
        """ValueError where turn ids or sequences do not fit the turns of ``turns``."""
        tokens = Tokens.of(labels, loss_mask, cu_seqlens, labels.device, validate)
        check_dialogues(turns.rewards, tokens.sequence_count)
        counts = None if turns.turn_counts is None else turns.turn_counts.long()
        flat = turn_ids.reshape(-1).long()
        every = torch.ones_like(turns.rewards)
        in_turn = ops.turn_credit_op(every, flat, tokens.sequences(), counts, tokens.active, validate) > 0
        return TurnTokens(tokens, in_turn & tokens.active, flat, tuple(turns.rewards.shape))  # type: ignore[arg-type]

    @property
    def labels(self) -> Tensor:
        """Of the caller's shape, masked also where there is no turn."""
        return self.tokens.masked_where(~self.in_turn).labels.view(self.tokens.shape)

    def sums(self, values: Tensor) -> Tensor:
        """(S, T) float64, the sum of ``values`` (N,) over the tokens of each turn, differentiable in them."""
        return reference.sum_of_turns(values, self.in_turn, self.turn_ids, self.tokens.sequences(), self.shape)

    def counts(self) -> Tensor:
        """(S, T) float64, how many tokens each turn has."""
        return self.sums(torch.ones(self.in_turn.shape, device=self.in_turn.device))

    def first_tokens(self) -> Tensor:
        """(S, T) int64, the number of each turn's first token; N where it has none."""
        return reference.first_of_turns(self.in_turn, self.turn_ids, self.tokens.sequences(), self.shape)

    def where_read(self, values: Tensor) -> Tensor:
        """``values`` of the labels' shape, detached, 0 outside of turns."""
        return torch.where(self.in_turn.view(self.tokens.shape), values.detach(), 0.0)

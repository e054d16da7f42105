"""The most uncertain share of an answer's tokens: which labels a step trains, and how many that is."""

from dataclasses import replace

import torch
from torch import Tensor

from ppg_fast.dialogues.packing import PackedBatch
from ppg_fast.spec import IGNORE


def kept_of_turns(batch: PackedBatch, share: float) -> Tensor:
    """(S, T) int64: how many tokens of each turn are trained, ceil(share n) of n, at least one of a turn that has any.

    A product that floating point puts a hair above an integer (0.07 * 100) counts as that integer.
    """
    counts = batch.sum_of_turns(torch.ones(len(batch.tokens), device=batch.tokens.device))
    return torch.maximum((share * counts - 1e-9).ceil(), counts.clamp(max=1)).long()


def most_uncertain(batch: PackedBatch, entropies: Tensor, share: float) -> Tensor:
    """(N,) bool: of each turn the `kept_of_turns` labels with the highest ``entropies`` (N,), the earlier of two equal
    ones (Wang et al., arXiv:2506.01939, who take the share of a whole batch)."""
    kept = kept_of_turns(batch, share).flatten()
    said = (batch.labels >= 0).nonzero()[:, 0]
    turns = (batch.dialogue_ids * batch.rewards.shape[1] + batch.turn_ids)[said]
    order = entropies[said].argsort(descending=True, stable=True)
    order = order[turns[order].argsort(stable=True)]  # by turn, and within one by entropy, then by place
    said, turns = said[order], turns[order]
    sizes = turns.bincount(minlength=len(kept))
    rank = torch.arange(len(said), device=said.device) - (sizes.cumsum(0) - sizes)[turns]
    chosen = torch.zeros_like(batch.labels, dtype=torch.bool)
    chosen[said[rank < kept[turns]]] = True
    return chosen


def train_most_uncertain(batch: PackedBatch, entropies: Tensor, share: float) -> PackedBatch:
    """``batch`` with -100 for the other labels, whose rows are then SKIP: not read, and without a gradient."""
    return replace(batch, labels=batch.labels.where(most_uncertain(batch, entropies, share), IGNORE))

"""Kept sets of the tokens of a packed batch, which a truncated sampler drew them from: ids and offsets, as `ppg.Kept`
has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppg_fast.spec import require

if TYPE_CHECKING:
    from ppg_fast.dialogues.packing import Sample

Sets = tuple[Tensor | None, Tensor | None]


def packed(samples: Sequence[Sample], turn_ids: Tensor) -> Sets:
    """Of the predicted token, whose ``turn_ids`` (N,) these are, negative for none. ValueError where some samples with
    tokens of the policy have sets and some have none."""
    given = {sample.kept is not None for sample in samples if max(sample.turn_ids) >= 0}
    require(len(given) < 2, "kept must be given for all samples or for none", "some with and some without")
    if True not in given:
        return None, None
    sets = [(sample.kept or [], len(sample.tokens)) for sample in samples]
    own = [ids for some, size in sets for ids in [*some, *[[]] * (size - len(some))]]
    of_next = [ids if turn >= 0 else [] for ids, turn in zip([*own[1:], []], turn_ids.tolist(), strict=True)]
    ends = torch.tensor([0, *map(len, of_next)], dtype=torch.int64).cumsum(0)
    return torch.tensor([i for ids in of_next for i in ids], dtype=torch.int64), ends


def chosen(ids: Tensor | None, offsets: Tensor | None, at: Tensor, context: Tensor) -> Sets:
    """Those of the tokens ``at`` (N,), in that order, and none where ``context``."""
    if ids is None or offsets is None:
        return None, None
    sizes = offsets.diff()[at].masked_fill_(context, 0)
    ends = sizes.cumsum(0)
    first = (offsets[at] - (ends - sizes)).repeat_interleave(sizes)
    return ids[torch.arange(len(first), device=at.device) + first], torch.cat([ends.new_zeros(1), ends])

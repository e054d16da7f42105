"""Kept sets of the tokens of a packed batch, which a truncated sampler drew them from: ids and offsets, as `ppg.Kept`
has them."""

from collections.abc import Sequence

import torch
from torch import Tensor

Sets = tuple[Tensor | None, Tensor | None]
NO_SETS: Sets = (None, None)


def packed(samples: Sequence[tuple[Sequence[Sequence[int]], int]], turn_ids: Tensor) -> Sets:
    """Of the predicted token, whose ``turn_ids`` (N,) these are, negative for none. ``samples``: the sets of each one's
    own tokens, as far as they go, and its number of tokens."""
    own = [ids for sets, size in samples for ids in [*sets, *[()] * (size - len(sets))]]
    of_next = [ids if turn >= 0 else () for ids, turn in zip([*own[1:], ()], turn_ids.tolist(), strict=True)]
    ends = torch.tensor([0, *map(len, of_next)], dtype=torch.int64).cumsum(0)
    return torch.tensor([i for ids in of_next for i in ids], dtype=torch.int64), ends


def chosen(ids: Tensor | None, offsets: Tensor | None, at: Tensor, context: Tensor) -> Sets:
    """Those of the tokens ``at`` (N,), in that order, and none where ``context``."""
    if ids is None or offsets is None:
        return NO_SETS
    sizes = offsets.diff()[at].masked_fill_(context, 0)
    ends = sizes.cumsum(0)
    first = (offsets[at] - (ends - sizes)).repeat_interleave(sizes)
    return ids[torch.arange(len(first), device=at.device) + first], torch.cat([ends.new_zeros(1), ends])

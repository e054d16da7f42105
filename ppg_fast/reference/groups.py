"""Groups of rows: their numbering and their sums, the same bits every time."""

import torch
from torch import Tensor


def group_sum(values: Tensor, groups: Tensor, count: int) -> Tensor:
    """out[j] = sum of values[i] over i with groups[i] = j. ``values`` (N, ...), ``groups`` (N,) int64 in [0, count) ->
    (count, ...).

    On a GPU through a sort, because `index_add` adds there in any order; on a CPU `index_add` goes through the rows one
    by one.
    """
    out = torch.zeros((count, *values.shape[1:]), dtype=values.dtype, device=values.device)
    if values.is_cuda:
        return out.index_put((groups,), values, accumulate=True)
    return out.index_add(0, groups, values)


def consecutive_ids(ids: Tensor) -> Tensor:
    """Any integers (N,) -> the same groups as numbers in [0, N), without asking the device how many there are."""
    order = ids.argsort(stable=True)
    ids = ids[order]
    first = torch.nn.functional.pad((ids[1:] != ids[:-1]).long(), (1, 0))
    return torch.empty_like(order).index_put((order,), first.cumsum(0)[: order.numel()])

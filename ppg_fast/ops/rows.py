"""Which rows of a call are read: those with a gradient, those without one, and none of the others."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ppg_fast.spec import require


class Rows(NamedTuple):
    """The rows that are read. Where they were only bounded, what lies behind the last of them is SKIP."""

    full: Tensor  # numbers of the rows that go through all GEMMs, ascending; (n,) int64
    forward: Tensor  # of those that go through the first
    # (n,) bool, the SKIP rows among ``full`` or, without a gradient, ``forward``; None: there are none
    skip: Tensor | None = None
    # 0-d float32: 0, or NaN where more rows are active than the caller's bound; None: they were counted
    excess: Tensor | None = None


def counted(labels: Tensor, bound: int | None, validate: bool) -> bool:
    """Whether the rows are counted on the host: it costs nothing on a CPU, one sync on a GPU, which a bound saves."""
    return bound is None or validate or labels.is_cpu


def check_bound(active: int, bound: int | None) -> None:
    """ValueError unless the caller's bound holds."""
    require(
        bound is None or active <= bound,
        "max_active_rows must be at least the number of active rows",
        f"{bound} for {active}",
    )


def partition(full: Tensor, forward: Tensor, bound: int | None = None, counting: bool = True) -> Rows:
    """FULL and FORWARD-ONLY rows (N,) bool -> their numbers, by one stable partition and at most one sync.

    ``bound``: no more are active. Counting, ValueError where it does not hold; without counting, `Rows.excess` is NaN
    there, and all rows are taken as FULL unless none is.
    """
    N = full.numel()
    kinds = torch.stack([full, forward, ~(full | forward)])
    ranks = kinds.flatten().cumsum(0)
    place = (ranks.view(3, N) * kinds).sum(0) - 1
    numbers = torch.arange(N, device=full.device)
    order = torch.empty_like(numbers).scatter_(0, place, numbers)
    if counting:
        n_full, active = ranks[N - 1 : 2 * N : N].tolist() if N else (0, 0)
        check_bound(active, bound)
        return Rows(order[:n_full], order[n_full:active])
    taken = min(N, N if bound is None else bound)
    active = ranks[2 * N - 1] if N else torch.zeros((), dtype=torch.int64, device=full.device)
    excess = torch.where(active > taken, torch.nan, 0.0).float()
    return Rows(order[:taken], order[:0], numbers[:taken] >= active, excess)


def pick(values: Sequence[Tensor | None], rows: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(None if v is None else v[rows] for v in values)

"""Large memory that is about to be written whole."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ppg_fast import backends

LARGE = 4 * 2**20  # bytes: from here on the call is repaid


def fresh(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory on the device of ``like``, in its dtype or another; on a CPU in huge pages where it is
    large, since faulting it in by 4 KiB would cost more than the kernels."""
    memory = like.new_empty(shape) if dtype is None else like.new_empty(shape, dtype=dtype)
    if memory.is_cpu and memory.nbytes >= LARGE and backends.why_not("cpu") is None:
        backends.load("cpu").want_huge_pages(memory)
    return memory

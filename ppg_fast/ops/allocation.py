"""Large memory that is about to be written whole."""

import torch
from torch import Tensor

from ppg_fast import backends

LARGE = 4 * 2**20  # bytes: from here on the call is repaid


def fresh(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory; on a CPU in huge pages where it is large, since faulting it in by 4 KiB would cost more
    than the kernels."""
    memory = torch.empty(shape, dtype=dtype, device=device)
    if memory.is_cpu and memory.nbytes >= LARGE and backends.why_not("cpu") is None:
        backends.load("cpu").want_huge_pages(memory)
    return memory

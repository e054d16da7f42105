"""The clock of a CPU, and beside each call how fast the cores computed: on a shared machine others slow every call, and
not all alike."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

SIZE, PRODUCTS = 128, 8  # of floats: they stay in a core's second cache, and take a quarter of a millisecond
UNDISTURBED = 0.9  # of the speed that one call in twenty of a case exceeds


class Cores:
    """How fast this process's threads compute at the moment."""

    def __init__(self) -> None:
        self.left, self.right, self.product = torch.rand(3, torch.get_num_threads(), SIZE, SIZE)

    def gflops(self) -> float:
        """1e9 operations a second of small matrix products, one a thread, all threads together."""
        torch.bmm(self.left, self.right, out=self.product)  # into the cache, which the caller may have emptied
        start = time.perf_counter()
        for _ in range(PRODUCTS):
            torch.bmm(self.left, self.right, out=self.product)
        return 2e-9 * PRODUCTS * self.product.numel() * SIZE / (time.perf_counter() - start)


class CoreClock:
    """Times the calls of one contestant; ``gflops``: of each, the lower speed of before and after it."""

    def __init__(self, cores: Cores) -> None:
        self.cores = cores
        self.gflops: list[float] = []

    def __call__(self, call: Callable[[], Any], prepare: Callable[[], None]) -> float:
        prepare()
        before = self.cores.gflops()
        start = time.perf_counter()
        result = call()
        end = time.perf_counter()
        self.gflops.append(min(before, self.cores.gflops()))
        del result
        return end - start

    def facts(self) -> dict[str, Any]:
        """For the result file, call by call."""
        return {"core_gflops": [round(speed) for speed in self.gflops]}


def undisturbed(gflops: Sequence[float], case: Sequence[float]) -> list[bool]:
    """Which calls had the cores almost to themselves; ``case``: the speeds of everybody's calls."""
    least = UNDISTURBED * float(np.quantile(case, 0.95)) if case else 0.0
    return [speed >= least for speed in gflops]

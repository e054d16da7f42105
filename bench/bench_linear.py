"""linear_policy_loss: the loss and the gradients of hidden states and head, from hidden states; the cost of rows that
do not count."""

import os
from collections.abc import Callable
from typing import Any

import torch

from ppg_fast.ops.head import default_chunk_rows, equal_chunks

from . import peers, providers
from .ceilings import CHUNK_ROWS, bare_products
from .problem import WHOLE_TRUTH, Case, Problem, make_problem, make_truth
from .providers import Providers, gather
from .timing import Contestant

make = make_problem
SHARES = (0.5, 0.25, 0.1)
LEAN = 60 * 2**20  # bytes: the bar of the peak of a float32 head, V 50,000, D 256
WHOLE_TRUTH_ON_A_GPU = 1e13  # multiply-adds in float64, about a second there
MAKERS = [
    providers.ours_from_hidden,
    providers.ours_in_four_products,
    providers.eager,
    providers.compiled,
    peers.torch_chunked,
    peers.trl_head,
    peers.liger_chunked,
    peers.liger_chunked_eager,
    peers.cut_cross_entropy,
]
MATERIALISING = ("eager PyTorch", "torch.compile")


def cases(grid: str, device: str) -> list[Case]:
    """All rows active, fewer, and turns of zero advantage; then a head of today's size, at two shares unless the grid
    is full."""
    if grid == "quick":
        shares = ((1.0, 0.0), (0.25, 0.0), (1.0, 0.5))
        return [Case("linear", 64, 512, 32, device=device, active=active, zero=zero) for active, zero in shares]
    small = (8192, 128256, 4096) if device == "cuda" else (2048, 50000, 256)
    large = [(8192, 151936, 4096), (8192, 262144, 4096)] if device == "cuda" else [(8192, 151936, 512)]
    dtypes = ("bfloat16",) if device == "cuda" else ("float32", "bfloat16")
    found = []
    for dtype in dtypes:
        options: dict[str, Any] = {"dtype": dtype, "device": device}
        found.append(Case("linear", *small, **options))
        found += [Case("linear", *small, **options, active=share) for share in SHARES]
        found += [Case("linear", *small, **options, zero=0.5)]
    for shape in large if grid == "full" or device == "cpu" else []:
        shares = (1.0, *SHARES) if grid == "full" else (0.1, 1.0)
        found += [Case("linear", *shape, dtype="bfloat16", device=device, active=share) for share in shares]
    return found


def participants(case: Case) -> Providers:
    """Ours and the peers; where rows are masked, the peers also behind a caller who compacts."""
    found, missing = gather(MAKERS, case)
    if case.active < 1:
        found = [p for p in found if p.name != "Liger chunked GRPO, compiled=False"]
        found += [p.with_compaction() for p in found if p.kind == "peer"]
    kept = []
    for provider in found:
        rows = case.N * case.active if provider.compacted else case.N
        needed = rows * case.V * (3 * 4 + case.torch_dtype.itemsize)
        free = _free_bytes(case.device)
        if provider.name.startswith(MATERIALISING) and needed > 0.7 * free:
            missing[provider.name] = (
                f"holds the logits several times, about {needed / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free"
            )
        else:
            kept.append(provider)
    return kept, missing


def _free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def ceilings(problem: Problem, case: Case) -> list[Contestant]:
    """The matrix products of the rows that have a gradient; on a CPU, where all have one, also in chunks as ours, and
    in chunks so small that they and d_weight fit the bar of its peak."""
    found = bare_products(problem, case)
    if case.device == "cpu" and case.active == 1 and not case.zero and case.N <= CHUNK_ROWS:
        for rows in chunks_of(case):
            found += bare_products(problem, case, rows)
    return found


def chunks_of(case: Case) -> list[int]:
    """Rows of logits in a chunk of ours and, in float32, of one that stays below `LEAN` beside d_weight."""
    size = case.torch_dtype.itemsize
    ours = equal_chunks(case.N, default_chunk_rows(case.V, size, case.device))
    lean = (LEAN - case.V * case.D * size) // (case.V * size) if case.dtype == "float32" else 0
    return sorted({rows for rows in (ours, lean) if 0 < rows < case.N})


def ceiling_of(provider: providers.Provider) -> tuple[str, ...]:
    """Names of the ceilings, the fastest of which counts."""
    return ("three bare GEMMs",)


def checker(problem: Problem, case: Case) -> Callable[[Any], dict[str, float]]:
    """Errors of a result against float64."""
    truth = make_truth(problem, budget=WHOLE_TRUTH_ON_A_GPU if case.device == "cuda" else WHOLE_TRUTH)
    return lambda result: truth.errors(*result)


def work(case: Case) -> dict[str, float]:
    """Floating-point operations of the three products over the rows that have a gradient."""
    return {"flops": 6 * case.N * case.active * (1 - case.zero) * case.V * case.D}

"""How rows are laid over a device: blocks and warps, clusters, programs in flight. Mirrors csrc/cuda/plan.h

A shape depends on V and the device alone, never on numbers that change from call to call, which would compile another
kernel.
"""

import os
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path

import torch
import triton
from torch import Tensor

WARP_SIZE = 64 if torch.version.hip else 32
THREADS = 512  # of a CTA that holds a row, or a part of one: it fills the registers of an SM
SHARED = 64 << 10  # bytes of a row, so many of which L2 holds that several programs may share an SM
WAVES = 16  # of programs, where rows are read once
LARGEST_CLUSTER = 8  # CTAs; more is not portable
FIRST_WITH_CLUSTERS = (3, 8)  # Triton 3.6 fails to compile one, 3.7 aborts the process

Shape = dict[str, int | bool]


def strides(rows: Tensor) -> tuple[int, int]:
    """Batch and row stride of (B, L, V) in elements; 0 where the size is 1, so that an arbitrary stride compiles no
    other kernel."""
    B, L, V = rows.shape
    if V > 1 and rows.stride(2) != 1:
        raise ValueError(f"logits must have unit stride along the vocabulary, got strides {rows.stride()}")
    return rows.stride(0) if B > 1 else 0, rows.stride(1) if L > 1 else 0


def block_shape(V: int, threads: int, per_thread: int, element_size: int) -> Shape:
    """Columns of a block and warps that share it: ``per_thread`` columns per thread, at most ``threads`` threads.

    LANES is the number of columns in one access of 16 bytes per thread. enable_fp_fusion: Triton 3.10 fuses no
    multiply-adds by default.
    """
    block = min(threads * per_thread, max(1024, triton.next_power_of_2(V)))
    threads = max(128, block // per_thread)
    lanes = min(block, threads * 16 // element_size)
    return {"BLOCK_V": block, "LANES": lanes, "num_warps": threads // WARP_SIZE, "enable_fp_fusion": True}


def row_shape(logits: Tensor, softcap: bool) -> Shape:
    """How a row is read for its log-prob. The same for every kernel that does, since sums in another order have other
    bits.

    512 threads have 128 registers each and hold 64 columns of a row each; 32 where a softcap or an unaligned access
    keeps a second value per column alive. With 32 the exponentials are kept for the gradient. A longer row is read in
    blocks: where L2 holds enough of them, by programs of 128 threads, up to four an SM, since one that holds a row has
    the SM for itself and leaves memory idle while it computes; not on ROCm, whose compute units are many for their
    memory. A row that is longer still is held by a cluster of CTAs, or read in blocks by as many threads.
    """
    V, element_size = logits.shape[-1], logits.element_size()
    shared = V > THREADS * 32 and V * element_size <= SHARED and not torch.version.hip
    columns = 32 if softcap or narrow(V) or V <= THREADS * 32 else 64
    ctas = triton.next_power_of_2(triton.cdiv(V, THREADS * columns))
    if not shared and (ctas == 1 or (ctas <= LARGEST_CLUSTER and why_no_clusters(logits.device) is None)):
        shape = block_shape(V, ctas * THREADS, columns, element_size)
        shape["num_warps"] //= ctas
        return {"ONE_BLOCK": True, "KEEP_EXP": columns == 32, "num_ctas": ctas, **shape}
    shape = block_shape(V, THREADS // 4 if shared else THREADS, 32, element_size)
    return {"ONE_BLOCK": False, "KEEP_EXP": False, "num_ctas": 1, **shape}


def loop_shape(V: int, threads: int, element_size: int, softcap: bool, entropy: bool) -> Shape:
    """`block_shape` of a row that is read in blocks: 64 bytes per thread, fewer where other values take registers."""
    held = 16 if softcap and entropy else 32 if softcap or narrow(V) else 64
    return block_shape(V, threads, held // element_size, element_size)


def narrow(V: int) -> bool:
    """Whether rows of V columns are accessed column by column, each with a mask and an address, since not every row is
    aligned."""
    return V % 16 != 0


def number_or_off(number: float) -> float | None:
    """A number as the kernels take it: a float, since an int compiles another kernel; None, compiled out, for 0."""
    return float(number) if number else None


def on_device(tensor: Tensor) -> AbstractContextManager:
    """A context in which kernels are launched on the device of ``tensor``."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@cache
def programs(device: torch.device, threads: int, read_again: int = 0) -> int:
    """Number of programs that share the rows, of ``threads`` threads each (all those of a cluster).

    Rows that are read once: a multiple of what runs at a time, so that the last program adds little. Rows of
    ``read_again`` bytes that are read twice: as many as fit into half of the L2, so that the second read hits it and
    writes have the other half; at least one for every fourth SM, to keep memory busy, and at most what runs at a time.
    On ROCm as many as that: all dies share a large cache behind their small L2.
    """
    if device.type != "cuda":
        return 2  # interpreted
    about = torch.cuda.get_device_properties(device)
    at_once = max(about.multi_processor_count * THREADS // threads, 1)
    if not read_again:
        return WAVES * at_once
    if torch.version.hip:
        return at_once
    return min(max(about.L2_cache_size // 2 // read_again, about.multi_processor_count // 4), at_once)


def why_no_clusters(device: torch.device) -> str | None:
    """None where a row can be spread over the registers of a cluster of CTAs on ``device``, else the reason."""
    if torch.version.hip:
        return "clusters are NVIDIA's, this is ROCm"
    if device.type != "cuda":
        return "interpreted programs have no clusters"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        return f"clusters need sm_90, this is sm_{major}{minor}"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < FIRST_WITH_CLUSTERS:
        return f"clusters need Triton 3.8, this is {triton.__version__}"
    return cluster_probe(10 * major + minor)


@cache
def cluster_probe(sm: int) -> str | None:
    """None if this Triton compiles a cluster for ``sm``, tried once in a subprocess, else the error message."""
    command = [sys.executable, str(Path(__file__).with_name("cluster_probe.py")), str(sm)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
    return (
        f"Triton {triton.__version__} ended with {done.returncode} on a cluster for sm_{sm} and said: {said}"
        if done.returncode
        else None
    )

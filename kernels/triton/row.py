"""The two pieces every sweep over the vocabulary is made of: the statistics of a row and its gradient.

Exponents are kept in base 2, the hardware's own: with z = softcap(x) and factor = log2(e) / temperature, a logit weighs
2^((z - max z) factor). One exponential per element and sweep (two with a softcap), none for a rescale.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-1.0e38)  # below every finite logit of interest, and unlike -inf it can be subtracted from itself
FAR = tl.constexpr(-256.0)  # 2^FAR is 0 in float32: exponents are clamped here before they multiply, because 0 * -inf is NaN

WARP_SIZE = 64 if torch.version.hip else 32


@triton.jit
def row_offset(n, L, batch_stride, row_stride):
    """Elements before row n = b L + l; 64 bits, because B L V does not fit into 32."""
    return (n // L).to(tl.int64) * batch_stride + (n % L).to(tl.int64) * row_stride


@triton.jit
def tanh(x):
    """tanh to 4e-7 relative: (1 - e) / (1 + e), e = exp(-2|x|), loses the digits of a small x, so a polynomial takes over there.

    Source of the polynomial: Cephes, tanhf.c
    """
    size = tl.abs(x)
    square = x * x
    small = -5.70498872745e-3
    small = small * square + 2.06390887954e-2
    small = small * square - 5.37397155531e-2
    small = small * square + 1.33314422036e-1
    small = small * square - 3.33332819422e-1
    small = small * square * size + size
    e = tl.exp2(size * LOG2E * -2.0)
    magnitude = tl.where(size < 0.625, small, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def softcapped(x, logit_softcap):
    """z = softcap tanh(x / softcap) in float32, or x where the softcap is None."""
    z = x.to(tl.float32)
    if logit_softcap is not None:
        z = logit_softcap * tanh(z / logit_softcap)
    return z


@triton.jit
def temperature_of(n, temperatures, temperature):
    """The temperature of row n: its own, or the one of all rows."""
    if temperatures is not None:
        temperature = tl.load(temperatures + n)
    return temperature


@triton.jit
def fold_block(m, s, sd, x, there, factor, logit_softcap, ENTROPY: tl.constexpr):
    """Fold a block of logits into the running statistics: m = max z, and per lane s = sum of 2^d, sd = sum of 2^d d, d = (z - m) factor.

    Lanes are summed by the caller at the end, so that a block costs one reduction, and they are rescaled by one factor a block.
    """
    z = softcapped(x, logit_softcap)
    if logit_softcap is not None:
        z = tl.where(there, z, float("-inf"))  # a softcapped -inf would weigh something
    m_new = tl.maximum(m, tl.max(z))
    shift = tl.maximum((m - m_new) * factor, FAR)
    rescale = tl.exp2(shift)
    d = (z - m_new) * factor
    e = tl.exp2(d)
    if ENTROPY:
        sd = (sd + s * shift) * rescale + e * tl.maximum(d, FAR)
    s = s * rescale + e
    return m_new, s, sd


@triton.jit
def row_statistics(row, V, factor, logit_softcap, ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr):
    """-> m, s, sd of the row at ``row``, see `fold_block`, in one read of it; a block is loaded while the one before it is folded."""
    cols = tl.arange(0, BLOCK_V)
    m = tl.full((), LOWEST, tl.float32)
    s = tl.zeros((BLOCK_V,), tl.float32)
    sd = tl.zeros((BLOCK_V,), tl.float32)
    x = tl.load(row + cols, mask=cols < V, other=float("-inf"), eviction_policy="evict_last")
    for start in range(0, V, BLOCK_V):
        after = start + BLOCK_V + cols
        x_after = tl.load(row + after, mask=after < V, other=float("-inf"), eviction_policy="evict_last")
        m, s, sd = fold_block(m, s, sd, x, start + cols < V, factor, logit_softcap, ENTROPY)
        x = x_after
    return m, tl.sum(s), tl.sum(sd)


@triton.jit
def entropy_of(s, sd):
    """H = -sum p log p in nats from the statistics of a row; p = 2^d / s."""
    return (tl.log2(s) - sd / s) * LN2


@triton.jit
def block_gradient(x, cols, label, m, log2_s, entropy, g, h, factor, logit_softcap):
    """g (1[v = label] - p) - h p (log p + H) through the softcap, for the columns ``cols``.  p = 2^((z - m) factor) / s.

    ``g`` and ``h`` are already divided by the temperature; ``h`` None: no entropy term. The label's column is found by compare: a store
    to it would race with the row's own stores.
    """
    z = softcapped(x, logit_softcap)
    log2_p = (z - m) * factor - log2_s
    pull = g
    if h is not None:
        pull = g + h * (tl.maximum(log2_p, FAR) * LN2 + entropy)
    dz = tl.where(cols == label, g, 0.0) - tl.exp2(log2_p) * pull
    if logit_softcap is not None:
        t = z / logit_softcap
        dz = dz * (1.0 - t * t)
    return dz


@triton.jit
def zero_row(row, V, BLOCK_V: tl.constexpr):
    """Exact zeros into a row, which is not read."""
    cols = tl.arange(0, BLOCK_V)
    zeros = tl.zeros((BLOCK_V,), row.dtype.element_ty)
    for start in range(0, V, BLOCK_V):
        tl.store(row + start + cols, zeros, mask=start + cols < V)


def strides(rows: Tensor) -> tuple[int, int]:
    """Batch and row stride of (B, L, V) in elements; 0 where the size is 1: an arbitrary stride would ask for a kernel of its own."""
    B, L, V = rows.shape
    if V > 1 and rows.stride(2) != 1:
        raise ValueError(f"logits must have unit stride along the vocabulary, got strides {rows.stride()}")
    return rows.stride(0) if B > 1 else 0, rows.stride(1) if L > 1 else 0


def block_shape(V: int, threads: int, per_thread: int) -> dict[str, int]:
    """The columns of a block and the warps that share it, ``per_thread`` columns a thread and at most ``threads`` threads."""
    block = min(threads * per_thread, max(1024, triton.next_power_of_2(V)))
    return {"BLOCK_V": block, "num_warps": max(128, block // per_thread) // WARP_SIZE}


def loop_shape(V: int, threads: int, element_size: int, softcap: bool, entropy: bool) -> dict[str, int]:
    """`block_shape` of a row that is swept in blocks: 64 bytes a thread, fewer where something else takes registers."""
    held = 16 if softcap and entropy else 32 if softcap or narrow(V) else 64
    return block_shape(V, threads, held // element_size)


def narrow(V: int) -> bool:
    """Whether rows of V columns are accessed one by one, which takes a mask and an address a column: they are not all aligned."""
    return V % 16 != 0


def number_or_off(number: float) -> float | None:
    """A number as the kernels take it, always a float: an int would be a kernel of its own. None, compiled out, where it is 0."""
    return float(number) if number else None


def on_device(tensor: Tensor) -> AbstractContextManager:
    """Launches inside go to the device of ``tensor``, whichever is current outside."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()

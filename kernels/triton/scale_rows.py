"""Rows of a gradient times a number each, or all times one, in place or from float32 into 16 bits.

Mirrors csrc/*/scale_rows.*
"""

import triton
import triton.language as tl
from torch import Tensor

from .plan import loop_shape, on_device, programs, strides
from .row import row_offset

THREADS = 256  # per program
LENGTH = 16384  # of the rows that a tensor without gaps is cut into under one scale


@triton.jit(do_not_specialize=["scale", "N", "L", "scale_stride"])
def scale_rows_kernel(
    x, scale, out,  # scale (N,), or one for all with a stride of 0
    N, L, V: tl.int32, elements: tl.int64, scale_stride,
    batch_stride: tl.int64, row_stride: tl.int64, out_batch_stride: tl.int64, out_row_stride: tl.int64,
    IN_PLACE: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Grid-stride loop over rows; in place, a row of scale 1 is not touched. The last row may be shorter: N V is
    ``elements`` or more."""
    for n in range(tl.program_id(0), N, tl.num_programs(0)):
        factor = tl.load(scale + n * scale_stride)
        if (not IN_PLACE) or factor != 1.0:
            row = x + row_offset(n, L, batch_stride, row_stride)
            out_row = out + row_offset(n, L, out_batch_stride, out_row_stride)
            left = elements - row_offset(n, N, 0, V)
            cols = tl.arange(0, BLOCK_V)
            for start in range(0, V, BLOCK_V):
                at = start + cols
                inside = (at < V) & (at < left)
                scaled = tl.load(row + at, mask=inside).to(tl.float32) * factor
                tl.store(out_row + at, scaled.to(out.dtype.element_ty), mask=inside)


def scale_rows(x: Tensor, scale: Tensor, out: Tensor) -> None:
    """Write row n of ``x`` (B, L, V) times scale[n], (N,) float32, or times the one of (1,), into ``out``. Contract:
    ppg_fast/backends.py"""
    B, L, V = x.shape
    N, elements, places = B * L, x.numel(), (*strides(x), *strides(out))
    if N == 0:
        return
    if scale.numel() == 1 and x.is_contiguous() and out.is_contiguous():  # a bias, or short rows, fill the chip too
        N, V, places = triton.cdiv(elements, LENGTH), LENGTH, (0, LENGTH, 0, LENGTH)
        L = N
    in_place = x.data_ptr() == out.data_ptr()
    shape = loop_shape(V, THREADS, x.element_size(), False, False)
    count = programs(x.device, 8 * THREADS)  # 4 per SM: in place nearly every scale is 1
    with on_device(x):
        scale_rows_kernel[(min(N, count),)](
            x, scale, out, N, L, V, elements, 0 if scale.numel() == 1 else 1, *places, in_place, **shape
        )  # fmt: skip

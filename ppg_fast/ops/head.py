"""A linear head over the rows that count: the GEMMs around one chunk of them, the order in which chunks run."""

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ppg_fast.ops.allocation import fresh
from ppg_fast.ops.products import add_product, adds_in_float32, product_dtype, project, tiles

# of logits alive at once; on a GPU so that d_weight is added up once or twice
CHUNK_BYTES = {"cpu": 54 * 2**20, "cuda": 2**31}
MIN_CHUNK_ROWS = 256  # below, the fp32 accumulation of d_weight costs more than its GEMM
# of a frozen head on a CPU: each chunk packs all of the weight for BLAS, twice, which 400 rows repay and 64 do not
FROZEN_CHUNK_BYTES, MIN_FROZEN_ROWS = 80 * 2**20, 128
# of d_weight in float32, while a 16-bit product is added up tile by tile: near a CPU's cache, and enough for BLAS
SUM_TILE_BYTES, MIN_SUM_ROWS = 4 * 2**20, 1024
# chunks are padded to a multiple: BLAS takes other kernels for a few rows, and a row's bits would depend on its
# neighbours
GEMM_ROWS = 16
SPARE = GEMM_ROWS // 2  # rows of float32 before the first of a chunk whose gradient is rounded in place
LINE = 64  # elements: 128 bytes of 16 bits each


def row_stride(vocabulary: int) -> int:
    """Elements from one row of a chunk of logits to the next: every row begins a cache line of a GPU, whatever the
    vocabulary. A stride that is no multiple of 16 bytes costs cuBLAS its fast kernels, and ours their aligned path."""
    return -(-vocabulary // LINE) * LINE


def default_chunk_rows(vocabulary: int, element_size: int, device_type: str, frozen: bool = False) -> int:
    """Rows of a chunk, at most, under the memory budget of the device; ``element_size``: of a logit; ``frozen``: the
    head has no gradient."""
    row_bytes = row_stride(vocabulary) * element_size
    budget, least = CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"]), MIN_CHUNK_ROWS
    if frozen and device_type == "cpu":
        budget, least = FROZEN_CHUNK_BYTES, MIN_FROZEN_ROWS
    return max(least, budget // row_bytes // GEMM_ROWS * GEMM_ROWS)


def equal_chunks(rows: int, chunk_rows: int) -> int:
    """Rows of each chunk so that as few as may be are alike: a small last one would pay a whole pass over d_weight."""
    pieces = max(1, -(-rows // chunk_rows))
    return max(1, min(chunk_rows, -(-rows // (pieces * GEMM_ROWS)) * GEMM_ROWS))


# ---- what comes out of them ---------------------------------------------------------------------------------------
def row_outputs(like: Tensor, rows: int, entropy: bool, score_norms: bool) -> list[Tensor]:
    """Two columns, and those of entropy and score norms, (0,) unless wanted."""
    sizes = rows, rows, rows if entropy or score_norms else 0, rows if score_norms else 0
    return [torch.zeros(n, dtype=torch.float32, device=like.device) for n in sizes]


def gradients_like(hidden: Tensor, weight: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Empty d_hidden, d_weight and d_bias in the dtype of hidden, (0,) where not wanted."""
    shapes = hidden.shape, weight.shape, weight.shape[:1]
    d_hidden, d_weight, d_bias = (
        hidden.new_empty(shape if want else (0,)) for shape, want in zip(shapes, wanted, strict=True)
    )
    return d_hidden, d_weight, d_bias


def loss_scale(live: Tensor, d_logprob: Tensor, d_entropy: Tensor | None, temperatures: Tensor | float) -> Tensor:
    """The power of two, 0-d float32, that brings the largest gradient of a logit near 2^5 and so keeps the digits of
    the small ones in float16, found on the device among ``live`` rows (N,); 1 where there is none."""
    size = d_logprob.abs() if d_entropy is None else d_logprob.abs() + 16 * d_entropy.abs()  # |p (log p + H)| <= log V
    size = size / temperatures
    most = torch.nn.functional.pad(torch.where(live & size.isfinite(), size, 0.0), (0, 1)).amax()
    return torch.where(most > 0, torch.ldexp(torch.ones_like(most), (5 - most.frexp().exponent).clamp(-99, 99)), 1.0)


# ---- GEMMs -----------------------------------------------------------------------------------------------------------
class Chunk(NamedTuple):
    """Some rows in the middle of the sweep."""

    rows: Tensor  # (n,) their numbers
    x: Tensor  # (n or more, D) their hidden states, zeros behind them
    logits: Tensor  # (n or more, V), and their gradient afterwards
    target: slice | Tensor  # their places in d_hidden
    alone: bool  # whether it holds all rows of its sweep


class Head:
    """A linear head over chunks of rows: logits = x W^T + b, and the gradients of its three inputs, those that are
    wanted. ``kernels``: of a backend. ``float32``: the logits, else they are in the dtype of the inputs. ``packed``:
    d_hidden holds the rows of the sweep alone, that many, in its order."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        chunk_rows: int,
        wanted: tuple[bool, bool, bool],
        kernels: ModuleType,
        float32: bool = False,
        packed: int | None = None,
    ) -> None:
        self.hidden, self.weight, self.bias, self.chunk_rows = hidden, weight, bias, chunk_rows
        self.wanted, self.kernels, self.packed = wanted, kernels, packed is not None
        self.logits_dtype = torch.float32 if float32 else hidden.dtype
        self.multiplied = product_dtype(hidden.dtype, hidden.device.type)
        # of the gradient of the logits when it is multiplied: one in float32 is rounded for products of 16 bits
        self.gradient_dtype = self.multiplied if float32 else hidden.dtype
        rows, D = hidden.shape
        self.d_hidden = hidden.new_zeros((rows if packed is None else packed, D) if wanted[0] else 0)
        self.d_weight: Tensor | None = None  # the first product is written, not added to zeros
        self.d_bias = hidden.new_zeros(weight.shape[0] if wanted[2] else 0, dtype=torch.float32)
        # the row kernel's gradient is taken this many times, a 0-d power of two: `loss_scale`; None: once
        self.scale: Tensor | None = None
        self.buffer: Tensor | None = None
        # a tile of d_weight and, if a CPU would have to allocate it to add it up, the same in float32
        self.tile: list[Tensor] | None = None

    def logits(self, rows: Tensor) -> Tensor:
        """The logits (1, n, V) of these rows, one chunk whatever their number; they live until the next ones."""
        self.chunk_rows = max(self.chunk_rows, rows.numel())
        return next(self.chunks(rows, ascending=False)).logits[None, : rows.numel()]

    def chunks(self, rows: Tensor, skip: Tensor | None = None, ascending: bool = True) -> Iterator[Chunk]:
        """The logits of each chunk of ``rows``; they live until the next one."""
        size, whole = equal_chunks(rows.numel(), self.chunk_rows), skip is None and rows.numel() == self.hidden.shape[0]
        whole = whole and ascending
        for start in range(0, rows.numel(), size):
            chunk = rows[start : start + size]
            n, padded = chunk.numel(), -(-chunk.numel() // GEMM_ROWS) * GEMM_ROWS
            here = slice(start, start + n)
            if whole and n == padded:
                x = self.hidden[here]
            else:
                x = self.hidden.new_zeros(padded, self.hidden.shape[1])
                torch.index_select(self.hidden, 0, chunk, out=x[:n])
                if skip is not None:  # what they hold may be NaN, which no zero gradient takes out of d_weight
                    x[:n].masked_fill_(skip[here, None], 0.0)
            logits = self._logits(min(size, rows.numel()))[:padded]
            project(x, self.weight, self.bias, logits)
            yield Chunk(chunk, x, logits, here if whole or self.packed else chunk, size >= rows.numel())

    def _logits(self, rows: int) -> Tensor:
        """Memory of the logits of at least ``rows`` rows, (rows, V), the same one again."""
        spare = SPARE if self.logits_dtype != self.gradient_dtype and any(self.wanted) else 0
        rows, V = spare + -(-rows // GEMM_ROWS) * GEMM_ROWS, self.weight.shape[0]
        if self.buffer is None or self.buffer.shape[0] < rows:
            self.buffer = fresh(self.hidden, (rows, row_stride(V)), self.logits_dtype)
            self.buffer[:, V:] = 0  # oneDNN's AMX products read on to the stride and take what is there times 0
        return self.buffer[spare:, :V]

    def _rounded(self, d: Tensor) -> Tensor:
        """The gradient ``d`` (n, V) where it is as it is multiplied; else rounded into its own memory.

        Rows of 16 bits are half as long: with `SPARE` rows before the first, no step writes what a later one reads.
        """
        if d.dtype == self.gradient_dtype:
            return d
        assert self.buffer is not None
        n, once = len(d), torch.ones(1, device=d.device)
        V, memory = d.shape[1], self.buffer.view(self.gradient_dtype).view(-1, self.buffer.shape[1])[:n]
        rounded = memory[:, :V]
        start = 0
        while start < n:
            end = min(n, 2 * (SPARE + start))
            self.kernels.scale_rows(d[None, start:end], once, rounded[None, start:end])
            start = end
        memory[:, V:] = 0  # halves of float32 numbers are there; as in `_logits`
        return rounded

    def sweep(
        self, rows: Tensor, row_kernel: Callable[[Tensor, Tensor], None], with_grad: bool, skip: Tensor | None = None
    ) -> None:
        """Logits, ``row_kernel(row numbers, logits (1, n, V))`` and, ``with_grad``, the GEMMs of its gradient, chunk by
        chunk; a gradient comes from one sweep."""
        for chunk in self.chunks(rows, skip):
            row_kernel(chunk.rows, chunk.logits[None, : chunk.rows.numel()])
            if with_grad:
                self.accumulate(chunk)

    def accumulate(self, chunk: Chunk) -> None:
        """Carry the gradient that now stands in the logits of ``chunk`` into the wanted gradients."""
        n, x, d = chunk.rows.numel(), chunk.x, self._rounded(chunk.logits)
        d[n:] = 0
        if self.multiplied != x.dtype:
            self._accumulate_tiles(chunk, d)
        else:
            if self.wanted[0] and isinstance(chunk.target, slice) and len(d) == n and self.scale is None:
                torch.mm(d, self.weight, out=self.d_hidden[chunk.target])
            elif self.wanted[0]:
                self._write_hidden(chunk, d @ self.weight)
            if self.wanted[1]:
                self._accumulate_weight(x, d, chunk.alone)
        if self.wanted[2]:
            self.d_bias += d.sum(0, dtype=torch.float32)

    def _write_hidden(self, chunk: Chunk, product: Tensor) -> None:
        """d_hidden of the rows of ``chunk`` from (n or more, D) of them in any dtype."""
        product = product[: chunk.rows.numel()]
        if self.scale is not None:
            scaled = torch.empty_like(product, dtype=self.hidden.dtype)
            self.kernels.scale_rows(product[None], self._once(), scaled[None])
            product = scaled
        self.d_hidden[chunk.target] = product.to(self.hidden.dtype)

    def _sum_of_weight(self, alone: bool) -> tuple[Tensor, bool]:
        """d_weight as it is added up, in float32, and whether nothing is there yet; the one product there is is in the
        dtype of the weight, but for one that the float16 may not fit before `loss_scale` is taken back."""
        if self.d_weight is not None:
            return self.d_weight, False
        dtype = self.weight.dtype if alone and self.scale is None else torch.float32
        self.d_weight = fresh(self.hidden, self.weight.shape, dtype)
        return self.d_weight, True

    def _accumulate_weight(self, x: Tensor, d: Tensor, alone: bool) -> None:
        """d_weight += d^T x of 16-bit ``d`` and ``x``, or both in float32."""
        total, first = self._sum_of_weight(alone)
        if total.dtype == d.dtype:
            total.addmm_(d.t(), x, beta=int(not first))
        elif adds_in_float32(d):
            add_product(total, d.t(), x, beta=int(not first))
        else:  # each chunk is rounded once, the sum is not
            if d.dtype == torch.float16:  # nor has a sum over many rows room in it
                x = x.float()
            if self.tile is None:
                rows, D = max(MIN_SUM_ROWS, SUM_TILE_BYTES // (4 * max(1, x.shape[1]))), x.shape[1]
                widens = total.is_cpu and total.dtype != x.dtype
                dtypes = (x.dtype, total.dtype) if widens else (x.dtype,)
                self.tile = [x.new_empty(min(rows, len(total)), D, dtype=dtype) for dtype in dtypes]
            size = len(self.tile[0])
            for part, columns in zip(total.split(size), d.split(size, 1), strict=True):
                product, *widened = (memory[: len(part)] for memory in self.tile)
                torch.mm(columns.to(x.dtype).t(), x, out=product)
                part.copy_(product) if first else part.add_(widened[0].copy_(product) if widened else product)

    def _accumulate_tiles(self, chunk: Chunk, d: Tensor) -> None:
        """d_hidden and d_weight by float32 products of 16-bit operands."""
        x = chunk.x.float()
        d_x = torch.zeros_like(x) if self.wanted[0] else None
        total, first = self._sum_of_weight(chunk.alone) if self.wanted[1] else (None, True)
        for at, rows in tiles(self.weight, cast=self.wanted[0]):
            part = d[:, at].float()
            if d_x is not None:
                d_x.addmm_(part, rows)
            if total is not None and total.dtype == torch.float32:
                total[at].addmm_(part.t(), x, beta=int(not first))
            elif total is not None:
                total[at] = part.t() @ x
        if d_x is not None:
            self._write_hidden(chunk, d_x)

    def _once(self) -> Tensor:
        """What takes `scale` back, (1,) float32."""
        return torch.ones(1, device=self.hidden.device) if self.scale is None else self.scale.reciprocal().view(1)

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """d_hidden, d_weight, d_bias in the dtype of the inputs; (0,) where not wanted."""
        self.buffer, self.tile, dtype = None, None, self.weight.dtype
        if self.d_weight is None:
            d_weight = self.weight.new_zeros(self.weight.shape if self.wanted[1] else 0)
        elif self.d_weight.dtype == dtype:  # there is no scale: float16 is added up in float32
            d_weight = self.d_weight
        else:
            d_weight = fresh(self.hidden, self.weight.shape, dtype)
            self.kernels.scale_rows(self.d_weight[None], self._once(), d_weight[None])
        d_bias = self.d_bias if self.scale is None else self.d_bias / self.scale
        return self.d_hidden, d_weight, d_bias.to(dtype)

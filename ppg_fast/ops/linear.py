"""The loss and the log-probs from hidden states: the row kernels in a loop over chunks of compacted rows, GEMMs around them.

The [N, V] logits never exist: one chunk of them does, and its gradient takes its place. Only FULL rows go through all three GEMMs
(logits, d_hidden, d_weight; two where the head is frozen), FORWARD-ONLY rows through the first, SKIP rows through none.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ppg_fast import backends, reference
from ppg_fast.ops.checks import check_labels
from ppg_fast.ops.memory import fresh
from ppg_fast.ops.policy_loss import NUMBERS, SCHEMA, PerRow
from ppg_fast.spec import PolicyLossSpec

CHUNK_BYTES = {"cpu": 48 * 2**20, "cuda": 2**30}  # of logits alive at once
MIN_CHUNK_ROWS = 256  # below, the fp32 accumulation of d_weight costs more than its GEMM
TILE = 2048  # rows of d_weight whose 16-bit product is still in a CPU's cache when it is added up in float32
GEMM_ROWS = 16  # chunks are padded to a multiple: BLAS takes other kernels for a few rows, and a row's bits would depend on its neighbours


def default_chunk_rows(hidden: Tensor, vocabulary: int) -> int:
    """Rows of a chunk under the memory budget of the device."""
    budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
    return max(MIN_CHUNK_ROWS, budget // (vocabulary * hidden.element_size()) // GEMM_ROWS * GEMM_ROWS)


class Head:
    """A linear head over chunks of rows: logits = x W^T + b, and the gradients of its three inputs, those that are wanted."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk_rows: int, wanted: tuple[bool, bool, bool]) -> None:
        self.hidden, self.weight, self.bias, self.chunk_rows = hidden, weight, bias, chunk_rows
        like = {"dtype": torch.float32, "device": hidden.device}
        self.d_hidden = torch.zeros_like(hidden) if wanted[0] else hidden.new_empty(0)
        self.d_weight = fresh(weight.shape, **like) if wanted[1] else torch.empty(0, **like)
        self.d_bias = torch.zeros(weight.shape[0], **like) if wanted[2] else torch.empty(0, **like)
        self.wanted = wanted
        self.buffer: Tensor | None = None
        self.started = False  # until then d_weight is not even zero: the first product is written, not added

    def chunks(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Row numbers and logits (1, n, V) of each chunk; the logits live until the next one."""
        for start in range(0, rows.numel(), self.chunk_rows):
            chunk = rows[start : start + self.chunk_rows]
            n, padded = chunk.numel(), -(-chunk.numel() // GEMM_ROWS) * GEMM_ROWS
            if rows.numel() == self.hidden.shape[0] and n == padded:
                self.x = self.hidden[start : start + n]  # every row takes part: no copy
            else:
                self.x = self.hidden.new_zeros(padded, self.hidden.shape[1])
                torch.index_select(self.hidden, 0, chunk, out=self.x[:n])
            if self.buffer is None or self.buffer.shape[0] < padded:
                self.buffer = fresh((padded, self.weight.shape[0]), self.hidden.dtype, self.hidden.device)
            self.logits = self.buffer[:padded]
            if self.bias is None:
                torch.mm(self.x, self.weight.t(), out=self.logits)
            else:
                torch.addmm(self.bias, self.x, self.weight.t(), out=self.logits)
            yield chunk, self.logits[None, :n]

    def gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """d_hidden, d_weight, d_bias; (0,) where not wanted."""
        if not self.started:
            self.d_weight.zero_()
        return self.d_hidden, self.d_weight, self.d_bias

    def accumulate(self, rows: Tensor) -> None:
        """Carry the gradient that now stands in the logits of the last chunk, ``rows``, into the wanted gradients.

        d_weight and d_bias add up in float32.
        """
        x, d = self.x, self.logits
        d[rows.numel() :] = 0
        if self.wanted[0]:
            self.d_hidden[rows] = (d @ self.weight)[: rows.numel()]
        if self.wanted[1]:
            if d.dtype == torch.float32:
                self.d_weight.addmm_(d.t(), x, beta=int(self.started))
            elif d.is_cuda:
                torch.addmm(self.d_weight, d.t(), x, out_dtype=torch.float32, beta=int(self.started), out=self.d_weight)
            else:  # PyTorch's CPU has no GEMM from 16 to 32 bits: each chunk is rounded once, the sum is not
                for d_weight, columns in zip(self.d_weight.split(TILE), d.split(TILE, 1), strict=True):
                    product = columns.t() @ x
                    d_weight.add_(product) if self.started else d_weight.copy_(product)
            self.started = True
        if self.wanted[2]:
            self.d_bias += d.sum(0, dtype=torch.float32)


def _pick(values: tuple[Tensor | None, ...], rows: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(None if v is None else v[rows] for v in values)


# ---- linear_policy_loss ----------------------------------------------------------------------------------------------------------------
LINEAR_SCHEMA = (
    f"(Tensor hidden, Tensor weight, Tensor? bias, {SCHEMA}, int chunk_rows, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LINEAR_ARGUMENTS = SCHEMA.count(",") + 3


@torch.library.custom_op("ppg_fast::linear_policy_loss", mutates_args=(), schema=LINEAR_SCHEMA)
def linear_policy_loss_op(hidden: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    """-> weighted loss, log-prob, entropy (N,) float32, and d_hidden (N, D), d_weight (V, D), d_bias (V,) of the summed loss.

    d_hidden in the dtype of hidden, the other two in float32; (0,) where not wanted.
    """
    labels, *per_row = arguments[:7]
    *numbers, entropy, _, validate, backend, chunk_rows, wanted = arguments[7:]
    check_labels(labels, weight.shape[0], validate)
    spec, kernels = PolicyLossSpec(*numbers), backends.load(backend)
    entropy = entropy or spec.entropy_coef != 0
    N = labels.numel()
    loss, logprob = (torch.zeros(N, dtype=torch.float32, device=hidden.device) for _ in range(2))
    ent = torch.zeros(N if entropy else 0, dtype=torch.float32, device=hidden.device)
    head = Head(hidden, weight, bias, chunk_rows, tuple(wanted))  # type: ignore[arg-type]
    full = (labels >= 0) & ((per_row[0] != 0) | spec.needs_every_row) & any(wanted)
    for kind, with_grad in ((full, True), ((labels >= 0) & ~full, False)):
        for rows, logits in head.chunks(kind.nonzero().squeeze(1)):
            out = kernels.policy_loss(logits, labels[rows], *_pick(tuple(per_row), rows), spec, entropy, logits if with_grad else None)
            loss[rows], logprob[rows] = out[0], out[1]
            if entropy:
                ent[rows] = out[2]
            if with_grad:
                head.accumulate(rows)
    return loss, logprob, ent, *head.gradients()


@linear_policy_loss_op.register_fake
def _(hidden, weight, bias, *arguments):
    N, wanted = hidden.shape[0], arguments[-1]
    entropy = arguments[-6] or arguments[7 + NUMBERS.index("entropy_coef")] != 0
    rows = [hidden.new_empty(n, dtype=torch.float32) for n in (N, N, N if entropy else 0)]
    d_hidden = torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0)
    d_weight = hidden.new_empty(weight.shape if wanted[1] else (0,), dtype=torch.float32)
    return *rows, d_hidden, d_weight, hidden.new_empty(weight.shape[:1] if wanted[2] else (0,), dtype=torch.float32)


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # else the outputs that are gradients get zeros of their size
    ctx.save_for_backward(*output[3:])
    ctx.dtypes, ctx.wanted = tuple(None if t is None else t.dtype for t in inputs[:3]), inputs[-1]


def _backward_linear(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * (3 + LINEAR_ARGUMENTS)
    upstream = d_loss[:1].sum()  # the public function hands out the sum alone, so every element is the same
    unscaled = type(d_loss) is Tensor and d_loss.is_cpu and bool(upstream == 1)  # a tracer's tensor has no values to branch on
    saved = zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
    return *(((d if unscaled else d * upstream).to(dtype) if wanted else None) for d, dtype, wanted in saved), *[None] * LINEAR_ARGUMENTS


linear_policy_loss_op.register_autograd(_backward_linear, setup_context=_setup_linear)


def linear_policy_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, per_row: PerRow, spec: PolicyLossSpec,
    validate: bool, backend: str, chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Weighted loss of each row, whose SUM is differentiable in hidden, weight and bias; log-prob and entropy. (N,) float32."""
    if backend == "reference":
        return _reference(hidden, weight, bias, labels, per_row, spec, validate, chunk_rows)
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    numbers = (getattr(spec, name) for name in NUMBERS)
    arguments = (labels, *per_row, *numbers, True, any(wanted), validate, backend, chunk_rows, wanted)
    return linear_policy_loss_op(hidden, weight, bias, *arguments)[:3]


def _reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, per_row: PerRow, spec: PolicyLossSpec,
    validate: bool, chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same by plain PyTorch: chunks of active rows under activation checkpointing, so that one chunk of logits is alive at a time."""
    check_labels(labels, weight.shape[0], validate)

    def chunk_loss(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *columns: Any) -> tuple[Tensor, Tensor, Tensor]:
        per_row = PerRow(*columns)
        scaled = spec if per_row.temperatures is None else replace(spec, temperature=per_row.temperatures)
        return reference.policy_loss(torch.nn.functional.linear(x, weight, bias).float(), labels, *per_row[:5], scaled)

    outputs = [torch.zeros(labels.numel(), device=hidden.device) for _ in range(3)]
    for rows in (labels >= 0).nonzero().squeeze(1).split(chunk_rows):
        x = hidden.index_select(0, rows)
        parts = checkpoint(chunk_loss, x, weight, bias, labels[rows], *_pick(per_row, rows), use_reentrant=False)
        outputs = [out.index_put((rows,), part) for out, part in zip(outputs, parts, strict=True)]
    return outputs[0], outputs[1], outputs[2]


# ---- linear_token_logprobs ---------------------------------------------------------------------------------------------------------------
@torch.library.custom_op("ppg_fast::linear_token_logprobs", mutates_args=())
def linear_token_logprobs_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, temperatures: Tensor | None, temperature: float,
    logit_softcap: float, entropy: bool, validate: bool, backend: str, chunk_rows: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> log-prob, entropy ((0,) unless wanted) and log-sum-exp of each row, (N,) float32; zeros where masked."""
    check_labels(labels, weight.shape[0], validate)
    kernels, N = backends.load(backend), labels.numel()
    logprob, ent, lse = (torch.zeros(n, dtype=torch.float32, device=hidden.device) for n in (N, N if entropy else 0, N))
    head = Head(hidden, weight, bias, chunk_rows, (False, False, False))
    for rows, logits in head.chunks((labels >= 0).nonzero().squeeze(1)):
        temps = None if temperatures is None else temperatures[rows]
        out = kernels.logprobs_fwd(logits, labels[rows], temps, temperature, logit_softcap, entropy)
        logprob[rows], lse[rows] = out[0], out[2]
        if entropy:
            ent[rows] = out[1]
    return logprob, ent, lse


@torch.library.custom_op("ppg_fast::linear_token_logprobs_bwd", mutates_args=())
def linear_token_logprobs_bwd_op(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, lse: Tensor, entropy: Tensor, d_logprob: Tensor,
    d_entropy: Tensor | None, temperatures: Tensor | None, temperature: float, logit_softcap: float, backend: str, chunk_rows: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> d_hidden, d_weight and d_bias of `linear_token_logprobs`; the logits of rows with a gradient are computed again."""
    kernels = backends.load(backend)
    head = Head(hidden, weight, bias, chunk_rows, tuple(wanted))  # type: ignore[arg-type]
    live = (labels >= 0) & ((d_logprob != 0) if d_entropy is None else (d_logprob != 0) | (d_entropy != 0))
    for rows, logits in head.chunks(live.nonzero().squeeze(1)):
        per_row = (lse, entropy if d_entropy is not None else None, d_logprob, d_entropy, temperatures)
        row_lse, ent, d_l, d_h, temps = _pick(per_row, rows)
        ent = entropy if ent is None else ent
        kernels.logprobs_bwd(logits, labels[rows], row_lse, ent, d_l, d_h, temps, temperature, logit_softcap, logits)
        head.accumulate(rows)
    return head.gradients()


@linear_token_logprobs_op.register_fake
def _(hidden, weight, bias, labels, temperatures, temperature, logit_softcap, entropy, validate, backend, chunk_rows):
    N = hidden.shape[0]
    return tuple(hidden.new_empty(n, dtype=torch.float32) for n in (N, N if entropy else 0, N))


@linear_token_logprobs_bwd_op.register_fake
def _(hidden, weight, *arguments):
    wanted = arguments[-1]
    d_hidden = torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0)
    d_weight = hidden.new_empty(weight.shape if wanted[1] else (0,), dtype=torch.float32)
    return d_hidden, d_weight, hidden.new_empty(weight.shape[:1] if wanted[2] else (0,), dtype=torch.float32)


def _setup_linear_logprobs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, temperatures, temperature, logit_softcap, entropy, _, backend, chunk_rows = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, output[2], output[1], temperatures)
    ctx.numbers, ctx.entropy = (temperature, logit_softcap, backend, chunk_rows), entropy


def _backward_linear_logprobs(ctx: Any, d_logprob: Tensor | None, d_entropy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, labels, lse, entropy, temperatures = ctx.saved_tensors
    d_logprob = torch.zeros_like(lse) if d_logprob is None else d_logprob
    d_entropy = d_entropy.contiguous() if ctx.entropy and d_entropy is not None else None
    wanted = [ctx.needs_input_grad[i] for i in range(3)]
    rows = labels, lse, entropy, d_logprob.contiguous(), d_entropy, temperatures
    grads = linear_token_logprobs_bwd_op(hidden, weight, bias, *rows, *ctx.numbers, wanted)
    inputs = zip(grads, (hidden, weight, bias), wanted, strict=True)
    return *(g.to(t.dtype) if want else None for g, t, want in inputs), *[None] * 8


linear_token_logprobs_op.register_autograd(_backward_linear_logprobs, setup_context=_setup_linear_logprobs)


def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, temperatures: Tensor | None, temperature: float,
    logit_softcap: float, entropy: bool, validate: bool, backend: str, chunk_rows: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Log-prob and entropy ((0,) unless wanted) of each row, (N,) float32, differentiable in hidden, weight and bias."""
    if backend == "reference":
        spec = PolicyLossSpec(temperature=temperature, logit_softcap=logit_softcap)
        per_row = PerRow(torch.zeros(labels.shape, device=hidden.device), None, None, None, None, temperatures)
        return _reference(hidden, weight, bias, labels, per_row, spec, validate, chunk_rows)[1:]
    numbers = temperature, logit_softcap, entropy, validate, backend, chunk_rows
    return linear_token_logprobs_op(hidden, weight, bias, labels, temperatures, *numbers)[:2]

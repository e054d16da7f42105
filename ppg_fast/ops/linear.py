"""The loss and the log-probs from hidden states: the row kernels in a loop over chunks of compacted rows, GEMMs around
them.

The [N, V] logits never exist: one chunk of them does, and its gradient takes its place. Only FULL rows go through all
three GEMMs (logits, d_hidden, d_weight; two where the head is frozen), FORWARD-ONLY rows through the first, SKIP rows
through none.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ppg_fast import backends
from ppg_fast.ops.checks import check_labels
from ppg_fast.ops.head import Head, check_bound, counted, default_chunk_rows, partition
from ppg_fast.ops.policy_loss import NUMBERS, SCHEMA, PerRow, reference_policy_loss
from ppg_fast.spec import PolicyLossSpec

__all__ = [
    "default_chunk_rows",
    "linear_policy_loss",
    "linear_policy_loss_op",
    "linear_token_logprobs",
    "linear_token_logprobs_op",
]


def _pick(values: tuple[Tensor | None, ...], rows: Tensor) -> tuple[Tensor | None, ...]:
    return tuple(None if v is None else v[rows] for v in values)


# ---- linear_policy_loss ----------------------------------------------------------------------------------------------
LINEAR_SCHEMA = (
    f"(Tensor hidden, Tensor weight, Tensor? bias, {SCHEMA}, int chunk_rows, int? max_active_rows, bool[] wanted) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
LINEAR_ARGUMENTS = SCHEMA.count(",") + 4


def _loss_and_gradients(hidden: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    """-> weighted loss, log-prob, entropy, score norm (N,) float32, and d_hidden (N, D), d_weight (V, D), d_bias (V,)
    of the summed loss.

    d_hidden in the dtype of hidden, the other two in float32; (0,) where not wanted.
    """
    labels, *per_row = arguments[:7]
    *numbers, entropy, score_norms, _, validate, backend, chunk_rows, bound, wanted = arguments[7:]
    check_labels(labels, weight.shape[0], validate)
    spec, kernels = PolicyLossSpec(*numbers), backends.load(backend)
    entropy = entropy or score_norms or spec.entropy_coef != 0
    N = labels.numel()
    loss, logprob = (torch.zeros(N, dtype=torch.float32, device=hidden.device) for _ in range(2))
    ent, norms = (
        torch.zeros(N if wants else 0, dtype=torch.float32, device=hidden.device) for wants in (entropy, score_norms)
    )
    head = Head(hidden, weight, bias, chunk_rows, tuple(wanted))  # type: ignore[arg-type]
    full = (labels >= 0) & ((per_row[0] != 0) | spec.needs_every_row) & any(wanted)
    parts = partition(full, (labels >= 0) & ~full, bound, counted(labels, bound, validate))
    if parts.excess is not None:  # by the weight NaN reaches the loss and all gradients
        per_row[1] = parts.excess.expand(N) + (1.0 if per_row[1] is None else per_row[1])

    def kernel(rows: Tensor, logits: Tensor, dlogits: Tensor | None) -> None:
        norm = torch.empty_like(loss[: rows.numel()]) if score_norms else None
        out = kernels.policy_loss(logits, labels[rows], *_pick(tuple(per_row), rows), spec, entropy, dlogits, norm)
        loss[rows], logprob[rows] = out[0], out[1]
        if entropy:
            ent[rows] = out[2]
        if norm is not None:
            norms[rows] = norm

    head.sweep(
        parts.full, lambda rows, logits: kernel(rows, logits, logits if any(wanted) else None), any(wanted), parts.skip
    )
    head.sweep(parts.forward, lambda rows, logits: kernel(rows, logits, None), False)
    return loss, logprob, ent, norms, *head.gradients()


linear_policy_loss_op = torch.library.custom_op(
    "ppg_fast::linear_policy_loss", _loss_and_gradients, mutates_args=(), schema=LINEAR_SCHEMA
)


@linear_policy_loss_op.register_fake
def _(hidden, weight, bias, *arguments):
    N, wanted, norm = hidden.shape[0], arguments[-1], arguments[-7]
    entropy = arguments[-8] or norm or arguments[7 + NUMBERS.index("entropy_coef")] != 0
    rows = [hidden.new_empty(n, dtype=torch.float32) for n in (N, N, N if entropy else 0, N if norm else 0)]
    d_hidden = torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0)
    d_weight = hidden.new_empty(weight.shape if wanted[1] else (0,), dtype=torch.float32)
    return *rows, d_hidden, d_weight, hidden.new_empty(weight.shape[:1] if wanted[2] else (0,), dtype=torch.float32)


def _setup_linear(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # else the outputs that are gradients get zeros of their size
    ctx.save_for_backward(*output[4:])
    ctx.dtypes, ctx.wanted = tuple(None if t is None else t.dtype for t in inputs[:3]), inputs[-1]


def _backward_linear(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,) * (3 + LINEAR_ARGUMENTS)
    upstream = d_loss[:1].sum()  # the public function hands out the sum alone, so every element is the same
    # a tracer's tensor has no values to branch on
    unscaled = type(d_loss) is Tensor and d_loss.is_cpu and bool(upstream == 1)
    saved = zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
    scaled = (
        (d.to(dtype) if unscaled else _scaled(d, upstream, dtype)) if wanted else None for d, dtype, wanted in saved
    )
    return *scaled, *[None] * LINEAR_ARGUMENTS


def _scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient * upstream in ``dtype``. On a GPU in one pass: a float32 product in between would be as large as
    d_weight."""
    if gradient.is_cuda:
        return torch.mul(gradient, upstream, out=torch.empty_like(gradient, dtype=dtype))
    return (gradient * upstream).to(dtype)


linear_policy_loss_op.register_autograd(_backward_linear, setup_context=_setup_linear)


def linear_policy_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, per_row: PerRow, spec: PolicyLossSpec,
    validate: bool, backend: str, chunk_rows: int, max_active_rows: int | None, score_norms: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Weighted loss of each row, whose SUM is differentiable in hidden, weight and bias; log-prob, entropy, score norm.
    (N,) float32."""
    if backend == "reference":
        return _reference(
            hidden, weight, bias, labels, per_row, spec, validate, chunk_rows, max_active_rows, score_norms
        )
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    numbers = (getattr(spec, name) for name in NUMBERS)
    arguments = (
        labels,
        *per_row,
        *numbers,
        True,
        score_norms,
        any(wanted),
        validate,
        backend,
        chunk_rows,
        max_active_rows,
        wanted,
    )
    return linear_policy_loss_op(hidden, weight, bias, *arguments)[:4]


def _reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, per_row: PerRow, spec: PolicyLossSpec,
    validate: bool, chunk_rows: int, max_active_rows: int | None, score_norms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The same by plain PyTorch: chunks of active rows under activation checkpointing, so that one chunk of logits is
    alive at a time."""
    check_labels(labels, weight.shape[0], validate)

    def chunk_loss(x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *columns: Any) -> tuple[Tensor, ...]:
        logits = torch.nn.functional.linear(x, weight, bias).float()
        return reference_policy_loss(logits, labels, PerRow(*columns), spec, score_norms)[: len(outputs)]

    outputs = [torch.zeros(labels.numel(), device=hidden.device) for _ in range(3 + score_norms)]
    active = (labels >= 0).nonzero().squeeze(1)
    check_bound(active.numel(), max_active_rows)
    for rows in active.split(chunk_rows):
        x = hidden.index_select(0, rows)
        parts = checkpoint(chunk_loss, x, weight, bias, labels[rows], *_pick(per_row, rows), use_reentrant=False)
        outputs = [out.index_put((rows,), part) for out, part in zip(outputs, parts, strict=True)]
    return outputs[0], outputs[1], outputs[2], outputs[3] if score_norms else hidden.new_empty(0, dtype=torch.float32)


# ---- linear_token_logprobs -------------------------------------------------------------------------------------------
def _logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, temperatures: Tensor | None,
    temperature: float,
    logit_softcap: float, entropy: bool, validate: bool, backend: str, chunk_rows: int, max_active_rows: int | None,
    score_norms: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> log-prob, entropy, log-sum-exp and score norm of each row, (N,) float32; zeros where masked, (0,) unless
    wanted."""
    check_labels(labels, weight.shape[0], validate)
    kernels, N, entropy = backends.load(backend), labels.numel(), entropy or score_norms
    sizes = N, N if entropy else 0, N, N if score_norms else 0
    logprob, ent, lse, norms = (torch.zeros(n, dtype=torch.float32, device=hidden.device) for n in sizes)
    active = labels >= 0
    parts = partition(active, torch.zeros_like(active), max_active_rows, counted(labels, max_active_rows, validate))

    def kernel(rows: Tensor, logits: Tensor) -> None:
        temps = None if temperatures is None else temperatures[rows]
        norm = torch.empty_like(lse[: rows.numel()]) if score_norms else None
        out = kernels.logprobs_fwd(logits, labels[rows], temps, temperature, logit_softcap, entropy, norm)
        logprob[rows], lse[rows] = out[0] if parts.excess is None else out[0] + parts.excess, out[2]
        if entropy:
            ent[rows] = out[1]
        if norm is not None:
            norms[rows] = norm

    Head(hidden, weight, bias, chunk_rows, (False, False, False)).sweep(parts.full, kernel, False, parts.skip)
    return logprob, ent, lse, norms


def _logprobs_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, lse: Tensor, entropy: Tensor,
    d_logprob: Tensor,
    d_entropy: Tensor | None, temperatures: Tensor | None, temperature: float, logit_softcap: float, backend: str,
    chunk_rows: int,
    max_active_rows: int | None, wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> d_hidden, d_weight and d_bias of `linear_token_logprobs`; the logits of rows with a gradient are computed
    again."""
    kernels = backends.load(backend)
    head = Head(hidden, weight, bias, chunk_rows, tuple(wanted))  # type: ignore[arg-type]
    live = (labels >= 0) & ((d_logprob != 0) if d_entropy is None else (d_logprob != 0) | (d_entropy != 0))
    parts = partition(live, torch.zeros_like(live), max_active_rows, counted(labels, max_active_rows, False))
    if parts.excess is not None:
        d_logprob = d_logprob + parts.excess

    def kernel(rows: Tensor, logits: Tensor) -> None:
        per_row = (lse, entropy if d_entropy is not None else None, d_logprob, d_entropy, temperatures)
        row_lse, ent, d_l, d_h, temps = _pick(per_row, rows)
        ent = entropy if ent is None else ent
        kernels.logprobs_bwd(logits, labels[rows], row_lse, ent, d_l, d_h, temps, temperature, logit_softcap, logits)

    head.sweep(parts.full, kernel, True, parts.skip)
    return head.gradients()


linear_token_logprobs_op = torch.library.custom_op("ppg_fast::linear_token_logprobs", _logprobs, mutates_args=())
linear_token_logprobs_bwd_op = torch.library.custom_op(
    "ppg_fast::linear_token_logprobs_bwd", _logprobs_gradients, mutates_args=()
)


@linear_token_logprobs_op.register_fake
def _(hidden, weight, bias, labels, temperatures, temperature, logit_softcap, entropy, *rest):
    N, norm = hidden.shape[0], rest[4:5] == (True,)
    return tuple(
        hidden.new_empty(n, dtype=torch.float32) for n in (N, N if entropy or norm else 0, N, N if norm else 0)
    )


@linear_token_logprobs_bwd_op.register_fake
def _(hidden, weight, *arguments):
    wanted = arguments[-1]
    d_hidden = torch.empty_like(hidden) if wanted[0] else hidden.new_empty(0)
    d_weight = hidden.new_empty(weight.shape if wanted[1] else (0,), dtype=torch.float32)
    return d_hidden, d_weight, hidden.new_empty(weight.shape[:1] if wanted[2] else (0,), dtype=torch.float32)


def _setup_linear_logprobs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, temperatures, temperature, logit_softcap, entropy, _, *plan, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, labels, output[2], output[1], temperatures)
    ctx.numbers, ctx.entropy = (temperature, logit_softcap, *plan), entropy


def _backward_linear_logprobs(
    ctx: Any, d_logprob: Tensor | None, d_entropy: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    hidden, weight, bias, labels, lse, entropy, temperatures = ctx.saved_tensors
    d_logprob = torch.zeros_like(lse) if d_logprob is None else d_logprob
    d_entropy = d_entropy.contiguous() if ctx.entropy and d_entropy is not None else None
    wanted = [ctx.needs_input_grad[i] for i in range(3)]
    rows = labels, lse, entropy, d_logprob.contiguous(), d_entropy, temperatures
    grads = linear_token_logprobs_bwd_op(hidden, weight, bias, *rows, *ctx.numbers, wanted)
    inputs = zip(grads, (hidden, weight, bias), wanted, strict=True)
    return *(g.to(t.dtype) if want else None for g, t, want in inputs), *[None] * 10


linear_token_logprobs_op.register_autograd(_backward_linear_logprobs, setup_context=_setup_linear_logprobs)


def linear_token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, temperatures: Tensor | None,
    temperature: float,
    logit_softcap: float, entropy: bool, validate: bool, backend: str, chunk_rows: int, max_active_rows: int | None,
    score_norms: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Log-prob, entropy, both differentiable in hidden, weight and bias, and score norm of each row, (N,) float32; (0,)
    unless wanted."""
    if backend == "reference":
        spec = PolicyLossSpec(temperature=temperature, logit_softcap=logit_softcap)
        per_row = PerRow(torch.zeros(labels.shape, device=hidden.device), None, None, None, None, temperatures)
        return _reference(
            hidden, weight, bias, labels, per_row, spec, validate, chunk_rows, max_active_rows, score_norms
        )[1:]
    numbers = temperature, logit_softcap, entropy, validate, backend, chunk_rows, max_active_rows, score_norms
    logprob, ent, _, norms = linear_token_logprobs_op(hidden, weight, bias, labels, temperatures, *numbers)
    return logprob, ent, norms

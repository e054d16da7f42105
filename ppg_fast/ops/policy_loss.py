"""policy_loss: log-prob, loss and dlogits in one sweep, as a custom op with autograd."""

from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppg_fast import backends, reference
from ppg_fast.ops.allocation import fresh
from ppg_fast.ops.checks import check_labels
from ppg_fast.spec import PolicyLossSpec


class PerRow(NamedTuple):
    """What the loss needs of each row beside its label, (N,) float32 each."""

    advantages: Tensor
    weights: Tensor | None  # of the reduction; None: 1
    old_logprobs: Tensor | None  # None: on-policy
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    temperatures: Tensor | None  # None: the spec's number for all


NUMBERS = tuple(f.name for f in fields(PolicyLossSpec))  # the wire format of a spec, in order
SPEC_SCHEMA = (
    "str loss_type, float clip_low, float clip_high, float dual_clip, float kl_coef, str kl_estimator, float "
    "entropy_coef, "
    "float importance_cap, float temperature, float logit_softcap, bool entropy, bool score_norms, bool with_grad, "
    "bool validate, "
    "str backend"
)
OUTPUTS = "(Tensor, Tensor, Tensor, Tensor, Tensor)"
SCHEMA = (
    "Tensor labels, Tensor advantages, Tensor? weights, Tensor? old_logprobs, Tensor? ref_logprobs, Tensor? "
    "rollout_logprobs, "
    f"Tensor? temperatures, {SPEC_SCHEMA}"
)


def wanted_norm(logits: Tensor, wanted: bool, *shape: int) -> Tensor | None:
    """Where a backend writes score norms to, if they are wanted."""
    return logits.new_empty(shape, dtype=torch.float32) if wanted else None


def given_norm(logits: Tensor, norm: Tensor | None) -> Tensor:
    """What an op returns for it: (0,) where it was not wanted."""
    return logits.new_empty(0, dtype=torch.float32) if norm is None else norm


def _policy_loss(
    logits: Tensor, dlogits: Tensor | None, labels: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    advantages, weights, old, ref, rollout, temperatures, *numbers, entropy, score_norms, _, validate, backend = (
        arguments
    )
    check_labels(labels, logits.shape[-1], validate)
    spec, norm = PolicyLossSpec(*numbers), wanted_norm(logits, score_norms, labels.numel())
    rows = labels, advantages, weights, old, ref, rollout, temperatures
    out = backends.load(backend).policy_loss(logits, *rows, spec, entropy, dlogits, norm)
    return *out, given_norm(logits, norm)


@torch.library.custom_op("ppg_fast::policy_loss", mutates_args=(), schema=f"(Tensor logits, {SCHEMA}) -> {OUTPUTS}")
def policy_loss_op(logits: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """-> weighted loss, log-prob, entropy and score norm (N,) float32, and dlogits (B, L, V); the last three (0,)
    unless wanted."""
    dlogits = fresh(logits.shape, logits.dtype, logits.device) if arguments[-3] else None
    return *_policy_loss(logits, dlogits, *arguments), logits.new_empty(0) if dlogits is None else dlogits


@torch.library.custom_op(
    "ppg_fast::policy_loss_",
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, {SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def policy_loss_inplace_op(logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same with dlogits written over the logits."""
    return _policy_loss(logits, logits, *arguments)


def _rows_like(logits: Tensor, arguments: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    N, entropy, norm = logits.shape[0] * logits.shape[1], arguments[-5], arguments[-4]
    entropy = entropy or norm or arguments[7 + NUMBERS.index("entropy_coef")] != 0
    shapes = N, N, N if entropy else 0, N if norm else 0
    return tuple(logits.new_empty(n, dtype=torch.float32) for n in shapes)  # type: ignore[return-value]


@policy_loss_op.register_fake
def _(logits, *arguments):
    return *_rows_like(logits, arguments), logits.new_empty(logits.shape if arguments[-3] else (0,))


@policy_loss_inplace_op.register_fake
def _(logits, *arguments):
    return _rows_like(logits, arguments)


def setup_traced(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)  # else dlogits gets zeros of its size
    ctx.save_for_backward(output[-1])
    ctx.arguments = len(inputs) - 1


def backward_traced(ctx: Any, d_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    (dlogits,) = ctx.saved_tensors
    if d_loss is None:
        return (None,) * (1 + ctx.arguments)
    scale = d_loss if d_loss.dim() == 0 else d_loss.view(dlogits.shape[0], dlogits.shape[1], 1)
    return (dlogits * scale).to(dlogits.dtype), *[None] * ctx.arguments


policy_loss_op.register_autograd(backward_traced, setup_context=setup_traced)


class EagerPolicyLoss(torch.autograd.Function):
    """Outside of a tracer the one gradient buffer is scaled by the upstream gradient in place, so that it is never held
    twice."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, inplace: bool, ops: tuple[Any, Any], *arguments: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``ops``: the one that returns dlogits behind its other results, and the one that writes it over the
        logits."""
        if inplace:
            out = ops[1](logits.detach(), *arguments)
            # whoever else saved the logits for a backward pass is told that they are gone
            torch.autograd.graph.increment_version(logits)
            dlogits = logits.detach()
        else:
            *out, dlogits = ops[0](logits.detach(), *arguments)
        ctx.save_for_backward(dlogits)
        ctx.backend, ctx.scaled, ctx.arguments = arguments[-1], False, len(arguments)
        ctx.mark_non_differentiable(*out[1:])
        return tuple(out)  # type: ignore[return-value]

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (dlogits,) = ctx.saved_tensors
        if ctx.scaled:
            raise RuntimeError(
                "the policy loss was differentiated a second time, but its only gradient buffer was scaled in place "
                "by the first "
                "backward pass: compute the loss again, or build on token_logprobs"
            )
        if not (d_loss.is_cpu and bool((d_loss == 1).all())):
            backends.load(ctx.backend).rescale_rows(dlogits, d_loss.reshape(-1).contiguous())
            ctx.scaled = True
        return dlogits, *[None] * (ctx.arguments + 2)


def policy_loss(
    logits: Tensor, labels: Tensor, per_row: PerRow, spec: PolicyLossSpec, entropy: bool, inplace: bool, validate: bool,
    backend: str,
    score_norms: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Weighted loss (differentiable in the logits), log-prob, entropy and score norm ((0,) unless wanted) of each row,
    (N,) float32."""
    if backend == "reference":
        check_labels(labels, logits.shape[-1], validate)
        return reference_policy_loss(logits.flatten(0, 1).float(), labels, per_row, spec, score_norms)
    with_grad = torch.is_grad_enabled() and logits.requires_grad
    arguments = (
        labels,
        *per_row,
        *(getattr(spec, name) for name in NUMBERS),
        entropy,
        score_norms,
        with_grad,
        validate,
        backend,
    )
    if with_grad and not torch.compiler.is_compiling():
        return EagerPolicyLoss.apply(logits, inplace, (policy_loss_op, policy_loss_inplace_op), *arguments)
    return policy_loss_op(logits, *arguments)[:4]


def reference_policy_loss(
    logits: Tensor, labels: Tensor, per_row: PerRow, spec: PolicyLossSpec, score_norms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of float32 logits (N, V) by plain PyTorch."""
    temperature = spec.temperature if per_row.temperatures is None else per_row.temperatures
    out = reference.policy_loss(logits, labels, *per_row[:5], replace(spec, temperature=temperature))
    norms = (
        reference.score_norms(logits, labels, temperature, spec.logit_softcap) if score_norms else logits.new_empty(0)
    )
    return *out, norms

"""token_logprobs: the differentiable pair (log-prob, entropy), for any loss that a user writes on top."""

from typing import Any

import torch
from torch import Tensor

from ppg_fast import backends, reference
from ppg_fast.ops.allocation import fresh
from ppg_fast.ops.checks import check_labels
from ppg_fast.ops.policy_loss import given_norm, wanted_norm


@torch.library.custom_op("ppg_fast::token_logprobs", mutates_args=())
def token_logprobs_op(
    logits: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    logit_softcap: float,
    entropy: bool,
    validate: bool,
    backend: str,
    score_norms: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> log-prob, entropy, log-sum-exp and score norm of each row, (N,) float32; zeros where masked, (0,) unless
    wanted."""
    check_labels(labels, logits.shape[-1], validate)
    norm = wanted_norm(logits, score_norms, labels.numel())
    out = backends.load(backend).logprobs_fwd(logits, labels, temperatures, temperature, logit_softcap, entropy, norm)
    return *out, given_norm(logits, norm)


@torch.library.custom_op("ppg_fast::token_logprobs_bwd", mutates_args=())
def token_logprobs_bwd_op(
    logits: Tensor, labels: Tensor, lse: Tensor, entropy: Tensor, d_logprob: Tensor, d_entropy: Tensor | None,
    temperatures: Tensor | None, temperature: float, logit_softcap: float, backend: str,
) -> Tensor:  # fmt: skip
    """-> dlogits (B, L, V) of `token_logprobs`."""
    dlogits = fresh(logits.shape, logits.dtype, logits.device)
    scale = temperatures, temperature, logit_softcap
    backends.load(backend).logprobs_bwd(logits, labels, lse, entropy, d_logprob, d_entropy, *scale, dlogits)
    return dlogits


@token_logprobs_op.register_fake
def _(logits, labels, temperatures, temperature, logit_softcap, entropy, validate, backend, score_norms=False):
    N = logits.shape[0] * logits.shape[1]
    return tuple(
        logits.new_empty(n, dtype=torch.float32)
        for n in (N, N if entropy or score_norms else 0, N, N if score_norms else 0)
    )


@token_logprobs_bwd_op.register_fake
def _(logits, *_):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup_token_logprobs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, temperatures, temperature, logit_softcap, entropy, _, backend, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, output[2], output[1], temperatures)
    ctx.numbers, ctx.entropy = (temperature, logit_softcap, backend), entropy


def _backward_token_logprobs(
    ctx: Any, d_logprob: Tensor | None, d_entropy: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    logits, labels, lse, entropy, temperatures = ctx.saved_tensors
    d_logprob = torch.zeros_like(lse) if d_logprob is None else d_logprob
    d_entropy = d_entropy.contiguous() if ctx.entropy and d_entropy is not None else None
    grad = token_logprobs_bwd_op(
        logits, labels, lse, entropy, d_logprob.contiguous(), d_entropy, temperatures, *ctx.numbers
    )
    return grad, *[None] * 8


token_logprobs_op.register_autograd(_backward_token_logprobs, setup_context=_setup_token_logprobs)


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    logit_softcap: float,
    entropy: bool,
    validate: bool,
    backend: str,
    score_norms: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Log-prob, entropy, both differentiable in the logits, and score norm of each row, (N,) float32; (0,) unless
    wanted."""
    if backend == "reference":
        check_labels(labels, logits.shape[-1], validate)
        scale = temperature if temperatures is None else temperatures
        z = logits.flatten(0, 1).float()
        norms = reference.score_norms(z, labels, scale, logit_softcap) if score_norms else z.new_empty(0)
        return *reference.token_logprobs(z, labels, scale, logit_softcap), norms
    logprob, ent, _, norms = token_logprobs_op(
        logits, labels, temperatures, temperature, logit_softcap, entropy, validate, backend, score_norms
    )
    return logprob, ent, norms

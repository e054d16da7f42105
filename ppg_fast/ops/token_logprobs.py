"""token_logprobs: log-prob, entropy and log-sum-exp, differentiable, for any loss that a user writes on top."""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ppg_fast import backends, reference
from ppg_fast.contract import Wanted
from ppg_fast.ops.allocation import fresh
from ppg_fast.ops.checks import check_labels
from ppg_fast.ops.tracing import as_data, constant, differentiable, first_order, needs_grad, traced


def _logprobs(
    logits: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    scale: list[float],
    wanted: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> log-prob, entropy, its maximum and sum, (N, 2), score norm and log-sum-exp of each row, (N,) float32, zeros
    where masked, (0,) unless wanted. ``scale``: temperature and softcap."""
    flags = Wanted(*wanted)
    check_labels(labels, logits.shape[-1], flags.validate)
    norm = torch.empty(labels.numel() if flags.score_norms else 0, dtype=torch.float32, device=logits.device)
    given = norm if flags.score_norms else None
    kernels = backends.load(backend)
    logprob, ent, pair = kernels.logprobs_fwd(logits, labels, temperatures, *scale, flags.entropy, given)
    lse = log_sum_exps(pair, labels, temperatures, scale, kernels) if flags.lse else logprob.new_empty(0)
    return logprob, ent, pair, norm, lse


def log_sum_exps(
    pair: Tensor, labels: Tensor, temperatures: Tensor | None, scale: Sequence[float], kernels: ModuleType
) -> Tensor:
    """log sum_v exp(z_v) of each row, (N,) float32, 0 where masked, from its maximum and sum as ``kernels`` gave them.
    In float64: the two may cancel."""
    temperature, logit_softcap = scale
    by = temperature if temperatures is None else temperatures.double()
    largest, sums = pair.double().unbind(1)
    lse = largest * kernels.unit_of_maximum(logit_softcap) / by + sums.log()
    return torch.where(labels < 0, 0.0, lse).float()


def _gradient(logits: Tensor, rows: list[Tensor | None], scale: list[float], backend: str) -> Tensor:
    """-> dlogits (B, L, V). ``rows``: labels, maximum and sum, entropy, d_logprob, d_entropy, d_lse,
    temperatures."""
    dlogits = fresh(logits, logits.shape)
    backends.load(backend).logprobs_bwd(logits, *rows, *scale, dlogits)
    return dlogits


token_logprobs_op = torch.library.custom_op("ppg_fast::token_logprobs", _logprobs, mutates_args=())
token_logprobs_bwd_op = torch.library.custom_op("ppg_fast::token_logprobs_bwd", _gradient, mutates_args=())


@token_logprobs_op.register_fake
def _(logits, labels, temperatures, scale, wanted, backend):
    flags, N = Wanted(*wanted), logits.shape[0] * logits.shape[1]
    wants = flags.entropy or flags.score_norms, flags.score_norms, flags.lse
    entropy, norm, lse = (N if want else 0 for want in wants)
    return tuple(logits.new_empty(n, dtype=torch.float32) for n in (N, entropy, (N, 2), norm, lse))


@token_logprobs_bwd_op.register_fake
def _(logits, rows, scale, backend):
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, temperatures, ctx.scale, wanted, ctx.backend = inputs
    _, entropy, pair, _, _ = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(logits, labels, pair, entropy, temperatures)
    ctx.flags = Wanted(*wanted)


def _backward(
    ctx: Any, d_logprob: Tensor | None, d_entropy: Tensor | None, _: Any, __: Any, d_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    logits, labels, pair, entropy, temperatures = ctx.saved_tensors
    d_logprob = torch.zeros_like(pair[:, 0]) if d_logprob is None else d_logprob.contiguous()
    d_entropy = d_entropy.contiguous() if ctx.flags.entropy and d_entropy is not None else None
    d_lse = d_lse.contiguous() if ctx.flags.lse and d_lse is not None else None
    call = token_logprobs_bwd_op if traced(logits, d_logprob) else _gradient
    rows = [labels, pair, entropy, d_logprob, d_entropy, d_lse, temperatures]
    return call(logits, rows, ctx.scale, ctx.backend), None, None, None, None, None


token_logprobs_op.register_autograd(first_order(_backward), setup_context=_setup)
EagerTokenLogprobs = differentiable(_logprobs, _setup, _backward)


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    logit_softcap: float,
    wanted: Wanted,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-prob, entropy, both differentiable in the logits, score norm and log-sum-exp, differentiable too, of each
    row, (N,) float32; (0,) unless wanted."""
    if backend == "reference":
        check_labels(labels, logits.shape[-1], wanted.validate)
        by, z = temperature if temperatures is None else temperatures, logits.flatten(0, 1).float()
        norms = reference.score_norms(z, labels, by, logit_softcap) if wanted.score_norms else z.new_empty(0)
        lse = reference.log_sum_exps(z, labels, by, logit_softcap) if wanted.lse else z.new_empty(0)
        return *reference.token_logprobs(z, labels, by, logit_softcap), norms, lse
    if temperatures is None and not constant(temperature):
        temperatures, temperature = as_data(labels.shape, temperature, torch.float32, labels.device), 1.0
    call = token_logprobs_op if traced(logits) else EagerTokenLogprobs.apply if needs_grad(logits) else _logprobs
    scale = [temperature, logit_softcap]
    logprob, entropy, _, norms, lse = call(logits, labels, temperatures, scale, list(wanted), backend)
    return logprob, entropy, norms, lse

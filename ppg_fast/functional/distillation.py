"""Distillation from hidden states: neither the policy's logits nor the teacher's exist as a whole."""

from typing import NamedTuple

import torch
from torch import Tensor

from ppg_fast import ops
from ppg_fast.contract import PerRow, RowArguments, Wanted
from ppg_fast.functional.head_inputs import head_of
from ppg_fast.functional.loss import spec_and_temperatures
from ppg_fast.functional.teacher import Teacher, TopKTeacher, teacher_rows
from ppg_fast.functional.tokens import Tokens, chosen_backend, ordered_sum, reduction_weights
from ppg_fast.spec import PolicyLossSpec


class DistillationOutput(NamedTuple):
    """What `linear_distillation_loss` returns.

    ``loss``: 0-d float32, or the labels' shape with reduction "none"; the only differentiable field.
    ``divergences``: float32 of the labels' shape, in nats, without coef and weights; zero where masked or of weight 0.
    """

    loss: Tensor
    divergences: Tensor


def linear_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    teacher: Teacher | TopKTeacher,
    *,
    bias: Tensor | None = None,
    chunk_rows: int | None = None,
    max_active_rows: int | None = None,
    logits_dtype: torch.dtype | str | None = None,
    loss_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    turn_ids: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float = 0.0,
    reduction: str = "token_mean",
    normalizer: float | Tensor | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> DistillationOutput:
    """A teacher's divergence from the policy on its own tokens, from hidden states of both; gradient computed in the
    forward pass.

    loss = sum over active tokens of weight * coef * D(q, p), p = softmax of the policy's logits, q of the teacher's,
    both at ``temperature``. Four GEMMs over the rows that count, three with a frozen head; one chunk of each side's
    logits is alive. Reduction "none" and float16 inputs compute the logits twice.

    Args:
        hidden, weight, bias, chunk_rows, max_active_rows, logits_dtype: as in `linear_policy_loss`.
        labels, loss_mask: which tokens take part, as in `linear_policy_loss`; which tokens they are does not matter.
        teacher: `Teacher` or `TopKTeacher`.
        cu_seqlens, reduction, normalizer, validate, backend: as in `policy_loss`; ``turn_ids`` for turn_weights.
        temperature, logit_softcap: of the policy, as in `token_logprobs`.

    Returns: `DistillationOutput`; differentiable in hidden, weight and bias, gradients in the dtype of each.
    Raises: ValueError for wrong shapes, dtypes, devices or numbers.
    """
    x, weight, bias, chunks = head_of(hidden, weight, labels, bias, chunk_rows, max_active_rows, logits_dtype)
    tokens = Tokens.of(labels, loss_mask, cu_seqlens, hidden.device, validate)
    spec, temperatures = spec_and_temperatures(
        PolicyLossSpec(temperature=temperature, logit_softcap=logit_softcap), labels, tokens.active, validate
    )
    weights = reduction_weights(tokens, reduction, normalizer, validate)
    taught = teacher_rows(teacher, x, weight, labels, tokens, weights, turn_ids, validate)
    if (factor := ops.mask_factor(loss_mask, validate)) is not None:
        taught = taught._replace(coefs=taught.coefs * factor)
    none = torch.zeros(tokens.labels.shape, device=x.device)
    rows = RowArguments(tokens.labels, PerRow(none, None, None, None, None, temperatures), spec)
    backend = chosen_backend(backend, hidden)
    wanted = Wanted(entropy=False, score_norms=False, gradient=False, validate=validate)
    if reduction == "none" or backend == "reference" or x.dtype == torch.float16:
        divergences = ops.linear_divergences(x, weight, bias, rows, taught, wanted, chunks, backend)
        loss = taught.coefs * divergences
    else:
        loss, *_, divergences = ops.linear_distillation(x, weight, bias, rows, taught, False, wanted, chunks, backend)
    loss = loss.view(labels.shape) if reduction == "none" else ordered_sum(loss)
    return DistillationOutput(loss, divergences.detach().view(labels.shape))

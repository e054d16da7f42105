"""From hidden states and the head's weight: the same functions, and the [N, V] logits never exist."""

import torch
from torch import Tensor
from typing_extensions import Unpack

from ppg_fast import ops
from ppg_fast.contract import Chunks, RowArguments, Wanted
from ppg_fast.functional.loss import (
    LossOptions,
    LossRows,
    PolicyLossOutput,
    credit_turns,
    needs_logprobs_first,
    spec_and_temperatures,
)
from ppg_fast.functional.teacher import Teacher, TopKTeacher, all_active, teacher_rows
from ppg_fast.functional.tokens import Tokens, asked_for, check_floats, chosen_backend
from ppg_fast.policy_classes import PolicyClass
from ppg_fast.rules import require_integer
from ppg_fast.spec import PolicyLossSpec, fail, require


def head_of(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    chunk_rows: int | None,
    max_active_rows: int | None,
    logits_dtype: torch.dtype | str | None,
) -> tuple[Tensor, Tensor, Tensor | None, Chunks]:
    """Hidden states (N, D), weight (V, D), bias (V,) of one dtype, and the chunks of its rows; ValueError where they do
    not fit."""
    check_floats("hidden", hidden)
    check_floats("weight", weight)
    require(isinstance(labels, Tensor), "labels must be a tensor", type(labels).__name__)
    fits = hidden.dim() >= 1 and hidden.shape[:-1] == labels.shape
    require(fits, f"hidden must be the shape of labels and a hidden size, {(*labels.shape, 'D')}", tuple(hidden.shape))
    require(
        weight.dim() == 2 and weight.shape[1] == hidden.shape[-1],
        f"weight must be (V, D) with D = {hidden.shape[-1]}",
        tuple(weight.shape),
    )
    require(weight.shape[0] >= 1, "the vocabulary must hold at least one token", weight.shape[0])
    require(weight.device == hidden.device, f"weight must be on the device of hidden, {hidden.device}", weight.device)
    if bias is not None:
        require(bias.shape == weight.shape[:1], f"bias must be (V,) = ({weight.shape[0]},)", tuple(bias.shape))
        require(bias.device == hidden.device, f"bias must be on the device of hidden, {hidden.device}", bias.device)
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))  # with and without grad mode
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    require(
        hidden.dtype == weight.dtype,
        "hidden and weight must have one dtype (or run under autocast)",
        (hidden.dtype, weight.dtype),
    )
    require(
        bias is None or bias.dtype == weight.dtype,
        f"bias must have the dtype of weight, {weight.dtype}",
        None if bias is None else bias.dtype,
    )
    dtype = _checked_logits_dtype(logits_dtype, hidden)
    if chunk_rows is None:
        rows = ops.default_chunk_rows(weight.shape[0], dtype.itemsize, hidden.device.type, frozen)
    else:
        rows = require_integer("chunk_rows", chunk_rows, 1)
    bound = None if max_active_rows is None else require_integer("max_active_rows", max_active_rows, 1)
    return hidden.reshape(labels.numel(), hidden.shape[-1]), weight, bias, Chunks(rows, bound, dtype == torch.float32)


def _checked_logits_dtype(given: torch.dtype | str | None, hidden: Tensor) -> torch.dtype:
    """The dtype of the logits of ``hidden``: by default what its products are fastest in; ValueError for another than
    float32 and its own."""
    if given is None:
        return ops.product_dtype(hidden.dtype, hidden.device.type)
    found = next((t for t in (torch.float32, hidden.dtype) if given in (t, str(t).removeprefix("torch."))), None)
    if found is None:
        fail(f"logits_dtype must be float32 or the dtype of hidden and weight, {hidden.dtype}", given)
    return found


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    max_active_rows: int | None = None,
    logits_dtype: torch.dtype | str | None = None,
    loss_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float = 0.0,
    lse: bool = False,
    entropy: bool = False,
    score_norms: bool = False,
    chunk_rows: int | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Log-probability of each label (log-sum-exp, entropy and score norm, too) from hidden states, without the logits.

    As `token_logprobs` of logits = hidden @ weight.T + bias. Differentiable in hidden, weight and bias: the backward
    pass computes the logits of the rows that have a gradient once more, a chunk at a time (four GEMMs in all). Of a
    head that requires no gradient one row (D,) of each active token is kept instead (two GEMMs in all); the gradient of
    an entropy computes the logits again there too.

    Args:
        hidden: (..., D) float32, bfloat16 or float16.
        weight: (V, D) in the dtype of hidden; ``bias``: (V,) or None.
        labels, loss_mask, temperature, logit_softcap, lse, entropy, score_norms, validate, backend: as in
            `token_logprobs`.
        chunk_rows: rows whose logits are alive at once; default from a memory budget.
        max_active_rows, logits_dtype: as in `linear_policy_loss`.

    Returns and raises: as `token_logprobs`. Gradients come back in the dtype of each input; d_weight is accumulated in
    float32.
    """
    x, weight, bias, chunks = head_of(hidden, weight, labels, bias, chunk_rows, max_active_rows, logits_dtype)
    tokens = Tokens.of(labels, loss_mask, None, hidden.device, validate)
    spec, temperatures = spec_and_temperatures(
        PolicyLossSpec(temperature=temperature, logit_softcap=logit_softcap), labels, tokens.active, validate
    )
    backend = chosen_backend(backend, hidden)
    wanted = Wanted(entropy, score_norms, gradient=True, validate=validate, lse=lse)
    scale = float(spec.temperature), float(spec.logit_softcap)
    given = x, weight, bias, tokens.labels, temperatures, *scale, wanted, chunks, backend
    return asked_for(ops.linear_token_logprobs(*given), wanted, labels.shape)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    advantages: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_rows: int | None = None,
    max_active_rows: int | None = None,
    logits_dtype: torch.dtype | str | None = None,
    loss_mask: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    turn_ids: Tensor | None = None,
    spec: PolicyLossSpec | None = None,
    reduction: str = "token_mean",
    normalizer: float | Tensor | None = None,
    nll_weights: Tensor | None = None,
    nll_normalizer: float | Tensor | None = None,
    skip_zero_advantages: bool = False,
    score_norms: bool = False,
    teacher: Teacher | TopKTeacher | None = None,
    validate: bool = False,
    backend: str | None = None,
) -> PolicyLossOutput:
    """The policy loss from hidden states: gradient computed in the forward pass, three GEMMs over the rows that have
    one.

    As `policy_loss` of logits = hidden @ weight.T + bias. Rows without weight are compacted away before the first GEMM;
    d_weight is accumulated in float32; a head that does not require a gradient saves the third GEMM. The sequence-level
    losses and reduction "none" need the whole sequence, or the upstream gradient, before the gradient: they compute the
    logits twice, or where the head requires no gradient and there is no entropy term keep rows of d_hidden.

    Args:
        hidden: (..., D) float32, bfloat16 or float16.
        weight: (V, D) in the dtype of hidden (or any under autocast); ``bias``: (V,) or None.
        chunk_rows: rows whose logits are alive at once; default from a memory budget.
        max_active_rows: upper bound on the rows that are read. On a GPU it saves the one sync of the call, which then
            can be captured in a CUDA graph, and compute is spent on that many. Where more are active: ValueError on a
            CPU or with ``validate``, else loss and gradients are NaN.
        logits_dtype: "float32" or the dtype of hidden and weight. Of 16-bit operands, float32 logits lose no digit; the
            gradient of a logit is rounded once, for the two products that follow, and not at all where they are in
            float32. Default: float32 on a CPU without products of that dtype, where it is faster; else that dtype.
        teacher: adds the divergence from a teacher to the loss of each token, under the same reduction, in the same
            pass over the chunks; "divergences" of the tokens are then among the metrics.
        the rest: as in `policy_loss`.

    Returns and raises: as `policy_loss`. Gradients come back in the dtype of each input.
    """
    x, weight, bias, chunks = head_of(hidden, weight, labels, bias, chunk_rows, max_active_rows, logits_dtype)
    rows = LossRows.of(
        labels, advantages, hidden.device, loss_mask=loss_mask, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs,
        rollout_logprobs=rollout_logprobs, cu_seqlens=cu_seqlens, turn_ids=turn_ids, spec=spec, reduction=reduction,
        normalizer=normalizer, nll_weights=nll_weights, nll_normalizer=nll_normalizer,
        skip_zero_advantages=skip_zero_advantages, score_norms=score_norms, validate=validate,
    )  # fmt: skip
    backend = chosen_backend(backend, hidden)
    wanted = Wanted(entropy=True, score_norms=score_norms, gradient=False, validate=validate)
    arguments = RowArguments(rows.tokens.labels, rows.per_row, rows.spec)
    first = needs_logprobs_first(spec, x.dtype) or reduction == "none"
    taught, with_teacher, divergences = None, arguments, None
    if teacher is not None:
        every = all_active(rows.tokens, rows.active, labels)
        taught = teacher_rows(teacher, x, weight, labels, every, rows.per_row.weights, turn_ids, validate)
        # rows of zero advantage that are skipped for the policy's sake still have a teacher
        with_teacher = arguments._replace(labels=torch.where(taught.coefs != 0, every.labels, rows.tokens.labels))
    if first:
        scale = float(rows.spec.temperature), float(rows.spec.logit_softcap)
        wanted = wanted._replace(gradient=rows.spec.entropy_coef == 0, lse=bool(rows.spec.z_coef))
        logprobs, entropy, norms, lse = ops.linear_token_logprobs(
            x, weight, bias, rows.tokens.labels, rows.per_row.temperatures, *scale, wanted, chunks, backend
        )
        loss = rows.loss_from_logprobs(logprobs, entropy if rows.spec.entropy_coef else None, lse)
    elif taught is not None and backend != "reference":
        loss, logprobs, entropy, norms, divergences = ops.linear_distillation(
            x, weight, bias, with_teacher, taught, True, wanted, chunks, backend
        )
    else:
        loss, logprobs, entropy, norms = ops.linear_policy_loss(x, weight, bias, arguments, wanted, chunks, backend)
    if taught is not None and divergences is None:
        divergences = ops.linear_divergences(x, weight, bias, with_teacher, taught, wanted, chunks, backend)
        loss = loss + taught.coefs * divergences
    return rows.output(loss, logprobs, entropy, skip_zero_advantages, norms, divergences)


def linear_partial_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    rewards: Tensor,
    turn_ids: Tensor,
    policy_class: PolicyClass | str,
    *,
    bias: Tensor | None = None,
    chunk_rows: int | None = None,
    max_active_rows: int | None = None,
    logits_dtype: torch.dtype | str | None = None,
    gamma: float = 1.0,
    baseline: str = "none",
    group_ids: Tensor | None = None,
    turn_counts: Tensor | None = None,
    teacher: Teacher | TopKTeacher | None = None,
    backend: str | None = None,
    **options: Unpack[LossOptions],
) -> PolicyLossOutput:
    """The partial policy gradient from hidden states: `partial_policy_loss` of logits = hidden @ weight.T + bias.

    Memory, gradients, chunks, max_active_rows and teacher as in `linear_policy_loss`, arguments as in both.
    """
    turns = rewards, turn_ids, policy_class, gamma, baseline, group_ids, turn_counts, backend
    options, advantages = credit_turns(options, labels, *turns)
    return linear_policy_loss(
        hidden,
        weight,
        labels,
        advantages,
        bias=bias,
        chunk_rows=chunk_rows,
        max_active_rows=max_active_rows,
        logits_dtype=logits_dtype,
        turn_ids=turn_ids,
        teacher=teacher,
        backend=backend,
        **options,
    )

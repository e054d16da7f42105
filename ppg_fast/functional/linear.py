"""From hidden states and the head's weight: the same functions, and the [N, V] logits never exist."""

from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import Unpack

from ppg_fast import ops
from ppg_fast.contract import Chunks, RowArguments, Wanted
from ppg_fast.functional.head_inputs import head_of
from ppg_fast.functional.kept import Kept, kept_logits
from ppg_fast.functional.logits import policy_loss
from ppg_fast.functional.loss import (
    LossOptions,
    LossRows,
    PolicyLossOutput,
    checked_spec,
    credit_turns,
    needs_logprobs_first,
    spec_and_temperatures,
)
from ppg_fast.functional.teacher import Teacher, TopKTeacher, all_active, teacher_rows
from ppg_fast.functional.tokens import Tokens, asked_for, chosen_backend
from ppg_fast.functional.vocab_shard import VocabShard, ops_of
from ppg_fast.policy_classes import PolicyClass
from ppg_fast.spec import PolicyLossSpec, require


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    max_active_rows: int | None = None,
    logits_dtype: torch.dtype | str | None = None,
    kept: Kept | None = None,
    vocab: VocabShard | None = None,
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
        max_active_rows, logits_dtype, kept, vocab: as in `linear_policy_loss`.

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
    if kept is not None:
        require(vocab is None, "kept sets go without a vocabulary shard", "both")
        z, columns = kept_logits(kept, x, weight, bias, tokens.labels, chunks, scale[1], backend)
        wanted = wanted._replace(gradient=False)
        found = ops.token_logprobs(z[None], columns, temperatures, scale[0], 0.0, wanted, backend)
        return asked_for(found, wanted, labels.shape)
    logprobs_of, _ = ops_of(vocab)
    given = x, weight, bias, tokens.labels, temperatures, *scale, wanted, chunks, backend
    return asked_for(logprobs_of(*given), wanted, labels.shape)


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
    kept: Kept | None = None,
    vocab: VocabShard | None = None,
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
        kept: the tokens that a truncated sampler chose among. Log-probs, entropies and all that follows are then those
            of softmax over that set alone, whose rows of the head are the only ones that are read; ``chunk_rows`` has
            no effect. ValueError that names row and id for a label outside of its set, an id twice or outside of the
            vocabulary; none goes with a teacher.
        vocab: which rows of the vocabulary ``weight`` and ``bias`` are, where other processes hold the rest. No kept
            sets and no teacher. One message a chunk, whose rows are the fewest of all processes.
        teacher: adds the divergence from a teacher to the loss of each token, under the same reduction, in the same
            pass over the chunks; "divergences" of the tokens are then among the metrics.
        the rest: as in `policy_loss`.

    Returns and raises: as `policy_loss`. Gradients come back in the dtype of each input.
    """
    x, weight, bias, chunks = head_of(hidden, weight, labels, bias, chunk_rows, max_active_rows, logits_dtype)
    backend = chosen_backend(backend, hidden)
    options: LossOptions = {
        "loss_mask": loss_mask, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs,
        "rollout_logprobs": rollout_logprobs, "cu_seqlens": cu_seqlens, "spec": spec, "reduction": reduction,
        "normalizer": normalizer, "nll_weights": nll_weights, "nll_normalizer": nll_normalizer,
        "skip_zero_advantages": skip_zero_advantages, "score_norms": score_norms, "validate": validate,
    }  # fmt: skip
    if kept is not None:
        require(vocab is None, "kept sets go without a vocabulary shard", "both")
        require(teacher is None, "kept sets go without a teacher, who speaks of the whole vocabulary", "both")
        return _kept_policy_loss(kept, x, weight, bias, labels, advantages, turn_ids, chunks, backend, options)
    rows = LossRows.of(labels, advantages, hidden.device, turn_ids=turn_ids, **options)
    require(vocab is None or teacher is None, "a vocabulary shard goes without a teacher", "both")
    wanted = Wanted(entropy=True, score_norms=score_norms, gradient=False, validate=validate)
    arguments = RowArguments(rows.tokens.labels, rows.per_row, rows.spec)
    logprobs_of, loss_of = ops_of(vocab)
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
        logprobs, entropy, norms, lse = logprobs_of(
            x, weight, bias, rows.tokens.labels, rows.per_row.temperatures, *scale, wanted, chunks, backend
        )
        loss = rows.loss_from_logprobs(logprobs, entropy if rows.spec.entropy_coef else None, lse)
    elif taught is not None and backend != "reference":
        loss, logprobs, entropy, norms, divergences = ops.linear_distillation(
            x, weight, bias, with_teacher, taught, True, wanted, chunks, backend
        )
    else:
        loss, logprobs, entropy, norms = loss_of(x, weight, bias, arguments, wanted, chunks, backend)
    if taught is not None and divergences is None:
        divergences = ops.linear_divergences(x, weight, bias, with_teacher, taught, wanted, chunks, backend)
        loss = loss + taught.coefs * divergences
    return rows.output(loss, logprobs, entropy, skip_zero_advantages, norms, divergences)


def _kept_policy_loss(
    kept: Kept,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    advantages: Tensor,
    turn_ids: Tensor | None,
    chunks: Chunks,
    backend: str,
    options: LossOptions,
) -> PolicyLossOutput:
    """`policy_loss` of the logits of the kept sets."""
    spec = checked_spec(options.get("spec"), options.get("ref_logprobs"))
    tokens = Tokens.of(labels, options.get("loss_mask"), None, x.device, options.get("validate", False))
    softcap = float(spec.logit_softcap)
    z, columns = kept_logits(kept, x, weight, bias, tokens.labels, chunks, softcap, backend)
    options = {**options, "spec": replace(spec, logit_softcap=0.0) if softcap else spec}
    return policy_loss(
        z.view(*labels.shape, z.shape[-1]),
        columns.view(labels.shape),
        advantages,
        turn_ids=turn_ids,
        backend=backend,
        **options,
    )


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
    kept: Kept | None = None,
    vocab: VocabShard | None = None,
    gamma: float = 1.0,
    baseline: str = "none",
    group_ids: Tensor | None = None,
    turn_counts: Tensor | None = None,
    values: Tensor | None = None,
    gae_lambda: float | None = None,
    teacher: Teacher | TopKTeacher | None = None,
    backend: str | None = None,
    **options: Unpack[LossOptions],
) -> PolicyLossOutput:
    """The partial policy gradient from hidden states: `partial_policy_loss` of logits = hidden @ weight.T + bias.

    Memory, gradients, chunks, max_active_rows, kept, vocab and teacher as in `linear_policy_loss`, arguments as in
    both.
    """
    turns = rewards, turn_ids, policy_class, gamma, baseline, group_ids, turn_counts, backend
    options, advantages = credit_turns(options, labels, *turns, values, gae_lambda)
    return linear_policy_loss(
        hidden,
        weight,
        labels,
        advantages,
        bias=bias,
        chunk_rows=chunk_rows,
        max_active_rows=max_active_rows,
        logits_dtype=logits_dtype,
        kept=kept,
        vocab=vocab,
        turn_ids=turn_ids,
        teacher=teacher,
        backend=backend,
        **options,
    )

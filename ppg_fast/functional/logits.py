"""From logits: log-probs, the policy loss, and the policy loss straight from rewards."""

import torch
from torch import Tensor
from typing_extensions import Unpack

from ppg_fast import ops
from ppg_fast.contract import Wanted
from ppg_fast.functional.fused import fused_policy_loss, fuses
from ppg_fast.functional.loss import (
    LossOptions,
    LossRows,
    PolicyLossOutput,
    credit_turns,
    needs_logprobs_first,
    spec_and_temperatures,
)
from ppg_fast.functional.returns import require_values
from ppg_fast.functional.tokens import Tokens, asked_for, check_floats, chosen_backend
from ppg_fast.ops.checks import check_labels
from ppg_fast.policy_classes import PolicyClass
from ppg_fast.spec import VALUE, PolicyLossSpec, fail


def _rows_of(logits: Tensor, labels: Tensor, inplace: bool = False) -> Tensor:
    """Logits (..., V) as (B, L, V) with unit stride along V; a view where the strides allow it, as for `logits[:,
    :-1]`."""
    check_floats("logits", logits)
    if not isinstance(labels, Tensor):
        fail("labels must be a tensor", type(labels).__name__)
    shape, rank = logits.shape, logits.dim()
    if rank < 1 or shape[:-1] != labels.shape:
        fail(f"logits must be the shape of labels and a vocabulary, {(*labels.shape, 'V')}", tuple(shape))
    V = shape[-1]
    if V < 1:
        fail("the vocabulary must hold at least one token", V)
    given = logits
    if logits.stride(-1) != 1 and V > 1:
        logits = logits.contiguous()
    if rank != 3:
        logits = logits.reshape(1, labels.numel(), V) if rank < 3 else logits.flatten(0, -3)
    if inplace and not torch.compiler.is_compiling():
        _check_own_memory(given, logits)
    return logits


def _check_own_memory(logits: Tensor, rows: Tensor) -> None:
    """ValueError unless the memory of ``logits``, seen as ``rows`` (B, L, V), may be overwritten row by row."""
    B, L, V = rows.shape
    base = logits._base
    if rows.data_ptr() != logits.data_ptr():
        fail(
            "inplace=True needs logits that are read where they are, of stride 1 along the vocabulary", logits.stride()
        )
    if base is not None and base.is_leaf and base.requires_grad and not logits.is_leaf:
        fail("inplace=True would overwrite the leaf that these logits are a view of: give it a copy", tuple(base.shape))
    (near, of_near), (far, of_far) = sorted(((s, n) for s, n in zip(rows.stride(), (B, L), strict=False)))
    apart = near >= V if of_near > 1 else True
    if of_far > 1:
        apart = apart and far >= (V if of_near <= 1 else near * (of_near - 1) + V)
    if not apart:
        fail("inplace=True needs logits whose rows lie in memory of their own, not an expanded view", rows.stride())


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    loss_mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logit_softcap: float = 0.0,
    lse: bool = False,
    entropy: bool = False,
    score_norms: bool = False,
    validate: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Log-probability of each label; the log-sum-exp of its row, its entropy and its score norm when asked for.

    l = log softmax(z)[label],  lse = log sum_v exp(z_v),  H = -sum_v p_v log p_v,
    |d l / d z|^2 = sum_v p_v^2 - 2 p_label + 1,  z = softcap tanh(logits / softcap) / temperature

    Args:
        logits: (..., V) float32, bfloat16 or float16; views such as ``logits[:, :-1]`` are read in place.
        labels: (...) int64, the tokens these logits predict (already shifted); -100 = masked.
        loss_mask: (...) any dtype; rows where it is 0 are masked.
        temperature: a number > 0, or one per token (...).
        logit_softcap: 0 is off.
        validate: on a GPU, also make the checks of values, which need a sync. On a CPU they are always made.
        backend: "cpu" | "triton" | "cuda" | "reference"; default the fastest that runs here.

    Returns: (...) float32 in nats; a tuple where ``lse``, ``entropy`` or ``score_norms`` is asked for: log-probs, then
        those three in this order. Zero where masked (such rows are not read). All but the norms are differentiable in
        the logits; the gradient comes back in their dtype.
    Raises: ValueError for wrong shapes, dtypes, devices or numbers; IndexError for a label outside [0, V).
    """
    x = _rows_of(logits, labels)
    tokens = Tokens.of(labels, loss_mask, None, logits.device, validate)
    spec, temperatures = spec_and_temperatures(
        PolicyLossSpec(temperature=temperature, logit_softcap=logit_softcap), labels, tokens.active, validate
    )
    backend = chosen_backend(backend, logits)
    wanted = Wanted(entropy, score_norms, gradient=False, validate=validate, lse=lse)
    scale = float(spec.temperature), float(spec.logit_softcap)
    given = x, tokens.labels, temperatures, *scale, wanted, backend
    return asked_for(ops.token_logprobs(*given), wanted, labels.shape)


def policy_loss(
    logits: Tensor,
    labels: Tensor,
    advantages: Tensor,
    *,
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
    inplace: bool = False,
    validate: bool = False,
    backend: str | None = None,
) -> PolicyLossOutput:
    """The policy-gradient loss and its gradient in one pass over the logits.

    loss = sum over active tokens of weight * term(l, H, old, ref, rollout, A), the weight from the reduction, the term
    from ``spec``.

    Args:
        logits: (..., V) float32, bfloat16 or float16; views such as ``logits[:, :-1]`` are read in place.
        labels: (...) int64, the tokens these logits predict (already shifted); -100 = masked.
        advantages: (...), or (B,) for a (B, L) batch.
        loss_mask: (...) any dtype; where it is 0 the row is masked: not read, exactly zero loss and gradient, whatever
            it holds.
        old_logprobs: (...) of the policy that acted; None = on-policy: ratio 1, differentiated as if old were the
            detached log-prob.
        ref_logprobs: (...) of the reference policy, for ``spec.kl_coef``.
        rollout_logprobs: (...) as the sampler reported them, for ``spec.importance_cap``; not used while that is 0. For
            NaN, the token that a sampler did not draw, see ``spec.nan_rollout``.
        cu_seqlens: (S + 1,) int32 starting at 0: the sequences of packed (N,) or (1, N) labels. Without it, sequences
            are the rows of a (B, L) batch, or (N,) is one.
        turn_ids: (...) integers, for loss_type "gspo_turn" and "gmpo_turn": tokens of one sequence and one id share a
            ratio.
        spec: the loss, default ``PolicyLossSpec()``; reduction: "token_mean" | "sequence_mean" | "sequence_sum" | "sum"
            | "none".
        normalizer: a number or 0-d tensor in place of the reduction's outer denominator (active tokens, sequences, or
            1).
        nll_weights: (...) weights of the likelihood: the loss gains sum of -nll_weights l / nll_normalizer, beside the
            reduction (VAPO, arXiv:2504.05118). ``nll_normalizer``: a number or 0-d tensor; default: the active tokens
            whose weight is not 0.
        skip_zero_advantages: rows of zero advantage cost what masked rows cost and their log-prob reads 0 (unless a KL
            or entropy term needs them); without it they are read once for their log-prob. The loss and its gradient are
            the same.
        score_norms: also |d l / d z|^2 = sum_v p_v^2 - 2 p_label + 1 of each token, z the logit after softcap and
            temperature, in the same
            sweep: ``metrics["score_norms"]``, (...) float32 in [0, 2], 0 where a row was not read. What the signals of
                `auto` are made of.
        inplace: the gradient takes the memory of the logits, which are gone after this call (gspo and float16 go
            without). ValueError where their rows share memory, were copied, or are a view of a leaf.
        validate: on a GPU, also make the checks of values, which need a sync. On a CPU they are always made.
        backend: "cpu" | "triton" | "cuda" | "reference"; default the fastest that runs here.

    Returns: `PolicyLossOutput`. The gradient of the logits comes back in their dtype. No active row: loss 0, zero
        gradients.
    Raises: ValueError for wrong shapes, dtypes, devices, names or numbers, a KL term without ref_logprobs; IndexError
        for a label outside [0, V). RuntimeError where one loss is differentiated twice (its gradient buffer serves one
        backward pass).
    """
    x = _rows_of(logits, labels, inplace)
    backend = chosen_backend(backend, logits)
    options: LossOptions = {
        "loss_mask": loss_mask, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs,
        "rollout_logprobs": rollout_logprobs,
        "cu_seqlens": cu_seqlens, "spec": spec, "reduction": reduction, "normalizer": normalizer,
        "nll_weights": nll_weights, "nll_normalizer": nll_normalizer,
        "skip_zero_advantages": skip_zero_advantages, "score_norms": score_norms, "validate": validate,
    }  # fmt: skip
    if fuses(backend, spec, logits.dtype):
        return fused_policy_loss(x, labels, advantages, None, inplace, backend, options)
    rows = LossRows.of(labels, advantages, logits.device, turn_ids=turn_ids, **options)
    if needs_logprobs_first(spec, logits.dtype):
        wanted = Wanted(True, score_norms, gradient=False, validate=validate, lse=bool(rows.spec.z_coef))
        scale = float(rows.spec.temperature), float(rows.spec.logit_softcap)
        logprobs, entropy, norms, lse = ops.token_logprobs(
            x, rows.tokens.labels, rows.per_row.temperatures, *scale, wanted, backend
        )
        loss = rows.loss_from_logprobs(logprobs, entropy if rows.spec.entropy_coef else None, lse)
    else:  # plain PyTorch
        check_labels(rows.tokens.labels, logits.shape[-1], validate)
        z = x.flatten(0, 1).float()
        loss, logprobs, entropy, norms = ops.reference_policy_loss(
            z, rows.tokens.labels, rows.per_row, rows.spec, score_norms
        )
    return rows.output(loss, logprobs, entropy, skip_zero_advantages, norms)


def partial_policy_loss(
    logits: Tensor,
    labels: Tensor,
    rewards: Tensor,
    turn_ids: Tensor,
    policy_class: PolicyClass | str,
    *,
    gamma: float = 1.0,
    baseline: str = "none",
    group_ids: Tensor | None = None,
    turn_counts: Tensor | None = None,
    values: Tensor | None = None,
    gae_lambda: float | None = None,
    inplace: bool = False,
    backend: str | None = None,
    **options: Unpack[LossOptions],
) -> PolicyLossOutput:
    """The partial policy gradient: from the rewards of the turns and the logits of their tokens to the loss and its
    gradient.

    A token of turn t has the advantage of that turn: its return over the rewards in S_t (`partial_returns`) minus the
    baseline over the group (`turn_advantages`).
    (arXiv:2603.06138)

    Args:
        logits, labels: as in `policy_loss`.
        rewards: (B, T), row b for sequence b of the labels (row b of a (B, L) batch, run b of ``cu_seqlens``).
        turn_ids: (...) integers: -1 = context (masked), else the turn of the token, an index into its row of the
            rewards.
        policy_class, gamma, turn_counts: as in `partial_returns`.
        baseline, group_ids, values: as in `turn_advantages`.
        gae_lambda: as in `partial_returns`, with baseline "value": None: A = R - V, no bootstrap; a number: GAE.
        **options: as in `policy_loss`.

    Returns and raises: as `policy_loss`; also ValueError for a turn id beyond the turns of its dialogue.
    """
    turns = rewards, turn_ids, policy_class, gamma, baseline, group_ids, turn_counts, backend
    x = _rows_of(logits, labels, inplace)
    chosen = chosen_backend(backend, logits)
    require_values(baseline, values, gae_lambda)
    if baseline != VALUE and fuses(chosen, options.get("spec"), logits.dtype):
        return fused_policy_loss(x, labels, None, turns, inplace, chosen, options)
    options, advantages = credit_turns(options, labels, *turns, values, gae_lambda)
    return policy_loss(logits, labels, advantages, inplace=inplace, turn_ids=turn_ids, backend=backend, **options)

"""From log-probs that the caller's own forward pass computed: the policy loss of a trainer that keeps its head."""

import torch
from torch import Tensor
from typing_extensions import Unpack

from ppg_fast.functional.loss import LossOptions, LossRows, PolicyLossOutput
from ppg_fast.functional.tokens import check_tensor
from ppg_fast.spec import require


def policy_loss_from_logprobs(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    entropy: Tensor | None = None,
    lse: Tensor | None = None,
    turn_ids: Tensor | None = None,
    **options: Unpack[LossOptions],
) -> PolicyLossOutput:
    """The policy loss of log-probs, differentiable in them: `policy_loss` after its sweep over the vocabulary.

    loss = sum over active tokens of weight * term(l, H, old, ref, rollout, A), the weight from the reduction, the term
    from ``spec``.

    Args:
        logprobs: (...) floating point, of the tokens taken, at the temperature they were sampled at; what masked rows
            hold is not used.
        advantages: (...), or (B,) for a (B, L) batch.
        entropy, lse: (...) of the same distributions, for ``spec.entropy_coef`` and ``spec.z_coef``.
        turn_ids: (...) integers, for loss_type "gspo_turn" and "gmpo_turn".
        **options: as in `policy_loss`; ``skip_zero_advantages`` changes no cost here, and ``spec.temperature`` and
            ``logit_softcap`` have no effect.

    Returns: `PolicyLossOutput` with the entropy zero where none was given.
    Raises: ValueError as `policy_loss`, for a term in entropy or log-sum-exp without ``entropy`` or ``lse``, and for
        ``score_norms``, which log-probs do not tell.
    """
    require(
        isinstance(logprobs, Tensor) and logprobs.is_floating_point(),
        "logprobs must be a floating point tensor",
        logprobs,
    )
    labels = torch.zeros(logprobs.shape, dtype=torch.int64, device=logprobs.device)
    rows = LossRows.of(labels, advantages, logprobs.device, turn_ids=turn_ids, **options)
    require(
        rows.spec.entropy_coef == 0 or entropy is not None, "an entropy term (entropy_coef != 0) needs entropy", entropy
    )
    require(not rows.spec.z_coef or lse is not None, "a z-loss (z_coef > 0) needs lse", lse)
    require(not rows.score_norms, "score_norms are made of logits: policy_loss and linear_policy_loss have them", True)
    read = rows.tokens.labels >= 0
    given = {"logprobs": logprobs, "entropy": entropy, "lse": lse}
    for name, values in given.items():
        if values is not None:
            check_tensor(name, values, logprobs.shape, logprobs.device)
            # replaced before use: what a masked row holds, NaN included, reaches neither the loss nor a gradient
            given[name] = torch.where(read, values.reshape(-1).float(), 0.0)
    l, H = given["logprobs"], given["entropy"]
    assert l is not None
    loss = rows.loss_from_logprobs(l, H, given["lse"])
    return rows.output(loss, l, torch.zeros_like(l) if H is None else H, options.get("skip_zero_advantages", False))

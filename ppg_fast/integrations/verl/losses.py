"""Policy losses for verl: our loss of each token, verl's denominators."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss  # pyright: ignore[reportMissingImports]

from ppg_fast.functional import policy_loss_from_logprobs
from ppg_fast.integrations.options import own_numbers
from ppg_fast.integrations.turns import inside, turn_ids_of_mask
from ppg_fast.integrations.verl.options import check_actor
from ppg_fast.losses import LOSS_TYPES
from ppg_fast.spec import PolicyLossSpec, require


def loss_spec(loss_type: str, config: Any) -> PolicyLossSpec:
    """The loss that verl's actor configuration asks for: clip_ratio_low and clip_ratio_high, else clip_ratio, as
    bounds; clip_ratio_c as dual clip, in dppo as cap of the ratio; tau_pos, tau_neg. ValueError for what it cannot
    honour."""
    require(config is not None, "verl's policy losses need the actor's config", config)
    check_actor(config)
    low, high = (
        config.clip_ratio if bound is None else bound for bound in (config.clip_ratio_low, config.clip_ratio_high)
    )
    most = float(config.get("clip_ratio_c", 3.0) or 0.0)
    taus = {"tau_positive": config.get("tau_pos", 1.0), "tau_negative": config.get("tau_neg", 1.05)}
    numbers = own_numbers(loss_type, clip_low=low, clip_high=high, dual_clip=most, ratio_cap=most, **taus)
    return PolicyLossSpec(loss_type, **numbers)


def policy_loss(
    loss_type: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The policy loss with verl's signature; verl adds entropy and KL terms.

    Args:
        old_log_prob, log_prob, advantages, response_mask: (bs, response_length), own alignment; ``log_prob`` is
        differentiable.
        loss_agg_mode: any mode of verl's ``agg_loss``, which divides.
        config: verl's ActorConfig, see `loss_spec`, with ``global_batch_info``.
        rollout_is_weights: (bs, response_length), factors of the tokens' losses.

    Returns: 0-d loss and metrics by name.
    """
    spec = loss_spec(loss_type, config)
    turn_ids = turn_ids_of_mask(response_mask) if spec.needs_turn_ids else None
    out = policy_loss_from_logprobs(
        log_prob,
        advantages,
        loss_mask=response_mask,
        old_logprobs=old_log_prob,
        turn_ids=turn_ids,
        spec=spec,
        reduction="none",
    )
    per_token = out.loss if rollout_is_weights is None else out.loss * inside(rollout_is_weights, response_mask)
    if bool((response_mask != 0).any()):
        loss = agg_loss(
            loss_mat=per_token, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info
        )
    else:  # a connected 0, where verl divides by its tokens or sequences
        loss = per_token.sum()
    names = {"approx_kl": "actor/approx_kl", "clip_fraction": "actor/pg_clipfrac"}
    return loss, {verl: float(out.metrics[ours]) for ours, verl in names.items() if ours in out.metrics}


LOSSES: dict[str, Callable[..., tuple[Tensor, dict[str, float]]]] = {
    "ppg" if name == "ppo" else f"ppg_{name}": partial(policy_loss, name) for name in LOSS_TYPES
}


def register() -> None:
    """Add the losses to verl's registry."""
    for name, function in LOSSES.items():
        register_policy_loss(name)(function)

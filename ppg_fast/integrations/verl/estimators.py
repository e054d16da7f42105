"""Advantage estimators for verl: one for each policy class, from per-token rewards, the response mask and uid."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from verl.trainer.config import AlgoConfig  # pyright: ignore[reportMissingImports]
from verl.trainer.ppo.core_algos import register_adv_est  # pyright: ignore[reportMissingImports]

from ppg_fast.integrations.turns import Credit, group_numbers, turn_ids_of_mask
from ppg_fast.integrations.verl.options import PPG, check_algorithm
from ppg_fast.spec import require

# the option each class needs
OPTION = {"greedy": None, "lookahead": "lookahead", "segment": "segment_length", "full": None, "lags": "lags"}


def credit(policy_class: str, config: Any) -> Credit:
    """Policy class, discount and baseline from ``algorithm.ppg``; ValueError for a wrong option, there or in
    ``algorithm``."""
    if config is not None:
        check_algorithm(config, AlgoConfig)
    options = None if config is None else config.get("ppg", None)
    options = {} if options is None else dict(options)
    unknown = sorted(set(options) - set(PPG))
    require(not unknown, f"algorithm.ppg has {', '.join(PPG)}", unknown)
    needed = OPTION[policy_class]
    if needed:
        what = "'[<a weight a lag>]'" if policy_class == "lags" else "<turns>"
        require(needed in options, f"ppg_{policy_class} needs +algorithm.ppg.{needed}={what}; algorithm.ppg", options)
        value = options[needed]
        own = value if isinstance(value, (str, int)) else ",".join(map(str, value))
        policy_class = f"{policy_class}:{own}"
    return Credit(policy_class, **{name: options[name] for name in ("gamma", "baseline") if name in options})


def estimate(
    policy_class: str,
    token_level_rewards: Tensor,
    response_mask: Tensor,
    config: Any = None,
    index: Any = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Advantage and return of the turn of each token.

    A token of turn t gets R_t minus the baseline of turn t over its group, R_t = sum over k in S_t of gamma^(k-t) r_k
    (arXiv:2603.06138); r_k is the sum of the rewards from the first token of turn k to the next turn.

    Args:
        token_level_rewards: (bs, response_length) floating point.
        response_mask: (bs, response_length), non-zero on the policy's own tokens; its runs are the turns.
        config: verl's ``algorithm`` configuration; ``config.ppg`` holds lookahead, segment_length, lags, gamma and
            baseline.
        index: (bs,) uid, equal for the rollouts of one prompt.

    Returns: advantages and returns, (bs, response_length) float32, zero outside of the mask.
    Raises: ValueError for an option that cannot be honoured, a missing lookahead, segment_length or lags, a reward
        before the first turn.
    """
    turn_ids = turn_ids_of_mask(response_mask)
    return credit(policy_class, config).of_tokens(token_level_rewards, turn_ids, group_numbers(index, turn_ids.device))


ESTIMATORS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    f"ppg_{name}": partial(estimate, name) for name in OPTION
}


def register() -> None:
    """Add the estimators to verl's registry."""
    for name, function in ESTIMATORS.items():
        register_adv_est(name)(function)

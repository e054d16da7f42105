"""SkyRL >= 0.3: an advantage estimator and a policy loss in its registries, and the mask that the estimator needs.

    from ppg_fast.integrations import skyrl
    class Trainer(skyrl.CreditByLossMask, RayPPOTrainer): ...
    skyrl.register(policy_class="lookahead:3")    # before the trainer is built

Then ``advantage_estimator`` and ``policy_loss_type`` may be "ppg". `OPTIONS` lists what becomes of SkyRL's options.
"""

from functools import partial
from typing import Any

from torch import Tensor

from ppg_fast.functional import policy_loss_from_logprobs
from ppg_fast.integrations.host import require_host
from ppg_fast.integrations.options import check, check_unknown, hosts_own, obeyed, own_numbers, refused
from ppg_fast.integrations.turns import Credit, group_numbers, inside, last_tokens, turn_ids_of_mask
from ppg_fast.losses import LOSS_TYPES
from ppg_fast.policy_classes import PolicyClass
from ppg_fast.spec import PolicyLossSpec, fail, require, require_one_of

MINIMUM = "0.3"
UTILS = "skyrl.backends.skyrl_train.utils"
ADVANTAGES, LOSS, TRAINER = "advantages", "loss", "trainer"
DPPO = {"dppo_tv": "binary_tv", "dppo_kl": "binary_kl"}
OPTIONS = (  # of trainer.algorithm; the last row is of the whole configuration
    obeyed(ADVANTAGES, "advantage_estimator", "the name given to `register`, which has the policy class and baseline"),
    refused(ADVANTAGES, "gamma", 1.0, "give register(gamma=...), a discount per turn"),
    refused(ADVANTAGES, "lambd", 1.0, "there is no GAE"),
    refused(ADVANTAGES, "grpo_norm_by_std", True, "give register(baseline=...)"),
    hosts_own(ADVANTAGES, "use_kl_in_reward kl_ctrl", "a penalty on a token is part of its turn's reward"),
    hosts_own(ADVANTAGES, "advantage_batch_normalize", "whitens our advantages"),
    hosts_own(ADVANTAGES, "zero_variance_filter zero_variance_filter_tol dynamic_sampling",
              "before us, by rewards of dialogues"),
    hosts_own(ADVANTAGES, "value_clip value_head_prefix", "of a critic"),
    obeyed(LOSS, "policy_loss_type", "the name given to `register`, which has the loss type"),
    obeyed(LOSS, "eps_clip_low eps_clip_high", "clip_low and clip_high, in icepop (SkyRL's rollout_is) of the gate; "
           "reinforce and sapo have none"),
    obeyed(LOSS, "cispo.cispo_eps_clip_low cispo.cispo_eps_clip_high", "clip_low and clip_high of cispo"),
    obeyed(LOSS, "cispo.cispo_anchor", "rollout: the sampler's log-probs are the old ones of cispo",
           lambda anchor: anchor in ("old", "rollout"), "old or rollout"),
    obeyed(LOSS, "sapo.tau_pos sapo.tau_neg", "tau_positive and tau_negative of sapo"),
    obeyed(LOSS, "dppo.delta_low dppo.delta_high", "clip_low and clip_high of dppo_tv and dppo_kl"),
    obeyed(LOSS, "dppo.dppo_type", "binary_tv with loss type dppo_tv, binary_kl with dppo_kl"),
    obeyed(LOSS, "off_policy_correction", "by SkyRL's own function, on the loss of each token"),
    hosts_own(LOSS, "use_tis tis_imp_ratio_cap", "become off_policy_correction before we see them"),
    hosts_own(LOSS, "loss_reduction max_seq_len", "scales the advantages: our loss is a sum"),
    hosts_own(LOSS, "use_kl_loss kl_loss_coef kl_estimator_type use_entropy_loss entropy_loss_coef",
              "terms that SkyRL adds"),
    hosts_own(LOSS, "temperature", "in the log-probs we are given"),
    refused(LOSS, "clip_ratio_c", 3.0, "belongs to policy_loss_type dual_clip: there is no dual clip here"),
    refused(LOSS, "clip_cov.clip_ratio", 0.0002, "belongs to policy_loss_type clip_cov"),
    refused(LOSS, "clip_cov.clip_cov_lb", 1.0, "belongs to policy_loss_type clip_cov"),
    refused(LOSS, "clip_cov.clip_cov_ub", 5.0, "belongs to policy_loss_type clip_cov"),
    refused(LOSS, "kl_cov.kl_cov_frac", 0.2, "belongs to policy_loss_type kl_cov"),
    refused(LOSS, "kl_cov.ppo_kl_coef", 1.0, "belongs to policy_loss_type kl_cov"),
    refused(TRAINER, "generator.step_wise_trajectories", False, "the row of a step has no rewards of other steps"),
)  # fmt: skip


def advantages(
    credit: Credit, token_level_rewards: Tensor, response_mask: Tensor, index: Any, config: Any = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """Advantage and return of the turn of each token, with the signature of SkyRL's estimators.

    Args:
        token_level_rewards: (B, L), the reward of a turn on its last token, where SkyRL's generator puts it.
        response_mask: (B, L), non-zero on the policy's own tokens: the loss mask, see `CreditByLossMask`; its runs are
            the turns.
        index: (B,) uids, equal for the rollouts of one prompt.
        config: SkyRL's algorithm configuration.

    Returns: advantages and returns, (B, L) float32, zero outside of the mask.
    Raises: ValueError for an option that `OPTIONS` refuses, and for a reward in the middle of a run, which is what
        SkyRL's response mask, observations included, gives.
    """
    _check_options(config, ADVANTAGES)
    turn_ids = turn_ids_of_mask(response_mask)
    if not getattr(config, "use_kl_in_reward", False):  # which leaves a reward on every token
        inside = (token_level_rewards != 0) & (turn_ids >= 0) & ~last_tokens(turn_ids)
        rule = (
            "rewards must be at ends of runs of the mask (give the trainer CreditByLossMask); first (row, token) inside"
        )
        require(not bool(inside.any()), rule, inside.nonzero()[:1].tolist())
    return credit.of_tokens(token_level_rewards, turn_ids, group_numbers(index, turn_ids.device))


def loss_spec(loss_type: str, config: Any) -> PolicyLossSpec:
    """The loss that SkyRL's algorithm configuration asks for; ValueError for what it cannot honour, see `OPTIONS`."""
    _check_options(config, LOSS)
    low, high = config.eps_clip_low, config.eps_clip_high
    if loss_type == "cispo":
        low, high = config.cispo.cispo_eps_clip_low, config.cispo.cispo_eps_clip_high
    if loss_type in DPPO:
        rule = f"dppo.dppo_type of SkyRL must be {DPPO[loss_type]} for loss type {loss_type} of register"
        require(config.dppo.dppo_type == DPPO[loss_type], rule, config.dppo.dppo_type)
        low, high = config.dppo.delta_low, config.dppo.delta_high
    numbers = {"clip_low": float(low), "clip_high": float(high)}
    if loss_type == "sapo":
        numbers |= {"tau_positive": config.sapo.tau_pos, "tau_negative": config.sapo.tau_neg}
    return PolicyLossSpec(loss_type, **own_numbers(loss_type, **numbers))


def _behaviour(loss_type: str, old: Tensor, rollout: Tensor | None, config: Any) -> Tensor:
    """The log-probs under the ratio: of the sampler where SkyRL's loss of this type is anchored there, else ``old``."""
    if loss_type in DPPO:
        return old if rollout is None else rollout
    anchored = loss_type == "cispo" and getattr(config.cispo, "cispo_anchor", "old") == "rollout"
    if not anchored and loss_type != "icepop":
        return old
    if rollout is None:
        fail(f"loss type {loss_type}, anchored at the sampler, needs rollout_logprobs", None)
    correction = getattr(config.off_policy_correction, "tis_ratio_type", None)
    rule = f"off_policy_correction.tis_ratio_type of SkyRL must be None for {loss_type} (its ratio corrects already)"
    require(correction is None, rule, correction)
    return rollout


def policy_loss(
    loss_type: str,
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    config: Any,
    loss_mask: Tensor | None = None,
    rollout_logprobs: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The policy loss with SkyRL's signature, a sum: SkyRL has scaled the advantages by its reduction.

    Args:
        log_probs: (B, L) differentiable; old_log_probs, advantages (scaled by SkyRL), loss_mask, rollout_logprobs: (B,
            L) or None.
        config: SkyRL's algorithm configuration, see `loss_spec` and off_policy_correction.

    Returns: 0-d loss and metrics by name. The off-policy correction is SkyRL's own, on the loss of each token.
    Raises: ValueError for an option that `OPTIONS` refuses.
    """
    spec, behaviour = loss_spec(loss_type, config), _behaviour(loss_type, old_log_probs, rollout_logprobs, config)
    turns = spec.needs_turn_ids
    require(not turns or loss_mask is not None, f'loss_type "{loss_type}" needs a loss_mask', loss_mask)
    turn_ids = turn_ids_of_mask(loss_mask) if turns and loss_mask is not None else None
    out = policy_loss_from_logprobs(
        log_probs,
        advantages,
        loss_mask=loss_mask,
        old_logprobs=behaviour,
        turn_ids=turn_ids,
        spec=spec,
        reduction="none",
    )
    correct = require_host("skyrl", MINIMUM, f"{UTILS}.off_policy_correction_utils").apply_off_policy_correction
    if loss_mask is not None:  # SkyRL multiplies by the mask
        old_log_probs = inside(old_log_probs, loss_mask)
        rollout_logprobs = None if rollout_logprobs is None else inside(rollout_logprobs, loss_mask)
    loss, mask, metrics = correct(out.loss, old_log_probs, rollout_logprobs, loss_mask, config.off_policy_correction)
    reduced = require_host("skyrl", MINIMUM, f"{UTILS}.ppo_utils").reduce_loss(loss, mask)
    return reduced, {"clip_ratio": float(out.metrics.get("clip_fraction", 0.0)), **metrics}


def _check_options(config: Any, part: str) -> None:
    if config is not None:
        check("SkyRL", OPTIONS, config, part)
        check_unknown("SkyRL", OPTIONS, config)


class CreditByLossMask:
    """Mix-in before RayPPOTrainer: estimators get the loss mask, which is zero on observations, as response mask.

    SkyRL's response mask covers observations too, so that the turns of a dialogue would be one run. Dialogues have to
    be single rows (``generator.step_wise_trajectories=false``): step-wise rows reach an estimator without their rewards
    of turns.
    """

    def compute_advantages_and_returns(self, data: Any) -> Any:
        check("SkyRL", OPTIONS, getattr(self, "cfg", None), TRAINER)
        response_mask = data["response_mask"]
        data["response_mask"] = data["loss_mask"]
        out = super().compute_advantages_and_returns(data)  # type: ignore[misc]
        out["response_mask"] = response_mask
        return out


def register(
    policy_class: PolicyClass | str = "full",
    gamma: float = 1.0,
    baseline: str = "leave_one_out",
    loss_type: str = "ppo",
    name: str = "ppg",
) -> None:
    """Register the estimator and the loss under ``name``; SkyRL sends them to its Ray workers.

    ``policy_class``, ``gamma``, ``baseline``: as in `partial_returns` and `turn_advantages`; ``loss_type``: as in
    `PolicyLossSpec`.
    """
    require_one_of("loss_type", loss_type, LOSS_TYPES)
    registries = require_host("skyrl", MINIMUM, f"{UTILS}.ppo_utils")
    registries.register_advantage_estimator(name)(
        _named(partial(advantages, Credit(policy_class, gamma, baseline)), "ppg_advantages")
    )
    registries.register_policy_loss(name)(_named(partial(policy_loss, loss_type), "ppg_policy_loss"))


def _named(function: Any, name: str) -> Any:
    function.__name__ = name  # SkyRL's decorator copies it
    return function

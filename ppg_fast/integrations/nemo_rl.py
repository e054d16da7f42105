"""NVIDIA NeMo-RL >= 0.6: a LossFunction and an advantage estimator, for a driver script that calls grpo_train(...,
loss_fn=...).

With ``config=master_config`` both obey NeMo-RL's configuration and refuse by name what they cannot honour, see
`OPTIONS`. Without it, ``loss_fn`` and ``grpo.adv_estimator`` of that configuration have no effect on them.
"""

from typing import Any

import torch
from torch import Tensor

from ppg_fast.functional import policy_loss_from_logprobs
from ppg_fast.integrations.host import require_host
from ppg_fast.integrations.options import RUN, Option, check, check_unknown, hosts_own, obeyed, own_numbers, refused
from ppg_fast.integrations.turns import Credit, inside, last_tokens, place_turn_rewards, turn_counts, turn_ids_of_mask
from ppg_fast.policy_classes import PolicyClass
from ppg_fast.spec import MAX_LOG_RATIO, PolicyLossSpec, require

MINIMUM = "0.6"
ADVANTAGES, TURN_REWARDS, LOSS = "advantages", "turn rewards", "loss"
BASELINE = "give PPGAdvantageEstimator(baseline=...)"
OPTIONS = (  # of the master configuration
    refused(ADVANTAGES, "grpo.adv_estimator.name", "grpo", "the estimator is PPGAdvantageEstimator"),
    refused(ADVANTAGES, "grpo.normalize_rewards grpo.use_leave_one_out_baseline grpo.adv_estimator.normalize_rewards "
            "grpo.adv_estimator.use_leave_one_out_baseline grpo.adv_estimator.minus_baseline", True, BASELINE),
    refused(ADVANTAGES, "grpo.adv_estimator.reward_weights", None, "turns have one reward: add them up before"),
    refused(ADVANTAGES, "loss_fn.use_kl_in_reward", False, "rewards get no KL penalty"),
    refused(TURN_REWARDS, "grpo.reward_shaping.enabled grpo.reward_scaling.enabled", False,
            "they change the reward of the dialogue, not those of its turns"),
    refused(TURN_REWARDS, "reward_penalties.penalize_duplicated_reasoning "
            "reward_penalties.penalize_empty_final_answer reward_penalties.penalize_unwanted_tokens "
            "reward_penalties.penalize_malformed_think_tag", False, "likewise"),
    hosts_own(ADVANTAGES, "reward_penalties grpo.reward_shaping grpo.reward_scaling grpo.use_dynamic_sampling "
              "grpo.batch_multiplier grpo.dynamic_sampling_max_gen_batches",
              "before us, on the reward of the dialogue"),
    hosts_own(ADVANTAGES, "grpo.advantage_clip_low grpo.advantage_clip_high grpo.invalid_tool_call_advantage "
              "grpo.malformed_thinking_advantage", "change our advantages"),
    hosts_own(ADVANTAGES, "grpo.overlong_filtering grpo.seq_logprob_error_threshold",
              "mask sequences, which then take no part in a baseline"),
    hosts_own(RUN, "grpo.num_prompts_per_step grpo.num_generations_per_prompt grpo.max_num_epochs "
              "grpo.max_num_steps grpo.max_rollout_turns grpo.val_period grpo.val_start_at grpo.val_batch_size "
              "grpo.val_at_start grpo.val_at_end grpo.max_val_samples grpo.val_num_generations_per_prompt "
              "grpo.stop_at_validation_metric grpo.stop_at_validation_threshold "
              "grpo.skip_reference_policy_logprobs_calculation grpo.seed grpo.async_grpo "
              "grpo.calculate_advantages_on_gpu grpo.deduplicate_multimodal_data grpo.debug_payload_metrics",
              "no effect on the loss of a batch"),
    obeyed(LOSS, "loss_fn.token_level_loss", "mean over tokens, else over sequences of their token mean"),
    obeyed(LOSS, "loss_fn.disable_ppo_ratio loss_fn.sequence_level_importance_ratios loss_fn.use_cispo",
           "loss_type reinforce, gspo, cispo; else ppo"),
    obeyed(LOSS, "loss_fn.ratio_clip_min loss_fn.ratio_clip_max",
           "clip_low and clip_high, of cispo too"),
    obeyed(LOSS, "loss_fn.ratio_clip_c", "dual_clip of ppo and gspo"),
    obeyed(LOSS, "loss_fn.force_on_policy_ratio", "prev_logprobs, then zeros, are not read"),
    obeyed(LOSS, "loss_fn.use_importance_sampling_correction loss_fn.truncated_importance_sampling_ratio",
           "importance_cap, weights of single tokens"),
    obeyed(LOSS, "loss_fn.truncated_importance_sampling_type", "importance_mode truncate or mask",
           lambda kind: kind in (None, "tis", "icepop"), "null, tis or icepop"),
    obeyed(LOSS, "loss_fn.truncated_importance_sampling_ratio_min", "importance_floor"),
    hosts_own(LOSS, "loss_fn.use_kl_in_reward", "takes the KL out of the loss, for its own estimators"),
    obeyed(LOSS, "loss_fn.reference_policy_kl_penalty", "kl_coef of k3_unbiased against its own sampling weight"),
    Option("loss_fn.reference_policy_kl_type", LOSS, "obeyed", "kl_estimator", must="k3 where there is a penalty"),
    Option("loss_fn.kl_input_clamp_value loss_fn.kl_output_clamp_value", LOSS, "obeyed", "max_log_ratio and kl_cap of "
           "the KL", must="the second smaller, or both null, where there is a penalty"),
    obeyed(LOSS, "loss_fn.use_on_policy_kl_approximation", "its sampling weight is exp(l - generation_logprobs)"),
    refused(LOSS, "on_policy_distillation.enabled", False, "no log-probs of a teacher are read"),
    obeyed(LOSS, "loss_fn.positive_example_nll_weight", "nll_weights on the tokens of sequences with a reward > 0"),
)  # fmt: skip


def _check_options(config: Any, part: str, section: str) -> None:
    check("NeMo-RL", OPTIONS, config, part)
    check_unknown("NeMo-RL", OPTIONS, config, names=lambda path: path.split(".")[0] == section)


def loss_spec(config: Any) -> PolicyLossSpec:
    """The loss that ``loss_fn`` of NeMo-RL's master configuration asks for; ValueError for what it cannot honour."""
    _check_options(config, LOSS, "loss_fn")
    given = config.loss_fn
    switches = {
        "reinforce": given.disable_ppo_ratio,
        "gspo": given.sequence_level_importance_ratios,
        "cispo": given.use_cispo,
    }
    loss_type = next((name for name, chosen in switches.items() if chosen), "ppo")
    rule = f"loss_fn.ratio_clip_c of NeMo-RL must be null for {loss_type} (it has no dual clip)"
    require(given.ratio_clip_c is None or loss_type in ("ppo", "gspo"), rule, given.ratio_clip_c)
    bounds = {"clip_low": given.ratio_clip_min, "clip_high": given.ratio_clip_max}
    own = own_numbers(loss_type, **bounds, dual_clip=given.ratio_clip_c or 0.0)
    return PolicyLossSpec(loss_type, **own, **_importance_weight(given, loss_type))


def _importance_weight(given: Any, loss_type: str) -> dict[str, Any]:
    if not given.use_importance_sampling_correction:
        return {}
    cap, kind = given.truncated_importance_sampling_ratio, given.truncated_importance_sampling_type
    rule = "loss_fn.truncated_importance_sampling_ratio of NeMo-RL must be a number (importance weights have a cap)"
    require(cap is not None, rule, cap)
    rule = "loss_fn.use_importance_sampling_correction of NeMo-RL must be False with"
    require(loss_type != "gspo", f"{rule} sequence_level_importance_ratios (our weights are of tokens)", True)
    floor = given.truncated_importance_sampling_ratio_min if kind else None
    mode = "mask" if kind == "icepop" else "truncate"
    return {"importance_cap": float(cap), "importance_floor": float(floor or 0.0), "importance_mode": mode}


def kl_spec(config: Any) -> PolicyLossSpec | None:
    """The KL term of ``loss_fn``, or None: k3 times a weight of the sampling through which its gradient flows too.

    A loss of its own, without a surrogate: the weight divides by the policy as it is, not by that of the ratio.
    ValueError for what it cannot honour.
    """
    given = config.loss_fn
    if not given.reference_policy_kl_penalty or given.use_kl_in_reward:
        return None
    kind, inner, outer = given.reference_policy_kl_type, given.kl_input_clamp_value, given.kl_output_clamp_value
    rule = "loss_fn.reference_policy_kl_type of NeMo-RL must be k3 (or give PPGLossFn a spec with kl_estimator)"
    require(kind == "k3", rule, kind)
    rule = "loss_fn.kl_output_clamp_value of NeMo-RL must be smaller than kl_input_clamp_value, or both null"
    require((inner is None) == (outer is None) and (inner is None or outer < inner), rule, outer)
    bounds = {} if inner is None else {"max_log_ratio": inner, "kl_cap": outer}
    return PolicyLossSpec(kl_coef=given.reference_policy_kl_penalty, kl_estimator="k3_unbiased", **bounds)


class PPGLossFn:
    """The policy loss as NeMo-RL's LossFunction over log-probs.

    Args:
        spec: the loss; its ``importance_cap`` uses generation_logprobs.
        config: NeMo-RL's master configuration in place of ``spec`` and ``token_level``, see `OPTIONS`.
        token_level: divided by the global number of tokens; else the mean over sequences of their token mean, divided
            by the global number of sequences.
        use_fused_linear_logprobs: as in NeMo-RL's own loss.

    Raises: ValueError for an option of ``config`` that cannot be honoured.
    """

    def __init__(
        self,
        spec: PolicyLossSpec | None = None,
        *,
        config: Any = None,
        token_level: bool = True,
        use_fused_linear_logprobs: bool = False,
    ) -> None:
        interfaces = require_host("nemo-rl", MINIMUM, "nemo_rl.algorithms.loss.interfaces")
        require(spec is None or config is None, "PPGLossFn takes a spec or NeMo-RL's config, not both", spec)
        self.spec = PolicyLossSpec("ppo") if spec is None else spec
        self.token_level, self.on_policy = token_level, False
        self.kl: PolicyLossSpec | None = None
        self.kl_on_policy, self.nll_weight = False, 0.0
        if config is not None:
            self.spec, self.kl, self.token_level = loss_spec(config), kl_spec(config), config.loss_fn.token_level_loss
            self.on_policy = config.loss_fn.force_on_policy_ratio
            self.kl_on_policy = config.loss_fn.use_on_policy_kl_approximation
            self.nll_weight = config.loss_fn.positive_example_nll_weight
        levels = interfaces.LossType
        self.loss_type = levels.TOKEN_LEVEL if self.token_level else levels.SEQUENCE_LEVEL
        self.input_type = interfaces.LossInputType.LOGPROB
        self.use_fused_linear_logprobs = use_fused_linear_logprobs

    def __call__(
        self, next_token_logprobs: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor, **_: Any
    ) -> tuple[Tensor, dict[str, float]]:
        """Loss and metrics of a micro-batch.

        Args:
            next_token_logprobs: (B, S - 1) differentiable, position i holding the log-prob of token i + 1.
            data: token_mask, advantages, prev_logprobs, generation_logprobs (B, S), sample_mask (B,);
                reference_policy_logprobs (B, S) where there is a KL term; rewards (B,) where the configuration has
                positive_example_nll_weight.
            global_valid_seqs, global_valid_toks: 0-d, the denominators over all ranks and micro-batches.

        Returns: 0-d loss, already divided, and metrics by name.
        """
        keep = data.get("curr_logprobs_keep_mask")  # next-token frame: tokens that top-k or top-p filtering left
        mask = data["token_mask"][:, 1:] * data["sample_mask"][:, None] * (1 if keep is None else keep)
        rule = "a KL term (kl_coef) needs sampling without top-k and top-p: log-probs are those of the filtered tokens"
        coef = self.spec.kl_coef or (self.kl.kl_coef if self.kl else 0.0)
        require(not coef or data.get("curr_logprobs_unfiltered") is None, rule, coef)
        rollout = data["generation_logprobs"][:, 1:]
        old = next_token_logprobs.detach() if self.on_policy else data["prev_logprobs"][:, 1:]
        rule = "prev_logprobs are zeros, as under loss_fn.force_on_policy_ratio: give PPGLossFn NeMo-RL's config; sum"
        require(self.on_policy or not bool(mask.any()) or bool(inside(old, mask).any()), rule, 0.0)
        denominator = global_valid_toks if self.token_level else global_valid_seqs
        tokens, normalizer = (
            torch.as_tensor(n, device=mask.device).reshape(()).float() for n in (global_valid_toks, denominator)
        )
        ref = data["reference_policy_logprobs"][:, 1:] if coef else None
        shared: dict[str, Any] = {
            "loss_mask": mask, "ref_logprobs": ref, "normalizer": normalizer.clamp(min=1),
            "reduction": "token_mean" if self.token_level else "sequence_mean",
        }  # fmt: skip
        advantages = data["advantages"][:, 1:]
        out = policy_loss_from_logprobs(
            next_token_logprobs, advantages, old_logprobs=old, rollout_logprobs=rollout, spec=self.spec,
            turn_ids=turn_ids_of_mask(mask) if self.spec.needs_turn_ids else None,
            nll_weights=self._likelihood(data, mask), **shared,
        )  # fmt: skip
        loss = out.loss
        if self.kl:
            sampled = rollout if self.kl_on_policy else next_token_logprobs.detach()
            zero = torch.zeros_like(advantages)
            kl = policy_loss_from_logprobs(next_token_logprobs, zero, old_logprobs=sampled, spec=self.kl, **shared)
            loss = loss + kl.loss
        # grpo_train reads this name, and sums metrics over micro-batches: hence the global denominator
        mismatch = inside((rollout - old).abs().clamp(max=MAX_LOG_RATIO).exp(), mask).sum() / tokens.clamp(min=1)
        metrics = {
            "loss": loss.detach(),
            "token_mult_prob_error": mismatch,
            "num_valid_samples": data["sample_mask"].sum(),
        }
        return loss, {name: float(value) for name, value in metrics.items()}

    def _likelihood(self, data: Any, mask: Tensor) -> Tensor | None:
        """Weights of the likelihood: of the tokens of sequences with a reward > 0, over their number here."""
        if not self.nll_weight or "rewards" not in data:
            return None
        return torch.where(data["rewards"][:, None] > 0, mask * self.nll_weight, 0.0)


class PPGAdvantageEstimator:
    """Advantages of turns under NeMo-RL's estimator interface.

    ``policy_class``, ``gamma``, ``baseline``: as in `turn_advantages`. ``config``: NeMo-RL's master configuration, of
    which an option that cannot be honoured is refused by a ValueError, see `OPTIONS`.
    """

    def __init__(
        self,
        policy_class: PolicyClass | str = "full",
        gamma: float = 1.0,
        baseline: str = "leave_one_out",
        *,
        config: Any = None,
    ) -> None:
        self.credit, self.config = Credit(policy_class, gamma, baseline), config
        if config is not None:
            _check_options(config, ADVANTAGES, "grpo")

    def compute_advantage(
        self,
        prompt_ids: Tensor,
        rewards: Tensor,
        mask: Tensor,
        repeated_batch: Any = None,
        valid_mask: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Advantage of the turn of each token, (B, S) float32, zero outside of the mask.

        Args:
            prompt_ids: (B, P) tokens of the prompts, equal for the rollouts of one prompt, or (B,).
            rewards: (B,) of the dialogues, given to the last turn where there are no rewards of turns.
            mask: (B, S), non-zero on the policy's own tokens; its runs are the turns.
            repeated_batch: the batch; ``repeated_batch["turn_rewards"]``, if given, holds one number per turn for each
                row.
            valid_mask: (B,), 0 for rows that take no part in the baselines either.

        Raises: ValueError where a row that takes part has another number of rewards than turns, and where turns have
            rewards although the configuration changes that of the dialogue.
        """
        mask = mask if valid_mask is None else mask * valid_mask[:, None]
        turn_ids = turn_ids_of_mask(mask)
        counts = turn_counts(turn_ids)
        if repeated_batch is not None and "turn_rewards" in repeated_batch:
            check("NeMo-RL", OPTIONS, self.config, TURN_REWARDS)
            rows = [
                list(row) if n else [] for row, n in zip(repeated_batch["turn_rewards"], counts.tolist(), strict=True)
            ]
            token_rewards = place_turn_rewards(rows, turn_ids)
        else:
            final = last_tokens(turn_ids) & (turn_ids == counts[:, None] - 1)
            token_rewards = torch.where(final, rewards[:, None].float(), 0.0)
        group_ids = torch.unique(prompt_ids, dim=0, return_inverse=True)[1]
        return self.credit.of_tokens(token_rewards, turn_ids, group_ids.to(mask.device))[0]

"""What becomes of verl's options, without verl: `algorithm.*` for the estimators, `actor_rollout_ref.actor.*` for the
losses."""

from typing import Any

from ppg_fast.integrations.options import RUN, check, check_unknown, hosts_own, obeyed, refused

ADVANTAGES, LOSS, HEAD = "advantages", "loss", "head"
PPG = ("lookahead", "segment_length", "lags", "gamma", "baseline")
ALGORITHM = (
    obeyed(ADVANTAGES, "adv_estimator ppg", "`ppg_*`; lookahead, segment_length, lags, gamma, baseline"),
    refused(ADVANTAGES, "gamma", 1.0, "set +algorithm.ppg.gamma, a discount per turn"),
    refused(ADVANTAGES, "lam", 1.0, "GAE wants values, which verl hands its own estimator alone"),
    refused(ADVANTAGES, "norm_adv_by_std_in_grpo", True, "set +algorithm.ppg.baseline"),
    refused(ADVANTAGES, "use_pf_ppo", False, "verl reweights samples for gae only"),
    refused(ADVANTAGES, "gdpo_reward_keys gdpo_reward_weights", None, "turns have one reward: add them up before"),
    obeyed(ADVANTAGES, "rollout_correction.rollout_rs", "rejected sequences have no turns and no part in a baseline",
           lambda modes: not modes or not any(mode.strip().startswith("token") for mode in str(modes).split(",")),
           "null or modes of whole sequences, since turns are the runs of the mask that it leaves"),
    hosts_own(ADVANTAGES, "rollout_correction", "weights come to the loss; bypass_mode takes verl's own loss"),
    hosts_own(ADVANTAGES, "use_kl_in_reward kl_penalty kl_ctrl", "a penalty on a token is part of its turn's reward"),
    hosts_own(ADVANTAGES, "filter_groups", "drops groups before us, by rewards of dialogues"),
    hosts_own(ADVANTAGES, "pf_ppo", "settings of use_pf_ppo"),
)  # fmt: skip
ACTOR = (
    obeyed(LOSS, "policy_loss.loss_mode", "`ppg`, `ppg_*`"),
    obeyed(LOSS, "clip_ratio clip_ratio_low clip_ratio_high",
           "clip_low, clip_high: the bounds of the loss; reinforce and sapo have none"),
    obeyed(LOSS, "clip_ratio_c", "dual_clip of ppo, gspo and gspo_turn, ratio_cap of dppo; others have none"),
    obeyed(LOSS, "tau_pos tau_neg", "tau_positive and tau_negative of sapo; its loss_agg_mode is the one given"),
    hosts_own(LOSS, "loss_agg_mode loss_scale_factor global_batch_info", "verl's agg_loss divides our loss of tokens"),
    hosts_own(LOSS, "entropy_coeff calculate_entropy use_kl_loss kl_loss_coef kl_loss_type", "terms that verl adds"),
    hosts_own(LOSS, "policy_loss.rollout_correction", "rejection is in the mask, weights are factors of each token"),
    refused(LOSS, "policy_loss.clip_cov_ratio", 0.0002, "belongs to loss_mode clip_cov"),
    refused(LOSS, "policy_loss.kl_cov_ratio", 0.0002, "belongs to loss_mode kl_cov"),
    refused(LOSS, "policy_loss.clip_cov_lb", 1.0, "belongs to loss_mode clip_cov"),
    refused(LOSS, "policy_loss.clip_cov_ub", 5.0, "belongs to loss_mode clip_cov"),
    refused(LOSS, "policy_loss.ppo_kl_coef", 0.1, "belongs to loss_mode kl_cov"),
    refused(LOSS, "policy_loss.dro_beta", None, "belongs to loss_mode dro"),
    obeyed(HEAD, "use_fused_kernels", "with `model.fused_kernel_options.impl_backend=ppg`"),
    obeyed(HEAD, "calculate_sum_pi_squared",
           "in the same sweep with `impl_backend=ppg` under FSDP, for verl's optimal token baselines; verl refuses it "
           "with other fused kernels"),
    hosts_own(
        RUN,
        "strategy rollout_n ppo_mini_batch_size ppo_micro_batch_size ppo_micro_batch_size_per_gpu "
        "ppo_infer_micro_batch_size_per_gpu use_dynamic_bsz ppo_max_token_len_per_gpu ppo_infer_max_token_len_per_gpu "
        "freeze_vision_tower use_prefix_grouper use_torch_compile ppo_epochs shuffle data_loader_seed checkpoint optim "
        "profiler engine model_config qat router_replay grad_clip ulysses_sequence_parallel_size "
        "entropy_from_logits_with_chunking entropy_from_logits_chunk_size entropy_checkpointing pad_to_length "
        "fsdp_config megatron veomni torchtitan profile use_remove_padding use_rollout_log_probs",
        "batches, engines and optimizers",
    ),
)  # fmt: skip


def check_algorithm(config: Any, defaults: Any = None) -> None:
    """Raise ValueError for the first option of ``algorithm`` that our estimators cannot honour, or do not know.

    ``defaults``: verl's AlgoConfig; without it an unknown option must be off.
    """
    check("verl's algorithm", ALGORITHM, config, ADVANTAGES)
    check_unknown("verl's algorithm", ALGORITHM, config, defaults if defaults is not None else dict)


def check_actor(config: Any) -> None:
    """Raise ValueError for the first option of ``actor_rollout_ref.actor`` that our losses cannot honour, or do not
    know."""
    check("verl's actor", ACTOR, config, LOSS)
    check_unknown("verl's actor", ACTOR, config)

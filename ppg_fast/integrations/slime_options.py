"""What becomes of slime's options, without slime: its own and, by families of names, what others add to them."""

import re
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

from ppg_fast.integrations.options import RUN, check, check_unknown, hosts_own, obeyed, refused

KL_TYPES = {"k1": "k1", "k2": "k2", "k3": "k3", "low_var_kl": "k3"}
KL_CAP = 10.0  # nats, of low_var_kl
ICEPOP = "slime.backends.megatron_utils.loss.icepop_function"  # its weights are 0 outside of the bounds
ESTIMATORS = {"grpo": "ppo", "gspo": "gspo", "cispo": "cispo"}  # the losses that slime chooses by its estimator
ADVANTAGES, LOSS = "advantages", "loss"
OPTIONS = (
    obeyed(ADVANTAGES, "ppg_policy_class ppg_gamma ppg_baseline", "as in `turn_advantages`"),
    obeyed(ADVANTAGES, "custom_reward_post_process_path custom_advantage_function_path", "the two functions here"),
    obeyed(ADVANTAGES, "reward_key", "the reward of a sample without `turn_rewards`"),
    refused(ADVANTAGES, "advantage_estimator", tuple(ESTIMATORS), "the advantages of other estimators are not ours"),
    refused(ADVANTAGES, "gamma", 1.0, "set ppg_gamma, a discount per turn"),
    refused(ADVANTAGES, "lambd", 1.0, "there is no GAE"),
    refused(ADVANTAGES, "kl_coef", 0.0, "rewards get no KL penalty: use_kl_loss and kl_loss_coef put it into the loss"),
    refused(ADVANTAGES, "rewards_normalization grpo_std_normalization", True, "ppg_baseline says what is subtracted"),
    refused(ADVANTAGES, "compute_advantages_and_returns", True, "without it no advantage is computed"),
    hosts_own(ADVANTAGES, "normalize_advantages", "whitens our advantages over the ranks"),
    hosts_own(ADVANTAGES, "use_opd opd_type opd_kl_coef", "subtracts the teacher's KL from our advantages"),
    hosts_own(ADVANTAGES, "dynamic_sampling_filter_path buffer_filter_path rollout_sample_filter_path "
              "rollout_all_samples_process_path custom_rm_path group_rm rm_type", "before us, on rewards of samples"),
    hosts_own(ADVANTAGES, "partial_rollout mask_offpolicy_in_partial_rollout loss_mask_type",
              "the loss mask, whose runs are the turns: a turn it masks wholly has no reward, which is an error"),
    hosts_own(ADVANTAGES, "allgather_cp", "slices our advantages as its log-probs"),
    obeyed(LOSS, "loss_type custom_loss_function_path", "`custom_loss` and `ppg_loss`"),
    obeyed(LOSS, "ppg_loss_type", "default: ppo, gspo or cispo by advantage_estimator"),
    obeyed(LOSS, "ppg_tau_positive ppg_tau_negative ppg_log_ratio_coef", "numbers of `PolicyLossSpec`"),
    obeyed(LOSS, "eps_clip eps_clip_high", "clip_low and clip_high: the bounds; reinforce and sapo have none"),
    obeyed(LOSS, "eps_clip_c", "dual_clip of ppo, gspo and gspo_turn, ratio_cap of dppo"),
    obeyed(LOSS, "use_kl_loss kl_loss_coef", "kl_coef"),
    obeyed(LOSS, "kl_loss_type", "kl_estimator; low_var_kl is k3 with a kl_cap of 10", lambda kind: kind in KL_TYPES,
           "k1, k2, k3 or low_var_kl"),
    obeyed(LOSS, "use_unbiased_kl", "kl_estimator k3_unbiased, with k3 or low_var_kl"),
    obeyed(LOSS, "entropy_coef", "of the logits at rollout_temperature"),
    obeyed(LOSS, "rollout_temperature", "temperature"),
    obeyed(LOSS, "use_rollout_logprobs", "the sampler's log-probs are the old ones"),
    obeyed(LOSS, "use_tis tis_clip tis_clip_low", "importance_cap and importance_floor"),
    obeyed(LOSS, "custom_tis_function_path", "importance_mode mask",
           lambda path: path in (None, ICEPOP), f"None or {ICEPOP}"),
    hosts_own(LOSS, "calculate_per_token_loss global_batch_size", "divides: our loss goes through its reducer"),
    refused(LOSS, "custom_pg_loss_reducer_function_path", None, "use --loss-type policy_loss"),
    obeyed(LOSS, "use_opsm opsm_delta", "opsm_delta; not together with use_tis"),
    refused(LOSS, "get_mismatch_metrics", False, "use --loss-type policy_loss"),
    refused(LOSS, "true_on_policy_mode", False, "our log-probs are not the sampler's bit for bit"),
    obeyed(LOSS, "rollout_top_p", "over the sets that slime's sampler hands over, and the entropy, too"),
    hosts_own(LOSS, "log_probs_chunk_size recompute_loss_function use_rollout_entropy value_clip "
              "keep_old_actor ref_update_interval use_routing_replay use_rollout_routing_replay "
              "num_critic_only_steps enable_mtp_training", "memory, models and metrics: no part of this loss"),
    refused(ADVANTAGES, "custom_convert_samples_to_train_data_path", None, "it takes the place of reward_post_process"),
    hosts_own(ADVANTAGES, "rollout_data_postprocess_path rollout_sample_hook_path over_sampling_batch_size "
              "n_samples_per_prompt", "masks and groups before us"),
    hosts_own(LOSS, "rollout_top_k", "of the sampler: no loss of slime's corrects for it either"),
    hosts_own(LOSS, "micro_batch_size use_dynamic_batch_size num_steps_per_rollout", "denominators of its reducer"),
    hosts_own(LOSS, "mtp_num_layers mtp_loss_scaling_factor custom_megatron_init_path "
              "custom_megatron_before_log_prob_hook_path custom_megatron_before_train_step_hook_path",
              "losses and hooks that Megatron adds"),
    hosts_own(RUN,
              "train_backend debug_rollout_only debug_train_only load_debug_rollout_data custom_config_path "
              "padded_vocab_size actor_num_nodes actor_num_gpus_per_node rollout_num_gpus "
              "rollout_num_gpus_per_engine num_gpus_per_node colocate offload offload_train offload_rollout "
              "distributed_backend distributed_timeout_minutes qwen_gdn_backend train_env_vars update_weight_mode "
              "update_weight_transport release_train update_weight_disk_dir update_weight_disk_keep_files "
              "update_weight_delta_encoding update_weight_delta_checksum custom_update_weight_post_write_path "
              "update_weight_local_checkpoint_dir custom_model_provider_path only_train_params_name_list "
              "freeze_params_name_list freeze_indexer hf_checkpoint model_name rollout_function_path "
              "rollout_max_context_len rollout_max_prompt_len rollout_max_response_len rollout_skip_special_tokens "
              "rollout_stop rollout_stop_token_ids rollout_shuffle rollout_seed custom_generate_function_path "
              "custom_rollout_log_function_path custom_eval_rollout_log_function_path update_weight_buffer_size "
              "update_weights_interval rollout_data_transport rollout_external_engine_addrs use_fault_tolerance "
              "rollout_health_check_interval rollout_health_check_timeout rollout_health_check_first_wait "
              "num_rollout num_epoch rollout_global_dataset data_source_path prompt_data apply_chat_template "
              "apply_chat_template_kwargs input_key label_key multimodal_keys metadata_key tool_key "
              "start_rollout_id rollout_batch_size balance_data balance_by_flops max_tokens_per_gpu "
              "log_probs_max_tokens_per_gpu eval_function_path eval_interval eval_prompt_data eval_config "
              "skip_eval_before_train eval_input_key eval_label_key eval_tool_key n_samples_per_eval_prompt "
              "eval_temperature eval_top_p eval_top_k eval_max_response_len eval_max_prompt_len eval_min_new_tokens "
              "eval_max_context_len ref_load ref_ckpt_step load save save_interval async_save no_save_optim save_hf "
              "seed clip_grad lr megatron_config_path reset_optimizer_states use_stateless_adam opd_teacher_load "
              "opd_teacher_ckpt_step use_wandb wandb_mode wandb_dir wandb_key wandb_host wandb_team wandb_group "
              "wandb_project wandb_random_suffix wandb_always_use_train_step log_multi_turn log_passrate "
              "log_reward_category log_correct_samples wandb_run_id use_tensorboard tb_project_name "
              "tb_experiment_name save_debug_rollout_data load_forge_rollout_data load_debug_rollout_data_subsample "
              "save_debug_train_data dump_details memory_snapshot_dir memory_snapshot_num_steps profile_target "
              "memory_recorder record_memory_history check_weight_update_equal http_proxy use_distributed_post "
              "eval_reward_key rm_url rollout_buffer_url fetch_trajectory_retry_times min_batch_collection_ratio "
              "rollout_task_type data_pad_size_multiplier megatron_deepgemm_forward_layers "
              "megatron_deepgemm_forward_modules megatron_deepgemm_moe_forward_layers "
              "megatron_deepgemm_moe_forward_modules ci_test ci_disable_kl_checker "
              "ci_train_rollout_logprob_abs_diff_threshold ci_save_grad_norm ci_load_grad_norm",
              "no effect on the loss of a batch"),
)  # fmt: skip
# names by which an option would change a loss where slime's own list of options is not at hand (`_own_options`): its
# arguments include a thousand of Megatron's, without defaults
FAMILIES = re.compile(
    "ppg_|eps_clip|(use_)?(tis|mis|opsm|icepop|kl)_|use_(tis|mis|opsm|icepop)$|custom_.*(loss|tis|reducer)"
    "|(?!rl_).*(advantage|pg_loss|importance)"
)


def check_options(args: Any, part: str) -> None:
    """Raise ValueError for the first of slime's arguments that ``part`` cannot honour, or does not know."""
    check("slime", OPTIONS, args, part)
    own = _own_options(load=part == ADVANTAGES)
    check_unknown("slime", OPTIONS, args, own or None, names=lambda name: name in own or bool(FAMILIES.match(name)))


def _own_options(load: bool) -> dict[str, Any]:
    """The options that the installed slime adds to Megatron's, with their defaults, from its own parser; none where
    that is not loaded. ``load``: import it, which costs nothing in the rollout manager, where sglang is at home."""
    if load and "slime" in sys.modules:
        with suppress(ImportError):
            import_module("slime.utils.arguments")
    arguments = sys.modules.get("slime.utils.arguments")
    return {} if arguments is None else _defaults(arguments.get_slime_extra_args_provider)


@cache
def _defaults(provider: Callable[[], Callable[[ArgumentParser], Any]]) -> dict[str, Any]:
    parser = ArgumentParser(add_help=False, conflict_handler="resolve")
    provider()(parser)
    return {action.dest: action.default for action in parser._actions}

"""PPGConfig: GRPOConfig with the options of this package, and what becomes of GRPOConfig's own."""

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from ppg_fast.integrations.options import RUN, check, check_unknown, hosts_own, obeyed, refused, require_baseline
from ppg_fast.integrations.trl.host import GRPOConfig
from ppg_fast.policy_classes import policy_class
from ppg_fast.spec import BASELINES, require, require_number, require_one_of

HEADS = ("ppg_fast", "trl")
ADVANTAGES, LOSS, HEAD = "advantages", "loss", "head"
OPTIONS = (  # of GRPOConfig; the loss is TRL's own, so every option of it is
    refused(ADVANTAGES, "scale_rewards", ("group", "none"), "baseline decides what is divided by what"),
    refused(ADVANTAGES, "multi_objective_aggregation", "sum_then_normalize",
            "turns have one reward, the weighted sum of the reward functions"),
    obeyed(ADVANTAGES, "reward_weights", "the sum that is the last turn's reward where turns have none of their own"),
    obeyed(ADVANTAGES, "num_generations num_generations_eval", "the size of a group"),
    obeyed(ADVANTAGES, "mask_truncated_completions", "a masked rollout stays in its group's baseline"),
    hosts_own(LOSS, "loss_type epsilon epsilon_high delta importance_sampling_level num_iterations beta "
              "use_bias_correction_kl sync_ref_model ref_model_mixup_alpha ref_model_sync_steps entropy_coef "
              "use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target "
              "top_entropy_quantile router_aux_loss_coef steps_per_generation max_completion_length",
              "on advantages (B, C)"),
    hosts_own(LOSS, "sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg "
              "vespo_lambda_neg off_policy_mask_threshold", "by the sign of the advantage, here that of the turn"),
    hosts_own(LOSS, "vllm_importance_sampling_correction vllm_importance_sampling_mode "
              "vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min vllm_importance_sampling_cap",
              "weights of tokens or rollouts"),
    refused(LOSS, "label_smoothing_factor", 0.0, "GRPOTrainer does not read it"),
    hosts_own(LOSS, "gradient_accumulation_steps per_device_train_batch_size num_train_epochs max_steps",
              "GRPOTrainer divides by its own count of a window's tokens, which are those of our mask"),
    hosts_own(LOSS, "average_tokens_across_devices use_liger_kernel liger_kernel_config",
              "GRPOTrainer reads none of the first, and keeps its fused forward under the others"),
    obeyed(HEAD, "temperature cast_lm_head_to_fp32", "as in TRL's head"),
    hosts_own(RUN, "model_init_kwargs trust_remote_code disable_dropout ds3_gather_for_generation shuffle_dataset "
              "pad_to_multiple_of generation_batch_size top_p top_k min_p generation_kwargs chat_template_kwargs "
              "repetition_penalty cache_implementation use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode "
              "vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port "
              "vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length "
              "vllm_tensor_parallel_size max_tool_calling_iterations log_completions log_multimodal "
              "num_completions_to_print log_unique_prompts log_completions_hub_repo "
              "use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged",
              "models, generation, logging; the rest of TrainingArguments as for transformers"),
)  # fmt: skip
OF_GRPO = {f.name for f in fields(GRPOConfig)} - {f.name for f in fields(TrainingArguments)}


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class PPGOptions:
    """The fields that `PPGConfig` adds to GRPOConfig, as a mixin for trainers with their own config class."""

    policy_class: str = _option(
        "full", "Future rewards a turn is credited for: greedy, lookahead:K, segment:LENGTH, full or lags:W0,W1,...."
    )
    gamma: float = _option(1.0, "Discount per turn inside the window, in [0, 1].")
    baseline: str = _option(
        "leave_one_out", f"Subtracted from the windowed return at the same turn: {', '.join(BASELINES)}."
    )
    std_eps: float = _option(
        1e-4, "Added to the standard deviation of the baseline group_std; the default is GRPOTrainer's own number."
    )
    turn_reward_key: str = _option(
        "turn_rewards", "Key of rollout_func's output, or attribute of an environment: rewards of the turns."
    )
    turn_id_key: str = _option(
        "turn_ids", "Key of rollout_func's output: the turn of each completion token, -1 where it is no action."
    )
    fused_head: str = _option("ppg_fast", "Whose fused head gives the log-probs: ppg_fast or trl.")


def check_options(args: Any) -> None:
    """TypeError unless ``args`` has the options, ValueError, with the rule and the value, unless they go together."""
    if not isinstance(args, PPGOptions):
        raise TypeError(f"args of PPGTrainer must be a PPGConfig, got {type(args).__name__}")
    _check_values(args)


def _check_values(args: Any) -> None:
    policy_class(args.policy_class)
    require_number("gamma", args.gamma, 0.0, 1.0)
    require_baseline(args.baseline)
    require_number("std_eps", args.std_eps, 0.0)
    require_one_of("fused_head", args.fused_head, HEADS)
    check("TRL", OPTIONS, args, ADVANTAGES)
    check("TRL", OPTIONS, args, LOSS)
    check_unknown("TRL", OPTIONS, args, GRPOConfig, names=OF_GRPO.__contains__)
    contradiction = args.baseline == "group_std" and args.scale_rewards == "none"
    require(
        not contradiction,
        'baseline "group_std" divides by a standard deviation, scale_rewards must be "group"',
        args.scale_rewards,
    )


@dataclass
class PPGConfig(PPGOptions, GRPOConfig):
    """GRPOConfig with a policy class, a discount and a baseline for the turns of a dialogue.

    A_t = R_t - baseline of R_t over the group at turn t,  R_t = sum over k in S_t of gamma^(k-t) r_k
    (arXiv:2603.06138)

    Args:
        policy_class: S_t, as `ppg_fast.policy_class` reads it: "greedy", "lookahead:K", "segment:LENGTH", "full",
            "lags:W0,W1,...".
        gamma: discount per turn, in [0, 1].
        baseline: "none" | "leave_one_out" | "group_mean" | "group_std", as in `ppg_fast.turn_advantages`. It replaces
            ``scale_rewards``: "group_mean" is its "none", "group_std" its "group"; "batch" has no counterpart and is
            refused.
        std_eps: as in `ppg_fast.turn_advantages`.
        turn_reward_key: where turn rewards are found: key of ``rollout_func``'s output or attribute of an environment.
        turn_id_key: key of ``rollout_func``'s output for explicit turn ids; without it, turns are the runs of the mask.
        fused_head: "ppg_fast" or "trl".
        the rest: as in GRPOConfig.

    Raises: ValueError for a name or number out of range, options that contradict each other, and an option of
        GRPOConfig that `OPTIONS` refuses.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(self)

"""What a run may change when it goes on with --resume: one list, every setting in exactly one class."""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from ppg_fast.config import TrainConfig, as_now
from ppg_fast.jobs.inputs import with_absolute_paths

MAY_CHANGE = {  # a row of docs/training_runs.md each
    "how far it goes": "max_steps max_skipped_steps eval_every save_every keep_checkpoints keep_rollouts",
    "what is shown and sent": (
        "progress report_to project run_name report_offline push_to_hub hub_private output_dir overwrite strict"
    ),
    "where it runs and in how much memory": (
        "device threads parallel sync_each_batch rank_timeout max_tokens rollout_batch activation_checkpointing "
        "activation_checkpointing_every_n_layers activation_offload"
    ),
    "how endpoints are asked": (
        "timeout retries concurrency judge_retries judge_tokens judge_key partner_key sampler_key sampler_refresh"
    ),
}
# another name for the same content, which a checksum knows
SAME_CONTENT = "data prompts model reward partner_prompt chat_template tools teacher reward_model"
# another address of the same model, which the setting with _model (or a checksum) knows
ADDRESSES = "judge partner sampler"
FIXED = """template_date chat_template_kwargs width layers vocab_size dtype bf16 logits_dtype
    lora_rank lora_alpha lora_dropout lora_target_modules freeze
    seed allow_negative_rewards imitate imitate_td policy_class signals gamma baseline gae_lambda
    loss_type eta beta replay reduction num_iterations preset
    clip_low clip_high dual_clip ratio_cap tau_positive tau_negative ratio_reduction
    opsm_delta log_ratio_coef z_coef kl_coef kl_estimator kl_cap entropy_coef importance_cap importance_floor
    importance_mode max_log_ratio nan_rollout distill_coef distill_divergence distill_beta distill_top_k
    k_positive lambda_positive k_negative lambda_negative nll_coef token_share num_prompts num_generations
    max_new_tokens max_turns temperature top_p top_k learning_rate warmup_steps final_learning_rate weight_decay
    optim optim_args max_residual cql_coef adam_beta1 adam_beta2 optim_offload max_grad_norm
    max_dialogue_tokens imitation_steps imitation_batch imitation_learning_rate teacher_skill partner_model
    partner_tokens partner_temperature max_tool_calls stop_phrase judge_model judge_range sampler_model
    eval_dialogues human_every human_steps human_learning_rate"""
CLASSES = {
    **{name: "may change" for names in MAY_CHANGE.values() for name in names.split()},
    **dict.fromkeys(SAME_CONTENT.split(), "same content"),
    **dict.fromkeys(ADDRESSES.split(), "address"),
    **dict.fromkeys(FIXED.split(), "fixed"),
}
SILENT = ("output_dir", "overwrite", "progress", "rank_timeout")  # of no interest to who goes on


def differences(before: Mapping[str, Any], now: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that are others than before, as (old, new). One that ``before`` does not know had its default."""
    known = as_now(before)
    old = with_absolute_paths({field.name: known.get(field.name, field.default) for field in fields(TrainConfig)})
    new = with_absolute_paths(asdict(now))
    return {name: (old[name], value) for name, value in new.items() if old[name] != value}


def require_changeable(before: Mapping[str, Any], now: TrainConfig) -> None:
    """ValueError, one line with every setting that may not change."""
    refused = [
        f"{name} {old!r} -> {new!r}"
        for name, (old, new) in differences(before, now).items()
        if _refused(name, old, new, now)
    ]
    if refused:
        rule = "a run goes on with the settings it began with"
        wanted = "take them back, or begin another run (--output-dir)"
        raise ValueError(f"{rule}, got {', '.join(refused)}: {wanted}")


def _refused(name: str, old: Any, new: Any, now: TrainConfig) -> bool:
    kind = CLASSES.get(name, "fixed")
    if kind == "same content":
        return not (old and new)  # whether it is the same is for the checksums to say
    if kind == "address":
        both = _is_url(old) and _is_url(new)
        return not both or (name != "judge" and getattr(now, f"{name}_model") is None)
    return kind == "fixed"


def _is_url(value: object) -> bool:
    return str(value).startswith(("http://", "https://"))

"""Sections of the help, the defaults of each kind of job, and the settings that rewards are made of."""

TURN_REGRESSION, SOFT_Q = "turn_regression", "soft_q"  # loss types of the trainer: no losses of one row
OF_TURNS = {  # the settings that are their own, and what they are called
    TURN_REGRESSION: (("eta",), "regression on turns"),
    SOFT_Q: (("beta", "max_residual", "cql_coef", "replay"), "soft Q-learning"),
}
AUTO = "auto"  # in place of a policy class: weights of the rewards, estimated while training
TRACKERS = ("tensorboard", "wandb", "trackio")

SECTIONS = {  # of the help: from this setting on, until the next section begins
    "output_dir": "the run and its data",
    "model": "the model",
    "bf16": "what of it trains, in which precision and memory",
    "parallel": "several ranks; randomness",
    "policy_class": "the objective",
    "clip_low": "numbers of the loss (docs/losses.md)",
    "log_ratio_coef": "terms beside it, importance weights",
    "teacher": "a teacher (docs/distillation.md)",
    "max_steps": "steps and rollouts",
    "learning_rate": "the optimizer",
    "imitation_steps": "the warm start of the persona interview",
    "prompts": "your own prompts and their partner",
    "reward": "rewards, judges, endpoints",
    "eval_every": "what is kept and shown",
    "report_to": "where it is reported",
}

OFFLINE = {  # other defaults where ``data`` is given
    "output_dir": "runs/offline",
    "baseline": "none",
    "learning_rate": 3e-4,
    "num_prompts": 4,
    "num_generations": 1,
    "max_new_tokens": 48,
    "max_turns": 3,
    "max_dialogue_tokens": 2048,
    "imitation_steps": 0,
    "eval_dialogues": 8,
}


PROMPTS = {  # other defaults where ``prompts`` is given: full planning, since nobody knows the window there
    "output_dir": "runs/prompts",
    "policy_class": "full",
    "learning_rate": 3e-4,
    "max_new_tokens": 128,
    "max_turns": 4,
    "imitation_steps": 0,
    "eval_dialogues": 32,
}


# settings that only a job on-policy reads
OF_REWARDS = ("reward", "judge", "judge_model", "judge_key", "judge_range", "judge_retries", "judge_tokens")
REWARD_SETTINGS = (  # of `ppg-fast score`
    *OF_REWARDS,
    *("timeout", "retries", "concurrency", "strict", "device", "template_date"),
)
# settings of people who rate while it trains, without effect where the reward is another
OF_HUMAN = ("reward_model", "human_every", "human_steps", "human_learning_rate")


REWARD_TRAINING = (  # of `ppg-fast reward`
    *("strict", "template_date", "device", "seed", "max_steps", "num_prompts", "learning_rate", "warmup_steps"),
    *("final_learning_rate", "weight_decay", "optim", "optim_args", "adam_beta1", "adam_beta2", "max_grad_norm"),
    *("max_tokens", "eval_every", "eval_dialogues"),
)
REWARD_TRAINING_DEFAULTS = {
    "max_steps": 1000,
    "num_prompts": 16,
    "learning_rate": 1e-5,
    "warmup_steps": 20,
    "final_learning_rate": 0.1,
    "weight_decay": 0.01,
    "eval_every": 50,
    "eval_dialogues": 500,
}


# settings that only a job with ``prompts`` reads
OF_PROMPTS = (
    *("partner", "partner_model", "partner_key", "partner_prompt", "partner_tokens", "partner_temperature"),
    *("tools", "max_tool_calls", "stop_phrase"),
    *("sampler", "sampler_model", "sampler_key", "sampler_refresh"),
)

# settings that are arguments of `PolicyLossSpec`
LOSS_SETTINGS = (
    *("loss_type", "clip_low", "clip_high", "dual_clip", "ratio_cap", "tau_positive", "tau_negative"),
    *("k_positive", "lambda_positive", "k_negative", "lambda_negative"),
    *("ratio_reduction", "opsm_delta", "log_ratio_coef", "kl_coef", "kl_estimator", "kl_cap", "entropy_coef", "z_coef"),
    *("temperature", "importance_cap", "importance_floor", "importance_mode", "max_log_ratio", "nan_rollout"),
)
# settings of a teacher, without effect where there is none
OF_TEACHER = ("distill_coef", "distill_divergence", "distill_beta", "distill_top_k")

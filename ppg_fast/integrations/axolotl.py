"""Plugin of axolotl: `rl: grpo` with `PPGTrainer`. It needs an axolotl whose TRL is 1.16 or later: axolotl 0.19 still
pins trl==1.9.0.

    plugins: [ppg_fast.integrations.axolotl.PPGPlugin]
    rl: grpo
    ppg: {policy_class: "lookahead:3", gamma: 1.0, baseline: leave_one_out}      # fields of PPGOptions
    trl: {rollout_func: my_module.my_rollout, reward_funcs: [ppg_fast.integrations.trl.total_turn_reward], ...}

Errors here are RuntimeErrors: axolotl prints a plugin's ImportError and goes on to train without the plugin.
"""

from dataclasses import fields
from typing import Any

from pydantic import BaseModel

from ppg_fast.integrations.host import require_host
from ppg_fast.integrations.options import check, check_unknown, hosts_own, obeyed, refused
from ppg_fast.spec import require

try:
    BasePlugin: Any = require_host("axolotl", "0.18", "axolotl.integrations.base").BasePlugin
    from ppg_fast.integrations.trl import PPGOptions, PPGTrainer
except ImportError as reason:
    raise RuntimeError(str(reason)) from None

ASYNC = "belongs to axolotl's asynchronous trainer, and PPGTrainer is TRL's"
OPTIONS = (  # of axolotl's configuration; what it passes to GRPOConfig is checked as TRL's
    obeyed("trainer", "rl", "`grpo`; every other kind, `gdpo` included, is trained by axolotl as ever"),
    obeyed("trainer", "ppg", "fields of PPGOptions"),
    obeyed("trainer", "trl.reward_funcs trl.reward_processing_classes trl.rollout_func", "as axolotl loads them"),
    refused("trainer", "trl.use_data_producer trl.async_prefetch trl.streaming_partial_batch trl.vllm_lora_sync",
            (None, False), ASYNC),
    refused("trainer", "trl.prefetch_depth trl.vllm_sync_interval trl.streaming_min_groups", None, ASYNC),
    refused("trainer", "trl.replay_buffer_size", (None, 0), ASYNC),
    refused("trainer", "trl.reroll_start_fraction", (None, 1.0), ASYNC),
    refused("trainer", "trl.reward_num_workers", (None, 1), ASYNC),
    refused("trainer", "context_parallel_size", (None, 1), "TRL splits no sequence of a rollout over ranks"),
    refused("trainer", "batch_flattening", (None, False), "advantages of turns are padded, (B, C)"),
    hosts_own("trainer", "trl.skip_zero_advantage_batches trl.replay_recompute_logps trl.reroll_max_groups",
              "settings of its asynchronous trainer, without effect"),
    hosts_own("trainer", "trl.beta trl.max_completion_length trl.use_vllm trl.vllm_mode trl.vllm_server_host "
              "trl.vllm_server_port trl.vllm_server_timeout trl.vllm_guided_decoding_regex trl.reward_weights "
              "trl.generation_batch_size trl.num_generations trl.log_completions trl.num_completions_to_print "
              "trl.importance_sampling_level trl.sync_ref_model trl.ref_model_mixup_alpha trl.ref_model_sync_steps "
              "trl.scale_rewards trl.temperature trl.top_p trl.top_k trl.min_p trl.repetition_penalty "
              "trl.generation_kwargs trl.chat_template_kwargs trl.num_iterations trl.epsilon trl.epsilon_high "
              "trl.use_liger_loss trl.loss_type trl.mask_truncated_completions trl.entropy_coef "
              "trl.use_adaptive_entropy trl.entropy_target trl.entropy_coef_delta trl.entropy_coef_min "
              "trl.entropy_coef_max trl.vllm_importance_sampling_clip_min trl.vllm_importance_sampling_clip_max "
              "trl.vllm_importance_sampling_correction trl.vllm_importance_sampling_mode "
              "trl.vllm_importance_sampling_cap trl.off_policy_mask_threshold trl.use_bias_correction_kl "
              "trl.log_multimodal trl.vllm_enable_sleep_mode trl.multi_objective_aggregation trl.vllm",
              "become GRPOConfig: the table of TRL"),
)  # fmt: skip


class PPGArgs(BaseModel):
    """The key of axolotl's configuration that this plugin adds: fields of `PPGOptions`."""

    ppg: dict[str, Any] | None = None


class PPGPlugin(BasePlugin):
    """Trains `rl: grpo` with `PPGTrainer`; other kinds of training are not changed."""

    model: Any = None

    def get_input_args(self) -> str:
        """Dotted path of the pydantic model with this plugin's keys."""
        return f"{__name__}.PPGArgs"

    def get_training_args_mixin(self) -> str:
        """Dotted path of the mixin for axolotl's GRPO config."""
        return f"{PPGOptions.__module__}.PPGOptions"

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """The values of those fields; ValueError for an unknown one, and for an option that `OPTIONS` refuses."""
        if _wanted(cfg):
            check("axolotl", OPTIONS, cfg, "trainer")
            check_unknown("axolotl", OPTIONS, cfg, names=lambda name: name.split(".")[0] == "trl")
        chosen, known = dict(cfg.ppg or {}) if _wanted(cfg) else {}, [field.name for field in fields(PPGOptions)]
        unknown = [name for name in chosen if name not in known]
        require(not unknown, f"ppg must hold only {', '.join(known)}", unknown)
        return chosen

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """No callbacks. Called just before the trainer is made, this keeps the policy, which axolotl passes to its own
        trainer classes only."""
        self.model = model
        return []

    def get_trainer_cls(self, cfg: Any) -> type[Any] | None:
        """`PPGTrainer` with axolotl's own additions to GRPOTrainer, or None unless `rl: grpo`.

        axolotl passes model, reward functions and rollout function to its own GRPO trainer and not to that of a plugin:
        the class here has them already.
        """
        if not _wanted(cfg):
            return None
        from axolotl.core.trainers.grpo import GRPOStrategy  # type: ignore[import-not-found]

        plugin, rewards, keywords = self, GRPOStrategy.set_trainer_args(cfg), GRPOStrategy.set_trainer_kwargs(cfg)

        class AxolotlPPGTrainer(PPGTrainer, GRPOStrategy.get_trainer_class()):
            """PPGTrainer inside axolotl."""

            _tag_names = ["trl", "ppg", "axolotl"]  # noqa: RUF012

            def __init__(self, *given: Any, **options: Any) -> None:
                if not given and plugin.model is None:
                    raise RuntimeError(
                        "axolotl no longer calls add_callbacks_pre_trainer before it makes the trainer: no model "
                        "was seen"
                    )
                super().__init__(*(given or (plugin.model, *rewards)), **{**keywords, **options})

        return AxolotlPPGTrainer


def _wanted(cfg: Any) -> bool:
    return getattr(cfg.rl, "value", cfg.rl) == "grpo"

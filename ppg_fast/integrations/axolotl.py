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

try:
    from axolotl.integrations.base import BasePlugin  # type: ignore[import-not-found]
except ModuleNotFoundError:
    raise RuntimeError(
        "ppg_fast.integrations.axolotl needs axolotl >= 0.18 (pip install axolotl), and it is not installed"
    ) from None
try:
    from ppg_fast.integrations.trl import PPGOptions, PPGTrainer
except ImportError as reason:
    raise RuntimeError(str(reason)) from None

from pydantic import BaseModel

from ppg_fast.spec import require


class PPGArgs(BaseModel):
    """The key of axolotl's configuration that this plugin adds: fields of `PPGOptions`."""

    ppg: dict[str, Any] | None = None


class PPGPlugin(BasePlugin):
    """Trains `rl: grpo` with `PPGTrainer`; every other kind of training is left alone."""

    model: Any = None

    def get_input_args(self) -> str:
        """Where axolotl finds the keys it lets through."""
        return f"{__name__}.PPGArgs"

    def get_training_args_mixin(self) -> str:
        """Where axolotl finds the fields it adds to its GRPO config."""
        return f"{PPGOptions.__module__}.PPGOptions"

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        """The values of those fields; ValueError for an unknown one."""
        chosen, known = dict(cfg.ppg or {}) if _wanted(cfg) else {}, [field.name for field in fields(PPGOptions)]
        unknown = [name for name in chosen if name not in known]
        require(not unknown, f"ppg must hold only {', '.join(known)}", unknown)
        return chosen

    def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
        """No callbacks, but the policy: axolotl hands no model to the trainer class of a plugin, and asks for callbacks
        just before."""
        self.model = model
        return []

    def get_trainer_cls(self, cfg: Any) -> type[Any] | None:
        """`PPGTrainer` with axolotl's own additions to GRPOTrainer, or None unless `rl: grpo`.

        The class brings along what axolotl passes to its own GRPO trainer and not to a plugin's: model, reward
        functions, rollout function.
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

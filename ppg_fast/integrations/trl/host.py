"""The one place that imports TRL: its version and the private names we build on are checked here, at import."""

import inspect
from importlib import import_module
from importlib.metadata import version
from typing import Any

from ppg_fast.integrations.host import require_host

HOOKS = {  # of GRPOTrainer: private, so their arguments are checked
    "_calculate_rewards": ("inputs", "prompts", "completions", "completion_ids_list"),
    "_generate_and_score_completions": ("inputs",),
    "_compute_loss": ("model", "inputs"),
}
HEAD_HOOK = ("model", "temperature", "cast_lm_head_to_fp32", "outputs")


def require_hooks(trainer: Any, add_fused_lm_head: Any) -> None:
    """ImportError of one line unless the private hooks take the arguments they took in TRL 1.16."""
    signatures = {
        f"GRPOTrainer.{name}": (getattr(trainer, name, None), ("self", *wanted)) for name, wanted in HOOKS.items()
    }
    signatures["add_fused_lm_head"] = (add_fused_lm_head, HEAD_HOOK)
    for name, (function, wanted) in signatures.items():
        found = None if function is None else tuple(inspect.signature(function).parameters)
        if found != wanted:
            got = "nothing of that name" if found is None else f"({', '.join(found)})"
            raise ImportError(
                f"ppg_fast.integrations.trl needs {name}({', '.join(wanted)}), got {got} in trl {version('trl')}"
            )


require_host("trl", "1.16")

from trl.kernels.chunked_logprob import ChunkedLogProbFunction  # noqa: E402
from trl.trainer.grpo_config import GRPOConfig  # noqa: E402
from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402
from trl.trainer.utils import FusedCausalLMOutput  # noqa: E402

grpo_trainer: Any = import_module(GRPOTrainer.__module__)  # its namespace holds the add_fused_lm_head that it calls
require_hooks(GRPOTrainer, getattr(grpo_trainer, "add_fused_lm_head", None))

__all__ = ["ChunkedLogProbFunction", "FusedCausalLMOutput", "GRPOConfig", "GRPOTrainer", "grpo_trainer"]

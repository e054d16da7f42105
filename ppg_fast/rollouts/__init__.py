"""Dialogues made by the policy: environments, partners, generation, groups of rollouts.

Names are imported on first use: a module of this room that needs no transformers does not import it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppg_fast.rollouts.environment import Environment
    from ppg_fast.rollouts.rollout import Rollout, collect_groups

__all__ = ["Environment", "Rollout", "collect_groups"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        room = "environment" if name == "Environment" else "rollout"
        return getattr(import_module(f"ppg_fast.rollouts.{room}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""The causal LM that is trained: its head without logits, packed attention, adapters, export.

Names are imported on first use: a module of this room that needs no transformers does not import it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ppg_fast.models.causal_lm import distribute, load_model, make_model, policy_loss, prepare, token_logprobs

__all__ = ["distribute", "load_model", "make_model", "policy_loss", "prepare", "token_logprobs"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("ppg_fast.models.causal_lm"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

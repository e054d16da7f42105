"""Memory that layers have freed, given back to the system while a step is under way."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def _trim() -> Callable[[int], int] | None:
    """glibc's malloc_trim; None where the allocator is another."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def give_back_freed_memory(model: nn.Module) -> None:
    """Once a layer, in the forward and in the backward pass, give the pages of freed memory back to the system.

    For layers that compute their activations again, on a CPU: what a layer frees has sizes that the next one rarely
    asks for, and glibc keeps blocks below 32 MiB for it, so that a step's resident memory would grow well beyond what
    is alive. Changes no number.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if (trim := _trim()) is None:
        return

    def after(_: nn.Module, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        # never while tokens are generated, a layer at a time for each of them
        if not (torch.is_grad_enabled() and isinstance(hidden, Tensor) and hidden.is_cpu):
            return
        trim(0)
        if hidden.requires_grad:
            hidden.register_hook(lambda _: (trim(0), None)[1])  # the layer above has ended its backward pass

    for layer in model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.register_forward_hook(after)

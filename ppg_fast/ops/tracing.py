"""Operators are for tracers: eager mode calls what is in them, without the cost of a dispatch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

PLAIN = {Tensor, torch.nn.Parameter}


def traced(*tensors: Tensor) -> bool:
    """Whether somebody records what is called: torch.compile, a dispatch mode such as FakeTensorMode, a subclass."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    return not PLAIN.issuperset(map(type, tensors))


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a gradient of one of them may be asked for."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def differentiable(compute: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any]) -> Any:
    """An autograd.Function of the three functions that a custom op is made of, to call in its place by ``apply``.

    Like the op's, its gradient has no derivative of its own: asking for one is an error.
    """
    once = once_differentiable(backward)
    members = {"forward": compute, "setup_context": setup, "backward": once}
    statics = {name: staticmethod(function) for name, function in members.items()}
    return type(compute.__name__, (torch.autograd.Function,), statics)


def no_gradients(tensors: list[Tensor | None]) -> list[None] | None:
    """What the backward pass of a custom op gives for a list: one None each if all are tensors, else one for all."""
    return [None] * len(tensors) if all(tensor is not None for tensor in tensors) else None

"""Where a whole training step goes: the seconds of its operators, and the bytes that its forward pass keeps for the
backward pass, by parts."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

OPTIMIZER, REST = "optimizer", "the rest"
OPERATORS = {
    "attention": ("_attention",),
    "matrix products": ("::mm", "::addmm", "::bmm", "::matmul"),
    "our kernels": ("ppg_fast",),
    "copies and gathers": ("::copy_", "::cat", "::index", "::gather", "::scatter", "::embedding", "::fill_", "::zero_"),
}  # by what the name of an operator holds, the first that fits
MODULES = {"attention": "Attention", "MLP": "MLP", "norms": "Norm"}  # by what the name of a module's class holds


def parts(step: Callable[[], Any]) -> dict[str, dict[str, float]]:
    """``seconds`` and ``kept_bytes`` of one step by parts, the largest first; each of a step of its own. ``step``
    has run before."""
    return {"seconds": _seconds(step), "kept_bytes": _kept(step)}


def _ordered(found: dict[str, float]) -> dict[str, float]:
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _seconds(step: Callable[[], Any]) -> dict[str, float]:
    """Time inside each operator without those that it calls; Python between them is nobody's."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    found: dict[str, float] = defaultdict(float)
    for event in profile.events() or ():
        found[_part(event)] += event.self_cpu_time_total / 1e6
    return _ordered(found)


def _part(event: Any) -> str:
    above = event
    while above is not None:
        if above.name.startswith("Optimizer."):
            return OPTIMIZER
        above = above.cpu_parent
    return next((part for part, names in OPERATORS.items() if any(n in event.name for n in names)), REST)


def _kept(step: Callable[[], Any]) -> dict[str, float]:
    """Bytes of the storages that autograd keeps, each once and under the innermost module that ran when it was kept
    first; the model's weights are left out, they are there anyway."""
    inside: list[str] = []
    seen: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice
    found: dict[str, float] = defaultdict(float)

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if not isinstance(tensor, nn.Parameter) and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = storage
            found[inside[-1] if inside else "head and loss"] += storage.nbytes()
        return tensor

    with _inside(inside), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return _ordered(found)


@contextmanager
def _inside(stack: list[str]) -> Iterator[None]:
    """``stack``: the part of each module whose forward pass runs, the innermost last."""

    def enter(module: nn.Module, _: Any) -> None:
        own = next((part for part, name in MODULES.items() if name in type(module).__name__), None)
        stack.append(own or (stack[-1] if stack else REST))

    def leave(*_: Any) -> None:
        stack.pop()

    hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

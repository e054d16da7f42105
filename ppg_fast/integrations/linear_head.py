"""The head of a model as one linear layer: what stands in place of its weight is read into the product, or refused.

A fused head multiplies by a weight and never calls the module that owns it. So whatever else that module does in its
forward (an adapter, a hook, a dequantization) has to be found here, or it would be left out without a word.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn

from ppg_fast.functional import VocabShard
from ppg_fast.spec import require


def linear_of(
    head: nn.Module, hidden: Tensor, *, called: bool = True, whole: Callable[[Any], Any] = lambda parameter: parameter
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states (..., D), weight (V, D), bias (V,) or None whose product is head(hidden), all differentiable.

    A LoRA head W x + s B A x is the linear layer [W, B] of [x, s A x]: no sum W + s B A, whose rounding would swallow a
    small update.

    Args:
        head: a torch.nn.Linear, or LoRA or modules_to_save of peft over one, adapters on, off or merged.
        hidden: (..., D).
        called: whether the head itself is called, with no rows, so that its hooks run.
        whole: gathers a sharded parameter of the base.

    Raises: ValueError for any other head: quantized, DoRA, tensor-parallel or ZeRO-3 shards, a replaced forward, hooks.
    """
    peft = sys.modules.get("peft")  # its layers exist only where it was imported
    if peft is not None and isinstance(head, peft.utils.other.AuxiliaryTrainingWrapper):
        _refuse_hooks(head, called)
        return linear_of(_saved_module(head), hidden, called=called, whole=whole)
    if peft is not None and isinstance(head, peft.tuners.lora.Linear):
        _refuse_hooks(head, called)
        return _lora(head, hidden, called, whole)
    kind = f"{type(head).__module__}.{type(head).__name__}"
    require(
        type(head).forward is nn.Linear.forward,
        "the head must be a torch.nn.Linear, or LoRA or modules_to_save of peft over one",
        kind,
    )
    replaced = head.__dict__.get("forward")  # accelerate's places devices, TRL's casts, as its fused head is told to
    owner = getattr(replaced, "__module__", "")
    known = hasattr(head, "_hf_hook") or owner.startswith("trl.") or owner == "transformers.distributed.tensor_parallel"
    rule = "the head's forward must be that of torch.nn.Linear, since the fused head multiplies by its weight alone"
    require(replaced is None or known, rule, replaced)
    _refuse_hooks(head, called)
    weight, bias = whole(head.weight), whole(head.bias)
    plain = type(weight) in (Tensor, nn.Parameter) and not hasattr(weight, "ds_id") and not weight.is_meta
    rule = (
        "the head's weight must be whole and plain where the loss is computed: not quantized, no shard (tensor "
        "parallelism, ZeRO-3), not offloaded"
    )
    require(plain, rule, "on meta" if weight.is_meta else type(weight).__name__)
    return hidden.to(weight.device), weight, bias


def local(parameter: Any) -> Any:
    """The part of a sharded parameter that this process holds; its gradient is that of the part."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def gathered(parameter: Any) -> Any:
    """A sharded parameter whole, without a gradient. All processes call it."""
    return parameter.detach().full_tensor() if hasattr(parameter, "full_tensor") else parameter


def shard_of(head: nn.Module) -> VocabShard | None:
    """Which tokens' rows tensor parallelism left here, where the weight is a DTensor [Shard(0)] over one dimension of
    processes that all see the same tokens; None for any other."""
    weight: Any = head.weight if isinstance(head, nn.Linear) else None
    if not distributed.is_available() or not hasattr(weight, "placements"):
        return None
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh = weight.device_mesh
    if hasattr(head, "_get_fsdp_state") or mesh.ndim != 1 or tuple(weight.placements) != (Shard(0),):
        return None
    _, (start, _) = compute_local_shape_and_global_offset(weight.shape, mesh, weight.placements)
    return VocabShard(start, mesh.get_group())


def _refuse_hooks(head: nn.Module, called: bool) -> None:
    """ValueError for hooks of a head that is never called; those of FSDP2 only gather."""
    if called or hasattr(head, "_get_fsdp_state"):
        return
    hooks = [*head._forward_pre_hooks.values(), *head._forward_hooks.values()]
    rule = "the head must have no forward hooks, the fused head never calls it and would leave them out"
    require(not hooks, rule, [getattr(hook, "__qualname__", type(hook).__name__) for hook in hooks])


def _saved_module(wrapper: Any) -> nn.Module:
    """The module that peft's modules_to_save wrapper calls."""
    saved: Any = getattr(wrapper, "modules_to_save", None)
    require(saved is not None, "of peft's wrappers the head may have modules_to_save only", type(wrapper).__name__)
    active = [] if wrapper.disable_adapters else [name for name in wrapper.active_adapters if name in saved]
    return saved[active[0]] if active else wrapper.original_module


def _lora(head: Any, hidden: Tensor, called: bool, whole: Callable[[Any], Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    require(
        not (head.disable_adapters and head.merged),
        "unmerge the LoRA head before its adapters are disabled",
        head.merged_adapters,
    )
    hidden, weight, bias = linear_of(head.base_layer, hidden, called=called, whole=whole)
    active = (
        [] if head.disable_adapters or head.merged else [name for name in head.active_adapters if name in head.lora_A]
    )
    inputs, columns = [hidden], [weight]
    for name in active:
        _refuse_variant(head, name)
        A, B, scaling = head.lora_A[name], head.lora_B[name], head.scaling[name]
        inputs.append((A(head.lora_dropout[name](hidden.to(A.weight.dtype))) * scaling).to(hidden.dtype))
        columns.append(B.weight.to(weight.dtype))
        if B.bias is not None:
            shift = (B.bias * scaling).to(weight.dtype)
            bias = shift if bias is None else bias + shift
    return (torch.cat(inputs, -1), torch.cat(columns, 1), bias) if active else (hidden, weight, bias)


def _refuse_variant(head: Any, name: str) -> None:
    """ValueError for an adapter that is no low-rank sum: DoRA and peft's other variants of LoRA."""
    variant = type(head.lora_variant[name]).__name__ if name in head.lora_variant else ""
    kind = "DoRA" if "dora" in variant.lower() else variant.removesuffix("LinearVariant")
    rule = (
        f"an adapter on the head must be plain LoRA, {kind} is not: leave the head out of target_modules, use LoRA "
        f"(use_dora=False) or merge_adapter() first; {kind} adapter"
    )
    require(not variant, rule if kind == "DoRA" else rule.replace(" (use_dora=False)", ""), name)

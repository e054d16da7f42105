"""What stands between the last hidden states and a causal LM's logits: a linear layer, a scale, a softcap. Found out,
and checked."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppg_fast.models.output_head import Head, final_softcap, logits_of, named_scales
from ppg_fast.spec import require

# largest |logit| of each probing row: small ones show a scale, large ones a softcap
ROW_PEAKS = (1.0, 10.0, 100.0, 1000.0)
# of a row's largest logit
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


@dataclass(frozen=True)
class LogitRule:
    """logits = softcap tanh(scale (hidden W^T + b) / softcap), softcap 0 = none, of the first ``vocabulary`` rows of
    W."""

    scale: float
    softcap: float
    vocabulary: int

    def __call__(self, projected: Tensor) -> Tensor:
        return logits_of(projected[..., : self.vocabulary].float(), self.scale, self.softcap)

    def head(self, weight: Tensor, bias: Tensor | None) -> Head:
        """The head of this weight and bias, without rows beyond the vocabulary."""
        if weight.shape[0] > self.vocabulary:
            weight, bias = weight[: self.vocabulary], None if bias is None else bias[: self.vocabulary]
        return Head(weight, bias, self.scale, self.softcap)


def output_head(model: Any) -> nn.Module:
    """The module that makes the logits; ValueError where there is none."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    require(
        isinstance(head, nn.Module),
        "the model must be a causal LM with an output head (patch it before DDP or torch.compile)",
        type(model),
    )
    assert isinstance(head, nn.Module)
    return head


def linear_of(head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Hidden states (..., D), weight (V, D), bias (V,) or None whose product is head(hidden), all differentiable.

    A LoRA head W x + s B A x is the linear layer [W, B] of [x, s A x]: no sum W + s B A, whose rounding would swallow a
    small update. ValueError for any other head: a quantized one, DoRA, tensor-parallel or ZeRO-3 shards.
    """
    peft = sys.modules.get("peft")  # its layers exist only where it was imported
    if peft is not None and isinstance(head, peft.utils.other.AuxiliaryTrainingWrapper):
        return linear_of(_saved_module(head), hidden)
    if peft is not None and isinstance(head, peft.tuners.lora.Linear):
        return _lora(head, hidden)
    kind = f"{type(head).__module__}.{type(head).__name__}"
    require(
        type(head).forward is nn.Linear.forward,
        "the head must be a torch.nn.Linear, or LoRA or modules_to_save of peft over one",
        kind,
    )
    weight, bias = head.weight, head.bias
    plain = type(weight) in (Tensor, nn.Parameter) and not hasattr(weight, "ds_id")
    rule = (
        "the head's weight must be whole and plain where the loss is computed: not quantized, no shard (tensor "
        "parallelism, ZeRO-3)"
    )
    require(plain, rule, type(weight).__name__)
    return hidden.to(weight.device), weight, bias  # type: ignore[return-value]


def _saved_module(wrapper: Any) -> nn.Module:
    """The module that peft's modules_to_save wrapper calls."""
    saved: Any = getattr(wrapper, "modules_to_save", None)
    require(saved is not None, "of peft's wrappers the head may have modules_to_save only", type(wrapper).__name__)
    active = [] if wrapper.disable_adapters else [name for name in wrapper.active_adapters if name in saved]
    return saved[active[0]] if active else wrapper.original_module


def _lora(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    require(
        not (head.disable_adapters and head.merged),
        "unmerge the LoRA head before its adapters are disabled",
        head.merged_adapters,
    )
    hidden, weight, bias = linear_of(head.base_layer, hidden)
    active = (
        [] if head.disable_adapters or head.merged else [name for name in head.active_adapters if name in head.lora_A]
    )
    inputs, columns = [hidden], [weight]
    for name in active:
        require(name not in head.lora_variant, "the LoRA of the head must be plain (no DoRA or other variant)", name)
        A, B, scaling = head.lora_A[name], head.lora_B[name], head.scaling[name]
        inputs.append((A(head.lora_dropout[name](hidden.to(A.weight.dtype))) * scaling).to(hidden.dtype))
        columns.append(B.weight.to(weight.dtype))
        if B.bias is not None:
            shift = (B.bias * scaling).to(weight.dtype)
            bias = shift if bias is None else bias + shift
    return (torch.cat(inputs, -1), torch.cat(columns, 1), bias) if active else (hidden, weight, bias)


def logit_rule(model: Any) -> LogitRule:
    """How ``model`` turns head(hidden) into logits, from its config and proven on a few random hidden rows through its
    own forward pass.

    The scale is 1, a number that the config names (`named_scales`) or its reciprocal; the softcap is that of the config
    or none. ValueError where none of these gives the model's own logits.
    """
    own, projected = _probe(model)
    config = model.config.get_text_config()
    numbers = [number for number in named_scales(config).values() if number]
    scales = [1.0, *(s for n in numbers for s in (n, 1 / n))]
    softcaps = [0.0, final_softcap(config)]
    rules = [LogitRule(scale, cap, own.shape[-1]) for scale in scales if scale > 0 for cap in softcaps]
    tolerance, peak = TOLERANCE.get(projected.dtype, 4e-2), own.abs().amax(-1)
    errors = [((rule(projected) - own.float()).abs().amax(-1) / peak).max().item() for rule in rules]
    best = min(range(len(rules)), key=errors.__getitem__)
    message = (
        f"the logits of {type(model).__name__} must be a scale and softcap of hidden W^T + b that its config names"
    )
    require(errors[best] <= tolerance, f"{message}; the nearest is {rules[best]} with a relative error", errors[best])
    return rules[best]


def _probe(model: Any) -> tuple[Tensor, Tensor]:
    """The model's own logits (rows, V) and head(hidden) (rows, V) of random hidden rows put in front of its head."""
    head, seen = output_head(model), []
    device = model.get_input_embeddings().weight.device
    require(device.type != "meta", "patch the model after its weights are loaded", device)

    def substitute(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = inputs[0]
        rows = torch.randn(len(ROW_PEAKS), hidden.shape[-1], generator=torch.Generator().manual_seed(0)).to(
            hidden.device, hidden.dtype
        )
        x, weight, bias = linear_of(module, rows)
        peaks = torch.tensor(ROW_PEAKS, device=x.device)[:, None] / nn.functional.linear(x, weight, bias).abs().amax(
            -1, keepdim=True
        )
        rows = (rows * peaks.to(rows)).to(hidden.dtype)
        x, weight, bias = linear_of(module, rows)
        seen.append(nn.functional.linear(x, weight, bias))
        return (rows[None], *inputs[1:])

    tokens = torch.arange(2, device=device)[None]
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with torch.no_grad(), forked, _evaluating(head), hooked(head, substitute):
        logits = model(input_ids=tokens, use_cache=False).logits
    require(len(seen) == 1, "the model must call its head once in a forward pass", len(seen))
    require(logits.shape[:2] == (1, len(ROW_PEAKS)), "the logits must come from the head's rows", tuple(logits.shape))
    return logits[0].to(seen[0].device), seen[0]


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """No dropout inside."""
    training = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, flag in training:
            part.training = flag


@contextmanager
def hooked(head: nn.Module, hook: Any) -> Iterator[None]:
    handle = head.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()

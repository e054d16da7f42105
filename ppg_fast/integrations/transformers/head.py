"""What stands between the last hidden states and a causal LM's logits: a linear layer, a scale, a softcap. Found out,
and checked."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppg_fast.integrations.linear_head import gathered, linear_of, shard_of
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
        whole = (lambda parameter: parameter) if shard_of(module) is None else gathered
        x, weight, bias = linear_of(module, rows, whole=whole)
        peaks = torch.tensor(ROW_PEAKS, device=x.device)[:, None] / nn.functional.linear(x, weight, bias).abs().amax(
            -1, keepdim=True
        )
        rows = (rows * peaks.to(rows)).to(hidden.dtype)
        x = linear_of(module, rows, whole=whole)[0]
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

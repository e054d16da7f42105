"""How much memory a training step will take, before there are weights: the step is taken on the meta device and its
bytes are counted.

The model is made from config.json alone. Its own code runs, with adapters, activation checkpointing and optimiser as
the settings say; every tensor that it makes is counted while it lives, under a name. Attention and head, whose kernels
have no meta device, stand in by the memory of theirs.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ppg_fast.config import TrainConfig
from ppg_fast.jobs.meta_step import Step
from ppg_fast.jobs.policy import adapted
from ppg_fast.models.causal_lm import make_model, prepare

ITEMS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "teacher": "teacher: weights, hidden states, a chunk of its logits",
    "reference": "reference (weights that train, at the start)",
    "layers": "activations of the layers",
    "attention": "activations of attention",
    "final": "hidden states, outside the layers",
    "backward": "backward pass: what is computed again, and gradients of activations",
    "head": "head: gradient of the hidden states, a chunk of logits",
    "d_weight": "head: gradient of its weight",
    "step": "optimizer step",
    "batch": "packed batch",
    "workspace": "workspace of matrix products",
}


@dataclass(frozen=True)
class Estimate:
    """Peak bytes of a step that reads ``tokens`` in each of its forward passes: ``items`` at the moment of the peak, in
    ``phase``."""

    tokens: int
    phase: str
    items: dict[str, int]
    layers: int
    parameters: int
    trainable: int

    @property
    def total(self) -> int:
        """Bytes of tensors at the peak."""
        return sum(self.items.values())


def config_model(config: TrainConfig, vocab_size: int = 0) -> Any:
    """The model of ``config`` without weights: on the meta device, from the config.json of ``model``. ValueError where
    there is none."""
    with torch.device("meta"):
        if not config.model:
            return make_model(vocab_size or config.vocab_size, config.width, config.layers)
        return _described(config.model, "model")


def _described(folder: str, name: str) -> Any:
    """The model that a config.json describes; ``name``: of the setting."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not Path(folder, "config.json").is_file():
        raise ValueError(f"{name} must be a folder with a config.json, got {folder!r}")
    return prepare(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)))


def _teacher(config: TrainConfig) -> Any:
    """The teacher of ``config``, None without one."""
    if not config.teacher:
        return None
    dtype = torch.bfloat16 if config.bf16 else getattr(torch, config.dtype)
    return _described(config.teacher, "teacher").to(dtype).eval().requires_grad_(False)


def estimate(config: TrainConfig, tokens: int, device: str = "cpu") -> Estimate:
    """What a step under ``config`` takes at its peak on ``device`` ("cpu" or "cuda"), from its second forward pass on.

    ``tokens``: of a forward pass, all in one dialogue or in many. All assistant rows are taken to have a gradient.
    """
    with torch.device("meta"):
        model = config_model(config).to(getattr(torch, config.dtype)).train()
        model = adapted(model, replace(config, activation_offload=False))
        teacher = _teacher(config)
    step = Step(model, config, device, teacher)
    with step.count:
        step.begin(tokens)
        for _ in range(2):  # the second pass finds the gradients of the first
            step.count.restart()
            step.forward_and_backward(tokens)
        step.optimise()
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trainable = sum(n for n, trains in sizes if trains)
    layers = model.config.get_text_config().num_hidden_layers
    return Estimate(
        tokens, step.count.peak_phase, dict(step.count.at_peak), layers, sum(n for n, _ in sizes), trainable
    )


def largest(config: TrainConfig, memory: float, device: str = "cpu") -> int:
    """Tokens of the longest dialogue whose step stays within ``memory`` bytes, 0 where not even 64 do; short of it by
    at most a 64th.

    The peak grows with the tokens, piecewise linearly: the line through the two estimates nearest to ``memory`` says
    where to look next, a 160th short of it and, where that fits, a 160th beyond; after eight estimates, bisection.
    """
    peak = {tokens: estimate(config, tokens, device).total for tokens in (64, 1024)}
    if peak[64] > memory:
        return 0
    while True:
        low = max(tokens for tokens, size in peak.items() if size <= memory)
        high = min((tokens for tokens, size in peak.items() if size > memory), default=64 * low)
        if low >= 2**31 or high - low <= max(1, low // 64):
            return low
        one, other = sorted(peak, key=lambda tokens: abs(peak[tokens] - memory))[:2]
        slope = max(1.0, (peak[one] - peak[other]) / (one - other))  # bytes a token
        reach = one + (memory - peak[one]) / slope
        tokens = int(reach * 159 / 160) if reach * 159 / 160 > low + 1 else int(reach * 161 / 160)
        tokens = min(max(tokens, low + 1), high - 1) if len(peak) < 8 else (low + high) // 2
        peak[tokens] = estimate(config, tokens, device).total


def report(config: TrainConfig, tokens: int, device: str, memory: float = 0.0) -> str:
    """The estimate as text; with ``memory`` bytes, the longest dialogue that fits them too."""
    found = estimate(config, tokens, device)
    kept = sum(found.items.get(name, 0) for name in ("layers", "attention")) / found.layers
    lines = [
        f"peak memory of a training step, estimated for {device}: passes of {tokens:,} tokens,",
        f"{found.parameters:,} parameters, {found.trainable:,} of them trained",
        *(f"  {text:<66}{found.items[name] / 1e9:>9.3f} GB" for name, text in ITEMS.items() if found.items.get(name)),
        f"  {'peak, in the ' + found.phase:<66}{found.total / 1e9:>9.3f} GB",
        f"  {'activations kept at that moment, a layer':<66}{kept / 1e9:>9.3f} GB",
    ]
    if memory:
        fits = largest(config, memory, device)
        text = (
            f"longest dialogue within {memory / 1e9:g} GB: {fits:,} tokens"
            if fits
            else f"not even 64 tokens fit {memory / 1e9:g} GB"
        )
        lines.append(text + ("" if found.total <= memory else f" (these {tokens:,} do not)"))
    return "\n".join(lines)

"""The output head of a causal LM, and what stands between it and the logits: a scale and a softcap."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ppg_fast.models.adaptation import plain_head
from ppg_fast.spec import PolicyLossSpec, require

# names in a model's text config: Cohere; Muse; Falcon-H1; Granite, MiniCPM3 and HyperCLOVA X
SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
SOFTCAP = "final_logit_softcapping"  # Gemma


@dataclass(frozen=True)
class Head:
    """logits = softcap tanh(scale (hidden weight^T + bias) / softcap), without the tanh where softcap is 0.

    ``weight`` (V, D) and ``bias`` (V,) or None, of one floating dtype; ``scale`` > 0.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float = 1.0
    softcap: float = 0.0

    @classmethod
    def of(cls, model: Any) -> "Head":
        """The head of a causal LM, scale and softcap from its config. ValueError where it carries adapters."""
        head, config = plain_head(model), model.config.get_text_config()
        return cls(head.weight, getattr(head, "bias", None), logit_scale(config), final_softcap(config))

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., V) of hidden states (..., D)."""
        return logits_of(torch.nn.functional.linear(hidden, self.weight, self.bias), self.scale, self.softcap)

    def fold(self, temperature: float | Tensor) -> dict[str, Any]:
        """``temperature`` and ``logit_softcap`` that give the same distribution of logits without the scale.

        softcap(s x; c) / T = softcap(x; c / s) / (T / s), so that no hidden state is copied.
        """
        return {"temperature": temperature / self.scale, "logit_softcap": self.softcap / self.scale}

    def fold_spec(self, spec: PolicyLossSpec) -> PolicyLossSpec:
        """``spec`` with the numbers of `fold`; ValueError for a softcap that is neither 0 nor the model's own."""
        require(isinstance(spec, PolicyLossSpec), "spec must be a PolicyLossSpec", type(spec).__name__)
        same = spec.logit_softcap in (0.0, self.softcap)
        require(same, f"logit_softcap of the spec must be 0 or the model's own, {self.softcap}", spec.logit_softcap)
        return replace(spec, **self.fold(spec.temperature))


def logits_of(projected: Tensor, scale: float, softcap: float) -> Tensor:
    """Logits of hidden W^T + b."""
    logits = projected if scale == 1.0 else projected * scale
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def named_scales(config: Any) -> dict[str, float]:
    """Those of `SCALES` that a text config sets."""
    found = {name: getattr(config, name, None) for name in SCALES}
    return {name: float(value) for name, value in found.items() if value is not None}


def logit_scale(config: Any) -> float:
    """What a model multiplies hidden W^T + b by before the softcap, from its text config; 1 where it does not.

    ``hidden`` as the decoder gives it. Granite and MiniCPM3 divide by logits_scaling, HyperCLOVA X multiplies by it.
    ValueError unless > 0.
    """
    for name, scale in named_scales(config).items():
        require(scale > 0, f"{name} of the model must be > 0", scale)
        return 1 / scale if name == "logits_scaling" and config.model_type != "hyperclovax" else scale
    return 1.0


def final_softcap(config: Any) -> float:
    """The softcap of a model's logits from its text config, 0 where there is none."""
    return float(getattr(config, SOFTCAP, None) or 0.0)

"""Golden losses: fixed inputs in closed form, and what the float64 reference makes of them, kept in
tests/golden/losses.json.

Every input is a multiple of 1/64 that float32, bfloat16 and float16 hold, and so is every logit hidden @ weight.T +
bias: one truth serves all dtypes. `make golden` writes the file and says the digest that CHANGELOG.md must name.
"""

import hashlib
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ppg_fast import reference
from ppg_fast.functional.loss import LossRows
from ppg_fast.spec import IGNORE, REDUCTIONS, PolicyLossSpec

FILE = Path(__file__).parents[1] / "golden/losses.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
B, L, V, D = 2, 4, 7, 3  # 8 tokens in two sequences, a vocabulary that is no multiple of a vector

NUMBERS = {"temperature": 0.75}
CLIP = {"clip_low": 0.15, "clip_high": 0.3}
LOSSES = {
    "reinforce": {"loss_type": "reinforce"},
    "ppo": {"loss_type": "ppo", **CLIP},
    "ppo-dual-clip": {"loss_type": "ppo", "dual_clip": 1.4, **CLIP},
    "cispo": {"loss_type": "cispo", "clip_high": 0.3},
    "gspo": {"loss_type": "gspo", **CLIP},
    "gspo_turn": {"loss_type": "gspo_turn", **CLIP},
}
MORE_LOSSES = {  # in fewer cases
    "cispo-two-sided": {"loss_type": "cispo", **CLIP},
    "ipo": {"loss_type": "ipo", "clip_low": 0.06, "clip_high": 0.05},
    "icepop": {"loss_type": "icepop", "clip_low": 0.4, "clip_high": 0.7},
    "dppo_tv": {"loss_type": "dppo_tv", "clip_low": 1e-3, "clip_high": 0.02, "ratio_cap": 1.3},
    "dppo_kl": {"loss_type": "dppo_kl", "clip_low": 5e-4, "clip_high": 5e-3, "ratio_cap": 1.3},
    "sapo": {"loss_type": "sapo", "tau_positive": 1.3, "tau_negative": 1.7},
    "topr": {"loss_type": "topr", **CLIP},
    "gmpo": {"loss_type": "gmpo", "clip_low": 0.25, "clip_high": 0.35},
    "gmpo_turn": {"loss_type": "gmpo_turn", "clip_low": 0.25, "clip_high": 0.35},
    "gspo_turn-sum": {"loss_type": "gspo_turn", **CLIP, "ratio_reduction": "sum"},
    "vespo": {"loss_type": "vespo"},
}
TERMS = {  # every estimator, and the other terms once with each neighbour
    "alone": {},
    "k1": {"kl_coef": 0.11, "kl_estimator": "k1", "entropy_coef": 0.02},
    "k2": {"kl_coef": 0.12, "kl_estimator": "k2", "importance_cap": 1.25},
    "k3": {"kl_coef": 0.13, "kl_estimator": "k3", "entropy_coef": 0.03, "importance_cap": 1.3, "logit_softcap": 6.0},
}
MORE_TERMS = {
    "log ratio": {"log_ratio_coef": 0.05, "importance_floor": 0.9},
    "k3_unbiased": {"kl_coef": 0.11, "kl_estimator": "k3_unbiased"},
    "k3_plus": {"kl_coef": 0.12, "kl_estimator": "k3_plus", "kl_cap": 0.05},
    "abs": {"kl_coef": 0.13, "kl_estimator": "abs", "kl_cap": 0.35},
    "mask": {"importance_floor": 0.9, "importance_cap": 1.3, "importance_mode": "mask"},
}
GRID = [(loss, terms, reduction) for loss in LOSSES for terms in TERMS for reduction in REDUCTIONS] + [
    ("cispo-two-sided", "mask", "sum"),
    ("ipo", "log ratio", "token_mean"),
    ("icepop", "k3_unbiased", "sequence_mean"),
    ("dppo_tv", "k3_plus", "none"),
    ("dppo_kl", "abs", "sequence_sum"),
    ("sapo", "mask", "sum"),
    ("topr", "k3_unbiased", "sum"),
    ("gmpo", "k1", "sequence_mean"),
    ("gmpo_turn", "k2", "none"),
    ("gspo_turn-sum", "abs", "token_mean"),
    ("vespo", "k2", "sequence_mean"),
]


def of_loss(loss: str) -> list[tuple[str, str]]:
    """Terms and reduction of each case of a loss."""
    return [(terms, reduction) for name, terms, reduction in GRID if name == loss]


def key(loss: str, terms: str, reduction: str) -> str:
    """The name of a case in the file."""
    return f"{loss} {terms} {reduction}"


def spec(loss: str, terms: str) -> PolicyLossSpec:
    return PolicyLossSpec(**NUMBERS, **(LOSSES | MORE_LOSSES)[loss], **(TERMS | MORE_TERMS)[terms])


def _wave(count: int, step: float, size: int, unit: int) -> list[float]:
    """``size`` sin(step (i + 1)) / ``unit``, the sine rounded so that the numbers are multiples of 1 / unit."""
    return [round(size * math.sin(step * (i + 1))) / unit for i in range(count)]


@dataclass
class Inputs:
    """Float64. ``hidden`` (B, L, D), ``weight`` (V, D), ``bias`` (V,), the rest (B, L). ``upstream``, of the losses
    under "none": powers of two, since a gradient of 16 bits is stored before it is scaled."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    turn_ids: Tensor
    advantages: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    rollout_logprobs: Tensor
    upstream: Tensor

    def head(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        """Leaves: hidden states, weight, bias."""
        return [t.to(device, dtype).requires_grad_() for t in (self.hidden, self.weight, self.bias)]

    def options(self, spec: PolicyLossSpec, reduction: str, dtype: torch.dtype, device: str = "cpu") -> dict:
        """The keyword arguments of a policy loss; log-probs are float32 in every dtype of the logits but float64."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        old = {
            name: getattr(self, name).to(device, wide) for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs")
        }
        return {**old, "turn_ids": self.turn_ids.to(device), "spec": spec, "reduction": reduction}


def inputs() -> Inputs:
    """One token is masked, one has no advantage; log-ratios lie on either side of both clips, alike in a sequence."""
    hidden = torch.tensor(_wave(B * L * D, 1.7, 4, 4), dtype=torch.float64).view(B, L, D)
    weight = torch.tensor(_wave(V * D, 2.3, 4, 4), dtype=torch.float64).view(V, D)
    bias = torch.tensor(_wave(V, 0.9, 6, 8), dtype=torch.float64)
    labels = torch.tensor([[3, 0, 6, 2], [5, IGNORE, 1, 4]])
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logprobs = torch.log_softmax(logits / NUMBERS["temperature"], -1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]

    def near(offsets: list[list[float]]) -> Tensor:
        return ((logprobs - torch.tensor(offsets, dtype=torch.float64)) * 64).round() / 64

    return Inputs(
        hidden,
        weight,
        bias,
        labels,
        torch.tensor([[0, 0, 1, 1], [0, 0, 1, 1]]),
        torch.tensor([[1.25, -0.5, 0.75, -1.5], [-0.875, 0.625, 0.0, -2.0]], dtype=torch.float64),
        near([[0.5, 0.4, 0.3, 0.6], [-0.6, -0.3, -0.2, 0.1]]),
        near([[0.3, -0.4, 0.2, 0.1], [-0.2, 0.5, -0.3, 0.4]]),
        near([[0.8, 0.35, 0.4, 1.0], [-0.5, -0.4, 0.3, 0.7]]),
        torch.tensor([[1.0, 0.5, -2.0, 4.0], [2.0, 1.0, 0.25, -0.5]], dtype=torch.float64),
    )


def textbook(case: Inputs, spec: PolicyLossSpec, reduction: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Loss and gradients by plain PyTorch: logits in ``dtype``, the loss in float32 (of float64: in float64)."""
    head = case.head(dtype)
    logits = torch.nn.functional.linear(*head)
    options = case.options(spec, reduction, dtype)
    rows = LossRows.of(case.labels, case.advantages.to(options["old_logprobs"].dtype), logits.device, **options)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    per_row = (None if t is None else t.to(wide) for t in rows.per_row[:5])
    flat = logits.view(B * L, V).to(wide)
    loss = reference.policy_loss(flat, rows.tokens.labels, *per_row, rows.spec, rows.groups)[0]
    upstream = case.upstream.flatten().to(wide) if reduction == "none" else torch.ones_like(loss)
    gradients = torch.autograd.grad(loss, [logits, *head], upstream)
    named = dict(zip(("d_logits", "d_hidden", "d_weight", "d_bias"), gradients, strict=True))
    return {"loss": (loss.view(B, L) if reduction == "none" else loss.sum()).detach(), **named}


def truth() -> dict[str, dict[str, Tensor]]:
    """Every case in float64, by name."""
    case = inputs()
    return {key(*names): textbook(case, spec(*names[:2]), names[2], torch.float64) for names in GRID}


def read() -> dict[str, dict[str, Tensor]]:
    """The file's losses and gradients by case, flat, float64."""
    cases = json.loads(FILE.read_text(encoding="utf-8"))["cases"]
    return {
        name: {k: torch.tensor(v, dtype=torch.float64) for k, v in numbers.items()} for name, numbers in cases.items()
    }


def digest(file: Path = FILE) -> str:
    """What CHANGELOG.md names: 12 hexadecimal digits of the file's SHA-256."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def _numbers(tensor: Tensor) -> str:
    values = [float(f"{v:.7g}") + 0.0 for v in tensor.detach().flatten().tolist()]  # + 0.0: no -0
    return "[" + ",".join(f"{v:.7g}" for v in values) + "]"


def write(file: Path = FILE) -> None:
    """Inputs and truth as JSON, a case a line."""
    about = (
        "Losses and gradients of ppg_fast in float64, for float32, bfloat16 and float16 alike: the inputs are exact in "
        "all three. logits = hidden @ weight.T + bias; a case is loss type, terms, reduction; tensors are flat, "
        "row-major; under reduction none the gradients are those of sum(upstream * loss). Written by `make golden`."
    )
    case = inputs()
    given = [f'  "{name}": {_numbers(getattr(case, name))}' for name in Inputs.__dataclass_fields__]
    lines = [
        f'  "{name}": {{' + ", ".join(f'"{k}": {_numbers(v)}' for k, v in numbers.items()) + "}"
        for name, numbers in truth().items()
    ]
    specs = {
        "numbers": NUMBERS,
        "losses": LOSSES | MORE_LOSSES,
        "terms": TERMS | MORE_TERMS,
        "shape": {"B": B, "L": L, "V": V, "D": D},
    }
    head = [f'"about": {json.dumps(about)}', *(f'"{name}": {json.dumps(value)}' for name, value in specs.items())]
    tables = [f'"{name}": {{\n' + ",\n".join(rows) + "\n}" for name, rows in (("inputs", given), ("cases", lines))]
    file.parent.mkdir(exist_ok=True)
    file.write_text("{\n" + ",\n".join(head + tables) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    write()
    sys.stdout.write(f"{FILE}\nCHANGELOG.md must say why they changed, in a line with: golden losses {digest()}\n")

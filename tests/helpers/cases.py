"""Inputs for the row kernels: no two numbers alike, none at its default, log-ratios on every side of a clip and away
from its kink."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ppg_fast import backends, ops, reference
from ppg_fast.contract import PerRow
from ppg_fast.losses import numbers_of
from ppg_fast.spec import IGNORE, UNUSED, PolicyLossSpec


def spec_of(loss_type: str, **numbers: Any) -> PolicyLossSpec:
    """A spec of those of the numbers that its loss uses."""
    unused = UNUSED.keys() - numbers_of(loss_type).keys()
    return PolicyLossSpec(loss_type, **{name: value for name, value in numbers.items() if name not in unused})


NUMBERS = {"clip_low": 0.15, "clip_high": 0.3, "temperature": 0.7}
LOSSES = {
    "reinforce": spec_of("reinforce", **NUMBERS),
    "ppo": spec_of("ppo", **NUMBERS),
    "ppo-dual-clip": spec_of("ppo", dual_clip=1.4, **NUMBERS),
    "cispo": spec_of("cispo", **NUMBERS),
    "ipo": spec_of("ipo", **NUMBERS),
    "icepop": spec_of("icepop", **NUMBERS),
    "dppo_tv": spec_of("dppo_tv", ratio_cap=1.2, **NUMBERS),
    "dppo_kl": PolicyLossSpec("dppo_kl", clip_low=0.06, clip_high=0.02, ratio_cap=1.2, temperature=0.7),
    "sapo": PolicyLossSpec("sapo", tau_positive=1.2, tau_negative=1.7, temperature=0.7),
    "topr": spec_of("topr", **NUMBERS),
}
TERMS = {
    "plain": {},
    "entropy": {"entropy_coef": 0.02},
    "k1": {"kl_coef": 0.11, "kl_estimator": "k1"},
    "k2": {"kl_coef": 0.12, "kl_estimator": "k2"},
    "k3": {"kl_coef": 0.13, "kl_estimator": "k3"},
    "softcap": {"logit_softcap": 5.0},
    "importance": {"importance_cap": 1.25},
    "everything": {"entropy_coef": 0.03, "kl_coef": 0.14, "logit_softcap": 6.0, "importance_cap": 1.3},
    "k3_unbiased": {"kl_coef": 0.15, "kl_estimator": "k3_unbiased"},
    "k3_plus": {"kl_coef": 0.16, "kl_estimator": "k3_plus", "kl_cap": 0.12},
    "abs": {"kl_coef": 0.17, "kl_estimator": "abs", "kl_cap": 0.3},
    "k1-cap": {"kl_coef": 0.18, "kl_estimator": "k1", "kl_cap": 0.3},
    "log-ratio": {"log_ratio_coef": 0.05},
    "z-loss": {"z_coef": 0.01, "logit_softcap": 4.0},
    "importance-floor": {"importance_floor": 0.7, "importance_cap": 1.25},
    "importance-mask": {"importance_floor": 0.7, "importance_cap": 1.25, "importance_mode": "mask"},
    "max-log-ratio": {
        "max_log_ratio": 0.2, "importance_floor": 0.9, "kl_coef": 0.19, "kl_estimator": "k3_unbiased"
    },
    "all-new": {
        "entropy_coef": 0.02, "log_ratio_coef": 0.03, "z_coef": 0.004, "kl_coef": 0.05, "kl_cap": 0.2,
        "kl_estimator": "k3_unbiased", "importance_floor": 0.8, "importance_mode": "mask",
    },
}  # fmt: skip
# every loss with few and with many terms, and one loss with every term
PAIRS = [(loss, terms) for loss in LOSSES for terms in TERMS if loss == "ppo" or terms in ("plain", "all-new")]


@dataclass
class Case:
    """One call of the row kernels: logits (B, L, V), the rest (N,)."""

    logits: Tensor
    labels: Tensor
    advantages: Tensor
    weights: Tensor | None
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    temperatures: Tensor | None
    spec: PolicyLossSpec
    nll_weights: Tensor | None = None

    @property
    def per_row(self) -> PerRow:
        return PerRow(
            self.advantages,
            self.weights,
            self.old_logprobs,
            self.ref_logprobs,
            self.rollout_logprobs,
            self.temperatures,
            self.nll_weights,
        )

    def textbook(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """What the reference says in ``dtype``: loss, logprob, entropy and dlogits."""
        x = self.logits.detach().flatten(0, 1).to(dtype).requires_grad_()
        rows = (None if t is None else t.to(dtype) for t in self.per_row[:5])
        nll = None if self.nll_weights is None else self.nll_weights.to(dtype)
        spec = self.spec if self.temperatures is None else replace(self.spec, temperature=self.temperatures.to(dtype))
        loss, logprob, entropy = reference.policy_loss(x, self.labels, *rows, spec, nll_weights=nll)
        grad = torch.autograd.grad(loss.sum(), x)[0].view(self.logits.shape)
        return {
            k: v.detach().cpu()
            for k, v in {"loss": loss, "logprob": logprob, "entropy": entropy, "dlogits": grad}.items()
        }


def make_case(
    shape: tuple[int, int, int],
    spec: PolicyLossSpec,
    dtype=torch.float32,
    device="cpu",
    *,
    strided=False,
    per_token=False,
    on_policy=False,
    likelihood=False,
) -> Case:
    """Every fourth row masked and full of NaN, another fourth of zero advantage; ratios of 0.6, 0.95, 1.05 and 1.65.
    Half of the labels are likely, so that a change of their probability is one."""
    B, L, V = shape
    N = B * L
    base = (3 * torch.randn(B, L + 1, V + 3)).to(dtype)
    logits = (base[:, :-1, 1 : V + 1] if strided else base[:, :-1, :V].contiguous()).to(device)
    labels = torch.randint(V, (N,))
    rows = torch.arange(N)
    labels = torch.where(rows % 8 < 4, logits.cpu().flatten(0, 1).argmax(-1), labels)
    temperatures = torch.linspace(0.6, 1.5, N) if per_token else None
    scale = temperatures if per_token else spec.temperature
    logprobs = reference.token_logprobs(logits.cpu().flatten(0, 1).double(), labels, scale, spec.logit_softcap)[
        0
    ].float()
    ratios = torch.tensor([-0.5, -0.05, 0.05, 0.5])[torch.randint(4, (3, N))]
    ratios[:2] = torch.where(logprobs < -0.6, ratios[:2], ratios[:2].abs())  # no probability beyond 1
    advantages = torch.randn(N).where(rows % 4 != 2, torch.tensor(0.0))
    labels = labels.where(rows % 4 != 3, torch.tensor(IGNORE))
    logits[(labels == IGNORE).view(B, L).to(device)] = float("nan")
    old = None if on_policy else logprobs - ratios[0]
    behind = logprobs if on_policy else old
    columns = (advantages, torch.rand(N) + 0.5, old, logprobs - ratios[1], behind - ratios[2], temperatures)
    nll = (rows % 3 > 0) * (torch.rand(N) + 0.2) if likelihood else None
    moved = (None if t is None else t.to(device) for t in columns)
    return Case(logits, labels.to(device), *moved, spec, None if nll is None else nll.to(device))


def run(case: Case, backend: str, rows=slice(None), norm: Tensor | None = None) -> dict[str, Tensor]:
    """What the contract's `policy_loss` makes of these rows, by name, and their score norms into ``norm``.

    Of "reference", which has no such function, the gradient is autograd's.
    """
    x, labels = case.logits[:, rows].detach(), case.labels[rows]
    per_row = PerRow(*(None if t is None else t[rows] for t in case.per_row))
    if backend == "reference":
        z = x.requires_grad_().flatten(0, 1).float()
        loss, logprob, entropy, norms = ops.reference_policy_loss(z, labels, per_row, case.spec, norm is not None)
        dlogits = torch.autograd.grad(loss.sum(), x)[0]
        if norm is not None:
            norm.copy_(norms)
    else:
        dlogits, call = torch.full_like(x, torch.nan), backends.load(backend).policy_loss
        loss, logprob, entropy = call(x, labels, *per_row, case.spec, True, dlogits, norm)
    return {"loss": loss.detach(), "logprob": logprob.detach(), "entropy": entropy.detach(), "dlogits": dlogits}

"""Calls of the kernels for tools that watch them: every kernel and plan on small shapes, and the fused kernel on large
ones."""

from itertools import product
from typing import Any

import torch

import ppg_fast as ppg
from ppg_fast import backends

# lengths of rows that take another plan each, two passes at both ends
PLANS = (7, 1000, 4099, 20011, 70001, 140003, 270001, 700001)
LARGE = (32000, 128256, 151936, 262144)
SPECS = (
    ppg.PolicyLossSpec("ppo", clip_high=0.28),
    ppg.PolicyLossSpec("cispo", entropy_coef=0.01, kl_coef=0.1, temperature=0.9),
    ppg.PolicyLossSpec("ppo", logit_softcap=30.0),
)


def _call(V: int, N: int, dtype: torch.dtype, spec: ppg.PolicyLossSpec, backend: str, device: str) -> None:
    """The policy loss and the pair around a loss of the caller's own, of a view whose rows lie apart and unaligned."""
    draw = torch.Generator(device).manual_seed(V)
    logits = torch.randn(1, N + 1, V + 1, generator=draw, device=device).to(dtype)[:, :-1, 1:]
    labels = torch.randint(V, (1, N), generator=draw, device=device)
    labels[:, ::4] = -100
    advantages = torch.randn(1, N, generator=draw, device=device)
    advantages[:, 1::4] = 0.0
    logits.requires_grad_()
    old = torch.zeros(1, N, device=device)
    rows = {"old_logprobs": old, "ref_logprobs": old, "score_norms": V % 2 == 1}  # kernels of their own
    out = ppg.policy_loss(logits, labels, advantages, **rows, spec=spec, backend=backend)
    torch.autograd.grad(out.loss * 2, logits)
    pair = ppg.token_logprobs(logits, labels, entropy=True, logit_softcap=spec.logit_softcap, backend=backend)
    torch.autograd.grad(pair[0].sum() + pair[1].sum(), logits)
    hidden, weight = (torch.randn(n, 8, generator=draw, device=device).to(dtype).requires_grad_() for n in (N, V))
    divergence = ("forward_kl", "reverse_kl", "jsd")[SPECS.index(spec)]
    taught = ppg.Teacher(hidden.detach(), weight.detach(), divergence=divergence)
    options: dict[str, Any] = {"logit_softcap": spec.logit_softcap, "backend": backend}
    torch.autograd.grad(ppg.linear_distillation_loss(hidden, weight, labels[0], taught, **options).loss, hidden)


def sweep_all(report: Any) -> None:
    """Every kernel of the CUDA backend once, on rows of every plan."""
    backend = "cuda" if report.device == "cuda" else "cpu"
    backends.load(backend)
    rewards = torch.rand(3, 5, device=report.device)
    for class_ in ("lookahead:2", "segment:2", "full", ppg.Segment(torch.tensor([[0, 0, 1, 1, 2]] * 3))):
        report.case(
            f"returns {class_}", lambda class_=class_: ppg.partial_returns(rewards, class_, 0.9, backend=backend)
        )
    for V, dtype in product(PLANS[:3] if report.tiny else PLANS, (torch.float32, torch.bfloat16, torch.float16)):
        for spec in SPECS if V < 30000 else SPECS[:1]:
            report.case(
                f"V {V} {dtype} {spec.loss_type}",
                lambda V=V, d=dtype, s=spec: _call(V, 5, d, s, backend, report.device),
                3.0,
            )
    if report.device == "cuda":
        torch.cuda.synchronize()


def sweep_large(report: Any) -> None:
    """The fused kernel in place and the forward-only one, bfloat16, once each; a line says what must move at least."""
    backend, N = ("cuda", 8192) if report.device == "cuda" else ("cpu", 16)
    for V in (512,) if report.tiny else LARGE:

        def both(V: int = V) -> None:
            logits = torch.randn(N, V, dtype=torch.bfloat16, device=report.device).requires_grad_()
            labels, advantages = torch.randint(V, (N,), device=report.device), torch.randn(N, device=report.device)
            one = N * V * 2
            report.add(op="logprobs", N=N, V=V, read=one, write=0)
            ppg.token_logprobs(logits.detach(), labels, entropy=True, backend=backend)
            report.add(op="policy_loss", N=N, V=V, read=one, write=one)
            ppg.policy_loss(logits, labels, advantages, inplace=True, backend=backend)
            if report.device == "cuda":
                torch.cuda.synchronize()

        report.case(f"V {V}", both, 3.0)

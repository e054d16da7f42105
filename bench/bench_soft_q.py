"""soft_q: losses of a whole turn or sequence from logits, soft Q-learning beside gspo: two sweeps, the gradient in the
second."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ppg_fast.functional import policy_loss, soft_q_loss, soft_q_loss_from_logprobs
from ppg_fast.spec import PolicyLossSpec, SoftQSpec

from . import providers
from .bench_policy_loss import VOCABULARIES
from .ceilings import copy_and_update
from .problem import TURNS, Case, Problem, make_problem, relative_error
from .providers import Provider, Providers, gather
from .timing import Contestant

make = make_problem
GSPO, SOFT_Q, WINDOW, DTYPES = "gspo", "soft Q", "lookahead:3", ("float32", "bfloat16")
SPEC = PolicyLossSpec(GSPO)


def cases(grid: str, device: str) -> list[Case]:
    """The shapes of logprobs, under both losses."""
    variants = (SOFT_Q, GSPO)
    if grid == "quick":
        return [Case("soft_q", 64, 512, variant=v, device=device) for v in variants]
    if device == "cuda":
        big = [(8192, V, "bfloat16") for V in VOCABULARIES]
    else:
        big = [(2048, 32000, dtype) for dtype in DTYPES]
    return [Case("soft_q", N, V, dtype=dtype, variant=v, device=device) for N, V, dtype in big for v in variants]


def _turns(p: Problem) -> tuple[Tensor, Tensor]:
    """Rewards (1, TURNS) and the turn of each token: the problem is one dialogue."""
    length = len(p.labels) // TURNS
    at = torch.arange(len(p.labels), device=p.labels.device) // length
    return p.advantages[::length][None, :TURNS].contiguous(), at.clamp(max=TURNS - 1)


def _soft_q_options(p: Problem) -> dict[str, Any]:
    """The reference has the old log-probs, and log-sum-exps of 0."""
    known = {"ref_logprobs": p.old_logprobs, "ref_lse": torch.zeros_like(p.old_logprobs)}
    return {**known, "spec": SoftQSpec(beta=1.0)}


def _loss(logprobs: Tensor, lse: Tensor | None, p: Problem) -> Tensor:
    """The case's loss in plain PyTorch: gspo without a log-sum-exp."""
    if lse is not None:
        return soft_q_loss_from_logprobs(logprobs, lse, *_turns(p), WINDOW, **_soft_q_options(p)).loss
    mask = p.mask
    mean = torch.where(mask, logprobs - p.old_logprobs, 0.0).sum() / mask.sum()
    ratio = torch.exp(mean.detach() + logprobs - logprobs.detach())
    clipped = ratio.clamp(1 - SPEC.clip_low, 1 + SPEC.clip_high)
    return (-torch.minimum(ratio * p.advantages, clipped * p.advantages) * mask).sum() / mask.sum()


def _ours(case: Case) -> list[Provider]:
    """ppg_fast."""

    def using(backend: str) -> Callable[[Problem], Tensor]:
        def soft_q(p: Problem) -> Tensor:
            given = p.leaves[0], p.labels, *_turns(p), WINDOW
            return soft_q_loss(*given, backend=backend, **_soft_q_options(p)).loss

        def gspo(p: Problem) -> Tensor:
            given = p.leaves[0], p.labels, p.advantages
            return policy_loss(*given, old_logprobs=p.old_logprobs, spec=SPEC, backend=backend).loss

        return soft_q if case.variant == SOFT_Q else gspo

    return [Provider(f"ppg_fast {name}", using(name), "ours") for name in providers.our_backends(case)]


def _read(logits: Tensor, labels: Tensor, with_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the labels and, where asked for, log-sum-exps, 0 where masked."""
    wide, active = logits.float() if logits.dtype != torch.float64 else logits, labels >= 0
    logprobs = torch.log_softmax(wide, -1).gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)
    lse = torch.where(active, wide.logsumexp(-1), 0.0) if with_lse else None
    return torch.where(active, logprobs, 0.0), lse


def _eager(case: Case) -> Provider:
    """Eager PyTorch."""
    with_lse = case.variant == SOFT_Q
    return Provider("eager PyTorch", lambda p: _loss(*_read(p.leaves[0], p.labels, with_lse), p))


def participants(case: Case) -> Providers:
    """Ours and eager PyTorch."""
    return gather([_ours, _eager], case)


def ceilings(problem: Problem, case: Case) -> list[Contestant]:
    """1R + 1W, of the second sweep alone."""
    return copy_and_update(problem, case.threads)


def ceiling_of(provider: Provider) -> tuple[str, ...]:
    """Names of the ceilings, the fastest of which counts."""
    return ("copy", "memcpy")


def checker(problem: Problem, case: Case) -> Callable[[Any], dict[str, float]]:
    """Errors of loss and gradient against log-probs in float64 and the chain rule, on a few rows."""
    assert problem.logits is not None
    with torch.no_grad():
        parts = zip(problem.logits.split(64), problem.labels.split(64), strict=True)
        found = [_read(logits.double(), labels, True) for logits, labels in parts]
    l, lse = (torch.cat([pair[i] for pair in found]).requires_grad_() for i in (0, 1))  # type: ignore[misc]
    loss = _loss(l, lse if case.variant == SOFT_Q else None, problem)
    d_l, d_lse = torch.autograd.grad(loss, (l, lse), allow_unused=True)
    rows = problem.mask.nonzero().squeeze(1)[:: max(1, len(problem.labels) // 16)]
    z = problem.logits.detach()[rows].double()
    pull = d_l[rows] - (0.0 if d_lse is None else d_lse[rows])
    truth = -pull[:, None] * torch.softmax(z, -1)
    truth[torch.arange(len(rows), device=rows.device), problem.labels[rows]] += d_l[rows]

    def errors(result: tuple[Tensor, tuple[Tensor, ...]]) -> dict[str, float]:
        value, (gradient,) = result
        return {"loss": relative_error(value, loss.detach()), "d_logits": relative_error(gradient[rows], truth)}

    return errors


def work(case: Case) -> dict[str, float]:
    """Bytes that have to move: two reads and a write."""
    return {"bytes": 3 * case.N * case.V * case.torch_dtype.itemsize}

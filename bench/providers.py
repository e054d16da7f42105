"""Who computes: our backends, plain PyTorch and torch.compile. The other libraries are in peers.py."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ppg_fast import backends
from ppg_fast.functional import linear_policy_loss, linear_token_logprobs, policy_loss, token_logprobs

from .problem import SPEC, Case, Problem, ppo


class Unavailable(Exception):
    """Why a provider cannot take part, in words a reader can act on."""


@dataclass(frozen=True)
class Provider:
    """A way to compute what an op asks for.

    ``compute``: the loss of a problem, differentiable in ``leaves``; with ``forward_only`` whatever the op returns.
        ``kind``: "ours" or
    "peer". ``destroys``: its backward pass takes the memory of the logits. ``compiles``: its first call invokes a
    compiler.
    ``compacted``: the caller picks the active rows first.
    """

    name: str
    compute: Callable[[Any], Any]
    kind: str = "peer"
    destroys: bool = False
    compiles: bool = False
    compacted: bool = False
    forward_only: bool = False
    leaves: Callable[[Any], tuple[Tensor, ...]] = lambda problem: problem.leaves

    def run(self, problem: Any) -> Any:
        """The timed call: the loss and its gradient, as a training step needs both, or the forward pass alone."""
        if self.forward_only:
            with torch.no_grad():
                return self.compute(problem)
        leaves = [leaf for leaf in self.leaves(problem) if leaf.requires_grad]
        loss = self.compute(problem)
        return loss.detach(), torch.autograd.grad(loss, leaves)

    def with_compaction(self) -> "Provider":
        """The same behind a caller who picks the active rows; the pick and its backward pass are inside of the
        clock."""
        return replace(
            self, name=f"{self.name}, caller compacts", compute=lambda p: self.compute(p.compacted()), compacted=True
        )


Providers = tuple[list[Provider], dict[str, str]]  # who takes part, and why the others do not


def gather(makers: list[Callable[[Case], Provider | list[Provider]]], case: Case) -> Providers:
    """Call every maker; one that raises `Unavailable` is a line saying so."""
    found: list[Provider] = []
    missing: dict[str, str] = {}
    for maker in makers:
        try:
            made = maker(case)
        except Unavailable as reason:
            missing[(maker.__doc__ or maker.__name__).splitlines()[0].rstrip(".")] = str(reason)
            continue
        found += made if isinstance(made, list) else [made]
    return found, missing


def our_backends(case: Case) -> list[str]:
    """Ours that run on the case's device; `Unavailable` says why none does."""
    candidates = ("triton", "cuda") if case.device == "cuda" else ("cpu",)
    reasons = [backends.why_not(name) for name in candidates]
    names = [name for name, reason in zip(candidates, reasons, strict=True) if reason is None]
    if not names:
        raise Unavailable("; ".join(filter(None, reasons)))
    return names


def loss_from_logits(backend: str, inplace: bool, skip: bool, score_norms: bool = False) -> Callable[[Problem], Tensor]:
    """Our `policy_loss` on one backend."""

    def compute(p: Problem) -> Tensor:
        assert p.logits is not None
        options = {
            "spec": SPEC,
            "inplace": inplace,
            "skip_zero_advantages": skip,
            "score_norms": score_norms,
            "backend": backend,
        }
        return policy_loss(p.logits, p.labels, p.advantages, old_logprobs=p.old_logprobs, **options).loss

    return compute


def ours_from_logits(case: Case) -> list[Provider]:
    """ppg_fast."""
    names = our_backends(case)
    inplace = [
        Provider(f"ppg_fast {name}, in place", loss_from_logits(name, True, False), "ours", destroys=True)
        for name in names
    ]
    separate = [Provider(f"ppg_fast {name}", loss_from_logits(name, False, False), "ours") for name in names]
    norms = [
        Provider(f"ppg_fast {n}, in place, score norms", loss_from_logits(n, True, False, True), "ours", destroys=True)
        for n in names
    ]
    return inplace + separate + norms


def loss_from_hidden(backend: str, skip: bool) -> Callable[[Problem], Tensor]:
    """Our `linear_policy_loss` on one backend."""

    def compute(p: Problem) -> Tensor:
        options = {"spec": SPEC, "skip_zero_advantages": skip, "backend": backend}
        hidden, weight = p.leaves
        return linear_policy_loss(hidden, weight, p.labels, p.advantages, old_logprobs=p.old_logprobs, **options).loss

    return compute


def ours_from_hidden(case: Case) -> list[Provider]:
    """ppg_fast."""
    providers = []
    for name in our_backends(case):
        providers.append(Provider(f"ppg_fast {name}", loss_from_hidden(name, bool(case.zero)), "ours"))
        if case.zero:
            providers.append(
                Provider(f"ppg_fast {name}, skip_zero_advantages=False", loss_from_hidden(name, False), "ours")
            )
    return providers


def ours_in_four_products(case: Case) -> list[Provider]:
    """ppg_fast's log-probs with PyTorch's loss on top: the logits are computed again for the backward pass."""

    def using(backend: str) -> Callable[[Problem], Tensor]:
        def compute(p: Problem) -> Tensor:
            hidden, weight = p.leaves
            return ppo(linear_token_logprobs(hidden, weight, p.labels, backend=backend), p)  # type: ignore[arg-type]

        return compute

    return [Provider(f"ppg_fast {name}, log-probs (four GEMMs)", using(name), "ours") for name in our_backends(case)]


def ours_logprobs(case: Case) -> list[Provider]:
    """ppg_fast."""

    def using(backend: str) -> Callable[[Problem], Tensor]:
        return lambda p: token_logprobs(p.logits, p.labels, backend=backend)  # type: ignore[arg-type,return-value]

    def with_entropy(backend: str) -> Callable[[Problem], Tensor]:
        return lambda p: token_logprobs(p.logits, p.labels, entropy=True, backend=backend)[0]  # type: ignore[arg-type,return-value]

    names = our_backends(case)
    found = [Provider(f"ppg_fast {name}", using(name), "ours") for name in names]
    return found + [
        Provider(f"ppg_fast {name}, with entropy", with_entropy(name), "ours")
        for name in names
        if case.device == "cuda"
    ]


def selected_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """log softmax of float32 logits at the labels, 0 where masked: what transformers and verl do with bfloat16
    logits."""
    active = labels >= 0
    picked = torch.log_softmax(logits.float(), -1).gather(-1, labels.clamp(min=0)[:, None]).squeeze(-1)
    return torch.where(active, picked, 0.0)


def _plain_loss(problem: Problem) -> Tensor:
    assert problem.logits is not None
    return ppo(selected_logprobs(problem.logits, problem.labels), problem)


def _plain_linear_loss(problem: Problem) -> Tensor:
    return ppo(selected_logprobs(F.linear(*problem.leaves), problem.labels), problem)


def _compiled(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """torch.compile with its own defaults, for one case: `torch._dynamo.reset` between cases keeps it from turning to
    dynamic shapes."""
    return torch.compile(compute)


def eager(case: Case) -> Provider:
    """Eager PyTorch."""
    return Provider("eager PyTorch", _plain_linear_loss if case.D else _plain_loss)


def compiled(case: Case) -> Provider:
    """torch.compile."""

    def loss(logits: Tensor, labels: Tensor, advantages: Tensor, old_logprobs: Tensor) -> Tensor:
        return ppo(selected_logprobs(logits, labels), Problem(labels, advantages, old_logprobs, 1, None))

    def linear_loss(hidden: Tensor, weight: Tensor, labels: Tensor, advantages: Tensor, old_logprobs: Tensor) -> Tensor:
        return loss(F.linear(hidden, weight), labels, advantages, old_logprobs)

    function = _compiled(linear_loss if case.D else loss)
    return Provider(
        "torch.compile", lambda p: function(*p.leaves, p.labels, p.advantages, p.old_logprobs), compiles=True
    )


def eager_logprobs(case: Case) -> list[Provider]:
    """Eager PyTorch."""

    def cross_entropy(p: Problem) -> Tensor:
        assert p.logits is not None
        return -F.cross_entropy(p.logits.float(), p.labels, reduction="none")

    plain = Provider("eager PyTorch", lambda p: selected_logprobs(p.logits, p.labels))  # type: ignore[arg-type]
    return [plain, Provider("F.cross_entropy", cross_entropy)]


def compiled_logprobs(case: Case) -> Provider:
    """torch.compile."""
    function = _compiled(selected_logprobs)
    return Provider("torch.compile", lambda p: function(p.logits, p.labels), compiles=True)

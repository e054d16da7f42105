"""host_time: what a call costs the host, one row each, in CPU time of the calling thread: checks, operators, launches.

The kernels' own work is next to nothing at this size. On a GPU a training step waits for exactly this time wherever
the device is faster than the host.
"""

import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ppg_fast import backends
from ppg_fast.functional import partial_returns, policy_loss
from ppg_fast.policy_classes import Lookahead

from .problem import SPEC, Case, relative_error
from .providers import Provider, Providers

REPEATS = {"quick": 20, "default": 1000}  # calls between two looks at the clock
GAMMA = 0.9
WINDOW = Lookahead(3)
EAGER, PRODUCT = "eager PyTorch, forward pass", "PyTorch, product with a (T, T) matrix"


@dataclass
class Call:
    """Inputs of one call: one row of V logits, or rewards (N, N) of dialogues."""

    logits: Tensor
    labels: Tensor
    advantages: Tensor
    old_logprobs: Tensor
    rewards: Tensor
    discounts: Tensor
    repeats: int
    scratch: Tensor = field(init=False)  # logits that may be lost

    def __post_init__(self) -> None:
        self.scratch = self.logits.detach().clone().requires_grad_()


class HostCall(Provider):
    """A call of which the forward pass alone is timed, with a gradient in view, many times in a row."""

    def run(self, problem: Call) -> Any:
        """The result of the first of the calls: where logits are lost, the others have none that could be checked."""
        result = self.compute(problem)
        for _ in range(problem.repeats - 1):
            self.compute(problem)
        return result


class StubbedCall(HostCall):
    """The host's side of the CUDA kernels: everything but the kernels themselves, on tensors of the CPU."""

    def run(self, problem: Call) -> None:
        """Nothing: no kernel has written a result."""
        with stubbed():
            super().run(problem)


def cases(grid: str, device: str) -> list[Case]:
    """One row of the loss; returns of 8 dialogues of 8 turns."""
    return [
        Case("host_time", N, V, variant=name if grid != "quick" else f"{name}, quick", device=device)
        for name, N, V in (("policy_loss", 1, 256), ("partial_returns", 8, 8))
    ]


def settings(device: str, threads: Sequence[int]) -> list[tuple[int, str]]:
    """One thread: the caller's."""
    return [(1, "default")]


def make(case: Case, seed: int = 0) -> Call:
    """Random numbers, a ratio away from the clip's kink."""
    g = torch.Generator(case.device).manual_seed(seed)
    logits = torch.randn(1, max(case.V, 16), generator=g, device=case.device)
    labels = torch.randint(max(case.V, 16), (1,), generator=g, device=case.device)
    old = torch.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0] - 0.1
    turns = torch.arange(8, device=case.device)
    ahead = turns - turns[:, None]
    discounts = torch.where((ahead >= 0) & (ahead < WINDOW.k), GAMMA ** ahead.clamp(min=0).double(), 0.0).float()
    rewards = torch.randn(8, 8, generator=g, device=case.device)
    repeats = REPEATS["quick" if case.variant.endswith("quick") else "default"]
    return Call(logits.requires_grad_(), labels, -torch.ones_like(old), old, rewards, discounts.T, repeats)


def participants(case: Case) -> Providers:
    """Ours as a user calls it, out of place and in place, and what takes its place in plain PyTorch."""
    if case.variant.startswith("partial_returns"):
        ours = HostCall("ppg_fast", lambda c: partial_returns(c.rewards, WINDOW, GAMMA), "ours")
        return [ours, HostCall(PRODUCT, lambda c: c.rewards @ c.discounts)], {}
    found: list[Provider] = [HostCall(EAGER, _eager)]
    for place in ("", ", in place"):
        found.append(HostCall(f"ppg_fast{place}", _loss(bool(place)), "ours"))
        if case.device == "cpu" and backends.why_not("cpu") is None:
            found.append(StubbedCall(f"ppg_fast cuda{place}, kernels stubbed", _loss(bool(place)), "ours"))
    return found, {}


def checker(problem: Call, case: Case) -> Callable[[Any], dict[str, float]]:
    """Error of the loss, or of the returns, against float64; none of what has no kernel."""
    if case.variant.startswith("partial_returns"):
        truth = problem.rewards.double() @ problem.discounts.double()
        return lambda result: {"returns": relative_error(result, truth)}
    truth = _eager(problem, torch.float64).detach()[None]
    return lambda out: {} if out is None else {"loss": relative_error(getattr(out, "loss", out).detach()[None], truth)}


def clock(call: Callable[[], Any], problem: Call) -> float:
    """CPU seconds of this thread, a call."""
    start = time.thread_time()
    call()
    return (time.thread_time() - start) / problem.repeats


def _loss(inplace: bool) -> Callable[[Call], Any]:
    def call(c: Call) -> Any:
        logits = c.scratch if inplace else c.logits
        return policy_loss(logits, c.labels, c.advantages, old_logprobs=c.old_logprobs, spec=SPEC, inplace=inplace)

    return call


def _eager(c: Call, dtype: torch.dtype = torch.float32) -> Tensor:
    """Clipped surrogate, mean over the tokens that are not masked."""
    logprobs = F.log_softmax(c.logits.to(dtype), -1).gather(-1, c.labels[:, None]).squeeze(-1)
    ratio = (logprobs - c.old_logprobs).exp()
    clipped = ratio.clamp(1 - SPEC.clip_low, 1 + SPEC.clip_high)
    mask = c.labels != -100
    losses = -torch.min(ratio * c.advantages, clipped * c.advantages)
    return (losses * mask).sum() / mask.sum().clamp(min=1)


@contextmanager
def stubbed() -> Iterator[None]:
    """Within, the C++ backend does all that the CUDA one does on the host, and launches nothing."""
    stub, load = _stub(), backends.load
    backends.load = lambda name: stub  # type: ignore[assignment]
    try:
        yield
    finally:
        backends.load = load


@cache
def _stub() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ppg_fast_stubbed", backends.load("cpu").__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    done = SimpleNamespace(default=lambda *arguments: True)
    module._lib = SimpleNamespace(fused_policy_loss=done)  # type: ignore[attr-defined]
    module.on_gpu = lambda tensor: True  # type: ignore[attr-defined]
    return module

"""The loss over kept sets of k tokens from hidden states, and the gradients of hidden states and head."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ppg_fast.functional import Kept, linear_policy_loss

from . import problem as base
from .problem import SPEC, Case, relative_error, terms
from .providers import Provider, Providers, gather, our_backends
from .timing import Contestant

CHECKED = 8  # rows of d_hidden
FULL, BAGS = "the full head, another loss", "three sums of the kept rows"


@dataclass
class Problem(base.Problem):
    """A problem whose labels are drawn from ``ids`` (N, k), each a set."""

    ids: Tensor | None = None

    @property
    def kept(self) -> Kept:
        assert self.ids is not None
        N, k = self.ids.shape
        return Kept(self.ids.reshape(-1), torch.arange(0, N * k + 1, k, device=self.ids.device))


def cases(grid: str, device: str) -> list[Case]:
    """Sets of 20 tokens, a usual top-k, and larger ones."""
    sizes = (5,) if grid == "quick" else (20, 64, 512)
    shape = (64, 512, 32) if grid == "quick" else (8192, 128256, 4096) if device == "cuda" else (2048, 50000, 256)
    dtypes = ("bfloat16",) if device == "cuda" else ("float32",) if grid == "quick" else ("float32", "bfloat16")
    return [Case("linear_kept", *shape, dtype, variant=f"k = {k}", device=device) for dtype in dtypes for k in sizes]


def make(case: Case, seed: int = 0, near: bool = True) -> Problem:
    """Random inputs of `problem.make_problem`; frequent tokens are in many sets, as in text."""
    found = base.make_problem(case, seed, near=False)
    options: dict[str, Any] = {"generator": torch.Generator(case.device).manual_seed(seed), "device": case.device}
    k, N = int(case.variant.split()[-1]), case.N
    draws = (case.V * torch.rand(N, 2 * k, **options) ** 3).long().clamp(max=case.V - 1)
    start, step = draws[:, :1], 1 + draws[:, 1:2] % max(1, case.V // k - 1)
    ids = (start + step * torch.arange(k, device=case.device)) % case.V  # distinct: k steps do not go round
    labels = ids.gather(1, torch.randint(k, (N, 1), **options))[:, 0]
    made = Problem(**{**vars(found), "labels": labels}, ids=ids)
    with torch.no_grad():
        made.old_logprobs = logprobs(made, slice(None), torch.float32) + 0.05
    return made


def logprobs(p: Problem, rows: Any, dtype: torch.dtype) -> Tensor:
    """Of some rows, by gathered rows of the weight."""
    hidden, weight = p.leaves
    assert p.ids is not None
    ids = p.ids[rows]
    parts = zip(hidden[rows].split(256), ids.split(256), p.labels[rows].split(256), strict=True)
    found = []
    for x, own, labels in parts:
        z = torch.bmm(weight[own].to(dtype), x.to(dtype)[:, :, None])[:, :, 0]
        logp = (z if dtype == torch.float64 else z.float()).log_softmax(-1)
        found.append(logp[own == labels[:, None]])
    return torch.cat(found)


def ours(case: Case) -> list[Provider]:
    """ppg_fast."""

    def using(backend: str) -> Callable[[Problem], Tensor]:
        def compute(p: Problem) -> Tensor:
            options: dict[str, Any] = {"old_logprobs": p.old_logprobs, "spec": SPEC, "kept": p.kept}
            hidden, weight = p.leaves
            return linear_policy_loss(hidden, weight, p.labels, p.advantages, **options, backend=backend).loss

        return compute

    return [Provider(f"ppg_fast {name}", using(name), "ours") for name in our_backends(case)]


def gathered(case: Case) -> Provider:
    """Eager PyTorch, gathered rows."""
    return Provider(
        "eager PyTorch, gathered rows", lambda p: terms(logprobs(p, slice(None), case.torch_dtype), p).mean()
    )


def masked(case: Case) -> Provider:
    """Eager PyTorch, masked logits."""

    def compute(p: Problem) -> Tensor:
        z, ids = F.linear(*p.leaves).float(), p.ids
        assert ids is not None
        logp = torch.full_like(z, -torch.inf).scatter(1, ids, z.gather(1, ids)).log_softmax(-1)
        return terms(logp.gather(1, p.labels[:, None])[:, 0], p).mean()

    return Provider("eager PyTorch, masked logits", compute)


def participants(case: Case) -> Providers:
    """Ours, and plain PyTorch in both ways that trainers do it."""
    return gather([ours, gathered, masked], case)


def checker(problem: Problem, case: Case) -> Callable[[Any], dict[str, float]]:
    """Errors of some rows of d_hidden, and of the loss, against float64."""
    rows = torch.linspace(0, case.N - 1, CHECKED).long()
    each = logprobs(problem, rows, torch.float64)
    part = {name: getattr(problem, name)[rows].double() for name in ("advantages", "old_logprobs")}
    own = terms(each, Problem(**{**vars(problem), **part})).sum() / case.N
    (truth,) = torch.autograd.grad(own, problem.leaves[:1])
    with torch.no_grad():
        loss = terms(logprobs(problem, slice(None), torch.float64), problem).mean()

    def errors(result: Any) -> dict[str, float]:
        found, (d_hidden, _) = result
        return {"loss": relative_error(found, loss), "d_hidden": relative_error(d_hidden[rows], truth[rows])}

    return errors


def ceilings(problem: Problem, case: Case) -> list[Contestant]:
    """What the whole vocabulary costs, and reading the kept rows once for each product."""
    (hidden, weight), name = problem.leaves, our_backends(case)[0]
    assert problem.ids is not None

    def full() -> None:
        options: dict[str, Any] = {"old_logprobs": problem.old_logprobs, "spec": SPEC, "backend": name}
        out = linear_policy_loss(hidden, weight, problem.labels, problem.advantages, **options)
        torch.autograd.grad(out.loss, problem.leaves)

    def bags() -> None:
        for _ in range(3):
            F.embedding_bag(problem.ids, weight.detach(), mode="sum")  # type: ignore[arg-type]

    return [Contestant(FULL, "ceiling", full), Contestant(BAGS, "ceiling", bags)]


def ceiling_of(provider: Provider) -> tuple[str, ...]:
    """Names of the ceilings, the fastest of which counts."""
    return (BAGS,)


def work(case: Case) -> dict[str, float]:
    """Floating-point operations of the three products."""
    return {"flops": 6 * case.N * int(case.variant.split()[-1]) * case.D}

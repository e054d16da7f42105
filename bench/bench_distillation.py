"""distillation: a teacher's divergence from the policy and the gradients of hidden states and head, from hidden states
of both."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ppg_fast.functional import Teacher, linear_distillation_loss
from ppg_fast.spec import DIVERGENCES, IGNORE

from .peers import load
from .problem import Case, relative_error
from .providers import Provider, Providers, gather, our_backends
from .timing import Contestant

WIDER = 1.5  # hidden size of the teacher over the policy's
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}
CHECKED = 8  # rows of d_hidden


@dataclass
class Problem:
    """N rows of both sides over one vocabulary; ``labels`` (N,) int64, -100 where masked."""

    labels: Tensor
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    teacher_hidden: Tensor  # (N, D')
    teacher_weight: Tensor  # (V, D')

    @property
    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.hidden, self.weight

    @property
    def teacher(self) -> tuple[Tensor, Tensor]:
        return self.teacher_hidden, self.teacher_weight


def cases(grid: str, device: str) -> list[Case]:
    """Every divergence at one size, then a wider vocabulary and fewer rows that count."""
    if grid == "quick":
        return [Case("distillation", 64, 512, 32, device=device, variant=name) for name in DIVERGENCES]
    N, V, D = (8192, 128256, 4096) if device == "cuda" else (1024, 32000, 512)
    dtypes = ("bfloat16",) if device == "cuda" else ("float32", "bfloat16")
    found = [
        Case("distillation", N, V, D, dtype, variant=name, device=device) for dtype in dtypes for name in DIVERGENCES
    ]
    wide = 262144 if device == "cuda" else 128256
    found += [Case("distillation", N, V, D, dtypes[0], active=0.25, variant="jsd", device=device)]
    return [*found, Case("distillation", N, wide, D, dtypes[0], variant="jsd", device=device)]


def make(case: Case, seed: int = 0, near: bool = True) -> Problem:
    """Random inputs, logits of standard deviation 3 on both sides, the last tokens of eight turns active."""
    options: dict[str, Any] = {
        "generator": torch.Generator(case.device).manual_seed(seed),
        "device": case.device,
    }
    sides = []
    for width in (case.D, int(case.D * WIDER)):
        hidden = torch.randn(case.N, width, dtype=case.torch_dtype, **options)
        sides += [hidden, torch.randn(case.V, width, dtype=case.torch_dtype, **options).mul_(3 / math.sqrt(width))]
    labels = torch.randint(case.V, (case.N,), **options)
    turn = case.N // 8
    labels[torch.arange(case.N, device=case.device) % turn < turn - round(turn * case.active)] = IGNORE
    hidden, weight, *teacher = sides
    return Problem(labels, hidden.requires_grad_(), weight.requires_grad_(), *teacher)


def ours(case: Case) -> list[Provider]:
    """ppg_fast."""

    def using(backend: str) -> Callable[[Problem], Tensor]:
        def compute(p: Problem) -> Tensor:
            teacher = Teacher(*p.teacher, divergence=case.variant)
            return linear_distillation_loss(*p.leaves, p.labels, teacher, backend=backend).loss

        return compute

    return [Provider(f"ppg_fast {name}", using(name), "ours") for name in our_backends(case)]


def eager(case: Case) -> Provider:
    """Eager PyTorch."""
    return Provider("eager PyTorch", lambda p: (divergence(p, case.variant) * (p.labels >= 0)).sum() / active(p))


def trl(case: Case) -> Provider:
    """TRL chunked divergence."""
    kernel = load("trl.kernels.chunked_divergence", "trl").ChunkedDivergenceFunction

    def compute(p: Problem) -> Tensor:
        """As DistillationTrainer calls it: masked rows are dropped on a GPU only."""
        (hidden, weight), (teacher_hidden, teacher_weight), mask = p.leaves, p.teacher, p.labels >= 0
        if hidden.is_cuda:
            hidden, teacher_hidden = hidden[mask], teacher_hidden[mask]
        found = kernel.apply(hidden, weight, None, teacher_hidden, teacher_weight, None, BETA[case.variant])[0]
        return (found if hidden.is_cuda else found.masked_fill(~mask, 0)).sum() / mask.sum()

    return Provider("TRL chunked divergence", compute)


def liger(case: Case) -> list[Provider]:
    """Liger chunked JSD."""
    chunked = load("liger_kernel.chunked_loss", "liger-kernel")
    found = []
    for compiles, note in ((True, ""), (False, ", compiled=False")):
        loss = chunked.LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA[case.variant], compiled=compiles
        )
        compute = lambda p, loss=loss: loss(*p.leaves, *p.teacher, p.labels)  # noqa: E731
        found.append(Provider(f"Liger chunked JSD{note}", compute, compiles=compiles))
    return found


MAKERS = [ours, eager, trl, liger]


def participants(case: Case) -> Providers:
    """Ours and the peers, as their trainers call them."""
    return gather(MAKERS, case)


def active(p: Problem) -> Tensor:
    return (p.labels >= 0).sum()


def divergence(p: Problem, name: str, rows: Any = slice(None), dtype: torch.dtype | None = None) -> Tensor:
    """Of some rows, by PyTorch's own functions; in ``dtype``, else float32 from the logits on."""
    pairs = ((h[rows], w) for h, w in (p.leaves, p.teacher))
    logits = (F.linear(h, w).float() if dtype is None else F.linear(h.to(dtype), w.to(dtype)) for h, w in pairs)
    s, t = (z.log_softmax(-1) for z in logits)
    beta = BETA[name]
    if beta in (0.0, 1.0):
        return F.kl_div(*((s, t) if beta == 0 else (t, s)), reduction="none", log_target=True).sum(-1)
    m = torch.logaddexp(s + math.log(1 - beta), t + math.log(beta))
    sides = (F.kl_div(m, x, reduction="none", log_target=True).sum(-1) for x in (t, s))
    return sum(share * side for share, side in zip((beta, 1 - beta), sides, strict=True))  # type: ignore[return-value]


def checker(problem: Problem, case: Case) -> Callable[[Any], dict[str, float]]:
    """Errors of some rows of d_hidden, and of the loss, against float64."""
    counted = (problem.labels >= 0).nonzero().squeeze(1)
    rows = counted[torch.linspace(0, len(counted) - 1, CHECKED).long()]
    (truth,) = torch.autograd.grad(divergence(problem, case.variant, rows, torch.float64).sum(), problem.hidden)
    truth = truth[rows].double() / len(counted)
    with torch.no_grad():
        parts = (divergence(problem, case.variant, part, torch.float64).sum() for part in counted.split(256))
        loss = torch.stack(list(parts)).sum() / len(counted)

    def errors(result: Any) -> dict[str, float]:
        found, (d_hidden, _) = result
        return {"loss": relative_error(found, loss), "d_hidden": relative_error(d_hidden[rows], truth)}

    return errors


def ceilings(problem: Problem, case: Case) -> list[Contestant]:
    """The matrix products of the rows that count: both logits, d_hidden, d_weight, into memory that is there."""
    counted = problem.labels >= 0
    (x, weight), (y, teacher) = ((h.detach()[counted], w.detach()) for h, w in (problem.leaves, problem.teacher))
    z, d_hidden, d_weight = x.new_empty(len(x), case.V).normal_(), torch.empty_like(x), torch.empty_like(weight)

    def four() -> None:
        torch.mm(y, teacher.t(), out=z)
        torch.mm(x, weight.t(), out=z)
        torch.mm(z, weight, out=d_hidden)
        torch.mm(z.t(), x, out=d_weight)

    return [Contestant("four bare GEMMs", "ceiling", four)]


def ceiling_of(provider: Provider) -> tuple[str, ...]:
    """Names of the ceilings, the fastest of which counts."""
    return ("four bare GEMMs",)


def work(case: Case) -> dict[str, float]:
    """Floating-point operations of the four products over the rows that count."""
    return {"flops": 2 * case.N * case.active * case.V * case.D * (3 + WIDER)}

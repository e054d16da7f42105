"""What is computed: one case of the grid, its random inputs, and the truth in float64 on a few rows."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ppg_fast.spec import IGNORE, PolicyLossSpec

SPEC = PolicyLossSpec("ppo")  # the loss that every peer can compute: clipped surrogate, one mean over the active tokens
FROZEN = "frozen head"  # a variant: the weight requires no gradient
TURNS = 8  # of a dialogue; the policy's tokens are the last of each turn
WHOLE_TRUTH = 4e10  # multiply-adds up to which every row is computed in float64, about a second


@dataclass(frozen=True)
class Case:
    """One point of the grid. ``D`` 0: from logits. ``active``: share of rows that are the policy's. ``zero``: share of
    their turns
    whose advantage is exactly zero. ``variant``: what else an op varies."""

    op: str
    N: int
    V: int
    D: int = 0
    dtype: str = "float32"
    active: float = 1.0
    zero: float = 0.0
    variant: str = ""
    device: str = "cpu"
    threads: int = 1
    allocator: str = "default"
    shape: str = ""  # of a whole model, by name: `whole_step.SHAPES`

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


@dataclass
class Problem:
    """Inputs of the loss, N = sequences x L rows.

    ``labels`` (N,) int64, -100 where masked; ``advantages``, ``old_logprobs`` (N,) float32. ``sequence_advantages``
    (B,) where a dialogue
    has one advantage, None where its turns differ. From logits: ``base`` (N + 1, V), whose first N rows are ``logits``
    and which some
    peers want whole. From hidden states: ``hidden`` (N, D) and ``weight`` (V, D).
    """

    labels: Tensor
    advantages: Tensor
    old_logprobs: Tensor
    sequences: int
    sequence_advantages: Tensor | None
    base: Tensor | None = None
    logits: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    pristine: Tensor | None = None

    def keep(self) -> None:
        """Remember the logits, for those who destroy them."""
        if self.base is not None and self.pristine is None:
            self.pristine = self.base.detach().clone()

    def restore(self) -> None:
        """Write the remembered logits back."""
        if self.base is not None and self.pristine is not None:
            self.base.detach().copy_(self.pristine)

    @property
    def mask(self) -> Tensor:
        return self.labels != IGNORE

    @property
    def leaves(self) -> tuple[Any, ...]:
        """What the gradient is wanted of, where it requires one."""
        if self.logits is not None:
            return (self.logits,)
        assert self.hidden is not None
        assert self.weight is not None
        return self.hidden, self.weight

    @property
    def vocabulary(self) -> int:
        return (self.leaves[-1].shape[-1]) if self.logits is not None else self.leaves[-1].shape[0]

    def compacted(self) -> "Problem":
        """The active rows alone, differentiable: what a caller can do before any implementation."""
        rows = self.mask.nonzero().squeeze(1)
        picked = {name: getattr(self, name)[rows] for name in ("labels", "advantages", "old_logprobs")}
        if self.logits is not None:
            picked["logits"] = self.logits[rows]
        else:
            assert self.hidden is not None
            picked["hidden"] = self.hidden[rows]
        return replace(self, base=None, **picked)

    def logits_of(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Logits of some rows, computed in ``dtype``."""
        if self.logits is not None:
            return self.logits.detach()[rows].to(dtype)
        hidden, weight = (t.detach() for t in self.leaves)
        return hidden[rows].to(dtype) @ weight.to(dtype).t()


def terms(logprobs: Tensor, problem: Problem) -> Tensor:
    """-min(r A, clip(r) A) of each token, r = exp(logprob - old)."""
    ratio = torch.exp(logprobs - problem.old_logprobs)
    clipped = ratio.clamp(1 - SPEC.clip_low, 1 + SPEC.clip_high)
    return -torch.minimum(ratio * problem.advantages, clipped * problem.advantages)


def ppo(logprobs: Tensor, problem: Problem) -> Tensor:
    """Mean of `terms` over the active tokens: the loss of every peer that returns log-probs."""
    mask = problem.mask
    return (terms(logprobs, problem) * mask).sum() / mask.sum()


def make_problem(case: Case, seed: int = 0, near: bool = True) -> Problem:
    """Random inputs, logits of standard deviation 3, and one advantage a dialogue unless ``zero`` asks for turns
    without one.

    ``near``: the policy that acted was close by (`act_near_by`), which takes a forward pass to arrange.
    """
    generator = torch.Generator(case.device).manual_seed(seed)
    options: dict[str, Any] = {"generator": generator, "device": case.device}
    sequences = 1 if not case.D else 4
    length = case.N // sequences
    labels = torch.randint(case.V, (case.N,), **options)
    place = torch.arange(length, device=case.device) % (length // TURNS)
    context = place < length // TURNS - max(1, round(length // TURNS * case.active))
    labels[context.repeat(sequences)] = IGNORE
    per_sequence = (0.5 + torch.rand(sequences, **options)) * torch.where(
        torch.rand(sequences, **options) < 0.5, -1.0, 1.0
    )
    advantages = per_sequence.repeat_interleave(length)
    if case.zero:
        turn = torch.arange(length, device=case.device) // (length // TURNS)
        zeroed = torch.floor((turn + 1) * case.zero) > torch.floor(turn * case.zero)  # spread over the dialogue
        advantages = torch.where(zeroed.repeat(sequences), 0.0, advantages)
    problem = Problem(
        labels, advantages, torch.zeros(case.N, device=case.device), sequences, None if case.zero else per_sequence
    )
    if case.D:
        problem.hidden = torch.randn(case.N, case.D, dtype=case.torch_dtype, **options).requires_grad_()
        problem.weight = (
            torch.randn(case.V, case.D, dtype=case.torch_dtype, **options).mul_(3 / math.sqrt(case.D))
        ).requires_grad_(case.variant != FROZEN)
    else:
        problem.base = torch.randn(case.N + 1, case.V, dtype=case.torch_dtype, **options).mul_(3).requires_grad_()
        problem.logits = problem.base.detach()[: case.N].requires_grad_()
    return act_near_by(problem, generator) if near else problem


def act_near_by(problem: Problem, generator: torch.Generator) -> Problem:
    """Set ``old_logprobs`` to those of the policy itself, shifted to both sides of the clip and away from its kink."""
    count, device = problem.labels.numel(), problem.labels.device
    shifts = torch.tensor([-0.5, -0.05, 0.05, 0.5], device=device)[
        torch.randint(4, (count,), generator=generator, device=device)
    ]
    for rows, logprobs, _ in _row_chunks(problem, torch.float32):
        problem.old_logprobs[rows] = logprobs + shifts[rows]
    return problem


def _row_chunks(
    problem: Problem, dtype: torch.dtype, rows: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Row numbers, label log-probs and log-probs of the vocabulary, a few active rows at a time."""
    rows = problem.mask.nonzero().squeeze(1) if rows is None else rows
    for chunk in rows.split(max(1, 2**24 // problem.vocabulary)):
        logp = torch.log_softmax(problem.logits_of(chunk, dtype), -1)
        yield chunk, logp.gather(1, problem.labels[chunk, None]).squeeze(1), logp


@dataclass
class Truth:
    """The loss and pieces of its gradient in float64, at ``rows`` (of dlogits or d_hidden) and ``columns`` (rows of
    d_weight)."""

    rows: Tensor
    columns: Tensor
    loss: Tensor | None
    loss_scale: Tensor  # mean |term|: the loss itself may cancel to nothing
    d_rows: Tensor
    d_weight: Tensor | None
    logprobs: Tensor
    from_hidden: bool

    def errors(self, loss: Tensor, gradients: tuple[Tensor, ...]) -> dict[str, float]:
        """Largest error of each piece, relative to the largest element of that piece."""
        pieces = {"d_hidden" if self.from_hidden else "d_logits": (gradients[0][self.rows], self.d_rows)}
        if self.loss is not None:
            pieces["loss"] = (loss, self.loss)
        if self.d_weight is not None and len(gradients) > 1:
            pieces["d_weight"] = (gradients[1][self.columns], self.d_weight)
        return {
            name: relative_error(*pair, self.loss_scale if name == "loss" else None) for name, pair in pieces.items()
        }


def relative_error(actual: Tensor, truth: Tensor, scale: Tensor | None = None) -> float:
    """max |actual - truth| / scale, by default max |truth|; infinite where something is not finite."""
    scale = truth.abs().max() if scale is None else scale
    difference = (actual.detach().double() - truth).abs().max() / scale.clamp(min=1e-300)
    return float(difference) if math.isfinite(float(difference)) else math.inf


def make_truth(problem: Problem, count: int = 8, budget: float = WHOLE_TRUTH) -> Truth:
    """Every row in float64 where that takes at most ``budget`` multiply-adds, else ``count`` rows: then loss and
    d_weight go unchecked."""
    mask, device = problem.mask, problem.labels.device
    active = mask.nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(1)
    picked = active[torch.randperm(len(active), generator=generator)[:count].to(device)]
    rows = torch.cat([picked, (~mask).nonzero().squeeze(1)[:1]])  # and a masked one, whose gradient is zero
    columns = torch.cat(
        [torch.randint(problem.vocabulary, (4,), generator=generator).to(device), problem.labels[picked[:4]]]
    ).unique()
    width = 1 if problem.logits is not None else problem.leaves[0].shape[1]
    whole = len(active) * problem.vocabulary * width <= budget
    loss, scale = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))
    weights: list[tuple[Tensor, Tensor]] = []
    logprobs = torch.zeros(len(mask), dtype=torch.float64, device=device)
    d_weight = (
        None if problem.logits is not None else torch.zeros(len(columns), width, dtype=torch.float64, device=device)
    )
    d_rows = torch.zeros(len(rows), problem.leaves[0].shape[1], dtype=torch.float64, device=device)
    for chunk, label_logprobs, logp in _row_chunks(problem, torch.float64, active if whole else picked):
        label_logprobs = label_logprobs.detach().requires_grad_()
        part = replace(
            problem, advantages=problem.advantages[chunk].double(), old_logprobs=problem.old_logprobs[chunk].double()
        )
        each = terms(label_logprobs, part) / len(active)
        (upstream,) = torch.autograd.grad(each.sum(), label_logprobs)
        loss, scale = loss + each.detach().sum(), scale + each.detach().abs().sum()
        logprobs[chunk] = label_logprobs.detach()
        d = -logp.exp() * upstream[:, None]
        d[torch.arange(len(chunk), device=device), problem.labels[chunk]] += upstream
        weights.append((chunk, d[:, columns]))
        at = (chunk[:, None] == rows).nonzero()
        piece = d[at[:, 0]]
        d_rows[at[:, 1]] = piece if problem.logits is not None else piece @ problem.leaves[1].detach().double()
    if d_weight is not None:
        for chunk, d in weights:
            d_weight += d.t() @ problem.leaves[0].detach()[chunk].double()
    pieces = loss if whole else None, scale, d_rows, d_weight if whole else None
    return Truth(rows, columns, *pieces, logprobs, from_hidden=problem.logits is None)

"""What the machine can do, measured among the others: moving the same bytes, reading them once, the bare matrix
products."""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .problem import Case, Problem
from .timing import Contestant

CHUNK_ROWS = 2048  # of logits in the bare products: they do not pay for memory that no implementation would hold


def _ceiling(name: str, call: Callable[[], Any]) -> Contestant:
    return Contestant(name, "ceiling", call)


def copy_and_update(problem: Problem, threads: int) -> list[Contestant]:
    """1R + 1W of the logits: into another buffer, and in place."""
    assert problem.logits is not None
    source = problem.logits.detach()
    target, changing = torch.empty_like(source).fill_(1), source.clone()
    found = [_ceiling("copy", lambda: target.copy_(source)), _ceiling("in-place update", lambda: changing.neg_())]
    if threads == 1 and not source.is_cuda:
        pointers = target.data_ptr(), source.data_ptr(), source.numel() * source.element_size()
        found.append(_ceiling("memcpy", lambda: ctypes.memmove(*pointers)))
    return found


def read(problem: Problem) -> list[Contestant]:
    """1R of the logits: the fastest of two ways to add them up, seen as float32."""
    assert problem.logits is not None
    words = (
        problem.logits.detach().view(torch.float32) if problem.logits.element_size() == 2 else problem.logits.detach()
    )
    words = words.flatten()
    half = words.numel() // 2
    return [
        _ceiling("read (sum)", words.sum),
        _ceiling("read (dot)", lambda: torch.dot(words[:half], words[half : 2 * half])),
    ]


def bare_products(problem: Problem, case: Case, chunk_rows: int = CHUNK_ROWS) -> list[Contestant]:
    """The matrix products that the rows with a gradient cannot do without: logits, d_hidden and, unless the head is
    frozen, d_weight, into memory that is there; ``chunk_rows`` at a time."""
    trains = problem.leaves[1].requires_grad
    hidden, weight = (t.detach() for t in problem.leaves)
    rows = (problem.mask & (problem.advantages != 0)).nonzero().squeeze(1)
    x = hidden[rows]
    n = min(len(rows), chunk_rows)
    logits = torch.empty(n, case.V, dtype=x.dtype, device=x.device).normal_()
    d_hidden, d_weight = (
        torch.empty(n, case.D, dtype=x.dtype, device=x.device),
        torch.zeros_like(weight if trains else weight[:0]),
    )

    def one(chunk: Tensor, z: Tensor) -> None:
        torch.mm(chunk, weight.t(), out=z)
        torch.mm(z, weight, out=d_hidden[: len(chunk)])
        if not trains:
            return
        if len(rows) <= chunk_rows:
            torch.mm(z.t(), chunk, out=d_weight)
        else:
            d_weight.addmm_(z.t(), chunk)

    def products() -> None:
        for chunk in x.split(chunk_rows):
            one(chunk, logits[: len(chunk)])

    few = "" if chunk_rows == CHUNK_ROWS else f", {chunk_rows} rows at a time"
    return [_ceiling(f"{'three' if trains else 'two'} bare GEMMs{few}", products)]


def copy_of(values: Tensor) -> list[Contestant]:
    """1R + 1W of a small tensor."""
    target = torch.empty_like(values).fill_(1)
    return [_ceiling("copy", lambda: target.copy_(values))]

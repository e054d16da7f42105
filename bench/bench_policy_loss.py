"""policy_loss: log-prob, loss and the gradient of the logits, from logits."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from . import peers, providers
from .ceilings import copy_and_update
from .problem import Case, Problem, make_problem, make_truth
from .providers import Providers, gather
from .timing import Contestant, Pace

make = make_problem
VOCABULARIES = (32000, 128256, 151936, 262144)
MAKERS = [
    providers.ours_from_logits,
    providers.eager,
    providers.compiled,
    peers.trl_selective,
    peers.liger_triton,
    peers.flash_attention,
    peers.quack,
]


def cases(grid: str, device: str) -> list[Case]:
    """bf16 first on a GPU; on a CPU one vocabulary and both dtypes."""
    if grid == "quick":
        return [Case("policy_loss", 64, 512, dtype=dtype, device=device) for dtype in ("float32", "bfloat16")]
    if device == "cuda":
        dtypes = ("bfloat16", "float32") if grid == "full" else ("bfloat16",)
        return [Case("policy_loss", 8192, V, dtype=dtype, device=device) for dtype in dtypes for V in VOCABULARIES]
    found = [Case("policy_loss", 2048, 32000, dtype=dtype) for dtype in ("float32", "bfloat16")]
    return [*found, Case("policy_loss", 2048, 32000, dtype="bfloat16", active=0.25)] if grid == "full" else found


def settings(device: str, threads: Sequence[int]) -> list[tuple[int, str]]:
    """Both allocators at the most threads: the default one decides how fast PyTorch gets fresh memory."""
    return (
        [(max(threads), "default")]
        if device == "cuda"
        else [*((n, "tuned") for n in threads), (max(threads), "default")]
    )


def pace_of(case: Case, pace: Pace) -> Pace:
    """On a CPU, ours and the ceilings until enough of their calls had the cores to themselves."""
    return replace(pace, rounds=4 * pace.rounds, alone=pace.own) if case.device == "cpu" and pace.own else pace


def participants(case: Case) -> Providers:
    """Ours and the peers; where rows are masked, the peers also behind a caller who compacts."""
    found, missing = gather(MAKERS, case)
    return found + [
        p.with_compaction() for p in found if p.kind == "peer" and not p.destroys and case.active < 1
    ], missing


def ceilings(problem: Problem, case: Case) -> list[Contestant]:
    """1R + 1W."""
    return copy_and_update(problem, case.threads)


def ceiling_of(provider: providers.Provider) -> tuple[str, ...]:
    """Names of the ceilings, the fastest of which counts."""
    return ("in-place update",) if provider.destroys else ("copy", "memcpy")


def checker(problem: Problem, case: Case) -> Callable[[Any], dict[str, float]]:
    """Errors of a result against float64."""
    truth = make_truth(problem)
    return lambda result: truth.errors(*result)


def work(case: Case) -> dict[str, float]:
    """Bytes that have to move."""
    return {"bytes": 2 * case.N * case.V * case.torch_dtype.itemsize}

"""logprobs: the log-prob of each label from logits, forward only, as for the old and the reference policy."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from . import ceilings as limits
from . import peers, providers
from .bench_policy_loss import VOCABULARIES
from .bench_policy_loss import pace_of as pace_of
from .problem import Case, Problem, make_problem, make_truth, relative_error
from .providers import Providers, gather
from .timing import Contestant

make = make_problem
MAKERS = [
    providers.ours_logprobs,
    providers.eager_logprobs,
    providers.compiled_logprobs,
    peers.trl_selective,
    peers.liger_selective,
]


def cases(grid: str, device: str) -> list[Case]:
    """The shapes of policy_loss."""
    if grid == "quick":
        return [Case("logprobs", 64, 512, dtype=dtype, device=device) for dtype in ("float32", "bfloat16")]
    if device == "cuda":
        return [Case("logprobs", 8192, V, dtype="bfloat16", device=device) for V in VOCABULARIES]
    return [Case("logprobs", 2048, 32000, dtype=dtype) for dtype in ("float32", "bfloat16")]


def settings(device: str, threads: Sequence[int]) -> list[tuple[int, str]]:
    """The tuned allocator for all, so that nobody pays for fresh pages."""
    return [(max(threads), "default")] if device == "cuda" else [(n, "tuned") for n in threads]


def participants(case: Case) -> Providers:
    """Ours and the peers, without gradients."""
    found, missing = gather(MAKERS, case)
    return [replace(p, forward_only=True) for p in found], missing


def ceilings(problem: Problem, case: Case) -> list[Contestant]:
    """1R."""
    return limits.read(problem)


def ceiling_of(provider: providers.Provider) -> tuple[str, ...]:
    """Names of the ceilings, the fastest of which counts."""
    return ("read (sum)", "read (dot)")


def checker(problem: Problem, case: Case) -> Callable[[Any], dict[str, float]]:
    """Errors of the log-probs against float64."""
    truth = make_truth(problem)
    rows = truth.logprobs != 0
    return lambda result: {"logprobs": relative_error(result[rows], truth.logprobs[rows])}


def work(case: Case) -> dict[str, float]:
    """Bytes that have to move."""
    return {"bytes": case.N * case.V * case.torch_dtype.itemsize}

"""The loss from hidden states with a frozen head (LoRA): the gradient of the hidden states alone."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ppg_fast.functional import linear_policy_loss, linear_token_logprobs

from . import bench_linear, peers, providers
from .ceilings import bare_products
from .problem import FROZEN, SPEC, Case, Problem, make_problem, ppo
from .providers import Provider, Providers, gather
from .timing import Contestant

make = make_problem
checker = bench_linear.checker


def cases(grid: str, device: str) -> list[Case]:
    """All rows active, and a quarter of them."""
    size = (64, 512, 32) if grid == "quick" else (8192, 128256, 4096) if device == "cuda" else (2048, 50000, 256)
    dtypes = ("bfloat16",) if device == "cuda" else ("float32",) if grid == "quick" else ("float32", "bfloat16")
    shares = (1.0,) if grid == "quick" else (1.0, 0.25)
    shared: dict[str, Any] = {"device": device, "variant": FROZEN}
    return [Case("linear_frozen", *size, dtype=dtype, active=share, **shared) for dtype in dtypes for share in shares]


def _ours(case: Case) -> list[Provider]:
    """ppg_fast."""

    def none(backend: str) -> Callable[[Problem], Tensor]:
        def compute(p: Problem) -> Tensor:
            given = *p.leaves, p.labels, p.advantages
            options: dict[str, Any] = {"spec": SPEC, "reduction": "none", "backend": backend}
            return linear_policy_loss(*given, old_logprobs=p.old_logprobs, **options).loss.sum() / p.mask.sum()

        return compute

    def logprobs(backend: str, entropy: bool) -> Callable[[Problem], Tensor]:
        def compute(p: Problem) -> Tensor:
            found = linear_token_logprobs(*p.leaves, p.labels, entropy=entropy, backend=backend)
            return ppo(found, p) if isinstance(found, Tensor) else ppo(found[0], p) - 0.0 * found[1].sum()

        return compute

    found = []
    for name in providers.our_backends(case):
        kinds = {
            "": providers.loss_from_hidden(name, False),
            ", reduction none": none(name),
            ", log-probs": logprobs(name, False),
            ", log-probs, entropy differentiated": logprobs(name, True),
        }
        found += [Provider(f"ppg_fast {name}{kind}", compute, "ours") for kind, compute in kinds.items()]
    return found


MAKERS = [
    _ours,
    providers.eager,
    providers.compiled,
    peers.torch_chunked,
    peers.trl_head,
    peers.liger_chunked_eager,
    peers.cut_cross_entropy,
]


def participants(case: Case) -> Providers:
    """Ours and the peers, each given a head that requires no gradient."""
    return gather(MAKERS, case)


def ceilings(problem: Problem, case: Case) -> list[Contestant]:
    """The two matrix products of the active rows."""
    return bare_products(problem, case)


def ceiling_of(provider: Provider) -> tuple[str, ...]:
    """Names of the ceilings, the fastest of which counts."""
    return ("two bare GEMMs",)


def work(case: Case) -> dict[str, float]:
    """Floating-point operations of the two products over the active rows."""
    return {"flops": 4 * case.N * case.active * case.V * case.D}

"""One case from inputs to entries: everybody is called once and checked, then timed in interleaved rounds."""

import importlib
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import intervals, machine, memory
from .problem import Case, Problem
from .providers import Provider, Unavailable
from .timing import Contestant, Pace, cache_bytes, interleave, stats

# A bench_X.py has cases, make, participants and checker; it may have settings, ceilings with ceiling_of, work, facts,
# a clock and a pace_of its own.
NAMES = (
    "policy_loss",
    "logprobs",
    "linear",
    "linear_frozen",
    "linear_kept",
    "distillation",
    "soft_q",
    "partial_returns",
    "critic",
    "host_time",
    "training_step",
    "hosts",
)
OPS: dict[str, ModuleType] = {name: importlib.import_module(f".bench_{name}", __package__) for name in NAMES}
PACES = {
    "quick": Pace(rounds=2, budget=0.5),
    "default": Pace(rounds=15, budget=2.0, least=intervals.LEAST, slow=4.0, own=15),
    "full": Pace(rounds=40, budget=12.0, least=15),
}
FLOOR = {"float32": 2e-5, "bfloat16": 1e-2}  # a few roundings, relative to the largest element
# some keep log-probs of order 10 in bfloat16, whose last digit is 2^-5
PEER_FLOOR = {"float32": 2e-5, "bfloat16": 6e-2}
TOO_LONG = 20.0  # seconds a call
LARGE = 2e11  # multiply-adds of one product of the head
CPU_PEAKS = 3  # processes in which a peak of memory is measured
Known = list[tuple[Case, dict[str, float]]]  # medians of every provider, by case
COPIES = 16  # of small inputs, so that no two calls in a row see the same memory


def settings_of(op: str, device: str, threads: Sequence[int]) -> list[tuple[int, str]]:
    """Threads and allocator of each process that measures an op: every core, unless the op has settings of its own."""
    module = OPS[op]
    return module.settings(device, threads) if hasattr(module, "settings") else [(max(threads), "default")]


def work_of(case: Case) -> dict[str, float]:
    """Bytes or operations that nobody can do without, where the op counts them."""
    module = OPS[case.op]
    return module.work(case) if hasattr(module, "work") else {}


def pool(case: Case, module: ModuleType) -> list[Any]:
    """The problem, and for small ones copies of other numbers until they are larger than the cache."""
    first = module.make(case)
    size = work_of(case).get("bytes", 0)
    small = 0 < size < 2 * cache_bytes(case.device) and case.op == "partial_returns"
    return [first, *(module.make(case, seed) for seed in range(1, COPIES if small else 1))]


def measure(
    case: Case, pace: Pace, compilers: bool = True, known: Known | None = None
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Entries in pytest-benchmark's form, one a contestant, and why the others are not there.

    ``compilers``: those who compile too. ``known``: the op's cases before this one and their providers' seconds; a slow
        one is left out,
    with a line saying so.
    """
    module = OPS[case.op]
    pace = module.pace_of(case, pace) if hasattr(module, "pace_of") else pace
    torch._dynamo.reset()
    try:
        providers, missing = module.participants(case)
        providers = [p for p in providers if compilers or not p.compiles]
        late = {p.name: reason for p in providers if (reason := _too_late(p, case, pace, known or []))}
        missing |= late
        providers = [p for p in providers if p.name not in late]
        problems = pool(case, module)
    except Unavailable as reason:
        return [], {case.op: str(reason)}
    check = module.checker(problems[0], case)
    contestants: list[Contestant] = []
    for provider in providers:
        contestant = _contestant(provider, problems)
        if contestant.before:
            contestant.before()
        try:
            contestant.facts["error"] = check(provider.run(problems[0]))
            if provider.compiles:
                contestant.call()
        except Exception as error:  # a peer that fails is a line in the result, not the end of the run
            missing[provider.name] = (
                f"failed: {type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
            )
            continue
        finally:
            if contestant.before:
                contestant.before()
        contestants.append(contestant)
    _judge(contestants, case)
    limits = module.ceilings(problems[0], case) if hasattr(module, "ceilings") else []
    for limit in limits:
        limit.call()
    _rotate(contestants, problems)
    clock = partial(module.clock, problem=problems[0]) if hasattr(module, "clock") else None
    before = machine.gpu_state(case.device)
    seconds = interleave([*limits, *contestants], pace, case.device, clock)
    after = machine.gpu_state(case.device)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for contestant, provider in zip(contestants, [p for p in providers if p.name in medians], strict=True):
        names = [name for name in module.ceiling_of(provider) if name in medians] if limits else []
        if names:
            best = min(names, key=lambda name: medians[name])
            contestant.facts |= {"ceiling": best, "share_of_ceiling": medians[best] / medians[contestant.name]}
            graphs = [c.facts.get("graph_seconds") for c in [*limits, contestant] if c.name in (best, contestant.name)]
            if all(graphs):
                contestant.facts["graph_share_of_ceiling"] = graphs[0] / graphs[1]
        if hasattr(module, "facts"):
            contestant.facts |= module.facts(problems[0], contestant.name, medians[contestant.name])
    everybody = [*contestants, *limits]
    if before:
        for contestant in everybody:
            contestant.facts |= {"gpu_before": before, "gpu_after": after}
    return [_entry(case, c, seconds[c.name], work_of(case)) for c in everybody], missing


def _too_late(provider: Provider, case: Case, pace: Pace, known: Known) -> str | None:
    """Why a provider is not worth its time here: slow at this size already, or too slow by its time at a smaller
    one."""
    for before, seconds in known:
        if provider.name not in seconds:
            continue
        took = seconds[provider.name]
        if (before.N, before.V, before.D) == (case.N, case.V, case.D):
            if before.dtype == case.dtype and took > pace.slow and (case.active < 1 or case.zero):
                return f"measured at fewer shares of active rows: {took:.0f} s a call"
        elif case.D and not before.zero and before.dtype == case.dtype:
            share = case.active / before.active if provider.compacted else 1.0
            expected = took * share * case.N * case.V * case.D / (before.N * before.V * before.D)
            if expected > TOO_LONG:
                return (
                    f"not measured at N {case.N:,}, V {case.V:,}: about {expected:.0f} s a call, by its time at N "
                    f"{before.N:,}"
                )
    return None


def _contestant(provider: Provider, problems: list[Any]) -> Contestant:
    before = None
    if provider.destroys and isinstance(problems[0], Problem):
        problems[0].keep()
        before = problems[0].restore
    facts = {"compacted": provider.compacted, "compiles": provider.compiles, "destroys": provider.destroys}
    return Contestant(provider.name, provider.kind, lambda: provider.run(problems[0]), before, facts)


def _rotate(contestants: list[Contestant], problems: list[Any]) -> None:
    """Let every call take the next problem of the pool: the list is turned before the clock starts."""
    if len(problems) == 1:
        return

    def turn() -> None:
        problems.append(problems.pop(0))

    for contestant in contestants:
        contestant.before = turn


def _judge(contestants: list[Contestant], case: Case) -> None:
    """Correct: no error above both twice that of eager PyTorch in this run and the floor of the dtype."""
    plain = next((c for c in contestants if c.name == "eager PyTorch"), None)
    for contestant in contestants:
        floor = (FLOOR if contestant.kind == "ours" and plain else PEER_FLOOR)[case.dtype]
        usual = plain.facts["error"] if plain else {}
        errors = contestant.facts["error"].items()
        contestant.facts["correct"] = all(error <= max(floor, 2 * usual.get(name, 0.0)) for name, error in errors)


def public(case: Case) -> dict[str, Any]:
    """The case as it is stored: a file by its name alone."""
    return asdict(
        replace(case, variant=Path(case.variant).name if case.op == "training_step" and case.variant else case.variant)
    )


def _entry(case: Case, contestant: Contestant, seconds: list[float], work: dict[str, float]) -> dict[str, Any]:
    params = public(case)
    numbers = " ".join(
        f"{name}={value}" for name, value in params.items() if name != "op" and value not in ("", 0, 0.0)
    )
    return {
        "group": f"{case.op} {numbers}",
        "name": f"{contestant.name} [{numbers}]",
        "fullname": f"bench/bench_{case.op}.py::{contestant.name}[{numbers}]",
        "param": contestant.name,
        "params": {**params, "provider": contestant.name},
        "extra_info": {"kind": contestant.kind, **(work if contestant.kind != "peer" else {}), **contestant.facts},
        "options": {"warmup": True, "interleaved": True},
        "stats": stats(seconds),
    }


def peaks(case: Case, compilers: bool = True) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Peak extra bytes of one call of every participant, in as many processes on a CPU as `CPU_PEAKS`, and why some
    have none. On a CPU nothing may have been computed before."""
    module = OPS[case.op]
    found: dict[str, list[int]] = {}
    failed: dict[str, str] = {}
    try:
        providers, _ = module.participants(case)
    except Unavailable:
        return {}, {}
    # a peer would take minutes for a number that the smaller case has
    if case.device == "cpu" and case.N * case.V * case.D > LARGE:
        providers = [p for p in providers if p.kind == "ours"]
    quick = module.cases("quick", case.device)
    tiny = next((c for c in quick if bool(c.shape) == bool(case.shape)), case)
    for provider in (p for p in providers if compilers or not p.compiles):

        def build(provider: Provider = provider) -> tuple[Callable[[], Any], Callable[[], Any]]:
            torch.set_num_threads(case.threads)
            small, problem = module.make(replace(tiny, dtype=case.dtype), near=False), module.make(case, near=False)
            return (lambda: provider.run(small)), (lambda: provider.run(problem))

        try:
            if case.device == "cuda":
                sizes = [memory.cuda_peak(build()[1])]
            else:  # freed memory goes back to the system when it likes
                tries = (memory.cpu_peak(build, provider.compiles) for _ in range(CPU_PEAKS))
                sizes = [size for size in tries if size is not None]
        except Exception as error:  # as above
            failed[provider.name] = f"memory not measured: {error}"
            continue
        if sizes:
            found[provider.name] = sizes
    return found, failed

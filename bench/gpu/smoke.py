"""One call of each op and backend against float64, on rows of every plan: what hangs or is plainly wrong is known
within seconds."""

from functools import partial
from typing import Any

from .. import harness
from ..problem import Case
from .grid import makers

PLANS = (1000, 32000, 101377, 128256, 262144, 330001)  # two passes, clusters of 1 to 8, rows that are not aligned
ROWS = 512  # so that every cluster takes several


def cases(device: str, tiny: bool) -> list[Case]:
    """The fused kernel first, which is what everything else is for."""
    bf16: dict[str, Any] = {"dtype": "bfloat16", "device": device}
    vocabularies, rows, (N, V, D) = ((512,), 16, (64, 512, 32)) if tiny else (PLANS, ROWS, (512, 32000, 1024))
    found = [Case(op, rows, V, **bf16) for V in vocabularies for op in ("policy_loss", "logprobs")]
    found += [Case("policy_loss", rows, vocabularies[0], device=device), Case("linear", N, V, D, **bf16)]
    found += [Case("distillation", N, V, D, **bf16, variant="jsd")]
    return [*found, Case("partial_returns", 20, 30, variant="lookahead:3", device=device)]


def _check(case: Case, report: Any) -> None:
    """Right is what `harness` calls so: no error above both the floor of the dtype and twice that of eager PyTorch."""
    module = harness.OPS[case.op]
    with makers(module, peers=False):
        problem, (providers, _) = module.make(case), module.participants(case)
    check, usual, wrong = module.checker(problem, case), dict[str, float](), []
    for provider in sorted(providers, key=lambda provider: provider.kind == "ours"):  # eager PyTorch first
        if provider.destroys:
            problem.keep()
        errors = check(provider.run(problem))
        if provider.destroys:
            problem.restore()
        report.add(op=case.op, N=case.N, V=case.V, D=case.D, dtype=case.dtype, provider=provider.name, error=errors)
        usual = errors if provider.name == "eager PyTorch" else usual
        off = [e for name, e in errors.items() if e > max(harness.FLOOR[case.dtype], 2 * usual.get(name, 0.0))]
        wrong += [f"{provider.name} is off by {max(off):.1e}"] if off and provider.kind == "ours" else []
    if wrong:
        raise ArithmeticError("; ".join(wrong))


def run(report: Any) -> None:
    """A line for each op, size and backend."""
    for case in cases(report.device, report.tiny):
        report.case(f"{case.op} N {case.N} V {case.V} {case.dtype}", partial(_check, case, report))

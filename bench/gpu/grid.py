"""The grid on a GPU: what the bars ask for first, the rest while there is time. Cases, peers and clock are those of
`ppg-fast bench`."""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ppg_fast.ops import head

from .. import bench_linear, harness
from ..problem import Case, make_problem
from ..providers import SPEC, linear_policy_loss
from ..timing import Contestant, Pace, interleave, stats

VOCABULARIES = (32000, 128256, 151936, 262144)
ODD = 151669  # its rows are not aligned
PACE = Pace(rounds=25, budget=0.6, least=5, slow=2.0)
QUICK = Pace(rounds=2, budget=0.2)
CHUNKS = (1024, 2048, 4096, 8192)


def cases(device: str, tiny: bool) -> list[tuple[Case, float, float]]:
    """Case, seconds that it takes about, and seconds for the peers or 0 where they do not take part: the bars first."""
    if tiny:
        shapes = (("policy_loss", 64, 512, 0), ("logprobs", 64, 512, 0), ("linear", 64, 512, 32))
        found = [(Case(op, N, V, D, dtype="bfloat16", device=device), 1.0, 1.0 * (not D)) for op, N, V, D in shapes]
        return [*found, (Case("distillation", 64, 512, 32, "bfloat16", variant="jsd", device=device), 1.0, 0.0)]
    bf16: dict[str, Any] = {"dtype": "bfloat16", "device": device}
    heads = Case("linear", 8192, 128256, 4096, **bf16)
    found = [(Case("policy_loss", 8192, V, **bf16), 3.0, 10.0) for V in VOCABULARIES]
    found += [(Case("logprobs", 8192, V, **bf16), 3.0, 4.0 * (V == 128256)) for V in VOCABULARIES]
    found += [(heads, 10.0, 25.0), (replace(heads, active=0.25), 6.0, 0.0)]
    found += [(Case("policy_loss", 8192, ODD, **bf16), 3.0, 0.0)]
    found += [(replace(heads, V=V), 10.0, 0.0) for V in (151936, 262144)]
    found += [(replace(heads, active=share), 5.0, 0.0) for share in (0.5, 0.1)]
    found += [(replace(heads, zero=0.5), 6.0, 0.0), (replace(heads, op="distillation", variant="jsd"), 15.0, 20.0)]
    found += [(Case("policy_loss", 8192, 128256, **bf16, active=share), 3.0, 0.0) for share in (0.5, 0.25, 0.1)]
    found += [(Case("policy_loss", 8192, V, dtype="float32", device=device), 3.0, 0.0) for V in (32000, 128256)]
    longer = ((131072, 32000), (32768, 128256), (16384, 262144))
    return found + [(Case("policy_loss", N, V, **bf16), 6.0, 0.0) for N, V in longer]


def run(report: Any) -> None:
    """Entries as `ppg-fast bench` writes them, case by case, of ours, eager PyTorch and the ceilings; then what the
    size of the head's chunks costs."""
    _measure(report, [(case, needed) for case, needed, _ in cases(report.device, report.tiny)], False)
    report.case("chunks of the head", lambda: _chunks(report), 4.0)


def run_peers(report: Any) -> None:
    """Entries of the others where the bars ask for them: they import and compile, and one that hangs costs nothing of
    ours."""
    _measure(report, [(case, needed) for case, _, needed in cases(report.device, report.tiny) if needed], True)


def _measure(report: Any, wanted: list[tuple[Case, float]], peers: bool) -> None:
    known: dict[str, harness.Known] = {}  # by op
    for case, needed in wanted:
        size = f"N={case.N} V={case.V} D={case.D} {case.dtype} active={case.active} zero={case.zero}"

        def measure(case: Case = case) -> None:
            with makers(harness.OPS[case.op], peers):
                entries, missing = harness.measure(
                    case, QUICK if report.tiny else PACE, peers and not report.tiny, known.setdefault(case.op, [])
                )
                if report.device == "cuda" and case.active == 1 and not case.zero and case.op != "logprobs":
                    _with_peaks(entries, case)
            known[case.op].append((case, {e["param"]: e["stats"]["median"] for e in entries}))
            if peers:
                entries = [e for e in entries if e["extra_info"]["kind"] == "peer" and e["param"] != "eager PyTorch"]
            named = {f"{case.op} {name}": reason for name, reason in missing.items()}
            report.add(benchmarks=entries, missing=named)

        report.case(f"{case.op} {size}", measure, needed)


@contextmanager
def makers(module: Any, peers: bool) -> Iterator[None]:
    """The op with ours alone, or with the others alone; eager PyTorch, by which both are judged, always."""
    before = getattr(module, "MAKERS", [])
    others = {maker for maker in before if not maker.__name__.startswith(("ours", "eager"))}
    ours = {maker for maker in before if maker.__name__.startswith("ours")}
    module.MAKERS = [maker for maker in before if maker not in (ours if peers else others)]
    try:
        yield
    finally:
        module.MAKERS = before


def _with_peaks(entries: list[dict[str, Any]], case: Case) -> None:
    peaks, _ = harness.peaks(case, compilers=False)
    rows = min(case.N, head.CHUNK_BYTES["cuda"] // (case.V * case.torch_dtype.itemsize))
    for entry in entries:
        if entry["param"] in peaks:
            entry["extra_info"]["peak_extra_bytes"] = peaks[entry["param"]][0]
        if entry["extra_info"]["kind"] == "ours" and case.op == "linear":
            entry["extra_info"]["chunk_bytes"] = head.equal_chunks(case.N, rows) * case.V * case.torch_dtype.itemsize


def _chunks(report: Any) -> None:
    """`linear_policy_loss` by rows of a chunk: what `ops.head` should do by default."""
    case = Case("linear", 64, 512, 32, device=report.device) if report.tiny else Case(
        "linear", 8192, 128256, 4096, dtype="bfloat16", device=report.device
    )  # fmt: skip
    problem = make_problem(case, near=False)
    hidden, weight = problem.leaves

    def call(rows: int) -> Any:
        given = {"old_logprobs": problem.old_logprobs, "spec": SPEC, "chunk_rows": rows}
        out = linear_policy_loss(hidden, weight, problem.labels, problem.advantages, **given)
        return torch.autograd.grad(out.loss, (hidden, weight))

    sizes = (16, 32) if report.tiny else CHUNKS
    contestants = [Contestant(f"{rows} rows", "ours", lambda rows=rows: call(rows)) for rows in sizes]
    for contestant in contestants:
        contestant.call()
    limits = bench_linear.ceilings(problem, case)
    seconds = interleave([*limits, *contestants], QUICK if report.tiny else PACE, report.device)
    bare = statistics.median(seconds.pop(limits[0].name))
    for rows, values, contestant in zip(sizes, seconds.values(), contestants, strict=True):
        share = bare / statistics.median(values)
        report.add(chunk_rows=rows, stats=stats(values), share_of_bare_gemms=share, **contestant.facts)

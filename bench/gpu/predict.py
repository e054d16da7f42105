"""What the model expects of the kernels as they are built: `python -m ppg_fast.bench.gpu.predict`.

Writes bench/results/gpu_prediction.json: the issue slots in the machine code of the extension, and what follows from
them. Run it again when csrc/cuda has changed; a test says when it is due.
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .. import result_file
from . import build, slots
from .bars import VOCABULARIES
from .devices import DEVICES, SOURCES, named
from .model import Case, Counts, Device, Launches, Plan, Unknowns, chosen, predict

NAME, N, D = "gpu_prediction", 8192, 4096
ROOT = result_file.ROOT
SIZES = {"bfloat16": 2, "float32": 4}
ARCHITECTURES = {"H100": "sm_90a", "H200": "sm_90a", "B200": "sm_100"}
READ = Launches(iterations=0, summed=False)  # of `logprobs_fwd`
# Ways to spread a row beside the chosen one, as bench/gpu/plans.cu measures them: cluster, threads, slots.
CANDIDATES = {
    32000: ((1, 256, 6), (1, 512, 13), (2, 256, 5)),
    128256: ((2, 512, 13), (4, 256, 5), (4, 512, 13), (8, 256, 5)),
    151936: ((2, 512, 13), (4, 256, 5), (4, 512, 13), (8, 256, 5)),
    262144: ((4, 512, 13), (8, 256, 6), (8, 512, 13)),
}
# What Triton compiles for sm_90, bfloat16: a row of 32,768 in the registers of one program, the same read twice by
# programs of 128 threads, longer ones in two passes. Slots a row of the first are an estimate.
HELD, TWICE, SWEPT = Counts(9.5, 10.6, 200, 200), Counts(9.4, 10.6, 231, 115), Counts(10.8, 10.8, 500, 500)
# The code that the review of 29 November 2026 read, by threads: loss and gradient, log-probs with entropy.
REVIEWED = {
    512: (Counts(9.19, 9.31, 447, 446, 17 / 16), Counts(11.75, 10.94, 469, 468, 17 / 16)),
    256: (Counts(7.69, 8.00, 448, 447, 33 / 32), Counts(10.22, 9.75, 480, 479, 33 / 32)),
}
# What happens to d_weight behind its GEMM: bytes an element; the first as slow as the review expects it.
AFTERWARDS = {"a cast element by element, as reviewed": 21, "a kernel that scales and casts": 6, "nothing": 0}
Built = dict[str, dict[str, Counts]]  # architecture -> kernel -> counts


# ---- what is built ---------------------------------------------------------------------------------------------------
def launches() -> Launches:
    """The launches of a fused policy loss whose denominator is counted, as csrc/cuda and ppg_fast/native.py have it."""
    from ppg_fast import native
    from ppg_fast.contract import Reduction

    credit = (ROOT / "csrc/cuda/credit.cu").read_text()
    at_once = {name: int(n) for name, n in re.findall(r"\b(THREADS|TOGETHER) = (\d+)", credit)}
    _, parts = native._counts(N, Reduction("token_mean", None, 1, None))
    iterations = -(-N // (parts * at_once["THREADS"] * at_once.get("TOGETHER", 1)))
    return Launches(
        iterations, overlapped="wait_for_leader" in (ROOT / "csrc/cuda/policy_loss_onepass.cuh").read_text()
    )


def scaled() -> str:
    """Of AFTERWARDS, what the head does: with that kernel it needs it for more than one chunk of rows only."""
    head = (ROOT / "ppg_fast/ops/head.py").read_text()
    return "nothing" if "scale_rows" in head else next(iter(AFTERWARDS))


def counts_of(found: Built, device: Device, dtype: str, sums: int, threads: int) -> Counts:
    element = {"bfloat16": "BF16", "float32": "F32"}[dtype]
    return found[ARCHITECTURES[device.name]][f"policy_loss_onepass<{element}, false, {sums}, {threads}>"]


# ---- what follows from it --------------------------------------------------------------------------------------------
def line(device: Device, case: Case, u: Unknowns | None = None, **about: Any) -> dict[str, Any]:
    found = predict(device, case, u)
    return about | {
        "device": device.name,
        "V": case.V,
        "plan": asdict(case.plan),
        "ms": round(1e3 * found.seconds, 4),
        "share": round(found.share, 4),
        "bound": found.bound,
    }


def calls(found: Built, around: Launches) -> Iterator[dict[str, Any]]:
    """The fused policy loss and the log-probs by device, dtype, V and share of active rows."""
    for device in DEVICES:
        if device.name not in ARCHITECTURES:
            continue
        for dtype, size in SIZES.items():
            for V in VOCABULARIES:
                plan = chosen(V, size)
                loss, forward = (counts_of(found, device, dtype, sums, plan.threads) for sums in (0, 1))
                for full in (100, 25):
                    case = Case(V, size, plan, loss, around, N, full)
                    yield line(device, case, op="policy_loss", dtype=dtype, active=full / 100)
                case = Case(V, size, plan, forward, READ, N, read_only=True)
                yield line(device, case, op="logprobs", dtype=dtype, active=1.0)


def plans(found: Built, around: Launches) -> Iterator[dict[str, Any]]:
    """Every way that bench/gpu/plans.cu tries, on an H200."""
    device = named("H200")
    for V, ways in CANDIDATES.items():
        for cluster, threads, count in ways:
            plan = Plan(cluster, threads, count, 2 if threads == 256 else 1)
            yield line(device, Case(V, 2, plan, counts_of(found, device, "bfloat16", 0, threads), around))
        yield line(device, Case(V, 2, two_passes(V, 2), counts_of(found, device, "bfloat16", 0, 512), around))


def two_passes(V: int, size: int) -> Plan:
    return Plan(0, 512, 1, min(max((256 << 10) // (V * size), 1), 2), kept=False, ahead=False)


def triton(around: Launches) -> Iterator[dict[str, Any]]:
    """The Triton kernels: a row of up to 32,768 held by one program, as on ROCm, or read twice by small ones; longer
    rows in two passes."""
    held = (Plan(1, 512, 4, ahead=False), HELD)
    twice = {f"read twice, {n} programs an SM": (Plan(0, 128, 2, n, kept=False, ahead=False), TWICE) for n in (3, 4)}
    for device in DEVICES:
        for V in VOCABULARIES:
            ways = {"two passes": (Plan(0, 512, 2, kept=False, ahead=False), SWEPT)}
            if V == 32000:
                ways = {"held in registers": held} | ({} if device.lanes == 64 else twice)
            for name, (plan, counts) in ways.items():
                few = device if plan.kept else replace(device, clusters={1: programs(device, 2 * V, plan.per_sm)})
                yield line(few, Case(V, 2, plan, counts, around), way=name)


def programs(device: Device, row: int, per_sm: int) -> int:
    """Of kernels/triton/plan.py, for rows that are read twice."""
    if device.lanes == 64:  # ROCm
        return device.sms
    return min(max(device.l2 // 2 // row, device.sms // 4), per_sm * device.sms)


Pair = tuple[Counts, Counts]  # of a sweep with a gradient and of one without


def changes(found: Built, around: Launches) -> Iterator[dict[str, Any]]:
    """What the planned changes bring to the reviewed code on an H200, one at a time and together; what is built."""
    device = named("H200")
    for V in VOCABULARIES:
        plan = chosen(V, 2)
        ways = dict(planned(V, plan)) | {"as built": (plan, pair(found, device, plan.threads), around)}
        for name, (spread, (loss, forward), launched) in ways.items():
            yield {"change": name, "V": V, **shares(device, V, spread, (loss, forward), launched)}


def planned(V: int, plan: Plan) -> Iterator[tuple[str, tuple[Plan, Pair, Launches]]]:
    """The planned changes as parameters of the model; slots that are not read from code are estimates."""
    loss, forward = both = REVIEWED[plan.threads]
    old, short = Launches(16), Launches(1, overlapped=True)
    long = [replace(c, first=f.first, exp_first=f.exp_first) for c, f in zip(both, REVIEWED[256], strict=True)]
    alone = replace(forward, waits=False, forward=150)
    yield "as reviewed", (plan, both, old)
    yield "L3: short slices and a dependent launch", (plan, both, short)
    yield "L4: a row without gradient waits for no exchange, 150 slots", (plan, (loss, alone), old)
    yield "two chunks a wait (512 threads)", (plan, (long[0], long[1]), old)
    fewer = [replace(c, row=c.row - 60, forward=c.forward - 60) for c in both]
    yield "divisions in the producer, 60 slots fewer a row", (plan, (fewer[0], fewer[1]), old)
    together = replace(long[0], row=loss.row - 60), replace(long[1], forward=150, waits=False)
    yield "these four", (plan, together, short)
    if plan.per_sm == 1:
        two = Plan(2 * plan.cluster, 256, 6 if V == 262144 else 5, 2)
        yield "two CTAs an SM", (two, REVIEWED[256], old)


def pair(found: Built, device: Device, threads: int) -> Pair:
    """The loss without entropy, the log-probs with it."""
    return tuple(counts_of(found, device, "bfloat16", sums, threads) for sums in (0, 1))  # type: ignore[return-value]


def shares(
    device: Device, V: int, plan: Plan, counts: Pair, around: Launches, u: Unknowns | None = None
) -> dict[str, float]:
    loss, forward = Case(V, 2, plan, counts[0], around), Case(V, 2, plan, counts[1], READ, read_only=True)
    return {
        "policy_loss": round(predict(device, loss, u).share, 4),
        "logprobs": round(predict(device, forward, u).share, 4),
    }


def sensitivity(found: Built, around: Launches) -> Iterator[dict[str, Any]]:
    """How the shares on an H200 move with what is not known."""
    device = named("H200")
    other: dict[str, tuple[tuple[str, Device, Unknowns], ...]] = {
        name: tuple(
            (f"{v:g}" if v > 1e-3 else f"{1e6 * v:g} µs", device, replace(Unknowns(), **{name: v})) for v in values
        )
        for name, values in {
            "issue": (0.65, 0.9), "evenness": (0.88, 1.0), "latency": (700, 2000), "exchange": (1000, 4000),
            "few": (0.5, 0.9), "gap": (1e-6, 6e-6), "start": (1e-6, 6e-6), "end": (1e-6, 6e-6),
        }.items()
    }  # fmt: skip
    other["clock"] = tuple((f"{c / 1e9:g} GHz", replace(device, clock=c), Unknowns()) for c in (1.5e9, 1.98e9))
    other["copy"] = tuple((f"{c / 1e12:g} TB/s", replace(device, copy=c), Unknowns()) for c in (4.0e12, 4.6e12))
    for name, values in other.items():
        for value, changed, u in values:
            for V in (32000, 128256):
                counts = pair(found, device, (plan := chosen(V, 2)).threads)
                yield {"unknown": name, "value": value, "V": V, **shares(changed, V, plan, counts, around, u)}


def heads(found: Built, built: str) -> Iterator[dict[str, Any]]:
    """`linear_policy_loss` at V 128,256 and D 4,096 beside its three GEMMs, by what happens to d_weight afterwards."""
    V, small = 128256, 0.2e-3  # of some thirty small launches of metrics
    for device in DEVICES[:3]:
        plan = chosen(V, 2)
        loss = counts_of(found, device, "bfloat16", 0, plan.threads)
        for full in (1.0, 0.25):
            rows = round(N * full)
            products = 6 * rows * V * D / device.gemm
            sweep = predict(device, Case(V, 2, plan, loss, Launches(0, summed=False), rows)).seconds
            for name, passes in AFTERWARDS.items():
                seconds = products + sweep + small + passes * V * D / device.copy
                yield {
                    "device": device.name, "active": full, "after": name, "built": name == built,
                    "gemms_ms": round(1e3 * products, 2), "sweep_ms": round(1e3 * sweep, 2),
                    "ms": round(1e3 * seconds, 2), "share": round(products / seconds, 4),
                }  # fmt: skip


def file_of(found: Built, around: Launches, after: str) -> dict[str, Any]:
    """The content of the results file."""
    tables = {
        "calls": calls(found, around), "plans": plans(found, around), "triton": triton(around),
        "changes": changes(found, around), "sensitivity": sensitivity(found, around), "heads": heads(found, after),
    }  # fmt: skip
    return result_file.header("python -m ppg_fast.bench.gpu.predict") | {
        "sources": build.sources(ROOT).checksum(),
        "launches": asdict(around),
        "unknowns": asdict(Unknowns()),
        "devices": [asdict(device) | {"source": SOURCES[device.name]} for device in DEVICES],
        "counts": {arch: {name: asdict(counts) for name, counts in of.items()} for arch, of in found.items()},
        **{name: list(rows) for name, rows in tables.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """0 written; 1 where there is no machine code to be read."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Predict the shares that the kernels reach.")
    parser.add_argument("--output", type=Path, default=result_file.FOLDER)
    arguments = parser.parse_args(argv)
    try:
        found = slots.built(ROOT, sorted(set(ARCHITECTURES.values())))
    except ValueError as error:
        print(f"ppg_fast.bench.gpu.predict: {error}", file=sys.stderr)
        return 1
    print(f"wrote {result_file.write(arguments.output, NAME, file_of(found, launches(), scaled()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

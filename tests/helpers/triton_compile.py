"""Compiles the Triton kernels ahead of time, as their own launchers launch them, and prints what came out, one JSON
line a kernel.

``triton_compile.py [few] TARGET ... [specialise]``; after "few" the cases of `FEW` only.

A script of its own, because the interpreter that other tests run under patches ``triton.language`` for good. Run by
test_triton_compile.py.
"""

import contextlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from ppg_fast.contract import Columns, Reduction, Turns
from ppg_fast.spec import PolicyLossSpec

# the package refuses to load without a device; its modules do not
package = importlib.util.find_spec("ppg_fast.kernels")
assert package is not None
sys.modules["ppg_fast.kernels"] = importlib.util.module_from_spec(package)

from ppg_fast.kernels import (
    cluster_probe,
    distillation,
    fused_policy_loss,
    logprobs,
    partial_returns,
    plan,
    policy_loss,
    scale_rows,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
Launch = tuple[JITFunction, tuple[Any, ...], dict[str, Any]]


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches made inside are listed and not run."""
    launches: list[Launch] = []
    original = JITFunction.run

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append((kernel, args, kwargs))

    JITFunction.run = run  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        JITFunction.run = original  # type: ignore[method-assign]


def specialised(launch: Launch, target: GPUTarget) -> tuple[Any, list[Any], dict[str, Any], Any]:
    """-> bound arguments, what Triton specialises on (its cache key), the remaining options, the target's backend."""
    kernel, args, kwargs = launch
    backend = backends["nvidia" if target.backend == "cuda" else "amd"].compiler(target)
    bound, key, options = create_function_from_signature(kernel.signature, kernel.params, backend)(*args, **kwargs)
    return bound, key, options, backend


def compiled(launch: Launch, target: GPUTarget) -> Any:
    """The kernel of ``launch``, compiled for ``target`` with the specialisation a launch on it would have."""
    bound, key, options, backend = specialised(launch, target)
    values = list(bound.values())
    signature = {name: kind for name, (kind, _) in zip(bound, key, strict=True)}
    constants = {(i,): values[i] for i, (kind, _) in enumerate(key) if kind == "constexpr"}
    attributes = {(i,): backend.parse_attr(a) for i, (_, a) in enumerate(key) if isinstance(a, str)}
    source = ASTSource(fn=launch[0], signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def facts(kernel: Any) -> dict[str, int]:
    """What one thread does: registers, spilled bytes or registers, 128-bit and narrower accesses to global memory,
    exponentials, cluster barriers; and how many programs of the kernel an SM or compute unit holds at once."""
    asm = kernel.asm
    if "amdgcn" in asm:
        code = asm["amdgcn"]
        spilled, registers = (re.search(rf"\.vgpr_{of}:\s+(\d+)", code) for of in ("spill_count", "count"))
        patterns = (
            r"(?:global|buffer)_load_dwordx4",
            r"(?:global|buffer)_store_dwordx4",
            r"(?:global|buffer)_(?:load|store)_(?!dwordx4)",
            "v_exp_f32",
        )
    else:
        code = asm["ptx"]
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(asm["cubin"])
            file.flush()
            command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        spilled = re.search(r"STACK:(\d+)", usage)  # what spills has a stack
        registers = re.search(r"REG:(\d+)", usage)
        patterns = (
            r"ld\.global[.\w:]*\.v4\.b32",
            r"st\.global[.\w:]*\.v4\.b32",
            r"(?:ld|st)\.global(?![.\w:]*\.v4\.b32)",
            r"ex2\.approx",
        )
    assert spilled is not None
    assert registers is not None
    held = held_at_once(kernel.metadata, int(registers[1]))
    counts = [len(re.findall(pattern, code)) for pattern in (*patterns, r"barrier\.cluster\.wait")]
    names = (
        "registers",
        "at_once",
        "shared",
        "spilled",
        "wide_loads",
        "wide_stores",
        "narrow",
        "exponentials",
        "exchanges",
    )
    numbers = (int(registers[1]), held, kernel.metadata.shared, int(spilled[1]), *counts)
    ticket = cluster_probe.one_ticket_a_cluster(code) if kernel.metadata.num_ctas > 1 and "atom." in code else None
    return dict(zip(names, numbers, strict=True)) | {"one_ticket": ticket}


def held_at_once(about: Any, registers: int) -> int:
    """Programs (CTAs of a cluster) that the registers and the shared memory of an SM, or of a compute unit of CDNA 3,
    hold at once."""
    if about.target.backend == "hip":  # four SIMDs, each with 512 registers a lane for at most 8 waves
        waves = 4 * min(8, 512 // (-(-registers // 8) * 8))
        return min(waves // about.num_warps, 65536 // max(about.shared, 1))
    memory = {80: 164, 90: 228, 100: 228}[about.target.arch] * 1024  # an SM's, of which a CTA takes 1 KB for itself
    return min(
        65536 // (-(-registers * 32 // 256) * 256 * about.num_warps),
        64 // about.num_warps,
        memory // (about.shared + 1024),
    )


def some_logits(dtype: torch.dtype, B: int, L: int, V: int) -> torch.Tensor:
    """Dense (B, L, V); a dimension of size 1 has the odd stride that a view may leave it."""
    dense = torch.empty(B, L, V, dtype=dtype)
    return dense.as_strided((B, L, V), (L * V if B > 1 else 7, V if L > 1 else 7, 1))


def policy_loss_case(
    dtype: torch.dtype, V: int, softcap: float, entropy: bool, B: int = 2, L: int = 3, number: float = 0.5, at: int = 0,
    score_norm: bool = False,
) -> None:  # fmt: skip
    """The heaviest policy loss over (B, L, V) logits, with every term, of z-loss and entropy one: with both, rows of
    float32 in registers put ten words aside on sm_100, once a row.

    ``number`` stands in for every number of the spec, ``at`` shifts every per-row argument.
    """
    logits, labels = some_logits(dtype, B, L, V), torch.empty(B * L + at, dtype=torch.int64)[at:]
    rows = [torch.empty(B * L + at)[at:] for _ in range(7)]
    numbers = ("clip_low", "clip_high", "ratio_cap", "log_ratio_coef", "kl_coef", "kl_cap")
    numbers += ("importance_floor", "importance_cap", "max_log_ratio")
    spec = PolicyLossSpec(
        "dppo_kl",
        **dict.fromkeys(numbers, number),
        kl_estimator="k3_unbiased",
        entropy_coef=number if entropy else 0,
        z_coef=0 if entropy else number,
        importance_mode="mask",
        nan_rollout="one",
        logit_softcap=softcap and softcap + number,
    )
    norm = (torch.empty(B * L + at)[at:],) if score_norm else ()
    policy_loss.policy_loss(logits, labels, *rows, spec, entropy, logits, *norm)


def logprobs_case(
    dtype: torch.dtype, V: int, softcap: float, entropy: bool, B: int = 2, L: int = 3, number: float = 0.5, at: int = 0
) -> None:
    """Log-probs, their gradient and a scale for each of its rows; arguments as in `policy_loss_case`."""
    logits, labels = some_logits(dtype, B, L, V), torch.empty(B * L + at, dtype=torch.int64)[at:]
    rows = [torch.empty(B * L + at)[at:] for _ in range(4)]
    softcap = softcap and softcap + number
    logprobs.logprobs_fwd(logits, labels, None, number, softcap, entropy)
    d = (rows[3], rows[3]) if entropy else (None, None)
    logprobs.logprobs_bwd(logits, labels, *rows[:3], *d, None, number, softcap, logits)
    scale_rows.scale_rows(logits, rows[0], logits)


def cast_case(dtype: torch.dtype, V: int, *_: float) -> None:
    """A float32 gradient, scaled into ``dtype``."""
    scale_rows.scale_rows(torch.empty(1, 3, V), torch.empty(1), torch.empty(1, 3, V, dtype=dtype))


def distillation_case(
    dtype: torch.dtype, V: int, softcap: float, _: bool, B: int = 2, L: int = 3, number: float = 0.5, at: int = 0,
    beta: float | None = None,
) -> None:  # fmt: skip
    """Two rows, every argument given, over the student's logits; arguments as in `policy_loss_case`."""
    logits, labels = some_logits(dtype, B, L, V), torch.empty(B * L + at, dtype=torch.int64)[at:]
    rows = [torch.empty(B * L + at)[at:] for _ in range(2)]
    softcaps = [softcap and softcap + number] * 2
    beta = number / 2 if beta is None else beta
    distillation.distillation(logits, some_logits(dtype, B, L, V), labels, *rows, 1.0, *softcaps, beta, logits)


def returns_case(
    B: int = 2, T: int = 5, lookahead: int = 3, segment_length: int = 2, gamma: float = 0.5, at: int = 0
) -> None:
    """Returns with every option on."""
    counts = torch.empty(B + at, dtype=torch.int64)[at:]
    partial_returns.partial_returns(
        torch.empty(B, T), torch.empty(B, T, dtype=torch.int64), counts, lookahead, segment_length, gamma
    )


def fused_case(
    dtype: torch.dtype, V: int, softcap: float, entropy: bool, B: int = 2, L: int = 3, T: int = 5, number: float = 0.5,
    at: int = 0,
    lookahead: int = 3, normalizer: bool = False, kind: str = "sequence_mean",
) -> None:  # fmt: skip
    """From rewards to the loss; arguments as in `policy_loss_case`, ``at`` makes every column a view with strides of
    its own."""
    column = lambda of: torch.empty(B, L + at, 1 + at, dtype=of)[:, at:, at]  # noqa: E731
    columns = Columns(
        column(torch.int64), column(torch.bool), column(torch.int32), None, *(column(torch.float32) for _ in range(4))
    )
    ids = torch.empty(B, T, dtype=torch.int64)
    counts, groups = (torch.empty(B + at, dtype=torch.int64)[at:] for _ in range(2))
    turns = Turns(torch.empty(B, T), counts, ids, None, groups, lookahead, 2, number, "group_std")
    bounds = torch.empty(B + 1, dtype=torch.int32)
    spec = PolicyLossSpec(
        "ppo",
        number,
        number,
        2 + number,
        number,
        "k3",
        number if entropy else 0,
        number,
        logit_softcap=softcap and softcap + number,
    )
    logits = some_logits(dtype, B, L, V)
    fused_policy_loss.fused_policy_loss(
        logits,
        columns,
        turns,
        Reduction(kind, 2 + number if normalizer else None, B, bounds),
        spec,
        False,
        True,
        logits,
    )


def largest_in_registers(dtype: torch.dtype, softcap: float, exponentials: bool) -> int:
    """The longest row that the registers of one CTA hold, together with its exponentials if these are kept."""
    shape = lambda V: plan.row_shape(some_logits(dtype, 1, 1, V), softcap != 0)  # noqa: E731
    return max(
        v for v in (2**i for i in range(10, 20)) if shape(v)["ONE_BLOCK"] and shape(v)["KEEP_EXP"] >= exponentials
    )


@dataclass(frozen=True)
class Case:
    """Launches with the flags that need most registers in each form of a kernel."""

    launches: Callable[..., None]
    V: int  # 0: the most that the registers of a CTA hold; 1: with the exponentials
    softcap: float = 0.0
    entropy_term: bool = True
    cluster: bool = False


with_norm = partial(policy_loss_case, score_norm=True)
CASES = {
    "in registers": Case(policy_loss_case, 0),
    "in registers, without an entropy term": Case(policy_loss_case, 0, entropy_term=False),
    "in registers, softcap": Case(policy_loss_case, 0, 30.0),
    "with exponentials": Case(policy_loss_case, 1, entropy_term=False),
    "four programs an SM": Case(policy_loss_case, 32768),
    "four programs an SM, softcap": Case(policy_loss_case, 32768, 30.0),
    "four programs an SM, unaligned": Case(policy_loss_case, 30522),
    "in blocks": Case(policy_loss_case, 131072),
    "in blocks, softcap": Case(policy_loss_case, 131072, 30.0),
    "in blocks, unaligned": Case(policy_loss_case, 50257),
    # with that term too, 16-bit rows spill 72 bytes a row on sm_90
    "in registers, score norm": Case(with_norm, 0, entropy_term=False),
    "in registers, softcap, score norm": Case(with_norm, 0, 30.0),
    "with exponentials, score norm": Case(with_norm, 1, entropy_term=False),
    "in blocks, score norm": Case(with_norm, 131072),
    "in blocks, softcap, score norm": Case(with_norm, 131072, 30.0),
    "fused, with exponentials": Case(fused_case, 1, entropy_term=False),
    "fused, in registers": Case(fused_case, 0),
    "fused, four programs an SM": Case(fused_case, 32000),
    "fused, in blocks": Case(fused_case, 151936),
    "log-probs": Case(logprobs_case, 131072),
    "log-probs, softcap": Case(logprobs_case, 131072, 30.0),
    "log-probs, in registers": Case(logprobs_case, 0),
    "scaled into 16 bits": Case(cast_case, 4096),
    "log-probs, four programs an SM": Case(logprobs_case, 32000),
    "forward KL": Case(partial(distillation_case, beta=0.0), 131072),
    "reverse KL": Case(partial(distillation_case, beta=1.0), 131072),
    "Jensen-Shannon, softcaps": Case(distillation_case, 131072, 30.0),
    "cluster of 2": Case(fused_case, 65536, cluster=True),
    "cluster of 4": Case(fused_case, 128256, entropy_term=False, cluster=True),
    "cluster of 8": Case(fused_case, 262144, cluster=True),
    "cluster, softcap": Case(fused_case, 128256, 30.0, cluster=True),
    "cluster, log-probs": Case(logprobs_case, 151936, cluster=True),
}
BF16, FLOAT32 = DTYPES = (torch.bfloat16, torch.float32)
# each form of a kernel with what it needs most registers for, in one dtype where the other has not this form or needs
# fewer
FEW: dict[str, tuple[torch.dtype, ...]] = {
    "in registers": (FLOAT32,),
    "with exponentials, score norm": DTYPES,
    "four programs an SM, softcap": (BF16,),
    "in blocks, softcap, score norm": DTYPES,
    "fused, in blocks": (BF16,),
    "log-probs, softcap": (BF16,),
    "Jensen-Shannon, softcaps": (BF16,),
    "cluster of 8": DTYPES,
}


def compile_all(target: str, wanted: dict[str, tuple[torch.dtype, ...]]) -> None:
    """Print the facts of cases in dtypes for one target; clusters where this Triton and the target have them."""
    plan.WARP_SIZE = TARGETS[target].warp_size
    torch.version.hip = "6.4" if TARGETS[target].backend == "hip" else None
    seen: set[str] = set()
    triton_has_clusters = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= plan.FIRST_WITH_CLUSTERS
    for name, dtype in ((name, dtype) for name, dtypes in wanted.items() for dtype in dtypes):
        case = CASES[name]
        if case.cluster and not (triton_has_clusters and target in ("sm_90", "sm_100")):
            continue
        plan.why_no_clusters = lambda device, cluster=case.cluster: None if cluster else "not this case"
        with recorded() as launches:
            V = case.V if case.V > 1 else largest_in_registers(dtype, case.softcap, case.V == 1)
            case.launches(dtype, V, case.softcap, case.entropy_term)
        for one in launches:
            _, key, options, _ = specialised(one, TARGETS[target])
            if (variant := repr((one[0].__name__, key, options))) in seen:
                continue  # does not depend on what the cases differ in
            seen.add(variant)
            about = {"triton": triton.__version__, "kernel": one[0].__name__, "case": name, "target": target}
            about |= {
                "dtype": str(dtype).removeprefix("torch."),
                "softcap": case.softcap != 0,
                "entropy_term": case.entropy_term,
                "aligned": V % 16 == 0,
            }
            print(json.dumps(about | shape_of(one[2], dtype.itemsize) | facts(compiled(one, TARGETS[target]))))
    with recorded() as launches:
        returns_case()
    about = {
        "triton": triton.__version__,
        "kernel": launches[0][0].__name__,
        "case": "returns",
        "target": target,
        "dtype": "float32",
    }
    print(json.dumps(about | facts(compiled(launches[0], TARGETS[target]))))


def shape_of(options: dict[str, Any], element_size: int) -> dict[str, Any]:
    """What one thread holds of a row, and how."""
    if "BLOCK_V" not in options:
        return {}
    ctas = options.get("num_ctas", 1)
    threads = options["num_warps"] * plan.WARP_SIZE
    columns = options["BLOCK_V"] // (threads * ctas)
    held = {"columns": columns, "wide": columns * element_size // 16, "ctas": ctas, "threads": threads}
    forms = {"one_block": options.get("ONE_BLOCK"), "keep_exp": options.get("KEEP_EXP"), "kind": options.get("KIND")}
    return held | forms


def specialise_all() -> None:
    """Print for each kernel how many variants Triton would compile for calls that differ in lengths, numbers and
    alignment."""
    shapes = [{}, {"B": 1}, {"L": 1}, {"B": 16, "L": 48}, {"at": 1}, {"number": 1}, {"number": 0.25}]
    fused = [*shapes, {"T": 1}, {"T": 48}, {"lookahead": 1}, {"lookahead": 2**31 - 1}]
    windows = [
        {},
        {"B": 1},
        {"T": 1},
        {"T": 48},
        {"lookahead": 1},
        {"lookahead": 2**31 - 1},
        {"segment_length": 1},
        {"gamma": 1},
        {"at": 1},
    ]
    plan.why_no_clusters = lambda device: "not here"
    variants: dict[str, set[str]] = {}
    for case, kwargs in (
        (lambda **of: policy_loss_case(torch.bfloat16, 4096, 30.0, True, **of), shapes),
        (lambda **of: logprobs_case(torch.bfloat16, 4096, 30.0, True, **of), shapes),
        (lambda **of: distillation_case(torch.bfloat16, 4096, 30.0, True, **of), shapes),
        (lambda **of: fused_case(torch.bfloat16, 4096, 30.0, True, **of), fused),
        (returns_case, windows),
    ):
        with recorded() as launches:
            for changed in kwargs:
                case(**changed)
        for one in launches:
            _, key, options, _ = specialised(one, TARGETS["sm_90"])
            name = one[0].__name__ + (
                " (fused)" if one[0] is policy_loss.policy_loss_kernel and one[1][8] is not None else ""
            )
            variants.setdefault(name, set()).add(repr((key, options)))
    print(json.dumps({name: len(keys) for name, keys in variants.items()}))


if __name__ == "__main__":
    wanted = dict.fromkeys(CASES, DTYPES)
    for what in sys.argv[1:]:
        if what == "few":
            wanted = FEW
        else:
            specialise_all() if what == "specialise" else compile_all(what, wanted)

"""Compiles the Triton kernels ahead of time, as their own launchers launch them, and prints what came out, one JSON line a kernel.

``triton_compile.py TARGET`` or ``triton_compile.py specialise``.

A script of its own, because the interpreter that other tests run under patches ``triton.language`` for good. Run by test_triton_compile.py.
"""

import contextlib
import importlib.util
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends import backends
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

from ppg_fast.spec import PolicyLossSpec

# the package refuses to load without a device; its modules do not
package = importlib.util.find_spec("ppg_fast.kernels")
assert package is not None
sys.modules["ppg_fast.kernels"] = importlib.util.module_from_spec(package)

from ppg_fast.kernels import logprobs, partial_returns, policy_loss, row

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


def facts(asm: dict[str, Any]) -> dict[str, int]:
    """What one thread does: spilled bytes or registers, 128-bit and narrower accesses to global memory, exponentials."""
    if "amdgcn" in asm:
        code = asm["amdgcn"]
        spilled = re.search(r"\.vgpr_spill_count:\s+(\d+)", code)
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
        patterns = (
            r"ld\.global[.\w:]*\.v4\.b32",
            r"st\.global[.\w:]*\.v4\.b32",
            r"(?:ld|st)\.global(?![.\w:]*\.v4\.b32)",
            r"ex2\.approx",
        )
    assert spilled is not None
    counts = [len(re.findall(pattern, code)) for pattern in patterns]
    return dict(zip(("spilled", "wide_loads", "wide_stores", "narrow", "exponentials"), (int(spilled[1]), *counts), strict=True))


def some_logits(dtype: torch.dtype, B: int, L: int, V: int) -> torch.Tensor:
    """Dense (B, L, V); a dimension of size 1 has the odd stride that a view may leave it."""
    dense = torch.empty(B, L, V, dtype=dtype)
    return dense.as_strided((B, L, V), (L * V if B > 1 else 7, V if L > 1 else 7, 1))


def policy_loss_case(
    dtype: torch.dtype, V: int, softcap: float, entropy: bool, B: int = 2, L: int = 3, number: float = 0.5, at: int = 0
) -> None:
    """The heaviest policy loss over (B, L, V) logits.

    ``number`` stands in for every number of the spec, ``at`` shifts every per-row argument.
    """
    logits, labels = some_logits(dtype, B, L, V), torch.empty(B * L + at, dtype=torch.int64)[at:]
    rows = [torch.empty(B * L + at)[at:] for _ in range(6)]
    spec = PolicyLossSpec(
        "ppo", number, number, 2 + number, number, "k3", number if entropy else 0, number, logit_softcap=softcap and softcap + number
    )
    policy_loss.policy_loss(logits, labels, *rows, spec, entropy, logits)


def logprobs_case(
    dtype: torch.dtype, V: int, softcap: float, entropy: bool, B: int = 2, L: int = 3, number: float = 0.5, at: int = 0
) -> None:
    """Log-probs, their gradient and its rescale; arguments as in `policy_loss_case`."""
    logits, labels = some_logits(dtype, B, L, V), torch.empty(B * L + at, dtype=torch.int64)[at:]
    rows = [torch.empty(B * L + at)[at:] for _ in range(4)]
    softcap = softcap and softcap + number
    logprobs.logprobs_fwd(logits, labels, None, number, softcap, entropy)
    logprobs.logprobs_bwd(logits, labels, *rows[:3], rows[3] if entropy else None, None, number, softcap, logits)
    logprobs.rescale_rows(logits, rows[0])


def returns_case(B: int = 2, T: int = 5, lookahead: int = 3, segment_length: int = 2, gamma: float = 0.5, at: int = 0) -> None:
    """Returns with every option on."""
    counts = torch.empty(B + at, dtype=torch.int64)[at:]
    partial_returns.partial_returns(torch.empty(B, T), torch.empty(B, T, dtype=torch.int64), counts, lookahead, segment_length, gamma)


def largest_in_registers(dtype: torch.dtype, softcap: float) -> int:
    """The longest row that is held in the registers of one program."""
    return max(v for v in (2**i for i in range(10, 20)) if policy_loss.launch_shape(v, dtype.itemsize, softcap != 0, True)["ONE_BLOCK"])


# name: launches, softcap, columns (0: the most that registers hold); flags that need most registers in each form of a kernel
CASES: dict[str, tuple[Callable[..., None], float, int]] = {
    "in registers": (policy_loss_case, 0.0, 0),
    "in registers, softcap": (policy_loss_case, 30.0, 0),
    "in blocks": (policy_loss_case, 0.0, 131072),
    "in blocks, softcap": (policy_loss_case, 30.0, 131072),
    "in blocks, unaligned": (policy_loss_case, 0.0, 50257),
    "log-probs": (logprobs_case, 0.0, 131072),
    "log-probs, softcap": (logprobs_case, 30.0, 131072),
}


def compile_all(target: str) -> None:
    """Print the facts of every case for one target."""
    row.WARP_SIZE = TARGETS[target].warp_size
    for (name, (case, softcap, V)), dtype in itertools.product(CASES.items(), (torch.bfloat16, torch.float32)):
        with recorded() as launches:
            case(dtype, V or largest_in_registers(dtype, softcap), softcap, True)
        for launch in launches:
            options = launch[2]
            if softcap and launch[0] is logprobs.rescale_rows_kernel:
                continue
            columns = options["BLOCK_V"] // (options["num_warps"] * row.WARP_SIZE)
            about = {"kernel": launch[0].__name__, "case": name, "target": target, "dtype": str(dtype).removeprefix("torch.")}
            held = {
                "softcap": softcap != 0,
                "aligned": V % 16 == 0,
                "columns": columns,
                "wide": columns * dtype.itemsize // 16,
                "one_block": options.get("ONE_BLOCK"),
            }
            print(json.dumps(about | held | facts(compiled(launch, TARGETS[target]).asm)))
    with recorded() as launches:
        returns_case()
    about = {"kernel": launches[0][0].__name__, "case": "returns", "target": target, "dtype": "float32"}
    print(json.dumps(about | facts(compiled(launches[0], TARGETS[target]).asm)))


def specialise_all() -> None:
    """Print for each kernel how many variants Triton would compile for calls that differ in lengths, numbers and alignment."""
    shapes = [{}, {"B": 1}, {"L": 1}, {"B": 16, "L": 48}, {"at": 1}, {"number": 1}, {"number": 0.25}]
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
    with recorded() as launches:
        for changed in shapes:
            policy_loss_case(torch.bfloat16, 4096, 30.0, True, **changed)
            logprobs_case(torch.bfloat16, 4096, 30.0, True, **changed)
        for changed in windows:
            returns_case(**changed)
    variants: dict[str, set[str]] = {}
    for launch in launches:
        _, key, options, _ = specialised(launch, TARGETS["sm_90"])
        variants.setdefault(launch[0].__name__, set()).add(repr((key, options)))
    print(json.dumps({name: len(keys) for name, keys in variants.items()}))


if __name__ == "__main__":
    specialise_all() if sys.argv[1] == "specialise" else compile_all(sys.argv[1])

"""The Triton kernels as compiled code: no spills, wide accesses, one exponential an element and sweep, no recompilation. No GPU needed."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("triton_compile.py")
PER_ROW = 16  # accesses to the (N,) arguments and to the label's logit, of any width
SCALARS = 6  # exponentials once a row or block: ratio, importance weight, KL, the label's tanh, the rescale
SWEEPS = {"policy_loss_kernel": 2, "logprobs_fwd_kernel": 1, "logprobs_bwd_kernel": 1, "rescale_rows_kernel": 0}


@cache
def lines(what: str, cache_dir: str) -> list[dict[str, Any]]:
    """What the script printed. Never interpreted, and with a cache of its own, so that something is compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": cache_dir}
    done = subprocess.run([sys.executable, SCRIPT, what], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiled_code(target: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    kernels = lines(target, str(tmp_path_factory.mktemp("triton")))
    assert {k["kernel"] for k in kernels} == {*SWEEPS, "partial_returns_kernel"}
    assert {(k["one_block"], k["dtype"]) for k in kernels if k["kernel"] == "policy_loss_kernel"} == {
        (one_block, dtype) for one_block in (True, False) for dtype in ("bfloat16", "float32")
    }
    for k in kernels:
        assert k["spilled"] == 0, k
        if k["kernel"] == "partial_returns_kernel":
            continue
        sweeps = SWEEPS[k["kernel"]]
        if k["aligned"]:
            assert k["wide_stores"] >= k["wide"] or k["kernel"] == "logprobs_fwd_kernel", k
            assert k["wide_loads"] >= k["wide"] * (1 if k["one_block"] else max(sweeps, 1)), k
            assert k["narrow"] <= PER_ROW, k
        least = k["columns"] * sweeps
        assert least <= k["exponentials"] <= least * (2 if k["softcap"] else 1) + SCALARS, k


def test_nothing_that_varies_is_compiled_in(tmp_path: Path) -> None:
    (variants,) = lines("specialise", str(tmp_path))
    assert variants == dict.fromkeys([*SWEEPS, "partial_returns_kernel"], 1)

"""The Triton kernels as compiled code: no spills, wide accesses, one exponential an element and sweep, no
recompilation. No GPU needed.

Under the Triton that is installed, and under every other version whose folder lies beside (`make triton-versions`).
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).with_name("helpers") / "triton_compile.py"
VERSIONS = ("3.6.0", "3.7.1", "3.8.0", "3.9.0")
WITH_CLUSTERS = ("3.8.0", "3.9.0")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
PER_ROW = 24  # accesses to what a row brings along and to the label's logit, of any width
SCALARS = 6  # exponentials once a row or block: ratio, importance weight, KL, the label's tanh, the rescale
# bytes: for sm_100 ptxas may put up to four words that no column depends on aside, once before the loop over rows
PARKED = 16
SWEEPS = {"policy_loss_kernel": 2, "logprobs_fwd_kernel": 1, "logprobs_bwd_kernel": 1, "scale_rows_kernel": 0}
SMALL = {"partial_returns_kernel", "credit_kernel"}  # no logits


@pytest.fixture(params=[triton.__version__, *(v for v in VERSIONS if v != triton.__version__)])
def version(request: pytest.FixtureRequest) -> str:
    if request.param != triton.__version__ and not (ROOT / ".triton" / request.param / "triton").is_dir():
        pytest.skip(f"no Triton {request.param} in .triton: make triton-versions")
    return request.param


def run(script: Path, version: str, cache_dir: str, *arguments: str) -> str:
    """What a script printed under ``version``. Never interpreted, and with a cache of its own, so that something is
    compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": cache_dir}
    if version != triton.__version__:
        environment["PYTHONPATH"] = str(ROOT / ".triton" / version)
    done = subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def lines(version: str, cache_dir: str, *arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run(SCRIPT, version, cache_dir, *arguments).splitlines()]


@pytest.mark.parametrize("target", TARGETS)
def test_compiled_code(version: str, target: str, tmp_path: Path) -> None:
    kernels = lines(version, str(tmp_path), target)
    assert {k["triton"] for k in kernels} == {version}
    assert {k["kernel"] for k in kernels} == {*SWEEPS, *SMALL}
    clusters = (2, 4, 8) if version in WITH_CLUSTERS and target in ("sm_90", "sm_100") else ()
    forms = {
        (k["one_block"], k["keep_exp"], k["ctas"], k["dtype"]) for k in kernels if k["kernel"] == "policy_loss_kernel"
    }
    for dtype in ("bfloat16", "float32"):
        assert {(True, True, 1, dtype), (True, False, 1, dtype), (False, False, 1, dtype)} <= forms
        assert {ctas for _, _, ctas, of in forms if of == dtype} == {1, *clusters}
    for k in kernels:
        assert k["spilled"] <= (PARKED if target == "sm_100" else 0), k
        if k["kernel"] in SMALL:
            continue
        sweeps = SWEEPS[k["kernel"]]
        if k["kernel"] == "policy_loss_kernel" and k["keep_exp"] and not k["entropy_term"] and not k["softcap"]:
            sweeps = 1  # the exponentials of the first are still there
        if k["aligned"]:
            assert k["wide_stores"] >= k["wide"] or k["kernel"] == "logprobs_fwd_kernel", k
            assert k["wide_loads"] >= k["wide"] * (1 if k["one_block"] else max(sweeps, 1)), k
            assert k["narrow"] <= PER_ROW, k
        least = k["columns"] * sweeps
        assert least <= k["exponentials"] <= least * (2 if k["softcap"] else 1) + SCALARS, k
        # maximum, sum and, with an entropy, one more: each is exchanged once, between barriers of the cluster
        assert (k["exchanges"] > 0) == (k["ctas"] > 1), k


def test_nothing_that_varies_is_compiled_in(version: str, tmp_path: Path) -> None:
    (variants,) = lines(version, str(tmp_path), "specialise")
    assert variants == dict.fromkeys([*SWEEPS, *SMALL, "policy_loss_kernel (fused)"], 1)


def test_the_probe_knows_who_has_clusters(version: str, tmp_path: Path) -> None:
    """The version gate stands for what the probe would find; older versions end with an error or a signal, in the
    probe's own process."""
    probe = ROOT / "kernels/triton/cluster_probe.py"
    if version in WITH_CLUSTERS:
        run(probe, version, str(tmp_path), "90")
    else:
        with pytest.raises(AssertionError):
            run(probe, version, str(tmp_path), "90")

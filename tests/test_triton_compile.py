"""The Triton kernels as compiled code: no spills, wide accesses, one exponential an element and sweep, no
recompilation. No GPU needed.

Under the Triton that is installed, and under every other version whose folder lies beside (`make triton-versions`).
"""

import importlib.util
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
# each tuple one process, whose imports take seconds
TARGETS = [("sm_90", "specialise"), ("few", "sm_80", "sm_100", "gfx942")]
if os.environ.get("PPG_FAST_EVERY_TRITON"):  # make test-triton
    TARGETS[1:] = [(target,) for target in TARGETS[1][1:]]
PER_ROW = 23  # accesses to what a row brings along and to the label's logit, of any width
SUMMED = 2048  # losses that a program sums at a time, each thread its share
SCALARS = 9  # exponentials once a row or block: ratio, gate, importance weight, KL, the label's tanh, the rescale
# bytes: for sm_100 ptxas may put up to four words that no column depends on aside, once before the loop over rows
PARKED = 16
SWEEPS = {"policy_loss_kernel": 2, "logprobs_fwd_kernel": 1, "logprobs_bwd_kernel": 1, "scale_rows_kernel": 0}
# of two rows: each once for its sum; then p and q, or p twice, or 2^-|log2(p / q)| as well, twice as is p
SWEEPS["distillation_kernel"] = 4
JSD, OF_JSD = 2, 7
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


@pytest.mark.parametrize("targets", TARGETS, ids=" ".join)
def test_compiled_code(version: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    """Every case for sm_90, each form of a kernel once for the others; under `make test-triton` every case for all."""
    found = [json.loads(line) for line in run(SCRIPT, version, str(tmp_path), *targets).splitlines()]
    kernels = [k for k in found if "kernel" in k]
    assert {k["target"] for k in kernels} == {*targets} - {"few", "specialise"}
    for target in {k["target"] for k in kernels}:
        check_code(version, target, [k for k in kernels if k["target"] == target], "few" in targets)
    if "specialise" in targets:
        names = dict.fromkeys([*SWEEPS, *SMALL, "policy_loss_kernel (fused)"], 1)
        assert found[-1] == names, "what varies from call to call is compiled in"


def check_code(version: str, target: str, kernels: list[dict[str, Any]], few: bool) -> None:
    assert {k["triton"] for k in kernels} == {version}
    assert {k["kernel"] for k in kernels} == {*SWEEPS, *SMALL}
    clusters = (2, 4, 8) if version in WITH_CLUSTERS and target in ("sm_90", "sm_100") else ()
    forms = {
        (k["one_block"], k["keep_exp"], k["ctas"], k["dtype"]) for k in kernels if k["kernel"] == "policy_loss_kernel"
    }
    for dtype in ("bfloat16", "float32"):
        assert {(True, True, 1, dtype), (False, False, 1, dtype)} <= forms
        assert {ctas for _, _, ctas, of in forms if of == dtype} == {1, *(clusters[-1:] if few else clusters)}
    assert (True, False, 1, "float32") in forms
    for k in kernels:
        assert k["spilled"] <= (PARKED if target == "sm_100" else 0), k
        if k["kernel"] in SMALL:
            continue
        assert k["at_once"] * k["threads"] >= 512, f"plan.programs counts on more: {k}"
        sweeps = SWEEPS[k["kernel"]]
        if k["kind"] == JSD:
            sweeps = OF_JSD
        if k["kernel"] == "policy_loss_kernel" and k["keep_exp"] and not k["entropy_term"] and not k["softcap"]:
            sweeps = 1  # the exponentials of the first are still there
        if k["aligned"]:
            assert k["wide_stores"] >= k["wide"] or k["kernel"] == "logprobs_fwd_kernel", k
            assert k["wide_loads"] >= k["wide"] * (1 if k["one_block"] else max(sweeps, 1)), k
            assert k["narrow"] <= PER_ROW + SUMMED // k["threads"], k
        least = k["columns"] * sweeps
        assert least <= k["exponentials"] <= least * (2 if k["softcap"] else 1) + SCALARS, k
        # maximum, sum and, with an entropy, one more: each is exchanged once, between barriers of the cluster
        assert (k["exchanges"] > 0) == (k["ctas"] > 1), k
        assert k["one_ticket"] is not False, k


PTX = """
	mov.u32 	%r1, %tid.x;
	mov.u32 	%r2, {rank};
	or.b32 	%r3, %r1, %r2;
	setp.eq.b32 	%p1, %r3, 0;
	@%p1 atom.global.gpu.acq_rel.add.u32 %r4, [ %rd1 + 0 ], %r5;
	barrier.cluster.wait.aligned;
	{load} 	%r6, [%r7];
	setp.ne.b32 	%p2, %r6, %r8;
	@%p2 bra 	$L__BB0_21;
	ld.shared::cluster.b32 	%r9, [%r7];
"""


@pytest.mark.parametrize(
    ("rank", "load", "right"),
    [
        ("%cluster_ctarank", "ld.shared::cluster.b32", True),
        ("%laneid", "ld.shared::cluster.b32", False),  # a ticket for each CTA
        ("%cluster_ctarank", "ld.shared.b32", False),  # of which only one knows the number
    ],
)
def test_a_ticket_is_a_clusters(rank: str, load: str, right: bool) -> None:
    spec = importlib.util.spec_from_file_location("cluster_probe", ROOT / "kernels/triton/cluster_probe.py")
    assert spec is not None
    assert spec.loader is not None
    probe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(probe)
    assert probe.one_ticket_a_cluster(PTX.format(rank=rank, load=load)) is right


def test_the_probe_knows_who_has_clusters(version: str, tmp_path: Path) -> None:
    """The version gate stands for what the probe would find; older versions end with an error or a signal, in the
    probe's own process."""
    probe = ROOT / "kernels/triton/cluster_probe.py"
    if version in WITH_CLUSTERS:
        run(probe, version, str(tmp_path), "90")
    else:
        with pytest.raises(AssertionError):
            run(probe, version, str(tmp_path), "90")

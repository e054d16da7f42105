"""A GPU's min and max give the other number where one is NaN, unless the instruction says .NaN; Triton's interpreter
and the emulator hide it. So the scalar loss is looked at as PTX."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from emulator.build import cached, digest
from test_cuda_compile import NVCC

from ppg_fast.losses import LOSS_TYPES, SEQUENCE_LEVEL

ROOT = Path(__file__).parents[1]
DROPPING = re.compile(r"^\s*(?:@\S+ )?((?:min|max)(?!\S*\.NaN)\S*f(?:16|32|64)\S*)", re.MULTILINE)
CUDA = """
#include "policy_term.h"
extern "C" __global__ void scalar_loss(const ppg::TermArgs* a, const float* x, ppg::Term* out) {
  *out = ppg::policy_term(*a, x[0], x[1], x[2], x[3], x[4], x + 5, x[6]);
}
"""


def test_the_pattern_finds_what_drops_a_nan():
    ptx = "\tmin.f32 \t%r1, %r2, %r3;\n\t@%p1 max.ftz.f32 %r1, %r2, %r3;\n\tmax.NaN.f32 %r1;\n\tmin.s32 %r1;\n"
    assert DROPPING.findall(ptx) == ["min.f32", "max.ftz.f32"]


def test_of_triton(tmp_path):
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(ROOT / "tests/helpers/triton_scalar.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {line["loss"]: line["ptx"] for line in map(json.loads, done.stdout.splitlines())}
    assert {loss.split()[0].lower() for loss in found} == {*LOSS_TYPES} - {*SEQUENCE_LEVEL}
    for loss, ptx in found.items():
        assert "ex2.approx" in ptx, loss
        assert DROPPING.findall(ptx) == [], loss


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_of_cuda():
    flags = ["-std=c++17", "-O3", "-arch=compute_90", "-ptx", f"-I{ROOT / 'csrc'}"]

    def make(out: Path) -> None:
        source = out.with_suffix(".cu")
        source.write_text(CUDA)
        done = subprocess.run([str(NVCC), *flags, "-o", str(out), str(source)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    texts = [(ROOT / "csrc" / name).read_text() for name in ("policy_term.h", "args.h")]
    ptx = cached(digest("scalar", *flags, CUDA, *texts), ".ptx", make).read_text()
    assert "ex2.approx" in ptx
    assert DROPPING.findall(ptx) == []

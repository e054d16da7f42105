"""Threads that wait give their core up, unless the user has said how they wait."""

import os
import subprocess
import sys

import pytest
import torch

from ppg_fast import openmp
from ppg_fast.cli import main

FIRST, AFTER_TORCH = "import ppg_fast", "import torch, ppg_fast"


def told(code, **environment):
    """What a fresh process's libgomp says that it was told; None where torch has another OpenMP."""
    kept = {name: value for name, value in os.environ.items() if name not in openmp.SETTINGS}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, **environment, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]
    return lines[0].split("'")[1] if lines else None


@pytest.mark.parametrize(
    ("code", "environment", "spins"),
    [
        (FIRST, {}, str(openmp.SPINS)),
        (FIRST, {"GOMP_SPINCOUNT": "77"}, "77"),
        (FIRST, {"OMP_WAIT_POLICY": "active"}, "30000000000"),
        (AFTER_TORCH, {}, "300000"),
    ],
)
def test_libgomp_is_told_before_torch_loads_it(code, environment, spins):
    found = told(code, **environment)
    if found is None:
        pytest.skip("torch has another OpenMP here")
    assert found == spins


def test_info_says_how_threads_wait(capsys, monkeypatch):
    for name in openmp.SETTINGS:
        monkeypatch.delenv(name, raising=False)
    main(["info"])
    assert "CPU threads that wait: spin for milliseconds" in capsys.readouterr().out
    monkeypatch.setenv("GOMP_SPINCOUNT", "123")
    main(["info"])
    assert "CPU threads that wait: GOMP_SPINCOUNT=123\n" in capsys.readouterr().out


def test_info_says_how_heads_of_16_bits_are_multiplied(capsys, monkeypatch):
    from ppg_fast.ops import products

    for own, said in ((True, "by the CPU's own products"), (False, "in float32, tile by tile")):
        monkeypatch.setattr(products, "product_dtype", lambda dtype, device, own=own: dtype if own else torch.float32)
        main(["info"])
        out = capsys.readouterr().out
        assert all(f"  a head of {dtype} on cpu is multiplied {said}" in out for dtype in ("bfloat16", "float16"))

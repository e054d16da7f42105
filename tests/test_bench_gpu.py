"""`make gpu` as far as a CPU allows: the package is found, the tools are read, every part measures."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ppg_fast.bench import step, timing
from ppg_fast.bench.gpu import bars, build, counts, measure, parts, plans, tools
from ppg_fast.bench.gpu.grid import cases
from ppg_fast.bench.gpu.lines import Lines as Reader
from ppg_fast.bench.gpu.lines import append

ROOT = Path(__file__).parents[1]
OPS = {"policy_loss", "logprobs", "linear", "distillation"}


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    """As in test_bench."""
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 2**16)


# ---- the package without installing ----------------------------------------------------------------------------------
def test_the_package_is_found_without_being_installed(tmp_path):
    """In a Python that has torch and its needs but none of our tools, and not this package: found, built for nothing,
    imported."""
    bare = tmp_path / "bare"
    bare.mkdir()
    wanted = (
        "torch", "torchgen", "functorch", "numpy", "typing_extensions.py", "sympy", "mpmath", "jinja2", "markupsafe",
        "networkx",
        "filelock", "fsspec", "triton", "setuptools", "numpy.libs", "torch.libs",
    )  # fmt: skip
    packages = Path(torch.__file__).parents[1]
    for name in wanted:
        if (packages / name).exists():
            (bare / name).symlink_to(packages / name)
    site = tmp_path / "site"
    build.link(ROOT, site)
    environment = {**os.environ, **build.environment(site)}
    environment["PYTHONPATH"] = f"{site}{os.pathsep}{bare}"
    environment.pop("TRITON_INTERPRET", None)
    program = (
        "import sys, ppg_fast, ppg_fast.bench.gpu.measure, ppg_fast.bench.command\n"
        "from ppg_fast import backends\n"
        "assert backends.why_not('cpu') is None, backends.why_not('cpu')\n"
        "assert 'triton' not in (backends.why_not('triton') or '') or 'CUDA' in backends.why_not('triton'), "
        "backends.why_not('triton')\n"
        f"assert ppg_fast.__file__.startswith({str(site)!r}), ppg_fast.__file__\n"
        "assert not {'trl', 'liger_kernel', 'transformers', 'pytest'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=site, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_links_are_the_package_as_installed(tmp_path):
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    assert {f"ppg_fast.{name}": folder for name, folder in build.WITHOUT_INSTALLING.items()} == project
    build.link(ROOT, tmp_path)
    build.link(ROOT, tmp_path)  # again, over what is there
    assert (tmp_path / "ppg_fast/kernels/__init__.py").samefile(ROOT / "kernels/triton/__init__.py")
    assert (tmp_path / "ppg_fast/bench/gpu/driver.py").samefile(ROOT / "bench/gpu/driver.py")
    assert (tmp_path / "ppg_fast/ops").samefile(ROOT / "ppg_fast/ops")


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("9.0", ["arch=compute_90a,code=sm_90a"]),
        ("9.0a", ["arch=compute_90a,code=sm_90a"]),
        (
            "8.0 8.9+PTX",
            ["arch=compute_80,code=sm_80", "arch=compute_89,code=compute_89", "arch=compute_89,code=sm_89"],
        ),
        ("Hopper", ["arch=compute_90,code=compute_90", "arch=compute_90a,code=sm_90a"]),
        ("", None),
    ],
)
def test_architectures_are_chosen_as_torch_does(monkeypatch, asked, expected):
    scope = {"__name__": "setup"}
    exec((ROOT / "setup.py").read_text().split("class Build")[0], scope)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert scope["architectures"]() == (list(scope["ARCHITECTURES"]) if expected is None else expected)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda n: (9, 0))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    assert scope["architectures"]() == ["arch=compute_90a,code=sm_90a"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.z")
    with pytest.raises(ValueError, match=r"Unknown CUDA arch \(9\.z\)"):
        scope["architectures"]()


def test_gpu_tests_are_found():
    names = [Path(path).name for path in build.gpu_tests(ROOT)]
    assert {
        "test_gpu.py",
        "test_policy_loss.py",
        "test_linear.py",
        "test_logprobs.py",
        "test_partial_returns.py",
    } <= set(names)
    assert "test_trainer.py" not in names


# ---- what the tools say ----------------------------------------------------------------------------------------------
NCU_COLUMNS = """==PROF== Connected to process 77 (/usr/bin/python3.12)
some line of the program, with "quotes"
==PROF== Profiling "policy_loss_onepass": 0%....50%....100% - 1 pass
"ID","Process ID","Process Name","Kernel Name","Context","dram__bytes_read.sum","dram__bytes_write.sum","gpu__time_duration.sum"
"","","","","","Gbyte","Mbyte","us"
"0","77","python3.12","policy_loss_onepass","1","2.10","2,050.5","1,012.3"
"1","77","python3.12","policy_loss_twopass","1","1.00","0.5","2.0"
==PROF== Disconnected from process 77
"""  # noqa: E501
NCU_LINES = """"ID","Process ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","77","policy_loss_onepass","Command line profiler metrics","dram__bytes_read.sum","byte","2,100,000,000"
"0","77","policy_loss_onepass","Command line profiler metrics","dram__bytes_write.sum","byte","2,050,500,000"
"0","77","policy_loss_onepass","Command line profiler metrics","gpu__time_duration.sum","nsecond","1,012,300"
"""
SANITIZER = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at policy_loss_twopass
========= ERROR SUMMARY: 3 errors
========= COMPUTE-SANITIZER
========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)
"""


def test_ncu_is_read_in_both_layouts():
    first = {
        "kernel": "policy_loss_onepass",
        tools.DRAM[0]: 2.1e9,
        tools.DRAM[1]: 2.0505e9,
        tools.DRAM[2]: pytest.approx(1.0123e-3),
    }
    assert tools.ncu_kernels(NCU_COLUMNS)[0] == first
    assert len(tools.ncu_kernels(NCU_COLUMNS)) == 2
    assert tools.ncu_kernels(NCU_LINES) == [first]
    assert tools.ncu_kernels("==ERROR== no counters") == []
    lines = [
        {"op": "policy_loss", "V": 7, "read": 2e9, "write": 2e9},
        {"op": "logprobs", "V": 7, "read": 1e9, "write": 0},
    ]
    record = {"results": lines, "cases": [], "statuses": [0]}
    assert parts._moved(record, NCU_COLUMNS) == ({}, None)
    assert lines[0]["over_least"] == pytest.approx(4.1505 / 4)
    assert parts._moved(record, NCU_LINES)[1].startswith("1 kernels for 2 calls")


def test_the_sanitizers_are_read():
    def collect(text, status=0):
        record = {"cases": [], "statuses": [status]}
        found = {tool: parts._sanitized(tool)(record, text) for tool in ("memcheck", "racecheck")}
        return [found[tool][0]["summaries"] for tool in found], [found[tool][1] for tool in found]

    found, reasons = collect(SANITIZER, 9)
    assert found == [
        [{"tool": "memcheck", "errors": 3}],
        [{"tool": "racecheck", "hazards": 2, "errors": 1, "warnings": 1}],
    ]
    assert reasons == ["3 errors", "1 errors"]
    clean = SANITIZER.replace("3 errors", "0 errors").replace(
        "2 hazards displayed (1 error, 1 warning)", "0 hazards displayed (0 errors, 0 warnings)"
    )
    assert collect(clean)[1] == [None, None]
    assert collect(clean.split("=========     at")[0])[1] == ["no summary", "no summary"]
    assert collect(clean, 1)[1][0].startswith("exit status 1")


# ---- what is measured ------------------------------------------------------------------------------------------------
class Lines(measure.Report):
    def __init__(self, seconds=60.0):
        super().__init__(None, "cpu", time.time() + seconds, True)
        self.lines = []

    def add(self, **line):
        if self.path is not None:
            super().add(**line)
        self.lines.append(json.loads(json.dumps(line)))


@pytest.mark.parametrize("part", measure.PARTS)
def test_every_measured_part_runs(part, tmp_path):
    if part == "steps":
        pytest.importorskip("transformers")
    lines = Lines()
    lines.path = tmp_path / "lines.jsonl"
    measure.PARTS[part](lines)
    assert lines.failed == []
    assert Reader(lines.path).new() == lines.lines
    found = [line for line in lines.lines if not set(line) & {"missing", "benchmarks", "started", "ended"}]
    assert all(line["outcome"] == "passed" for line in lines.lines if "ended" in line)
    if part == "smoke":
        assert {line["op"] for line in found} == {*OPS, "partial_returns"}
    if part == "counts":
        assert {line["path"] for line in found} == set(counts.calls("cpu", True))
    if part == "bench":
        assert {e["params"]["op"] for line in lines.lines for e in line.get("benchmarks", [])} == OPS
        assert [line["chunk_rows"] for line in found] == [16, 32]
    if part == "steps":
        assert {line["tokens"] for line in found} == {128, 256}
        assert all(line["fits"] and 0 < line["loss_seconds"] < line["seconds"] for line in found)
        assert {line["offload"] for line in found} == {False, True}
    if part == "dram":
        assert [(line["op"], line["write"]) for line in found] == [("logprobs", 0), ("policy_loss", 16 * 512 * 2)]


def test_what_there_is_no_time_for_is_a_line():
    lines = Lines(seconds=10.0)
    assert lines.case("long", lambda: 1 / 0, needed=20.0) is None
    assert lines.lines[0]["missing"]["long"].startswith("not measured: 20 s needed, ")
    assert lines.failed == []
    lines.case("broken", lambda: 1 / 0)
    assert lines.failed == ["broken"]
    assert lines.lines[1] == {"started": "broken", "limit_s": 4 * measure.CASE}
    assert lines.lines[2] == {"missing": {"broken": "failed: ZeroDivisionError: division by zero"}}
    assert (lines.lines[3]["ended"], lines.lines[3]["outcome"]) == ("broken", "failed")


def test_what_has_ended_is_not_done_again(tmp_path):
    """Not in the process that is begun again after one that hung."""
    path = tmp_path / "lines.jsonl"
    first = measure.Report(path, "cpu", time.time() + 60, True)
    first.case("good", lambda: first.add(found=1))
    path.write_text(path.read_text() + '{"started": "ha')  # killed in the middle of a line
    append(path, ended="hangs", outcome="hung", seconds=1.0, message="")
    second = measure.Report(path, "cpu", time.time() + 60, True)
    for name in ("good", "hangs", "next"):
        second.case(name, lambda name=name: second.add(found=name))
    assert [line["found"] for line in Reader(path).new() if "found" in line] == [1, "next"]


def test_a_device_that_takes_no_more_calls_ends_the_process(monkeypatch):
    lines, left = Lines(), []
    lines.device = "cuda"
    monkeypatch.setattr(measure, "lost", lambda: True)
    monkeypatch.setattr(measure, "leave", lambda: left.append(lines.lines[-1]["ended"]))
    lines.case("broken", lambda: 1 / 0)
    assert left == ["broken"]  # once it is written down


def test_the_grid_asks_what_the_bars_ask():
    found = {
        (case.op, case.N, case.V, case.D, case.dtype, case.active, case.zero) for case, _, _ in cases("cuda", False)
    }
    wanted = {("policy_loss", 8192, V, 0, "bfloat16", 1.0, 0.0) for V in bars.VOCABULARIES}
    wanted |= {("logprobs", 8192, V, 0, "bfloat16", 1.0, 0.0) for V in bars.VOCABULARIES}
    wanted |= {("linear", 8192, 128256, 4096, "bfloat16", active, 0.0) for active in (1.0, 0.25)}
    wanted |= {("distillation", 8192, 128256, 4096, "bfloat16", 1.0, 0.0)}
    assert wanted <= found
    bars_alone = [case for case in cases("cuda", False) if case[2]]
    assert sum(ours for _, ours, _ in bars_alone) < 90 - 12
    assert sum(ours for _, ours, _ in cases("cuda", False)) < 240


def test_parameters_are_counted_right():
    pytest.importorskip("transformers")
    model = step.make_model("smallest", "cpu", torch.float32)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    assert sum(p.numel() for p in matrices) == step.SHAPES["smallest"].parameters
    assert abs(step.SHAPES["Qwen3-0.6B"].parameters / 0.596e9 - 1) < 0.01
    assert abs(step.SHAPES["Qwen3-8B"].parameters / 8.19e9 - 1) < 0.01


def test_a_worker_without_its_gpu_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert measure.main(["counts"]) == 1
    assert "torch sees no CUDA device" in capsys.readouterr().err


NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_the_plans_program_compiles(tmp_path):
    from emulator.build import cached, digest

    def make(out):
        words = [word for word in plans.command(ROOT, out) if word != "-O3"]
        done = subprocess.run([NVCC, *words[1:], "--ptx"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    cached(digest("plans", plans.checksum(ROOT)), ".ptx", make)

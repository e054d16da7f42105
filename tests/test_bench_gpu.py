"""`make gpu` as far as a CPU allows: the parts run, are bounded and recorded, the tools are read, the files become
documents."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ppg_fast.bench import render
from ppg_fast.bench.gpu import __main__ as command
from ppg_fast.bench.gpu import bars, build, counts, driver, report, steps, tools, worker
from ppg_fast.bench.gpu.grid import cases
from ppg_fast.bench.tables import NOT_MEASURED

ROOT = Path(__file__).parents[1]
SAY = [sys.executable, "-S", "-c"]


# ---- the driver ------------------------------------------------------------------------------------------------------
def told(statuses, output, lines):
    """Collects everything, and passes where all commands did."""
    return {"output": output, "count": len(lines)}, None if statuses == [0] * len(statuses) else f"{statuses}"


def stored(tmp_path):
    return driver.Store(tmp_path / "out", "gpu.cuda", driver.header("make gpu", "abc"))


def content(store):
    return json.loads(store.path.read_text())


def test_parts_pass_fail_or_are_missing_and_the_others_go_on(tmp_path):
    store, out = stored(tmp_path), tmp_path / "lines.jsonl"
    write = f"import json; open({str(out)!r}, 'a').write(json.dumps({{'found': 1}}) + chr(10) + '{{\"half a li')"
    parts = [
        driver.Part("bad", 60, [[*SAY, "print('went wrong'); raise SystemExit(3)"]], told),
        driver.Part("absent", 60, [["true"]], told, missing="nothing is not on PATH"),
        driver.Part("no such program", 60, [["/no/such/program"]], told),
        driver.Part("good", 60, [[*SAY, write], [*SAY, "print({seconds})"]], told, lines=out),
    ]
    assert not driver.run(parts, store, 300, tmp_path / "logs")
    found = content(store)["parts"]
    assert {name: part["status"] for name, part in found.items()} == {
        "bad": "failed", "absent": "missing", "no such program": "failed", "good": "passed",
    }  # fmt: skip
    assert found["bad"]["reason"] == "[3]"
    assert "went wrong" in found["bad"]["output"]
    assert found["absent"]["reason"] == "nothing is not on PATH"
    assert found["good"]["results"] == [{"found": 1}]
    assert found["good"]["output"].strip() == "27"  # nine tenths of its half of a minute
    assert driver.run(parts[3:], store, 300, tmp_path / "logs")


def test_a_part_is_stopped_with_all_that_it_started(tmp_path):
    store, mark = stored(tmp_path), tmp_path / "alive"
    child = f"import time, pathlib\nwhile True: pathlib.Path({str(mark)!r}).touch(); time.sleep(0.05)"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-S', '-c', {child!r}]); time.sleep(600)"
    parts = [
        driver.Part("long", 2.0, [[*SAY, parent], [*SAY, "pass"]], told),
        driver.Part("late", 60, [["true"]], told),
    ]
    start = time.monotonic()
    assert not driver.run(parts, store, 6.0, tmp_path / "logs")
    assert time.monotonic() - start < 30
    found = content(store)["parts"]
    assert found["long"]["reason"] == "stopped after 2 s; [None]"
    assert found["late"].get("reason", "no time left: ").startswith("no time left: ")
    mark.unlink(missing_ok=True)
    time.sleep(0.5)
    assert not mark.exists()


def test_a_kill_loses_nothing_that_was_found(tmp_path):
    """The whole process, killed in the middle of its second part."""
    out, pid = tmp_path / "lines.jsonl", tmp_path / "pid"
    write = f"open({str(out)!r}, 'a').write('{{\"found\": 2}}\\n'); open({str(pid)!r}, 'w').write(str(os.getpid()))"
    slow = f"import os, time; {write}; time.sleep(600)"
    program = f"""
from pathlib import Path
from bench.gpu.driver import Part, Store, header, run
here, tell = Path({str(tmp_path)!r}), lambda *_: ({{}}, None)
two = Part("two", 60, [[*{SAY!r}, {slow!r}]], tell, lines=here / "lines.jsonl")
store = Store(here, "gpu.cuda", header("make gpu", "abc"))
run([Part("one", 60, [[*{SAY!r}, "pass"]], tell), two], store, 300, here / "logs")
"""
    running = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not ('"found": 2' in _text(tmp_path / "gpu.cuda.json") and _text(pid)):
        time.sleep(0.1)
    running.kill()
    running.wait()
    found = json.loads((tmp_path / "gpu.cuda.json").read_text())["parts"]
    assert found["one"]["status"] == "passed"
    assert found["two"]["status"] == "running"
    assert found["two"]["results"] == [{"found": 2}]
    os.kill(int(pid.read_text()), signal.SIGKILL)  # the part, which outlives a driver that had no time to end it


def _text(path):
    return path.read_text() if path.exists() else ""


def test_the_driver_needs_nothing_but_python():
    """What runs before the package is built must not import it, nor torch."""
    program = "import sys; import bench.gpu.__main__; assert not {'torch', 'numpy', 'ppg_fast'} & set(sys.modules)"
    subprocess.run([sys.executable, "-S", "-c", program], cwd=ROOT, check=True)


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
        "import sys, ppg_fast, ppg_fast.bench.gpu.worker, ppg_fast.bench.command\n"
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
    assert command._moved([0], NCU_COLUMNS, lines) == ({}, None)
    assert lines[0]["over_least"] == pytest.approx(4.1505 / 4)
    assert command._moved([0], NCU_LINES, lines)[1].startswith("1 kernels for 2 calls")


def test_the_sanitizers_are_read():
    found, reason = command._sanitized([9, 9], SANITIZER, [])
    assert found["summaries"] == [
        {"tool": "memcheck", "errors": 3},
        {"tool": "racecheck", "hazards": 2, "errors": 1, "warnings": 1},
    ]
    assert reason == "memcheck: 3 errors; racecheck: 1 errors"
    clean = SANITIZER.replace("3 errors", "0 errors").replace(
        "2 hazards displayed (1 error, 1 warning)", "0 hazards displayed (0 errors, 0 warnings)"
    )
    assert command._sanitized([0, 0], clean, [])[1] is None
    assert (
        command._sanitized([0, 0], clean.split("=========     at")[0], [])[1]
        == "memcheck gave no summary; racecheck gave no summary"
    )
    assert command._sanitized([1, 0], clean, [])[1].startswith("exit status 1")


def test_pytest_is_read(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\npytestmark = pytest.mark.gpu\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no such thing')\ndef test_absent(): pass\n"
    )
    (tmp_path / "pyproject.toml").write_text('[tool.pytest.ini_options]\nmarkers = ["gpu: x"]\n')
    made = tools.pytest_command(
        tmp_path, [str(tmp_path / "test_some.py")], tmp_path / "junit.xml", 0, ["-p", "no:xdist"]
    )
    subprocess.run(made, cwd=tmp_path, capture_output=True)
    found, reason = tools.junit(tmp_path / "junit.xml")
    assert (found["passed"], found["failed"], found["skipped"], found["why_skipped"]) == (1, 1, 1, ["no such thing"])
    assert reason.startswith("1 of 3 tests failed, first ")
    assert "assert 1 == 2" in found["failures"][0]["message"]
    assert tools.junit(tmp_path / "other.xml") == ({}, "pytest wrote no report")


# ---- what is measured ------------------------------------------------------------------------------------------------
class Lines(worker.Report):
    def __init__(self, seconds=60.0):
        super().__init__(None, "cpu", seconds, True)
        self.lines = []

    def add(self, **line):
        self.lines.append(json.loads(json.dumps(line)))


@pytest.mark.parametrize("part", worker.PARTS)
def test_every_measured_part_runs(part):
    if part == "steps":
        pytest.importorskip("transformers")
    lines = Lines()
    worker.PARTS[part](lines)
    assert lines.failed == []
    found = [line for line in lines.lines if set(line) - {"missing", "benchmarks"}]
    if part == "counts":
        assert {line["path"] for line in found} == set(counts.calls("cpu", True))
    if part == "bench":
        assert {e["params"]["op"] for line in lines.lines for e in line.get("benchmarks", [])} == {
            "policy_loss",
            "logprobs",
            "linear",
        }
        assert [(line["chunk_rows"], line["second_stream"]) for line in found] == [
            (16, False),
            (16, True),
            (32, False),
            (32, True),
        ]
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
    assert lines.lines[1] == {"missing": {"broken": "failed: ZeroDivisionError: division by zero"}}


def test_the_grid_asks_what_the_bars_ask():
    found = {
        (case.op, case.N, case.V, case.D, case.dtype, case.active, case.zero) for case, _, _ in cases("cuda", False)
    }
    wanted = {("policy_loss", 8192, V, 0, "bfloat16", 1.0, 0.0) for V in bars.VOCABULARIES}
    wanted |= {("logprobs", 8192, V, 0, "bfloat16", 1.0, 0.0) for V in bars.VOCABULARIES}
    wanted |= {("linear", 8192, 128256, 4096, "bfloat16", active, 0.0) for active in (1.0, 0.25)}
    assert wanted <= found
    assert sum(seconds for *_, seconds in cases("cuda", False)) < 240


def test_parameters_are_counted_right():
    pytest.importorskip("transformers")
    model = steps.make_model(steps.TINY, "cpu", torch.float32)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    assert sum(p.numel() for p in matrices) == steps.TINY.parameters
    assert abs(steps.SMALL.parameters / 0.596e9 - 1) < 0.01
    assert abs(steps.LARGE.parameters / 8.19e9 - 1) < 0.01


def test_a_worker_without_its_gpu_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert worker.main(["counts"]) == 1
    assert "torch sees no CUDA device" in capsys.readouterr().err


NVCC = shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
def test_the_plans_program_compiles(tmp_path):
    from emulator.build import cached, digest

    texts = [
        p.read_text()
        for p in sorted([*(ROOT / "csrc").rglob("*.*"), ROOT / "bench/gpu/plans.cu"])
        if p.suffix in (".h", ".cuh", ".cu")
    ]

    def make(out):
        flags = ["-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "--ptx"]
        done = subprocess.run(
            [NVCC, *flags, "-o", out, str(ROOT / "bench/gpu/plans.cu")], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    cached(digest("plans", *texts), ".ptx", make)


# ---- documents -------------------------------------------------------------------------------------------------------
def entry(op, provider, median, kind="peer", **params):
    case = {
        "op": op,
        "N": 8192,
        "V": 128256,
        "D": 0,
        "dtype": "bfloat16",
        "active": 1.0,
        "zero": 0.0,
        "variant": "",
        "device": "cuda",
    }
    case |= {"threads": 1, "allocator": "default", "provider": provider, **params}
    stats = {"median": median, "p20": median, "p80": median, "min": median, "rounds": 5}
    group = f"{op} {case['V']} {case['active']}"
    return {
        "group": group,
        "param": provider,
        "params": case,
        "part": "bench",
        "stats": stats,
        "extra_info": {"kind": kind, "correct": True},
    }


def synthetic(when, commit, **parts):
    file = driver.header("make gpu", commit)
    file["datetime"] = when
    file["parts"] = {name: {"status": "passed", "seconds": 1.0, "results": results} for name, results in parts.items()}
    return file


def measured():
    """A run made up of round numbers."""
    bare = entry("linear", "three bare GEMMs", 0.033, "ceiling", D=4096)
    head = entry("linear", "ppg_fast cuda", 0.036, "ours", D=4096)
    head["extra_info"] |= {"peak_extra_bytes": 4.0e9, "chunk_bytes": 8192 * 128256 * 2}
    file = synthetic(
        "2026-01-01T00:00:00+00:00",
        "c" * 40,
        dram=[
            {
                "op": "policy_loss",
                "N": 8192,
                "V": 128256,
                "read": 2e9,
                "write": 2e9,
                "bytes": 4.1e9,
                "over_least": 1.025,
            }
        ],
        counts=[{"path": "rewards and logits to loss and dlogits", "launches": ["a", "b", "c"], "syncs": 0}],
        bench=[{"chunk_rows": 4096, "second_stream": True, "stats": {"median": 0.035}, "share_of_bare_gemms": 0.94}],
        steps=[
            {
                "model": "Qwen3-8B",
                "tokens": 262144,
                "offload": True,
                "provider": "ppg_fast cuda",
                "fits": True,
                "seconds": 60.0,
                "loss_seconds": 3.0,
                "peak_bytes": 2**36,
            },
            {
                "model": "Qwen3-8B",
                "tokens": 32768,
                "offload": False,
                "provider": "eager PyTorch",
                "fits": False,
                "reason": "out of memory",
            },
        ],
        plans=[
            {
                "plan": {"cluster": 4, "threads": 256, "slots": 5},
                "N": 8192,
                "V": 128256,
                "full": 100,
                "launched": True,
                "ms": 1.1,
                "copy_ms": 1.0,
                "share_of_copy": 0.91,
                "difference": 1e-6,
            }
        ],
    )
    file["benchmarks"] = [
        entry("policy_loss", "copy", 0.0010, "ceiling"),
        entry("policy_loss", "ppg_fast cuda, in place", 0.0011, "ours"),
        entry("policy_loss", "torch.compile", 0.0022), entry("policy_loss", "quack cross-entropy", 0.00105), bare, head,
        entry("linear", "ppg_fast cuda", 0.0099, "ours", D=4096, active=0.25),
        entry("logprobs", "read (sum)", 0.00050, "ceiling"),
        entry("logprobs", "ppg_fast cuda, with entropy", 0.00060, "ours"),
    ]  # fmt: skip
    return file


def test_bars_are_met_or_not():
    found = {bar[0]: (bar[3], bars.met(bar)) for bar in bars.bars(measured())}
    assert found["V 128,256: DRAM bytes of the fused kernel / (one read + one write)"] == (1.025, "met")
    assert found["V 128,256: share of the rate of a device copy"] == (pytest.approx(1 / 1.1), "met")
    assert found["V 128,256: time of torch.compile / ours"] == (pytest.approx(2.0), "met")
    assert found["V 128,256: time of quack's cross-entropy / ours"] == (pytest.approx(1.05 / 1.1), "**not met**")
    assert found["V 128,256: log-prob and entropy alone, share of the read rate"] == (
        pytest.approx(5 / 6),
        "**not met**",
    )
    assert found["from hidden states, V 128,256, D 4,096: share of three bare GEMMs"] == (pytest.approx(11 / 12), "met")
    assert found["its peak memory / (a chunk of logits + float32 d_weight + d_hidden)"][1] == "met"
    assert found["25% of the rows active: time / that of all"] == (pytest.approx(0.275), "met")
    assert found["rewards and logits to loss and dlogits: launches"] == (3.0, "**not met**")
    assert found["V 262,144: share of the rate of a device copy"] == (None, "not measured")


def test_a_wrong_result_meets_no_bar():
    file = measured()
    for e in file["benchmarks"]:
        e["extra_info"]["correct"] = e["extra_info"]["kind"] != "ours"
    assert {bars.met(bar) for bar in bars.bars(file) if "DRAM" not in bar[0] and "launches" not in bar[0]} == {
        "not measured",
        "met",
    }
    assert [bar[0] for bar in bars.bars(file) if bars.met(bar) == "met" and "DRAM" not in bar[0]] == [
        "rewards and logits to loss and dlogits: syncs"
    ]


def test_a_results_file_becomes_sections(tmp_path):
    """From a file that is made up and lives in a temporary folder: the documents of the repository know no such
    figures."""
    results = tmp_path / render.FOLDER
    results.mkdir(parents=True)
    page = (
        "<!-- bench:gpu -->\n<!-- /bench -->\n<!-- bench:gpu_summary -->\n<!-- /bench -->\n<!-- bench:machine "
        "-->\n<!-- /bench -->\n"
    )
    (tmp_path / "README.md").write_text(page)
    render.write(tmp_path)
    assert (tmp_path / "README.md").read_text().count(NOT_MEASURED) == 3
    (results / "gpu.cuda.json").write_text(json.dumps(measured()))
    render.write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("| V 128,256: share of the rate of a device copy | >= 90% | 91% | met |") == 2
    assert (
        "| Qwen3-8B, 262,144 tokens, checkpoints on the host | ppg_fast cuda | 60.0 s | 4,369 | 5% | 64.0 GiB |" in text
    )
    assert "| Qwen3-8B, 32,768 tokens | eager PyTorch | does not fit |" in text
    assert "| 128,256 | 100% | cluster 4, 256 threads, 5 slots | 1.100 ms | 91% | 1.0e-06 |" in text
    assert "| 4,096 | yes | 35.0 ms | 94% |" in text
    assert "`gpu.cuda`" in text
    later = synthetic(
        "2026-01-02T00:00:00+00:00",
        "d" * 40,
        counts=[{"path": "rewards and logits to loss and dlogits", "launches": ["a"], "syncs": 0}],
    )
    later["parts"]["dram"] = {"status": "missing", "reason": "ncu is not on PATH"}
    (results / "gpu-counts.cuda.json").write_text(json.dumps(later))
    render.write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert (
        "| rewards and logits to loss and dlogits: launches | <= 2 | 1 | met |" in text
    )  # the newer part beside the others of the older run
    assert "| V 128,256: DRAM bytes of the fused kernel / (one read + one write) | <= 1.05 | 1.02 | met |" in text


def test_without_a_results_file_no_figure_is_claimed():
    if list((ROOT / render.FOLDER).glob("gpu*.cuda.json")):
        pytest.skip("there is one")
    assert report.gpu_section(render.load(ROOT / render.FOLDER)) == NOT_MEASURED
    assert report.summary_section({}) == NOT_MEASURED


def test_the_command(tmp_path):
    """From a shell: a part that cannot run here fails by name, the file is there, the exit status says so; and bad
    usage."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--only", "nothing"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "got 'nothing'" in done.stderr
    if not build.is_current(ROOT):
        pytest.skip("the extension is older than its sources, and would be built first")
    run = [
        sys.executable,
        "-m",
        "bench.gpu",
        "--only",
        "sanitizer,counts",
        "--out",
        str(tmp_path),
        "--commit",
        "abc",
        "--device",
        "cpu",
        "--tiny",
    ]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    file = json.loads((tmp_path / "gpu-sanitizer-counts.cpu.json").read_text())
    assert file["commit_info"]["id"] == "abc"
    assert file["parts"]["counts"]["status"] == "passed", done.stdout
    assert file["machine_info"]["torch_cpu_capability"]
    if shutil.which("compute-sanitizer") is None:
        assert done.returncode == 1
        assert "sanitizer  missing: compute-sanitizer is not on PATH" in done.stdout


def test_a_signal_ends_the_running_part(tmp_path):
    pid = tmp_path / "pid"
    slow = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    program = f"""
from pathlib import Path
from bench.gpu.driver import Part, Store, header, run, stop_on_signals
stop_on_signals()
here, part = Path({str(tmp_path)!r}), Part("slow", 60, [[*{SAY!r}, {slow!r}]], lambda *_: ({{}}, None))
run([part], Store(here, "gpu.cuda", header("make gpu", "abc")), 300, here / "logs")
"""
    running = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not _text(pid):
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=60) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)

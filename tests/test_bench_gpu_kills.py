"""`make gpu` loses nothing: its processes and itself are killed at random moments, what was done before is there."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ppg_fast.bench.gpu import driver, process, store, tools
from ppg_fast.bench.gpu.lines import Lines

ROOT = Path(__file__).parents[1]
WORKER = """
import sys, time
from pathlib import Path
from bench.gpu.lines import append, ended
path, name = Path(sys.argv[1]), sys.argv[2]
for number in range(15):
    if f"{name} {number}" not in ended(path):
        append(path, started=f"{name} {number}", limit_s=30)
        time.sleep(0.02)
        append(path, ended=f"{name} {number}", outcome="passed", seconds=0.02, at=time.time())
"""
DRIVER = f"""
import sys
from pathlib import Path
from bench.gpu import driver, store
def part(name, processes):
    commands = [[sys.executable, "-S", "-c", {WORKER!r}, "{{lines}}", f"{{name}}{{n}}"] for n in range(processes)]
    ends = lambda record: {{case["outcome"] for case in record["cases"]}}
    tell = lambda record, output: ({{}}, None if ends(record) == {{"passed"}} else "bad")
    return driver.Part(name, 60, commands, tell, folder=Path.cwd())
kept = store.Store(Path(sys.argv[1]), "gpu.cuda", store.header("make gpu", "abc"), resume=True)
driver.run([part("one", 1), part("two", 2), part("three", 1)], kept, 300)
"""
ALL = {f"{process} {number}" for process in ("one0", "two0", "two1", "three0") for number in range(15)}


def begin(out):
    return subprocess.Popen([sys.executable, "-S", "-c", DRIVER, str(out)], cwd=ROOT, stdout=subprocess.DEVNULL)


def children(pid):
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def results(out):
    """Of the results file, whole whenever it is looked at: the pieces of work by part."""
    path = out / "gpu.cuda.json"
    parts = json.loads(path.read_text())["parts"] if path.exists() else {}
    return parts, [case for part in parts.values() for case in part["cases"]]


def told(out):
    """What the processes themselves have written."""
    paths = (out / "gpu.cuda.logs").glob("*.jsonl")
    return [line for path in paths for line in Lines(path).new() if line.get("outcome") == "passed"]


def test_the_driver_is_killed_at_random_moments(tmp_path):
    """What a process had ended a second before is in the results file, and what it had ended at all beside it; a run
    that goes on does the rest, and nothing twice."""
    draw, kills = random.Random(0), 0
    while kills < 4:
        running = begin(tmp_path)
        time.sleep(draw.uniform(0.2, 1.2))
        running.kill()
        killed = time.time()
        if running.wait() == 0:  # it was done before
            break
        kills += 1
        parts, cases = results(tmp_path)
        before = told(tmp_path)
        late = {line["ended"] for line in before if line["at"] < killed - 1} - {case["name"] for case in cases}
        assert late == set()
        assert all(part["status"] in ("passed", "running") for part in parts.values())
    assert kills
    assert begin(tmp_path).wait(timeout=60) == 0
    parts, cases = results(tmp_path)
    assert sorted(case["name"] for case in cases) == sorted(ALL)
    assert {part["status"] for part in parts.values()} == {"passed"}


def test_the_processes_are_killed_at_random_moments(tmp_path):
    """Each is begun again without what it was at work on, which has its name in the results file."""
    draw, running, killed = random.Random(0), begin(tmp_path), set()
    while running.poll() is None:
        time.sleep(draw.uniform(0.05, 0.4))
        for pid in children(running.pid)[:1]:
            if any((tmp_path / "gpu.cuda.logs").glob("*.jsonl")):
                os.kill(pid, signal.SIGKILL)
                killed.add(pid)
    parts, cases = results(tmp_path)
    assert killed
    assert sorted(line["ended"] for line in told(tmp_path)) == sorted(
        case["name"] for case in cases if case["outcome"] == "passed"
    )
    died = [case["name"] for case in cases if case["outcome"] == "died"]
    assert len(died) <= len(killed)
    given_up = [name for name, part in parts.items() if any(status for status in part["statuses"])]
    missing = ALL - {case["name"] for case in cases}
    assert not missing or given_up  # killed before its first piece of work, a process is not begun again


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_ends_the_running_part(tmp_path, number):
    pid = tmp_path / "pid"
    slow = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    program = f"""
from pathlib import Path
import sys
from bench.gpu import driver, store
driver.stop_on_signals()
part = driver.Part("slow", 60, [[sys.executable, "-S", "-c", {slow!r}]], lambda *_: ({{}}, None))
driver.run([part], store.Store(Path({str(tmp_path)!r}), "gpu.cuda", store.header("make gpu", "abc")), 300)
"""
    running = subprocess.Popen([sys.executable, "-S", "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (pid.exists() and pid.read_text()):
        time.sleep(0.05)
    running.send_signal(number)
    assert running.wait(timeout=60) == (-number if number == signal.SIGKILL else 128 + number)
    while Path(f"/proc/{pid.read_text()}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_part_that_begins_again_keeps_what_is_on_the_disk(tmp_path):
    """Until what its lines say is read again."""
    header = store.header("make gpu", "abc")
    kept = store.Store(tmp_path, "gpu.cuda", {**header, "parts": {"one": {"status": "running", "cases": [1, 2]}}})
    again = store.Store(tmp_path, "gpu.cuda", header, resume=True)
    again.begin("one", {"status": "running", "cases": []})
    assert json.loads(kept.path.read_text())["parts"]["one"]["cases"] == [1, 2]
    other = store.Store(tmp_path, "gpu.cuda", store.header("make gpu", "another commit"), resume=True)
    assert other.content["parts"] == {}


# ---- tests -----------------------------------------------------------------------------------------------------------
TESTS = """
import os, time
import pytest

def test_good(): pass
def test_bad(): assert 1 == 2
@pytest.mark.skip(reason="no such thing")
def test_absent(): pass
def test_hangs(): time.sleep(600)
def test_dies(): os._exit(1)
def test_later(): pass
"""


def test_a_test_that_hangs_or_dies_costs_none_of_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "GRACE", 0.5)
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    commands = tools.pytest_commands(
        tmp_path, [str(tmp_path / "test_some.py"), str(tmp_path / "test_broken.py")], 1, ["-p", "no:xdist"], limit=1.0
    )
    kept = store.Store(tmp_path / "out", "gpu.cuda", store.header("make gpu", "abc"))
    part = driver.Part("tests", 60, commands, lambda record, output: tools.tested(record), folder=tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    record = driver.run_part(part, 60, kept)
    found = {case["name"]: case["outcome"] for case in record["cases"]}
    assert found == {
        "test_broken.py": "failed", "test_some.py::test_good": "passed", "test_some.py::test_bad": "failed",
        "test_some.py::test_absent": "skipped", "test_some.py::test_hangs": "hung", "test_some.py::test_dies": "died",
        "test_some.py::test_later": "passed",
    }  # fmt: skip
    assert (record["passed"], record["failed"], record["skipped"], record["not_run"]) == (2, 4, 1, 0)
    assert record["why_skipped"] == ["no such thing"]
    messages = {failure["test"]: failure["message"] for failure in record["failures"]}
    assert "assert 1 == 2" in messages["test_some.py::test_bad"]
    assert "no_such_module" in messages["test_broken.py"]
    assert messages["test_some.py::test_hangs"] == "had not ended after 1 s"
    assert record["reason"].startswith("4 of 6 tests failed, first test_broken.py")


def test_tests_that_did_not_run_are_counted():
    collected = [{"collected": 3, "shard": 0}, {"collected": 4, "shard": 1}, {"collected": 3, "shard": 0}]
    cases = [{"name": "a", "outcome": "passed", "seconds": 1.0}, {"name": "b", "outcome": "skipped", "seconds": 0.0}]
    cases[1]["message"] = "no GPU"
    found, reason = tools.tested({"results": collected, "cases": cases})
    assert (found["passed"], found["not_run"], found["slowest"][0]) == (1, 5, (1.0, "a"))
    assert reason == "5 of 7 tests not run"
    assert tools.tested({"results": [], "cases": cases[1:]})[1] == "no test passed: no GPU"

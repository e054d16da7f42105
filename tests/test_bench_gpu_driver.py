"""`make gpu` runs its parts one after the other, bounded, and loses nothing that was found."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ppg_fast.bench.gpu import build, driver

ROOT = Path(__file__).parents[1]
SAY = [sys.executable, "-S", "-c"]


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

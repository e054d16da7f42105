"""`make gpu` runs its parts one after the other, bounded, and names what hangs or dies and goes on without it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ppg_fast.bench.gpu import build, driver, process, schedule, store

ROOT = Path(__file__).parents[1]
SAY = [sys.executable, "-S", "-c"]
# A process that does pieces of work one after the other; what a piece does is code.
WORKER = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from bench.gpu.lines import append, ended
lines, limit, done = Path(sys.argv[2]), float(sys.argv[3]), ended(Path(sys.argv[2]))
for name, code in (word.split("=", 1) for word in sys.argv[4:]):
    if name not in done:
        append(lines, started=name, limit_s=limit)
        exec(code)
        append(lines, found=name)
        append(lines, ended=name, outcome="passed", seconds=0.0)
"""


def worker(*work, limit=0.5):
    return [*SAY, WORKER, str(ROOT), "{lines}", str(limit), *work]


def told(record, output):
    """Passes where all processes and all pieces of work did."""
    statuses = record["statuses"]
    bad = [f"{case['name']} {case['outcome']}" for case in record["cases"] if case["outcome"] != "passed"]
    return {}, "; ".join(bad) or (None if not any(statuses) and None not in statuses else f"{statuses}")


def stored(tmp_path, **more):
    return store.Store(tmp_path / "out", "gpu.cuda", store.header("make gpu", "abc"), **more)


def content(kept):
    return json.loads(kept.path.read_text())


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(driver, "TICK", 0.02)
    monkeypatch.setattr(process, "GRACE", 0.5)


# ---- parts -----------------------------------------------------------------------------------------------------------
def test_parts_pass_fail_or_are_missing_and_the_others_go_on(tmp_path, capsys):
    kept = stored(tmp_path)
    write = "import sys; open(sys.argv[1], 'a').write('{\"found\": 1}' + chr(10) + '[3]' + chr(10) + '{\"half a li')"
    parts = [
        driver.Part(
            "bad", 60, [[*SAY, "print('went wrong'); raise SystemExit(3)"]], told, estimate=7, reason="a guess"
        ),
        driver.Part("absent", 60, [["true"]], told, missing="nothing is not on PATH"),
        driver.Part("odd", 60, [[*SAY, "pass"]], lambda record, output: 1 / 0),
        driver.Part("no such program", 60, [["/no/such/program"]], told),
        driver.Part("good", 60, [[*SAY, write, "{lines}"], [*SAY, "print({until})"]], told),
        driver.Part("nothing to do", 60, [], told),
    ]
    assert not driver.run(parts, kept, 300)
    found = content(kept)["parts"]
    assert {name: part["status"] for name, part in found.items()} == {
        "bad": "failed", "absent": "missing", "odd": "failed",
        "no such program": "failed", "good": "passed", "nothing to do": "passed",
    }  # fmt: skip
    assert found["bad"]["reason"] == "[3]"
    assert "went wrong" in found["bad"]["output"]
    assert found["bad"]["estimate_s"] == 7
    assert found["bad"]["seconds"] < 7
    assert found["absent"]["reason"] == "nothing is not on PATH"
    assert found["odd"]["reason"] == "not understood: ZeroDivisionError: division by zero"
    assert found["no such program"]["statuses"] == [127]
    assert found["good"]["results"] == [{"found": 1}, {"unreadable": "[3]"}]
    assert abs(float((kept.logs / "good-1.log").read_text()) - time.time() - 57) < 20  # for what is left of a minute
    said = capsys.readouterr().out
    assert said.index("7 s   60 s   a guess") < said.index("bad ...")
    assert "s of about 7  bad        failed: [3]" in said
    assert driver.run(parts[4:], kept, 300)


def test_a_part_is_stopped_with_all_that_it_started(tmp_path):
    kept, mark = stored(tmp_path), tmp_path / "alive"
    child = f"import time, pathlib\nwhile True: pathlib.Path({str(mark)!r}).touch(); time.sleep(0.05)"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-S', '-c', {child!r}]); time.sleep(600)"
    parts = [driver.Part("long", 1.0, [[*SAY, parent]], told), driver.Part("late", 60, [["true"]], told)]
    start = time.monotonic()
    assert not driver.run(parts, kept, 5.5)
    assert time.monotonic() - start < 30
    found = content(kept)["parts"]
    assert found["long"]["reason"] == "stopped after 1 s; [None]"
    assert found["late"].get("reason", "no time left: ").startswith("no time left: ")
    mark.unlink(missing_ok=True)
    time.sleep(0.3)
    assert not mark.exists()


def test_time_that_is_left_goes_to_those_who_can_use_it(tmp_path):
    quick = [[*SAY, "pass"]]
    parts = [
        driver.Part("quick", 50, quick, told), driver.Part("bounded", 50, quick, told, most=55),
        driver.Part("open", 50, quick, told, most=1000), driver.Part("last", 50, quick, told, most=20),
    ]  # fmt: skip
    kept = stored(tmp_path)
    assert driver.run(parts, kept, 210)
    limits = {name: part["limit_s"] for name, part in content(kept)["parts"].items()}
    assert limits["quick"] == 50
    assert limits["bounded"] == 55
    assert 150 < limits["open"] <= 160  # 210 less the 50 of the last
    assert limits["last"] == 50


# ---- what hangs or dies ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("code", "outcome"), [("time.sleep(600)", "hung"), ("os.abort()", "died"), ("os._exit(75)", "died")]
)
def test_what_hangs_or_dies_is_named_and_the_rest_is_done(tmp_path, code, outcome):
    kept = stored(tmp_path)
    part = driver.Part("some", 60, [worker("a=0", f"b={code}", "c=0", "d=0"), worker("e=0")], told)
    driver.run_part(part, 60, kept)
    found = content(kept)
    record = found["parts"]["some"]
    assert {case["name"]: case["outcome"] for case in record["cases"]} == {
        "a": "passed", "b": outcome, "c": "passed", "d": "passed", "e": "passed",
    }  # fmt: skip
    assert sorted(line["found"] for line in record["results"]) == ["a", "c", "d", "e"]
    assert record["reason"] == f"b {outcome}"
    assert found["ppg_fast"]["missing"]["some: b"].startswith(outcome)
    assert driver.suspicious(record)


def test_a_process_that_asks_for_another_gets_one(tmp_path):
    kept = stored(tmp_path)
    leave = "append(lines, ended=name, outcome='failed', seconds=0.0); os._exit(75)"
    record = driver.run_part(driver.Part("some", 60, [worker("a=0", f"b={leave}", "c=0")], told), 60, kept)
    assert [case["outcome"] for case in record["cases"]] == ["passed", "failed", "passed"]
    endless = driver.run_part(driver.Part("endless", 60, [[*SAY, "raise SystemExit(75)"]], told), 60, kept)
    assert endless["statuses"] == [75]  # it ended nothing, so that another would end nothing


def test_a_device_that_hangs_every_time_is_given_up(tmp_path):
    kept, work = stored(tmp_path), [f"{name}=time.sleep(600)" for name in "abcdef"]
    record = driver.run_part(driver.Part("some", 60, [worker(*work, limit=0.2)], told), 60, kept)
    assert [case["outcome"] for case in record["cases"]] == ["hung"] * process.LOST
    assert record["seconds"] < 30


def test_what_cannot_be_killed_does_not_stop_the_others(tmp_path, monkeypatch):
    """As a process in the middle of a call of the GPU's driver, which no signal reaches."""
    kill, spared = os.killpg, []
    monkeypatch.setattr(os, "killpg", lambda group, number: spared.append(group))
    parts = [driver.Part("stays", 1.0, [[*SAY, "import time; time.sleep(600)"]], told)]
    parts += [driver.Part("next", 60, [[*SAY, "pass"]], told)]
    kept, start = stored(tmp_path), time.monotonic()
    try:
        assert not driver.run(parts, kept, 300)
    finally:
        for group in set(spared):
            with contextlib.suppress(ProcessLookupError):
                kill(group, signal.SIGKILL)
    assert time.monotonic() - start < 20
    found = content(kept)["parts"]
    assert found["stays"]["reason"] == "stopped after 1 s; a process did not end when it was killed; [None]"
    assert found["next"]["status"] == "passed"


@pytest.mark.parametrize("answers", [True, False])
def test_after_a_part_that_hung_the_device_is_asked_first(tmp_path, monkeypatch, answers):
    monkeypatch.setattr(driver, "ANSWER", 1.0)
    asked = tmp_path / "asked"
    probe = [*SAY, f"open({str(asked)!r}, 'a').write('x'); import time; time.sleep({0 if answers else 600})"]
    quick = [[*SAY, "pass"]]
    parts = [
        driver.Part("good", 60, quick, told), driver.Part("hung", 1.0, [[*SAY, "import time; time.sleep(600)"]], told),
        driver.Part("without it", 60, quick, told, on_device=False), driver.Part("next", 60, quick, told),
        driver.Part("last", 60, quick, told),
    ]  # fmt: skip
    kept = stored(tmp_path)
    assert not driver.run(parts, kept, 300, probe)
    found = content(kept)["parts"]
    assert found["without it"]["status"] == "passed"
    assert {found[name]["status"] for name in ("next", "last")} == {"passed" if answers else "missing"}
    assert asked.read_text() == ("x" if answers else "xx")  # once it has answered it is trusted
    if not answers:
        assert found["next"]["reason"] == "the device did not answer within 1 s after what went before"


# ---- the schedule ----------------------------------------------------------------------------------------------------
def test_the_limits_fit_into_the_whole():
    slots = schedule.SLOTS
    assert sum(slot.limit for slot in slots.values()) <= schedule.WHOLE - 5  # for the end
    assert list(slots)[:4] == ["build", "smoke", "plans", "bench"]
    assert list(slots)[-1] == "racecheck"
    assert all(slot.estimate <= slot.limit <= slot.most and slot.reason for slot in slots.values())


def test_estimates_come_from_the_newest_results_of_the_same_gpu(tmp_path, monkeypatch):
    def results(name, gpu, when, **seconds):
        parts = {part: {"status": status, "seconds": taken} for part, (status, taken) in seconds.items()}
        file = {"machine_info": {"gpu": {"name": gpu}}, "datetime": when, "parts": parts}
        (tmp_path / f"{name}.cuda.json").write_text(json.dumps(file))

    results("gpu", "NVIDIA H200", "2026-01-02T00:00", smoke=("passed", 11.0), tests=("failed", 70.0))
    results("gpu-smoke", "NVIDIA H200", "2026-01-03T00:00", smoke=("passed", 12.0))
    results("gpu-bench", "NVIDIA B200", "2026-01-04T00:00", bench=("passed", 50.0))
    monkeypatch.setattr(schedule, "gpu_name", lambda: "NVIDIA H200")
    found = schedule.slots(tmp_path)
    assert (found["smoke"].estimate, found["smoke"].reason) == (12.0, "as on 2026-01-03")
    assert found["tests"] == schedule.SLOTS["tests"]  # what failed says little
    assert found["bench"] == schedule.SLOTS["bench"]
    monkeypatch.setattr(schedule, "gpu_name", lambda: None)
    assert schedule.slots(tmp_path) == schedule.SLOTS


# ---- the command -----------------------------------------------------------------------------------------------------
def test_the_driver_needs_nothing_but_python():
    """What runs before the package is built must not import it, nor torch."""
    program = "import sys; import bench.gpu.__main__; assert not {'torch', 'numpy', 'ppg_fast'} & set(sys.modules)"
    subprocess.run([sys.executable, "-S", "-c", program], cwd=ROOT, check=True)


def test_bad_usage():
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--only", "nothing"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "got 'nothing'" in done.stderr


def test_a_part_whose_tool_is_absent_says_so(tmp_path, monkeypatch):
    from ppg_fast.bench.gpu import __main__ as command
    from ppg_fast.bench.gpu.parts import parts

    monkeypatch.setenv("PATH", str(tmp_path))
    known = parts(list(schedule.SLOTS), command.setting(False, []), schedule.SLOTS)
    found = {part.name: part.missing for part in known}
    quick = next(part.commands[1] for part in known if part.name == "smoke")
    assert [Path(word).name for word in quick if word.endswith(".py")] == ["test_gpu.py"]  # collected in no time
    assert found["racecheck"] == found["memcheck"] == "compute-sanitizer is not on PATH"
    assert found["dram"] == "ncu is not on PATH"
    assert found["smoke"] is None
    assert build.is_current(ROOT) or next(iter(found)) == "build"

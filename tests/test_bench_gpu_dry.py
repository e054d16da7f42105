"""A dry run: every part of `make gpu` in its order and with its limits, on a CPU, and a file that becomes sections.

Its measuring processes here write lines that were made up, at once; tests/test_bench_gpu.py runs what they would run.
"""

import json
import sys

import pytest
from ppg_fast.bench import result_file
from ppg_fast.bench.gpu import __main__ as command
from ppg_fast.bench.gpu import dry, parts, schedule, sections
from test_bench_gpu_documents import measured

WORKER = """
import json, sys
made, part, lines = json.load(open(sys.argv[1])), sys.argv[2], open(sys.argv[3], "a")
found = [*made["parts"].get(part, {}).get("results", [])]
found += [{"benchmarks": made["benchmarks"]}] if part == "bench" else []
for line in [{"started": "all"}, *found, {"ended": "all", "outcome": "passed", "seconds": 0.0}]:
    print(json.dumps(line), file=lines)
"""
TESTS = "import pytest\n@pytest.mark.parametrize('backend', ['cpu'] * 8)\ndef test_short(backend): pass\n"


@pytest.fixture
def made_up(monkeypatch, tmp_path):
    """Results of every part at once, and a shorter walk through the tests."""
    (tmp_path / "made.json").write_text(json.dumps(measured()))
    program = [sys.executable, "-S", "-c", WORKER, str(tmp_path / "made.json")]
    monkeypatch.setattr(parts, "worker", lambda part, setting: [*program, part, "{lines}"])
    (tmp_path / "test_short.py").write_text(TESTS)
    monkeypatch.setattr(dry, "FILES", (tmp_path / "test_short.py",))
    monkeypatch.setattr(command, "show", lambda *_: None)
    monkeypatch.setattr(command, "stop_on_signals", lambda: None)  # this process has handlers of its own
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # to be put back: the tools that pretend come first on it


def test_a_dry_run_walks_every_part(made_up, tmp_path, capsys):
    status = command.main(["--dry", "--out", str(tmp_path), "--commit", "abc"])
    said, file = capsys.readouterr().out, result_file.read(tmp_path / "gpu.dry.json")
    assert status == 0, said
    assert list(file["parts"]) == list(schedule.SLOTS)
    left = schedule.WHOLE
    for name, slot in schedule.SLOTS.items():
        part = file["parts"][name]
        assert part["status"] == "passed", (name, part)
        assert slot.limit <= part["limit_s"] <= max(slot.most, slot.limit)
        assert part["estimate_s"] == slot.estimate
        left -= part["seconds"]
    assert left > 0
    assert file["parts"]["tests"]["passed"] == 8
    assert len(file["parts"]["tests"]["command"]) == 2  # processes
    assert file["parts"]["dram"]["results"][0]["kernel"] == "policy_loss_onepass"
    assert file["parts"]["racecheck"]["summaries"][0]["hazards"] == 0
    assert len(list((tmp_path / "gpu.dry.logs").glob("*.log"))) == 13
    text = sections.gpu_section({"gpu.cuda": file})
    assert "| racecheck | passed | 20 s |" in text
    assert "| 128,256 | 100% | as chosen | does not launch |" in text
    # a second run does nothing again that has passed, and a file of a dry run is no result
    assert command.main(["--dry", "--out", str(tmp_path), "--commit", "abc", "--resume"]) == 0
    assert capsys.readouterr().out.count("passed before, at the same commit") == len(schedule.SLOTS)
    assert sections.gpu_section({"gpu.dry": file}) == sections.NOT_MEASURED

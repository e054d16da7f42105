"""What ends a run, or does not: files that cannot be written, outputs that nobody reads, numbers without a gradient."""

import io
import json
import os
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

pytest.importorskip("transformers")

from test_checkpoint import SHORT, status

from ppg_fast.cli import main
from ppg_fast.console import print_everything
from ppg_fast.jobs import cards, run_folder
from ppg_fast.jobs.persona import PersonaJob
from ppg_fast.jobs.progress import Progress
from ppg_fast.rollouts.rollout import finite_reward
from ppg_fast.training import checkpoint
from ppg_fast.writing import writing

FULL = OSError(28, "No space left on device")
NAMED = OSError(28, "No space left on device", "samples_after.md")
SAFETENSORS = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def train(folder, *options):
    return main(["train", "--output-dir", str(folder), *SHORT, *options])


def failing(error, after=0, real=lambda *_, **__: None):
    calls = []

    def fail(*arguments, **options):
        calls.append(1)
        if len(calls) > after:
            raise error
        return real(*arguments, **options)

    return fail


WRITERS = {  # what a run writes: where it is written, what may be raised there, when
    "model": (lambda patch: patch.setattr("transformers.PreTrainedModel.save_pretrained", failing(SAFETENSORS)), True),
    "tokenizer": (
        lambda patch: patch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", failing(FULL)),
        True,
    ),
    "metrics": (
        lambda patch: patch.setattr(run_folder, "append_whole", failing(FULL, 3, run_folder.append_whole)),
        True,
    ),
    "samples": (
        lambda patch: patch.setattr(run_folder, "append_rows", failing(RuntimeError("unexpected pos 64"), 1)),
        True,
    ),
    "pages": (lambda patch: patch.setattr(run_folder, "page", failing(NAMED, 1, run_folder.page)), True),
    "curves": (lambda patch: patch.setattr(run_folder.curves, "draw_curve", failing(RuntimeError("png write"))), True),
    "summary": (lambda patch: patch.setattr(cards, "write_readme", failing(FULL, 1)), False),
}


@pytest.mark.parametrize("what", WRITERS)
def test_a_file_that_cannot_be_written_is_a_clear_end(what, tmp_path, monkeypatch, capsys):
    run, (break_it, summarised) = tmp_path / "run", WRITERS[what]
    with monkeypatch.context() as patch:
        break_it(patch)
        assert train(run) == 1
    said = capsys.readouterr().err.strip().splitlines()
    assert [line for line in said if not line.startswith("ppg-fast: warning: ")] == [said[-1]], said
    assert str(run) in said[-1] or "No space left" in said[-1]
    if summarised:
        summary = json.loads((run / "summary.json").read_text())
        assert summary["status"] == "failed"
        assert summary["error"] in said[-1]
        assert "It failed" in (readme := (run / "README.md").read_text())
        assert summary["error"] in readme
    assert not (run / "checkpoint.new").exists()
    if what != "metrics":  # the others fail after steps
        assert checkpoint.newest(run / "checkpoints")["training"]["step"] >= 1
    assert main(["train", "--resume", str(run)]) == 0
    assert status(run) == "finished"


def test_a_config_that_cannot_be_written_ends_it_before_it_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_folder, "write_yaml", failing(FULL))
    assert train(tmp_path / "run") == 1
    assert "No space left" in capsys.readouterr().err
    assert not (tmp_path / "run/config.yaml").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_disk_that_is_full(tmp_path, capsys):
    """The system's own refusal: metrics go to a device that is always full."""
    (tmp_path / "run").mkdir()
    from ppg_fast.jobs.samples import append_whole

    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"), writing(tmp_path):
        append_whole(tmp_path / "full", "a line")


def test_a_library_says_it_in_its_own_way(tmp_path):
    """The three of a full disk are one error, which names the place; what is about input stays."""
    for error in (SAFETENSORS, RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")):
        with pytest.raises(OSError, match=rf"{tmp_path} cannot be written: .*"), writing(tmp_path):
            raise error
    with pytest.raises(FileExistsError, match="a run is there"), writing(tmp_path):
        raise FileExistsError("a run is there")
    with pytest.raises(ValueError, match="K < 1"), writing(tmp_path):
        raise ValueError("K < 1")
    hidden = RuntimeError("the writer lost its place")
    hidden.__context__ = FULL
    with pytest.raises(OSError, match="No space left on device"), writing(tmp_path):
        raise hidden


class Ascii(io.TextIOWrapper):
    def __init__(self):
        super().__init__(io.BytesIO(), encoding="ascii")


def test_a_terminal_of_few_characters_ends_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Ascii())
    print_everything()
    Progress(False, 1).say("runs/prüfung → done")
    assert sys.stdout.buffer.getvalue() == b"runs/pr\\xfcfung \\u2192 done\n"


def test_an_output_that_nobody_reads_ends_nothing(tmp_path, monkeypatch, capsys):
    """``ppg-fast train | true``: the pipe is gone."""
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        os.close(reader)
        assert train(tmp_path / "run") == 0
    lost = "ppg-fast: warning: the output is lost (nobody reads it any more); the work goes on\n"
    assert capsys.readouterr().err.count(lost) == 1
    assert status(tmp_path / "run") == "finished"


def rewarded(monkeypatch, reward, steps=()):
    collect = PersonaJob.collect

    def collected(self, step):
        found = collect(self, step)
        for sample in found if not steps or step in steps else ():
            sample.rewards[:] = [reward] * len(sample.rewards)
        return found

    monkeypatch.setattr(PersonaJob, "collect", collected)


GREEDY = ("--policy-class", "greedy", "--baseline", "none", "--max-skipped-steps", "9")


def test_a_run_that_skipped_all_its_steps_has_failed(tmp_path, monkeypatch, capsys):
    rewarded(monkeypatch, 1e30)
    assert train(tmp_path / "run", *GREEDY) == 1
    said = capsys.readouterr().err
    assert "got none in 4 steps" in said
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["skipped_steps"]) == ("failed", 4, 4)
    assert len({json.loads(line)["step"] for line in (tmp_path / "run/not_finite.jsonl").read_text().splitlines()}) == 4


def test_some_skipped_steps_are_said_at_the_end(tmp_path, monkeypatch, capsys):
    rewarded(monkeypatch, 1e30, steps=(2, 4))
    assert train(tmp_path / "run", *GREEDY) == 0
    assert "finished after 4 steps, 2 of them skipped (loss or gradient not finite)" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/summary.json").read_text())["skipped_steps"] == 2


@pytest.mark.parametrize("reward", [1e39, -3.5e38, float("inf"), float("nan")])
def test_a_reward_beyond_float32_names_dialogue_and_turn(reward):
    with pytest.raises(
        ValueError, match=rf"finite float32.*got {reward:g} for turn 3 of dialogue 'q7'".replace("+", r"\+")
    ):
        finite_reward(reward, "q7", 3)
    assert finite_reward(3.4e38, "q7", 3) == 3.4e38


def prompts(path, count=6, **lengths):
    lines = []
    for i in range(count):
        text = "why ? " * lengths.get(f"q{i}", 1)
        lines.append(json.dumps({"id": f"q{i}", "messages": [{"role": "user", "content": text}]}) + "\n")
    path.write_text("".join(lines))
    return path


ONE_STEP = ["--max-steps", "1", "--num-prompts", "2"]
TOY = SHORT[: SHORT.index("--imitation-steps")]


def prompted(folder, path, code, *options):
    (folder / "rewards.py").write_text(code)
    reward = ["--reward", f"{folder / 'rewards.py'}:f", "--prompts", str(path), "--output-dir", str(folder / "run")]
    return main(["train", *TOY, *ONE_STEP, "--partner", "none", *reward, *options])


def test_a_reward_when_drawn_names_its_dialogue(tmp_path, capsys):
    code = "def f(messages, id):\n    return 1e39 if id == 'q3' else 1.0\n"
    assert prompted(tmp_path, prompts(tmp_path / "p.jsonl"), code, "--num-prompts", "6") == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    rule = "must be a finite number, at most 3.4e38 (float32), or None, got 1e+39"
    assert said == f"ppg-fast: reward f at dialogue 'q3', turn 0, {rule}"


@pytest.mark.parametrize("strict", [True, False])
def test_an_opening_that_does_not_fit_is_said_before_anything_is_written(strict, tmp_path, monkeypatch, capsys):
    """Also where max_dialogue_tokens would allow it: the model has no positions for it."""
    monkeypatch.setattr("ppg_fast.jobs.policy.Policy.positions", 60)
    path, code = prompts(tmp_path / "p.jsonl", q4=100), "def f(messages):\n    return 1.0\n"
    options = ("--max-dialogue-tokens", "5000", *(("--strict",) if strict else ()))
    assert prompted(tmp_path, path, code, *options) == (1 if strict else 0)
    said = capsys.readouterr().err
    assert "prompt 'q4': an opening must be shorter than the 60 tokens of a dialogue, got" in said
    assert (tmp_path / "run").exists() != strict


def test_a_logged_dialogue_that_does_not_fit_is_said_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ppg_fast.jobs.policy.Policy.positions", 60)
    said = [
        [{"role": "user", "content": "why ? " * n}, {"role": "assistant", "content": "so ."}] for n in (1, 1, 90, 1)
    ]
    lines = [
        json.dumps({"id": f"d{i}", "group_id": "g", "messages": m, "turn_rewards": [1.0]}) for i, m in enumerate(said)
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    options = [*TOY, *ONE_STEP, "--data", str(tmp_path / "log.jsonl"), "--vocab-size", "280"]
    assert main(["train", *options, "--strict", "--output-dir", str(tmp_path / "run")]) == 1
    rule = "dialogue 'd2': what is read of it must fit the model's 60 positions (max_dialogue_tokens cuts it), got"
    assert rule in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


ENFORCED = {  # rows of docs/training_runs.md, and the test of each
    "all steps are taken": "test_checkpoint.py::test_a_signal_ends_the_run_within_the_step_and_resume_goes_on",
    "Ctrl-C, SIGTERM, SIGHUP (not under `nohup`)": "test_stopping.py::test_a_signal_anywhere_and_resume_give_the_bits",
    "a second signal": "test_stopping.py::test_the_second_signal_ends_the_process_whatever_runs",
    "`kill -9`, power loss": "test_checkpoint.py::test_kill_minus_nine_at_many_moments",
    "a file cannot be written (full disk), whatever a library raises": (
        "test_run_ends.py::test_a_file_that_cannot_be_written_is_a_clear_end"
    ),
    "a checkpoint cannot be written": "test_checkpoint.py::test_a_full_disk_costs_a_checkpoint_and_not_the_run",
    "loss or gradient not finite": "test_run_ends.py::test_some_skipped_steps_are_said_at_the_end",
    "more than `max_skipped_steps` of these in a row, or all steps": (
        "test_run_ends.py::test_a_run_that_skipped_all_its_steps_has_failed"
    ),
    "a reward that float32 cannot hold (1e39, NaN)": "test_run_ends.py::test_a_reward_when_drawn_names_its_dialogue",
    "no turn of a step has a reward, all ranks together": "test_ranks_end.py::test_they_end_alike",
    "an opening or logged dialogue longer than the model's positions": (
        "test_run_ends.py::test_a_logged_dialogue_that_does_not_fit_is_said_before_anything_is_written"
    ),
    "`--resume` with other data, model, rewards or settings, or no `metrics.jsonl`": (
        "test_checkpoint.py::test_what_cannot_be_resumed_is_named"
    ),
    "damaged checkpoint": "test_checkpoint.py::test_a_run_falls_back_and_says_so",
    "a rank that dies or hangs": "test_ranks.py::test_a_rank_that_is_lost_is_an_error_on_the_others",
    "a second process in the same folder": "test_checkpoint.py::test_one_process_a_folder",
    "nobody reads the output (`head`), characters that the terminal lacks": (
        "test_run_ends.py::test_an_output_that_nobody_reads_ends_nothing"
    ),
}


def test_every_row_of_the_table_has_its_test():
    tests = Path(__file__).parent
    page = (tests.parent / "docs/training_runs.md").read_text()
    table = page.split("## What ends a run")[1].split("\n\n")[1].splitlines()[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in table] == list(ENFORCED)
    for place in ENFORCED.values():
        file, name = place.split("::")
        assert f"def {name}" in (tests / file).read_text(), place

"""A run that survives: kill -9 at many moments, a full disk, damaged files, signals, numbers that are not finite."""

import errno
import json
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from ppg_fast.cli import main
from ppg_fast.dialogues.packing import Sample
from ppg_fast.jobs.persona import PersonaJob
from ppg_fast.models import causal_lm as models
from ppg_fast.policy_classes import Greedy
from ppg_fast.training import checkpoint
from ppg_fast.training.objective import Objective, Schedule
from ppg_fast.training.trainer import NotFinite, TrainingState, optimise

LEAST_KILLED = {"persona": 5, "soft_q": 2, "offline": 5}  # moments at which a run of each job is killed
CLOCKS = ("seconds", "step_time", "perf/tokens_per_second", "perf/peak_memory_mb")


def flags(text: str) -> list[str]:
    return text.split()


TINY = flags(
    "--device cpu --width 16 --layers 1 --no-progress --save-every 2 --eval-every 2 --max-new-tokens 2 "
    "--eval-dialogues 2"
)
SHORT = [
    *TINY,
    *flags(
        "--imitation-steps 1 --imitation-batch 2 --max-steps 4 --num-prompts 2 --num-generations 2 --entropy-coef 0.1"
    ),
]


def rows(folder):
    return [
        {k: v for k, v in json.loads(line).items() if k not in CLOCKS}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def weights(folder):
    return (folder / "checkpoint/model.safetensors").read_bytes()


def status(folder):
    return json.loads((folder / "summary.json").read_text())["status"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert main(["train", "--output-dir", str(folder), *SHORT]) == 0
    return folder


def test_kill_minus_nine_at_many_moments(tmp_path):
    """Three jobs, killed at touches of the run's files and at random times, up to three times in a row: same bits, same
    rows."""
    case = Path(__file__).with_name("helpers") / "kill_case.py"
    done = subprocess.run([sys.executable, case, tmp_path], capture_output=True, text=True, check=False)
    trials = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0, done.stderr
    assert [t for t in trials if not (t["status"] == 0 and t["state"] and t["rows"])] == []
    touches = [t for t in trials if isinstance(t["deaths"][0], int)]  # the others may die too late on a fast machine
    assert [t for t in touches if t["killed"] != 1] == []
    assert [job for job, least in LEAST_KILLED.items() if sum(t["job"] == job for t in touches) < least] == []


@pytest.mark.parametrize(
    ("number", "code", "name"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "stopped")]
)
def test_a_signal_ends_the_run_within_the_step_and_resume_goes_on(
    number, code, name, whole, tmp_path, monkeypatch, capsys
):
    rollouts = PersonaJob.collect

    def interrupted(self, step):
        if step == 3:
            os.kill(os.getpid(), number)
        return rollouts(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(PersonaJob, "collect", interrupted)
        assert main(["train", "--output-dir", str(tmp_path / "run"), *SHORT]) == code
    assert status(tmp_path / "run") == name
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert [p.name for p in checkpoint.checkpoints(tmp_path / "run/checkpoints")] == ["step-00000002", "step-00000003"]
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert "goes on after step 2 of phase 'train'\n" in capsys.readouterr().out
    assert status(tmp_path / "run") == "finished"
    assert rows(tmp_path / "run") == rows(whole)
    assert weights(tmp_path / "run") == weights(whole)


def test_plain_resume_takes_the_output_dir_and_flags_win(whole, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["train", "--output-dir", str(folder), *SHORT, "--max-steps", "2", "--overwrite"]) == 0
    assert main(["train", "--resume", "--output-dir", str(folder), "--max-steps", "3"]) == 0
    assert "step 2 of phase 'train', with other settings: max_steps 2 -> 3\n" in capsys.readouterr().out
    assert [r["step"] for r in rows(folder) if r["phase"] == "train"] == [1, 2, 3]
    assert main(["train", "--resume", str(folder)]) == 0, "a finished run has nothing left to do but its end"
    assert [r["step"] for r in rows(folder) if r["phase"] == "eval"] == [0, 2, 3]


def refused(capsys, *argv):
    assert main(["train", *argv]) == 1
    return capsys.readouterr().err


def test_what_cannot_be_resumed_is_named(whole, tmp_path, capsys):
    assert "wants the folder of a run" in refused(capsys, "--resume", str(tmp_path))
    run, before = ("--resume", str(whole)), (weights(whole), rows(whole), (whole / "config.yaml").read_bytes())
    assert "exclude each other" in refused(capsys, *run, "--overwrite")
    assert "goes on in RUN itself" in refused(capsys, *run, "--output-dir", str(tmp_path))
    assert "settings it began with, got width 16 -> 32" in refused(capsys, *run, "--width", "32")
    assert "settings it began with, got kl_coef 0.0 -> 0.1" in refused(capsys, *run, "--kl-coef", "0.1")
    data = tmp_path / "log.jsonl"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    data.write_text(json.dumps({"id": "a", "group_id": "a", "messages": messages, "turn_rewards": [1.0]}) + "\n")
    assert "got data None -> " in refused(capsys, *run, "--data", str(data), "--baseline", "none")
    assert (weights(whole), rows(whole), (whole / "config.yaml").read_bytes()) == before


def test_one_process_a_folder(whole, capsys):
    import fcntl

    other = os.open(whole, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert "only one process may train" in refused(capsys, "--resume", str(whole))
    finally:
        os.close(other)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(whole, tmp_path, monkeypatch, capsys):
    save, calls = torch.save, []

    def full(state, file):
        calls.append(file.name)
        save(state, file)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)

    monkeypatch.setattr(torch, "save", full)
    assert main(["train", "--output-dir", str(tmp_path / "run"), *SHORT]) == 0
    assert "no checkpoint after step 4, the newest is step-00000002" in (said := capsys.readouterr().err)
    assert "No space left on device" in said
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000001", "step-00000002"]
    assert len(calls) == 4
    assert weights(tmp_path / "run") == weights(whole)
    monkeypatch.setattr(torch, "save", save)
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert (weights(tmp_path / "run"), rows(tmp_path / "run")) == (weights(whole), rows(whole))


def test_a_write_that_the_system_refuses_leaves_the_one_before(tmp_path):
    """A real refusal inside torch's writer: the process may not write more than 64 KiB into a file."""
    checkpoint.save(tmp_path, 1, {"a": torch.arange(3)}, keep=2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError, match=r"step-00000002: .*File too large"):
            checkpoint.save(tmp_path, 2, {"a": torch.zeros(1 << 16)}, keep=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.newest(tmp_path)["a"].tolist() == [0, 1, 2]


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        data[how % len(data)] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize("name", ["state.pt", "SHA256SUMS"])
@pytest.mark.parametrize("how", ["missing", "cut", "empty", 0, 17, 400, 2000, -1])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(how, name, tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"step": step, "a": torch.full((300,), float(step))}, keep=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    damage(tmp_path / "step-00000003" / name, how)
    if name == "SHA256SUMS" and how == -1:  # the line's end, which ``sha256sum`` does not need either
        assert checkpoint.newest(tmp_path)["step"] in (2, 3)
        return
    with pytest.warns(UserWarning, match=r"damaged checkpoint .*step-00000003 \(.*\): going on from step-00000002"):
        assert checkpoint.newest(tmp_path)["step"] == 2
    checkpoint.save(tmp_path, 4, {"step": 4}, keep=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step-00000002", "step-00000004"]


def test_only_damaged_checkpoints_are_an_error(tmp_path):
    assert checkpoint.newest(tmp_path) is None
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"step": step}, keep=2)
        damage(tmp_path / f"step-0000000{step}/state.pt", 5)
    for _ in range(2):  # and stay one: a second try must not begin at the beginning
        with pytest.raises(
            ValueError, match=r"none does: .*step-00000002 \(the checksum of state.pt differs\), .*step-00000001"
        ):
            checkpoint.newest(tmp_path)


def test_a_run_falls_back_and_says_so(whole, tmp_path, capsys):
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    damage(checkpoint.checkpoints(folder / "checkpoints")[-1] / "state.pt", 3000)
    assert main(["train", "--resume", str(folder)]) == 0
    assert "going on from step-00000004, the one before" in capsys.readouterr().err
    assert (weights(folder), rows(folder)) == (weights(whole), rows(whole))


def test_metrics_that_are_gone_are_missed(whole, tmp_path, capsys):
    import shutil

    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run/metrics.jsonl").write_text("")
    assert "metrics.jsonl must hold the" in refused(capsys, "--resume", str(tmp_path / "run"))


def draws():
    return (
        random.random(),
        np.random.rand(3).tolist(),  # noqa: NPY002
        np.random.randn(),  # noqa: NPY002
        torch.rand(3).tolist(),
        torch.randn(5).tolist(),
    )


def test_random_states_go_to_disk_and_back(tmp_path):
    np.random.randn()  # noqa: NPY002 (the generator then holds a second normal back)
    checkpoint.save(tmp_path, 1, {"random": checkpoint.random_states()}, keep=1)
    first = draws()
    assert draws() != first
    checkpoint.set_random_states(checkpoint.newest(tmp_path)["random"])
    assert draws() == first


def samples(reward):
    return [Sample([3, 4, 5 + i, 6, 1], [-1, -1, 0, 0, 0], [reward], i) for i in range(3)]


def loop(bad_steps, steps=6, **schedule):
    model = models.make_model(23, width=16, layers=1)
    batches = [samples(3e38 if step in bad_steps else 0.5) for step in range(1, steps + 1)]
    return model, optimise(
        model, lambda step: batches[step - 1], Objective(Greedy(), baseline="none"), Schedule(steps, 1e-3, **schedule)
    )


def test_steps_that_are_not_finite_are_skipped_and_counted():
    model, steps = loop({2, 3, 5}, max_skipped_steps=2)
    before, skipped = None, []
    for metrics in steps:
        now = [p.detach().clone() for p in model.parameters()]
        stayed = before is not None and all(map(torch.equal, before, now))
        assert stayed == (metrics["step"] in {2, 3, 5})
        before = now
        skipped.append(metrics["skipped_steps"])
    assert skipped == [0, 1, 2, 2, 3, 3]


def test_too_many_in_a_row_end_the_training_with_their_batches():
    _, steps = loop({1, 3, 4, 5}, max_skipped_steps=2)
    with pytest.raises(
        NotFinite, match=r"loss and gradient must be finite.*at step 5, the last of 3 in a row"
    ) as caught:
        list(steps)
    assert [step for step, _ in caught.value.batches] == [3, 4, 5]
    assert caught.value.batches[0][1] == samples(3e38)


def test_a_run_that_is_not_finite_keeps_the_batch_and_names_the_file(tmp_path, monkeypatch, capsys):
    rollouts = PersonaJob.collect

    def exploding(self, step):
        found = rollouts(self, step)
        for sample in found if step > 1 else ():
            sample.rewards[:] = [3e38] * len(sample.rewards)
        return found

    argv = [
        "--output-dir",
        str(tmp_path / "run"),
        *SHORT,
        "--policy-class",
        "greedy",
        "--baseline",
        "none",
        "--max-skipped-steps",
        "1",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(PersonaJob, "collect", exploding)
        said = refused(capsys, *argv)
    file = tmp_path / "run" / "not_finite.jsonl"
    assert f"step 3, the last of 2 in a row; the dialogues of these steps are in {file}" in said
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert [k["step"] for k in kept] == [2] * 4 + [3] * 4
    assert kept[0]["rewards"][0] == 3e38
    assert kept[0]["text"].startswith("<system>")
    train = [r for r in rows(tmp_path / "run") if r["phase"] == "train"]
    assert [(r["step"], r["skipped_steps"]) for r in train] == [(1, 0), (2, 1)]
    assert train[1]["grad_norm"] is None, "JSON has no infinity"
    assert status(tmp_path / "run") == "failed"
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0


def test_a_state_goes_on_where_it_was():
    """The loop by itself, in one process: three steps, a round trip, three steps more are six."""
    model, steps = loop(set())
    list(steps)
    half = models.make_model(23, width=16, layers=1)
    objective, schedule = Objective(Greedy(), baseline="none"), Schedule(6, 1e-3)
    state = TrainingState.start(half, objective, schedule)
    for metrics in optimise(half, lambda step: samples(0.5), objective, schedule, state):
        if metrics["step"] == 3:
            break
    saved = state.state_dict()
    other = TrainingState.start(models.make_model(23, width=16, layers=1, seed=1), objective, schedule)
    other.load_state_dict(saved)
    assert [m["step"] for m in optimise(other.model, lambda step: samples(0.5), objective, schedule, other)] == [
        4,
        5,
        6,
    ]
    assert all(map(torch.equal, model.parameters(), other.model.parameters()))

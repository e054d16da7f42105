"""Runs with signals, interrupted and resumed: the same bits as a run that was not; a state has no field that is
forgotten."""

import json
import os
import signal
from dataclasses import dataclass, fields, replace

import pytest
import torch

pytest.importorskip("transformers")

from ppg_fast.cli import main
from ppg_fast.config import TrainConfig, make_config, read_yaml, write_yaml
from ppg_fast.dialogues.packing import Sample
from ppg_fast.jobs.persona import PersonaJob
from ppg_fast.models.causal_lm import make_model
from ppg_fast.policy_classes import Greedy
from ppg_fast.spec import PolicyLossSpec
from ppg_fast.training import checkpoint, optimisers
from ppg_fast.training.auto import StepSignals
from ppg_fast.training.critic import Critic
from ppg_fast.training.experience import Experience
from ppg_fast.training.objective import Objective, Schedule
from ppg_fast.training.state import NotFinite, TrainingState
from ppg_fast.training.trainer import optimise

CLOCKS = ("seconds", "step_time", "perf/tokens_per_second", "perf/peak_memory_mb")
RUN = (
    "--device cpu --width 16 --layers 1 --no-progress --save-every 2 --eval-every 9 --eval-dialogues 1 "
    "--max-new-tokens 1 --imitation-steps 2 --imitation-batch 2 --max-steps 6 --num-prompts 1 --num-generations 8"
)
CASES = {"auto": ["--policy-class", "auto"], "signals": ["--policy-class", "lookahead:3", "--signals"]}


def result(folder):
    """Rows of the metrics but for the clocks, the weights' bytes, and what the last checkpoint knows of rewards."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k not in CLOCKS} for line in lines]
    known = checkpoint.newest(folder / "checkpoints")["training"]["credit_weights"]
    weights = (folder / "checkpoint/model.safetensors").read_bytes()
    return rows, weights, plain(known)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """Flags, a folder with a run that was stopped after its third step, and one with a run that was not."""
    folder, flags = tmp_path_factory.mktemp(request.param), [*RUN.split(), *CASES[request.param]]
    collect = PersonaJob.collect

    def interrupted(self, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return collect(self, step)

    assert main(["train", "--output-dir", str(folder / "whole"), *flags]) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PersonaJob, "collect", interrupted)
        assert main(["train", "--output-dir", str(folder / "stopped"), *flags]) == 143
    return request.param, folder


def test_a_run_with_another_class_is_refused_before_anything_is_written(case, capsys):
    run = case[1] / "stopped"
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert main(["train", "--resume", str(run), "--policy-class", "full", "--no-signals"]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line]
    assert "settings it began with, got policy_class " in said[-1]
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_resumed_run_gives_the_same_bits(case):
    name, folder = case
    assert main(["train", "--resume", str(folder / "stopped")]) == 0
    rows, weights, known = result(folder / "whole")
    assert result(folder / "stopped") == (rows, weights, known)
    train = [r for r in rows if r["phase"] == "train"]
    assert [r["step"] for r in train] == list(range(1, 7))
    assert any("auto/weight/0" in r for r in train[:3]), "something must have been seen before the stop"
    assert known["weight"] > 0
    assert any("auto/scale" in r for r in train[:3]) == (name == "auto")


# ---- the state by itself ---------------------------------------------------------------------------------------------
OBJECTIVE = Objective(Greedy(), baseline="none", spec=PolicyLossSpec(kl_coef=0.1), signals=True)
SCHEDULE = Schedule(6, 1e-3, max_skipped_steps=3)


def samples(reward=0.5):
    return [Sample([3, 4, 5 + i, 6, 1], [-1, -1, 0, 0, 0], [reward], i, cut_off=[False]) for i in range(3)]


def state_after(steps, bad=()):
    model = make_model(23, width=16, layers=1)
    state = TrainingState.start(model, OBJECTIVE, SCHEDULE)
    collect = lambda step: samples(3e38 if step in bad else 0.5)  # noqa: E731
    list(optimise(model, collect, OBJECTIVE, replace(SCHEDULE, max_steps=steps), state))
    return state


def through_a_file(saved, folder):
    checkpoint.save(folder, 1, saved, keep=1)
    return checkpoint.newest(folder)


def plain(value):
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


@dataclass
class More(TrainingState):
    """A state with a field that nobody has thought of."""

    extra: int = 0


def test_every_field_of_a_state_is_loaded(tmp_path):
    state = state_after(4, bad={3, 4})
    state = More(**vars(state), extra=7)
    state.credit_weights.observe(StepSignals(torch.eye(3)[:, None], torch.ones(3, 1).double(), 1.0))
    state.experience = Experience(1)
    state.experience.means = [0.5]
    state.critic = Critic()
    state.critic.load_state_dict({name: torch.eye(3).double() for name in ("moments", "reached", "totals")})
    fresh = TrainingState.start(make_model(23, width=16, layers=1, seed=1), OBJECTIVE, SCHEDULE)
    fresh = More(**{**vars(fresh), "experience": Experience(1), "critic": Critic()})
    before, saved = plain(fresh.state_dict()), plain(state.state_dict())
    assert saved.keys() == {f.name for f in fields(More)}
    assert [name for name in saved if before[name] == saved[name]] == [], "the test needs every field to differ"
    fresh.load_state_dict(through_a_file(state.state_dict(), tmp_path))
    assert plain(fresh.state_dict()) == saved


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"signals": False}, "began with a credit_weights must go on with one, got 'NoneType'"),
        ({"spec": PolicyLossSpec()}, "began with a reference must go on with one, got 'NoneType'"),
    ],
)
def test_a_state_of_another_kind_is_refused(change, words):
    other = TrainingState.start(make_model(23, width=16, layers=1), replace(OBJECTIVE, **change), SCHEDULE)
    with pytest.raises(ValueError, match=words):
        other.load_state_dict(state_after(1).state_dict())


def test_a_run_from_before_auto_estimated_weights_goes_on(tmp_path):
    """Its settings name candidates and its state has an empty chooser; one with a chooser cannot go on."""
    settings = tmp_path / "config.yaml"
    write_yaml(settings, TrainConfig())
    settings.write_text(settings.read_text() + "candidates: greedy,full\n")
    assert make_config(read_yaml(str(settings))) == TrainConfig()
    settings.write_text("candidates: greedy,full\n")
    with pytest.raises(ValueError, match="unknown setting 'candidates'"):
        read_yaml(str(settings))
    saved, fresh = state_after(1).state_dict(), state_after(0)
    fresh.load_state_dict({**saved, "chooser": None})
    assert plain(fresh.state_dict()) == plain(saved)
    with pytest.raises(ValueError, match="a training state must have"):
        fresh.load_state_dict({**saved, "chooser": {"weight": 1.0}})


def test_skipped_steps_in_a_row_are_counted_across_a_stop(tmp_path):
    """Two before the stop and two after it are four in a row, and the error has the dialogues of all of them."""
    saved = through_a_file(state_after(3, bad={2, 3}).state_dict(), tmp_path)
    state = TrainingState.start(make_model(23, width=16, layers=1), OBJECTIVE, SCHEDULE)
    state.load_state_dict(saved)
    with pytest.raises(NotFinite, match="at step 5, the last of 4 in a row") as caught:
        list(optimise(state.model, lambda step: samples(3e38), OBJECTIVE, SCHEDULE, state))
    assert caught.value.batches == [(step, samples(3e38)) for step in (2, 3, 4, 5)]


def test_moments_are_spread_like_the_weights_in_every_part_of_an_optimizer(monkeypatch):
    model = make_model(23, width=16, layers=1)
    optimizer = optimisers.make_optimizer(model, "muon")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved, spread = optimizer.state_dict(), []
    monkeypatch.setattr(optimisers, "shard_like", lambda value, weight: (spread.append(weight), value)[1])
    optimizer.load_state_dict(saved)
    assert {id(p) for p in spread} == {id(p) for p in model.parameters()}

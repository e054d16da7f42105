"""`make study-real` without its model: what is registered, trained, kept and said of it."""

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

from ppg_fast.bench import result_file
from ppg_fast.bench.real import command, models
from ppg_fast.bench.study_real import __main__ as study
from ppg_fast.bench.study_real import cells, dialogue, judge, prediction, section
from ppg_fast.bench.study_real.cells import ARMS, AUTO, FULL, GAE, GAMMA, GREEDY, LAGS, WINDOW, Cell
from ppg_fast.bench.tables import NOT_MEASURED
from test_bench_study_real_partner import consistent_llms, fixed_judge  # noqa: F401

from ppg_fast.config import TrainConfig
from ppg_fast.dialogues import make_word_tokenizer
from ppg_fast.dialogues.packing import Sample, pack
from ppg_fast.jobs.policy import Policy
from ppg_fast.models import make_model
from ppg_fast.policy_classes import policy_class
from ppg_fast.rollouts.persona import FACTS
from ppg_fast.training.objective import credit

WORDS = [value for values in FACTS.values() for value in values]


# ---- the steps -------------------------------------------------------------------------------------------------------
LAG = {"signal": {"value": 5.0, "error": 1.0}, "by_chance": 2.0, "clear": True, "share": {"value": 1.0, "error": 0.1}}
PREDICTED = {
    "window": "lookahead:3", "weights": "lags:1.0,0.0,0.5", "last_clear_lag": 2, "rollouts": 256, "lags": [LAG] * 3,
    "datetime": "2026-11-30T01:00:00+00:00", "cpu_seconds": 60.0,
}  # fmt: skip


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A study with both windows predicted and registered, whose cells are made up; what was asked for."""
    asked = []

    def made(self, cell):
        asked.append(cell)
        return result_of(cell)

    monkeypatch.setattr(study.Study, "_cell", made)
    monkeypatch.setattr(prediction, "predict", lambda delay, *_: asked.append(delay) or dict(PREDICTED))
    monkeypatch.setattr(study, "folder", lambda name: tmp_path / "model")
    monkeypatch.setattr(result_file, "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/log.md").write_text("# Log\n")
    data = consistent_llms(tmp_path / "education.json")
    given = ["--data", data, "--output", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    return SimpleNamespace(
        run=lambda *steps: study.main([*steps, *given]), asked=asked, log=tmp_path / "docs/log.md", out=tmp_path / "out"
    )


def result_of(cell, level=2.0, seconds=100.0):
    returns = [1.0, level]
    edges = {when: {"return": r, "truthful": 0.5} for when, r in (("before", 1.0), ("after", level))}
    more = {"policy_class": "lookahead:3" if cell.arm == WINDOW else "full", "cpu_seconds": seconds, **edges}
    return {**vars(cell), "returns": returns, "truthful": [0.25, 0.75], "begun": "2026-11-30T02:00:00+00:00", **more}


def register(begun, capsys):
    assert begun.run("predict") == 0
    said = capsys.readouterr().out.splitlines()
    begun.log.write_text("# Log\n* " + "\n  ".join(" ".join(said).split()) + "\n")  # wrapped as prose is
    return said


def test_nothing_is_trained_before_it_was_registered(begun, capsys):
    assert begun.run("train") == 1
    assert "train wants the step predict first, of delay, got 2" in capsys.readouterr().err
    assert begun.run("predict") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("delay 2: window lookahead:3, weights lags:1.0,0.0,0.5 (256 rollouts, judge ")
    assert begun.run("train") == 1
    assert f"docs/log.md must hold the prediction before a cell is trained; add and commit it, got {lines[0]!r}" in (
        capsys.readouterr().err
    )
    begun.log.write_text(lines[0].replace("lookahead:3", "lookahead:4"))
    assert begun.run("train") == 1
    assert begun.asked == [2, 5]
    begun.log.write_text(f"{lines[0]}\n")
    assert begun.run("train", "--only", "delay 2, full, seed 0") == 0
    assert begun.asked == [2, 5, Cell(2, FULL, 0)]


def test_a_cell_is_trained_once(begun, capsys):
    """In the order of the study, what was finished before a failure is kept, and no prediction is made again."""
    register(begun, capsys)
    assert begun.run("train", "--only", "seed 0") == 0
    assert begun.asked[2:] == [Cell(delay, arm, 0) for delay in (2, 5) for arm in ARMS]
    study.Study._cell, kept = lambda self, cell: 1 / 0 if cell.seed == 2 else result_of(cell), study.Study._cell
    try:
        with pytest.raises(ZeroDivisionError):
            begun.run("train")
    finally:
        study.Study._cell = kept
    file = result_file.read(begun.out / "study_real.cpu.json")
    assert len(file["cells"]) == 4 * len(ARMS)
    assert begun.run("--jobs", "2") == 0
    assert set(begun.asked[2 + 2 * len(ARMS) :]) == {Cell(delay, arm, 2) for delay in (2, 5) for arm in ARMS}
    assert len(result_file.read(begun.out / "study_real.cpu.json")["cells"]) == len(cells.grid()) == 42
    assert "42 of 42 cells are done, 0 to train" in (begun.run() or capsys.readouterr().out)


def test_two_processes_keep_each_others_cells(begun, capsys, monkeypatch):
    """Of other cells: one ends while the other trains."""
    register(begun, capsys)
    made = study.Study._cell

    def beside(self, cell):
        if cell.seed == 1:
            monkeypatch.setattr(study.Study, "_cell", made)
            assert begun.run("train", "--only", "delay 5, full, seed 2") == 0
        return made(self, cell)

    monkeypatch.setattr(study.Study, "_cell", beside)
    assert begun.run("train", "--only", "delay 2, full") == 0
    kept = [(c["delay"], c["seed"]) for c in result_file.read(begun.out / "study_real.cpu.json")["cells"]]
    assert sorted(kept) == [(2, 0), (2, 1), (2, 2), (5, 2)]


def test_other_settings_are_another_study(begun, capsys, monkeypatch):
    """Those of the rollouts once a window is predicted, those of training once a cell is trained."""
    register(begun, capsys)
    monkeypatch.setitem(cells.SETTINGS, "learning_rate", 1e-4)
    assert begun.run("train", "--only", "delay 2, full, seed 0") == 0
    assert result_file.read(begun.out / "study_real.cpu.json")["settings"]["learning_rate"] == 1e-4
    for name in ("learning_rate", "temperature"):
        with monkeypatch.context() as other:
            other.setitem(cells.SETTINGS, name, 0.125)
            assert begun.run("train") == 1
        assert f"(delete it to begin a new study), got {{'{name}': 0.125}}" in capsys.readouterr().err


def test_a_prediction_keeps_the_settings_of_its_rollouts(begun, capsys, monkeypatch):
    register(begun, capsys)
    monkeypatch.setitem(cells.SETTINGS, "temperature", 0.125)
    assert begun.run("train") == 1
    assert "settings must be those of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["sing"], "a step must be one of predict, train, got 'sing'"),
        (["--data", "nowhere.json"], "--data must be files, got 'nowhere.json'"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--only", "seed 9"], "--only must be part of a cell's name, such as 'delay 2, full, seed 0', got 'seed 9'"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is(given, said, tmp_path, capsys):
    data = [] if "--data" in given else ["--data", __file__]
    with pytest.raises(SystemExit, match="2"):
        study.main([*given, *data, "--output", str(tmp_path), "--work", str(tmp_path)])
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- a tiny model ----------------------------------------------------------------------------------------------------
@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder in the place of the real model's, and settings that it can be trained with."""
    place = tmp_path / models.SMOLLM2
    tokenizer = make_word_tokenizer(WORDS)
    make_model(len(tokenizer), 16, 1, 0, tokenizer.pad_token_id, tokenizer.eos_token_id).save_pretrained(place)
    tokenizer.save_pretrained(place)
    (place / "done").touch()
    monkeypatch.setenv(models.CACHE, str(tmp_path))
    small = {"lora_rank": 0, "max_steps": 2, "num_prompts": 2, "num_generations": 2, "eval_dialogues": 2}
    for name, value in {**small, "max_new_tokens": 2}.items():
        monkeypatch.setitem(cells.SETTINGS, name, value)
    return place


def test_every_arm_trains(tiny):
    """From the same start, on the same openings, each with its own credit."""
    found = {}
    for cell in (Cell(2, arm, 0) for arm in ARMS):
        found[cell.arm] = cells.train(cell, {"model": str(tiny), **cells.SETTINGS, **cell.settings(PREDICTED)})
    own = {GREEDY: "greedy", WINDOW: "lookahead:3", LAGS: PREDICTED["weights"]}
    for arm, of_arm in found.items():
        assert [len(of_arm[name]) for name in ("returns", "truthful")] == [2, 2]
        assert (of_arm["before"], of_arm["returns"][0]) == (found[FULL]["before"], found[FULL]["returns"][0])
        assert of_arm["policy_class"] == (AUTO if arm == AUTO else str(policy_class(own.get(arm, "full"))))


REWARDS = [[0.5, 0, 1.5, 0.5, 0, 0, 0.5], [0, 0.5, 2.0, 0, 0, 0.5, 0]]  # of the two dialogues of a group
MEANS = [2.5, 2.25, 2.0, 0.5, 0.25, 0.5, 0.25]  # that the critic expects from each turn on


def test_arms_credit_the_same_dialogues_each_in_its_own_way(tiny):
    """By the formulas, in plain Python."""
    samples = [Sample([0, 5] * 7, [i // 2 if i % 2 else -1 for i in range(14)], r, 0) for r in REWARDS]
    found = {}
    for cell in (Cell(2, arm, 0) for arm in ARMS if arm != AUTO):  # which begins as full planning
        settings = {"model": str(tiny), **cells.SETTINGS, **cell.settings(PREDICTED)}
        objective = Policy(TrainConfig(seed=0, **settings), lambda: None).objective()
        found[cell.arm] = credit(pack(samples), objective, MEANS)[1].tolist()
    turns, values = range(7), [*MEANS, 0.0]
    rest = [[r[k] + values[k + 1] - values[k] for k in turns] for r in REWARDS]
    credited = {
        FULL: (REWARDS, lambda d: 1.0),
        GAMMA: (REWARDS, lambda d: 0.9**d),
        GAE: (rest, lambda d: 0.95**d),
        WINDOW: (REWARDS, lambda d: float(d < 3)),
        GREEDY: (REWARDS, lambda d: float(d == 0)),
        LAGS: (REWARDS, lambda d: (1.0, 0.0, 0.5, 0, 0, 0, 0)[d]),
    }
    for arm, (what, w) in credited.items():
        one, other = ([sum(w(k - t) * r[k] for k in turns if k >= t) for t in turns] for r in what)
        less = [a - b for a, b in zip(one, other, strict=True)]  # the other is all of the group's others
        assert found[arm] == [pytest.approx(less, abs=1e-6), pytest.approx([-x for x in less], abs=1e-6)]
    assert len({str(advantages) for advantages in found.values()}) == len(ARMS) - 1


def test_a_cell_is_a_process_of_its_own(tiny, tmp_path, monkeypatch):
    """Which finds the judge, and says what it took."""
    judge.Judge(0.0, {}, {}).write(tmp_path / "judge.json")
    made = study.Study.__new__(study.Study)
    made.work, made.judge, made.file = tmp_path, tmp_path / "judge.json", {"predictions": {"5": PREDICTED}}
    found = made._cell(Cell(5, WINDOW, 1))
    assert (found["delay"], found["arm"], found["seed"], found["policy_class"]) == (5, WINDOW, 1, "lookahead:3")
    assert all(r >= 0.5 for r in found["returns"])  # the judge says 1/2
    assert found["cpu_seconds"] > 0
    assert "step 2" in (tmp_path / "delay-5-the-window-seed-1.log").read_text()


def test_the_prediction_asks_the_command(tmp_path, monkeypatch):
    asked = []

    def run(arguments, environment, log):
        asked.append((arguments, environment))
        (tmp_path / "window-5").mkdir()
        kept = {name: PREDICTED[name] for name in ("window", "weights", "last_clear_lag", "rollouts", "lags")}
        more = {"groups": 64, "mean_return": 1.0, "classes": {}, "seconds": 9.0}
        (tmp_path / "window-5/window.json").write_text(json.dumps({**kept, **more}))
        return command.Ran(0, 9.0, 8.0, 1)

    monkeypatch.setattr(command, "run", run)
    found = prediction.predict(5, tmp_path / "model", tmp_path / "judge.json", tmp_path)
    assert (found["window"], found["cpu_seconds"]) == ("lookahead:3", 8.0)
    ((arguments, environment),) = asked
    assert arguments[:2] == ["ppg_fast", "compare"]
    assert "--env=ppg_fast.bench.study_real.dialogue:SettlesAfter5" in arguments
    assert f"--num-generations={cells.SETTINGS['num_generations']}" in arguments
    assert environment[dialogue.JUDGE] == str(tmp_path / "judge.json")


# ---- what is rendered ------------------------------------------------------------------------------------------------
JUDGED = {
    "files": ["a.json"], "dialogues": 10, "lines": 1234, "consistent": 0.75, "held_out_lines": 200, "auc": 0.655,
    "digest": "0123456789ab",
}  # fmt: skip


def rendered(name, cells=(), **predictions):
    found = {d.strip("_"): p for d, p in predictions.items()}
    return section.SECTIONS[name]({"study_real.cpu": {"judge": JUDGED, "predictions": found, "cells": list(cells)}})


def test_a_window_that_moves_is_told_from_one_that_does_not():
    far = {**PREDICTED, "window": "lookahead:6", "last_clear_lag": 5, "lags": [{**LAG, "clear": False}] * 5 + [LAG]}
    text = rendered("study_real_prediction", _2=PREDICTED, _5=far)
    assert (
        "* `delay 5: window lookahead:6, weights lags:1.0,0.0,0.5 (256 rollouts, judge 0123456789ab)`, on 2026" in text
    )
    assert "| delay 5 | 2.5 | 2.5 | 2.5 | 2.5 | 2.5 | **2.5** |" in text
    assert "lookahead:6 where lookahead:6 is built. The window moves with the delay." in text
    assert "1,234 lines of 10 dialogues (a.json), 75% of them consistent" in text
    near, nothing = ({**far, "last_clear_lag": lag} for lag in (2, None))
    text = rendered("study_real_prediction", _2=PREDICTED, _5=near)
    assert "(too short by 3). The window **does not** move with the delay." in text
    assert "(no lag is clear). The window **does not** move" in rendered(
        "study_real_prediction", _2=PREDICTED, _5=nothing
    )
    assert "The other delay is not measured yet." in rendered("study_real_prediction", _2=PREDICTED)


def test_arms_are_compared_within_seeds():
    """The window of three seeds, greedy of one, full of two; means and standard errors by hand."""
    of = lambda arm, *levels: [result_of(Cell(2, arm, s), level) for s, level in enumerate(levels)]  # noqa: E731
    text = rendered("study_real_training", [*of(FULL, 2.0, 3.0), *of(WINDOW, 3.0, 4.4, 9.0), *of(GREEDY, 1.0)])
    assert "6 of 42 cells are trained, 600 s of a core in all." in text
    assert "**The partner settles after 2 turns**, seeds 0, 1, 2" in text
    assert "| full | 2 | 1.75 |  | 1.00 | 2.50 | 25% | 75% |" in text
    assert "| the window: lookahead:3 | 3 | 3.23 | +0.60 ± 0.10 | 1.00 | 5.47 | 25% | 75% |" in text
    assert "| greedy | 1 | 1.00 | -0.50 (one seed) |" in text
    assert "Largest mean return among arms of 3 seeds: the window." in text
    assert "The window is above full planning, clearly (+0.60 ± 0.10)." in text
    text = rendered("study_real_training", [*of(FULL, 2.0, 3.0), *of(WINDOW, 1.0, 3.2)])
    assert "The window is below full planning, not clearly (-0.20 ± 0.30)." in text


def test_nothing_is_claimed_of_one_seed_or_none():
    text = rendered("study_real_training", [result_of(Cell(5, FULL, 0)), result_of(Cell(5, WINDOW, 0), 3.0)])
    assert "Nothing can be said of the window before two seeds have it and full planning." in text
    assert rendered("study_real_training") == "0 of 42 cells are trained, 0 s of a core in all.\n"
    assert {s({}) for s in section.SECTIONS.values()} == {NOT_MEASURED}

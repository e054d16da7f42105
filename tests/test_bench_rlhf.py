"""`make rlhf-demo` at a tiny size: its parts, what it stores of them, and what is said of it."""

import json
import math
import random
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

from ppg_fast.bench import render, rlhf

from ppg_fast.cli import main as ppg_fast
from ppg_fast.dialogues.message import Message

TINY = {"pairs": 12, "seeds": 1, "steps": 1, "imitation_steps": 1, "reward_steps": 2, "width": 16, "eval_dialogues": 2}
FLAGS = [part for name, value in TINY.items() for part in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder of a finished demonstration, and the commands that it gave."""
    folder, said = tmp_path_factory.mktemp("rlhf"), []

    def run(arguments):
        said.append(arguments)
        assert ppg_fast(arguments) == 0

    rlhf.main([*FLAGS, "--folder", str(folder / "runs"), "--output", str(folder)], run)
    return folder, said


def test_its_parts_follow_each_other_and_are_not_done_twice(done):
    folder, said = done
    assert [arguments[0] for arguments in said] == ["train", "reward", "train", "train", "train"]
    assert all(["--reward", f"model:{folder / 'runs/rm'}"] == arguments[-2:] for arguments in said[2:4])
    assert ["--kl-coef" in arguments for arguments in said[2:]] == [True, False, False]
    assert "--reward" not in said[4]
    again = []
    rlhf.main([*FLAGS, "--folder", str(folder / "runs"), "--output", str(folder)], again.append)
    assert again == []
    with pytest.raises(ValueError, match="must be of the same settings"):
        rlhf.main(["--folder", str(folder / "runs")], again.append)


def test_what_is_stored_is_what_the_runs_logged(done):
    folder, _ = done
    file = json.loads((folder / "rlhf.cpu.json").read_text())
    assert [(c["on"], c["seed"]) for c in file["curves"]] == [("model", 0), ("free", 0), ("true", 0)]
    rows = [json.loads(line) for line in (folder / "runs/model-0/metrics.jsonl").read_text().splitlines()]
    logged = [row for row in rows if row["phase"] == "eval"]
    by_model, _, true = file["curves"]
    assert [p["true"] for p in by_model["points"]] == pytest.approx([row["eval/interview"] for row in logged], abs=1e-5)
    assert [p["trained"] for p in by_model["points"]] == pytest.approx([row["eval/reward"] for row in logged], abs=1e-5)
    assert all(point["true"] == point["trained"] for point in true["points"])
    assert by_model["points"][0]["true"] == true["points"][0]["true"]  # the same policy on the same personas
    lines = (folder / "runs/pairs.jsonl").read_text().splitlines()
    assert file["pairs"]["count"] == len(lines) == 12


def stored(gains, low):
    curves = [
        {
            "on": "model",
            "seed": seed,
            "seconds": 9.0,
            "points": [{"step": s, "trained": s, "true": 2 + g * s} for s in (0, 1)],
        }
        for seed, g in enumerate(gains)
    ]
    held_out = {"accuracy": 0.7, "accuracy_interval": [low, 0.8], "step": 50}
    pairs = {"count": 2000, "ties": 100, "agreement": 0.82}
    return {"rlhf.cpu": {"pairs": pairs, "held_out": held_out, "curves": curves}}


def test_bars_are_met_or_missed():
    text = render.SECTIONS["rlhf"](stored([1.0, 1.2, 1.1], 0.66))
    assert "2,000 pairs, 100 of them ties; of the others the rater was right on 82%" in text
    assert "70% of the held-out pairs as the rater told them, 66% to 80%" in text
    assert "| the model's reward, seed 1 | 0.00 | 1.00 | 2.00 | 3.20 | 3.20 |" in text
    assert text.count("**met**") == 2
    text = render.SECTIONS["rlhf"](stored([1.0, -1.2, 0.5], 0.59))
    assert text.count("**missed**") == 2
    assert render.SECTIONS["rlhf"]({}) == render.NOT_MEASURED


def test_the_chart_has_both_returns():
    chart = rlhf.charts(stored([1.0, 0.5], 0.6))[rlhf.CHART]
    assert chart.count("<polyline") == 4
    assert "true return" in chart
    assert ">3.00</text>" in chart
    assert chart == rlhf.charts(stored([1.0, 0.5], 0.6))[rlhf.CHART]


def side(rewards):
    return SimpleNamespace(total_reward=sum(rewards), messages=[Message("assistant", str(rewards))])


def test_the_rater_errs_as_often_as_it_should():
    rng, better, worse = random.Random(1), side([1.0, 0.5]), side([0.75])
    told = [rlhf.rated(sides, rng) for sides in ((better, worse), (worse, better)) for _ in range(4000)]
    assert sum(right for _, right in told) / 8000 == pytest.approx(1 / (1 + math.exp(-0.75 / rlhf.NOISE)), abs=0.02)
    for pair, right in told[:40]:
        assert (pair["chosen"][0]["content"] == "[1.0, 0.5]") == right
    assert rlhf.rated((better, side([1.5])), rng)[1] is None
    assert rlhf.rated((better, side([1.5])), rng)[0]["tie"]

"""`--reward human:`: a run waits for what people say of its dialogues, and loses none of it when either is killed."""

import json
import signal
import subprocess
import sys
import threading
import warnings

import pytest
import torch

pytest.importorskip("transformers")

from test_rating import started as rating

from ppg_fast.cli import main
from ppg_fast.config import make_config
from ppg_fast.dialogues.dialogue import read_dialogues
from ppg_fast.jobs import human
from ppg_fast.jobs.human import human_of
from ppg_fast.rating.answers import Answers
from ppg_fast.training import checkpoint

TINY = (
    "--device cpu --width 16 --layers 1 --no-progress --save-every 1 --eval-every 9 --eval-dialogues 1 --max-turns 2 "
    "--max-new-tokens 2 --imitation-steps 0 --max-steps 2 --num-prompts 1 --num-generations 2 --keep-rollouts 2"
)


def flags(run):
    return ["--output-dir", str(run), *TINY.split(), "--reward", f"human:{run / 'ratings'}"]


def opinion(dialogue, turn):
    """1 to 5, by what the dialogue and the turn are."""
    return 1 + (len(dialogue.rpartition("/")[2].split("-")[0]) + int(dialogue[-1], 16) + turn) % 5


def kept(run, step):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_dialogues(run / f"rollouts/step-{step:06d}.jsonl")


def places(run, step):
    return [(d.id, t) for d in kept(run, step) for t in range(len(d.turn_rewards))]


@pytest.fixture
def rates_while_it_waits(monkeypatch):
    """Two raters who answer one turn each time that the run waits; ``order`` is what they were asked."""
    order = []

    def answer(_):
        run = order_of["run"]
        raters = [Answers(run / f"ratings/{name}.jsonl", name) for name in ("ann", "bob")]
        try:
            step = max(int(path.stem.partition("-")[2]) for path in (run / "rollouts").glob("step-*"))
            left = [place for place in places(run, step) if place not in raters[0].given]
            order.append(left[0])
            raters[1].add(*left[0], 5)  # while only one has answered, the mean is of one
            raters[0].add(*left[0], opinion(*left[0]))
        finally:
            for rater in raters:
                rater.close()

    order_of = {"order": order}
    monkeypatch.setattr(human.time, "sleep", answer)
    return order_of


def test_a_step_is_taken_with_what_people_say_of_it(tmp_path, rates_while_it_waits, capsys):
    run = rates_while_it_waits["run"] = tmp_path / "run"
    assert main(["train", *flags(run)]) == 0
    assert f"waits for ratings of 4 turns in {run / 'ratings'}: ppg-fast rate {run}" in capsys.readouterr().out
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step in (1, 2):
        dialogues = kept(run, step)
        for d in dialogues:
            assert d.turn_rewards == tuple((5 + opinion(d.id, turn)) / 2 for turn in range(2))
        (row,) = [row for row in rows if row["phase"] == "train" and row["step"] == step]
        assert row["reward"] == pytest.approx(sum(sum(d.turn_rewards) for d in dialogues) / 2)
    assert [r["step"] for r in rows if "human_time" in r] == [1, 2]
    summary = json.loads((run / "summary.json").read_text())
    assert "eval/reward/start" in summary, "the interview says what it pays"


def test_prompts_have_no_reward_but_theirs(tmp_path, rates_while_it_waits):
    run = rates_while_it_waits["run"] = tmp_path / "run"
    lines = [json.dumps({"messages": [{"role": "user", "content": f"say {i}"}]}) + "\n" for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(lines))
    assert main(["train", "--prompts", str(tmp_path / "prompts.jsonl"), *flags(run), "--max-steps", "1"]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert not [name for row in rows if row["phase"] == "eval" for name in row if name.startswith("eval/reward")]
    assert next(row["reward"] for row in rows if row["phase"] == "train") > 1


def wait_for(condition, process):
    for _ in range(600):
        if condition():
            return
        assert process.poll() is None
        threading.Event().wait(0.1)  # time.sleep answers questions here
    raise AssertionError("in vain")


def test_kill_minus_nine_of_both_sides_loses_nothing(tmp_path, rates_while_it_waits):
    """Run and rater are killed with half of a step rated; what comes of it has the bits of a run that was not."""
    whole = rates_while_it_waits["run"] = tmp_path / "whole"
    for rater in ("ann", "bob"):
        (whole / "ratings").mkdir(parents=True, exist_ok=True)
        (whole / f"ratings/{rater}.jsonl").touch()
    assert main(["train", *flags(whole)]) == 0
    run, first = tmp_path / "run", tmp_path / "run/rollouts/step-000001.jsonl"
    train = subprocess.Popen([sys.executable, "-m", "ppg_fast", "train", *flags(run)], stdout=subprocess.DEVNULL)
    rater = None
    try:
        wait_for(first.exists, train)
        rater, client = rating(run, "--rater", "ann")
        _, state = client("next")
        for _ in range(2):
            told = {"id": state["id"], "turn": state["turn"], "rating": opinion(state["id"], state["turn"])}
            status, state = client("rate", **told)
            assert status == 200
    finally:
        for process in filter(None, (train, rater)):
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert [d.turn_rewards for d in kept(run, 1)] == [(None, None)] * 2
    ann = Answers(run / "ratings/ann.jsonl", "ann")
    bob = Answers(run / "ratings/bob.jsonl", "bob")
    given = dict(ann.given)
    for place in places(run, 1):
        bob.add(*place, 5)
        if place not in given:
            ann.add(*place, opinion(*place))
    ann.close(), bob.close()
    assert len(given) == 2
    rates_while_it_waits["run"] = run
    asked = len(rates_while_it_waits["order"])
    assert main(["train", "--resume", str(run), "--no-progress"]) == 0
    assert [name.split("/")[0] for name, _ in rates_while_it_waits["order"][asked:]] == ["step-000002"] * 4
    ends = [checkpoint.newest(folder / "checkpoints")["training"]["model"] for folder in (whole, run)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_step_that_was_rated_keeps_its_rewards(tmp_path, rates_while_it_waits):
    """Whatever is rated afterwards."""
    run = rates_while_it_waits["run"] = tmp_path / "run"
    assert main(["train", *flags(run), "--max-steps", "1"]) == 0
    before = kept(run, 1)
    eve = Answers(run / "ratings/eve.jsonl", "eve")
    eve.add(before[0].id, 0, 1)
    eve.close()
    folder = type("Run", (), {"kept_rollouts": lambda self, step: before, "keep_rollouts": None})()
    assert human.HumanRatings(run / "ratings").rewarded(folder, 1, before, print) == before
    assert human.HumanRatings(run / "ratings").known()[before[0].id][0] != before[0].turn_rewards[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"reward": "human:r + a.py:b"}, "without a reward_model must be the whole reward: human:RUN/ratings"),
        ({"reward": "0.5*human:r"}, "must be the whole reward"),
        ({"reward": "human:r", "judge": "http://x"}, "must be the whole reward"),
        ({"reward": "human:r", "keep_rollouts": 63}, "keep_rollouts must be at least the 64 dialogues of a step"),
        ({"reward": "human:r", "human_every": 5}, "human_every must be left out without a reward_model, got 5"),
        ({"human_steps": 5}, "human_steps must be left out without reward human:RUN/ratings, got 5"),
        ({"reward": "judge", "reward_model": "m"}, "reward_model must be left out without reward human:"),
        ({"reward": "human:r", "reward_model": "m"}, "keep_rollouts must be at least 1 with reward human"),
        ({"reward": "human:", "reward_model": "m"}, "reward must name the ratings of people once"),
        ({"reward": "human:r + human:s", "reward_model": "m"}, "reward must name the ratings of people once"),
    ],
)
def test_what_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        human_of(make_config(given))


def test_a_line_that_is_being_written_is_waited_for(tmp_path):
    (tmp_path / "ann.jsonl").write_text('{"id": "a", "turn": 0, "rating": 4, "rater": "ann"}\n{"id": "a", "tu')
    (tmp_path / "ann.pairs.jsonl").write_text('{"id": "b", "rating": 1, "rater": "ann"}\n')
    found = human.HumanRatings(tmp_path)
    assert found.known() == {"a": {0: 4.0}}
    (tmp_path / "ann.jsonl").write_text('{"id": "a"}\n')
    with pytest.raises(ValueError, match=r"ann\.jsonl, line 1 must be a JSON object with id and rating"):
        found.known()

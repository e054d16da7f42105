"""`--reward human:RUN/ratings --reward-model FOLDER`: people rate a few dialogues, a model that is fitted to what they
said rewards the others; nothing they said is lost, and a run that goes on has the same bits."""

import json
import math
import os
import shlex
import shutil
import signal
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from test_rating import started as rating
from test_reward_training import small_model

from ppg_fast.cli import main
from ppg_fast.config import make_config
from ppg_fast.dialogues import Dialogue, Message
from ppg_fast.dialogues.dialogue import read_dialogues
from ppg_fast.distributed import Ranks
from ppg_fast.jobs import human
from ppg_fast.jobs.refitted_model import RefittedModel
from ppg_fast.jobs.reward_training import RewardTraining
from ppg_fast.jobs.run_folder import RunFolder
from ppg_fast.rating.answers import Answers
from ppg_fast.rewards import Transcript, make_rewards
from ppg_fast.training import checkpoint, trainer

TRUE = """
def true(messages):
    said = messages[-1]["content"].split()
    return sum(word in ("good", "fine") for word in said) - sum(word in ("bad", "poor") for word in said)
"""
TINY = (
    "--device cpu --partner none --max-turns 1 --max-new-tokens 2 --num-prompts 2 --num-generations 4 "
    "--keep-rollouts 8 --learning-rate 0.02 --eval-dialogues 4 --no-progress --human-steps 30 "
    "--human-learning-rate 0.02"
)


def opinion(text):
    """1 to 5, by what is said."""
    said = text.split()
    good = sum(word in ("good", "fine") for word in said) - sum(word in ("bad", "poor") for word in said)
    return 3 + max(-2, min(2, good))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def flags(base, tmp_path):
    """Of a run in a folder."""
    (tmp_path / "true.py").write_text(TRUE)
    asks = [{"messages": [{"role": "user", "content": "ask" + " more" * i}]} for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(ask) + "\n" for ask in asks))
    given = ["--prompts", str(tmp_path / "prompts.jsonl"), "--model", str(base), "--reward-model", str(base)]

    def of(run, ratings=None, beside=True):
        truth = f" + 0*{tmp_path}/true.py:true" if beside else ""
        reward = f"human:{ratings or run / 'ratings'}{truth}"
        return ["train", *given, "--output-dir", str(run), "--reward", reward, *TINY.split()]

    return of


def rows(run, phase):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if row["phase"] == phase]


def kept(run, step):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_dialogues(run / f"rollouts/step-{step:06d}.jsonl")


class Rater(threading.Thread):
    """Rates over HTTP what a run shows, by what it truly is worth; its server is killed once on the way."""

    def __init__(self, run):
        super().__init__(daemon=True)
        self.run_folder, self.over, self.confirmed = run, threading.Event(), []

    def run(self):
        try:
            self._rate_all()
        except BaseException:
            os.kill(os.getpid(), signal.SIGINT)  # a run that waits for nobody would wait for ever
            raise

    def _rate_all(self):
        while not (self.run_folder / "rollouts/step-000001.jsonl").is_file():
            if self.over.wait(0.05):
                return
        for most in (5, math.inf):
            if self.over.is_set():
                return
            process, client = rating(self.run_folder, "--rater", "ann")
            try:
                self._rate(client, most)
            finally:
                process.send_signal(signal.SIGKILL)
                process.wait()

    def _rate(self, client, most):
        count, (status, state) = 0, client("next")
        while not self.over.is_set() and count < most:
            if state["id"] is None:
                self.over.wait(0.02)
                status, state = client("next")
                continue
            place = {"id": state["id"], "turn": state["turn"], "rating": opinion(state["dialogues"][0][-1]["text"])}
            status, state = client("rate", **place)
            assert status == 200
            self.confirmed.append(place)
            count += 1


def test_the_true_return_rises_while_people_rate(flags, tmp_path, monkeypatch, capsys):
    """The model learns what is good from ratings that are posted while it trains, from nothing."""
    monkeypatch.setattr(human, "PAUSE", 0.02)
    run, more = tmp_path / "run", ["--max-steps", "12", "--human-every", "4", "--eval-every", "12"]
    rater = Rater(run)
    rater.start()
    try:
        assert main([*flags(run), *more]) == 0
    finally:
        rater.over.set()
        rater.join(60)
    said = capsys.readouterr().out
    assert f"waits for ratings of 8 turns in {run / 'ratings'}: ppg-fast rate {run}" in said
    assert "step 2: 8 ratings of 8 dialogues, fitted in " in said
    true = [row["eval/rewards/true/mean"] for row in rows(run, "eval")]
    assert true[-1] > true[0] + 0.5, true
    lines = [json.loads(line) for line in (run / "ratings/ann.jsonl").read_text().splitlines()]
    assert [{**place, "rater": "ann"} for place in rater.confirmed] == lines[: len(rater.confirmed)]
    assert len(lines) > 16
    fits = [row for row in rows(run, "rollout") if "human/ratings" in row]
    assert fits[0]["step"] == 2
    assert {5, 9} <= {row["step"] for row in fits}
    assert fits[-1]["human/ratings"] > 16
    assert all(row["human_time"] > 0 for row in fits)
    assert rows(run, "train")[0]["active_turns"] == 0, "before anybody said anything, nothing is learned"
    (reward,) = make_rewards(f"model:{run / 'reward_model'}")
    good, bad = (Transcript(w, (Message("user", "ask"), Message("assistant", f"{w} {w}"))) for w in ("good", "bad"))
    assert reward.turns([good])[0][0] > reward.turns([bad])[0][0] + 0.5


@pytest.fixture
def rated_at_once(monkeypatch, tmp_path):
    """A folder beside the run, where every dialogue is rated as soon as it is kept."""
    keep = RunFolder.keep_rollouts

    def keep_and_rate(self, step, dialogues):
        keep(self, step, dialogues)
        ann = Answers(tmp_path / "ratings/ann.jsonl", "ann")
        for one in (one for one in dialogues if (one.id, 0) not in ann.given):
            ann.add(one.id, 0, opinion(one.messages[-1].content))
        ann.close()

    monkeypatch.setattr(RunFolder, "keep_rollouts", keep_and_rate)
    return tmp_path / "ratings"


@pytest.mark.parametrize("loss", ["reinforce", "soft_q"])
def test_a_run_that_goes_on_has_the_same_bits(flags, tmp_path, rated_at_once, loss):
    """Killed after a fit and before the next checkpoint, and rated by somebody else before it goes on."""
    whole, half = tmp_path / "whole", tmp_path / "half"
    more = shlex.split("--max-steps 6 --human-every 2 --eval-every 9 --save-every 1 --keep-checkpoints 9")
    more += ["--loss-type", loss] + (["--policy-class", "full", "--beta", "0.5"] if loss == "soft_q" else [])
    assert main([*flags(whole, rated_at_once, beside=False), *more]) == 0
    assert [row["step"] for row in rows(whole, "rollout") if "human/ratings" in row] == [2, 3, 5]
    shutil.copytree(whole, half)
    for path in checkpoint.checkpoints(half / "checkpoints")[3:]:
        shutil.rmtree(path)
    eve = Answers(rated_at_once / "eve.jsonl", "eve")
    for step in range(1, 7):
        for one in kept(half, step):
            eve.add(one.id, 0, 6 - opinion(one.messages[-1].content))
    eve.close()
    assert main(["train", "--resume", str(half), "--no-progress"]) == 0
    ends = [checkpoint.newest(run / "checkpoints") for run in (whole, half)]
    states = [(end["training"]["model"], end["policy"]["reward_model"]["weights"]) for end in ends]
    for mine, theirs in zip(*states, strict=True):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    read = [end["policy"]["reward_model"]["lines"] for end in ends]
    assert read[0] == read[1]
    assert [row["loss"] for row in rows(whole, "train")] == [row["loss"] for row in rows(half, "train")]
    assert main(["train", "--resume", str(half), "--max-steps", "7"]) == 0
    assert rows(half, "rollout")[-1]["human/ratings"] == 2 * 8 * 6, "a step that is new reads what is there now"


def test_rated_dialogues_come_again_with_what_people_said(flags, tmp_path, rated_at_once, monkeypatch):
    """In soft Q-learning, in the units of the model: standard deviations about the rater's mean."""
    update, seen = trainer.update, []

    def spy(*arguments):
        seen.append((arguments[2], arguments[7]))
        return update(*arguments)

    monkeypatch.setattr(trainer, "update", spy)
    run = tmp_path / "run"
    more = shlex.split("--max-steps 4 --human-every 2 --eval-every 9 --loss-type soft_q --policy-class full")
    assert main([*flags(run, rated_at_once, beside=False), *more]) == 0
    assert [len(again) for _, again in seen] == [0, 8, 8, 8]
    given = [opinion(one.messages[-1].content) for step in (1, 2) for one in kept(run, step)]
    mean = sum(given) / 16
    spread = math.sqrt(sum((y - mean) ** 2 for y in given) / 16)
    sampled = [one for samples, _ in seen[:2] for one in samples]
    worth = {tuple(one.tokens): (y - mean) / spread for one, y in zip(sampled, given, strict=True)}
    for one in seen[3][1]:
        assert one.rewards == pytest.approx([worth[tuple(one.tokens)]])
        assert any((one.tokens, one.rollout_logprobs) == (old.tokens, old.rollout_logprobs) for old in sampled)
    (rated_at_once / "ann.jsonl").unlink()
    both = ["--reward", f"human:{rated_at_once} + 0.1*{tmp_path}/true.py:true"]
    assert main([*flags(tmp_path / "two", rated_at_once), *more, *both]) == 0
    assert [len(again) for _, again in seen[4:]] == [0, 0, 0, 0], "where another term weighs, its part is not known"


def made(base, tmp_path):
    """A model that has read nothing yet, and the folder of its run."""
    settings = {"human_steps": 20, "human_learning_rate": 0.02, "keep_rollouts": 8, "device": "cpu"}
    given = {"reward": f"human:{tmp_path}/ratings", "reward_model": str(base), "output_dir": str(tmp_path / "run")}
    config = make_config({**given, **settings})
    return RefittedModel(str(tmp_path / "ratings"), config, "cpu"), RunFolder(config)


def said(run, step, *answers):
    names = [f"step-{step:06d}/{i}-0" for i in range(len(answers))]
    messages = [(Message("user", "ask"), Message("assistant", answer)) for answer in answers]
    run.path.mkdir(exist_ok=True)
    run.keep_rollouts(step, [Dialogue(n, n, m, (0.0,)) for n, m in zip(names, messages, strict=True)])
    return names


def test_a_fit_that_makes_it_worse_is_none(base, tmp_path, monkeypatch):
    model, run = made(base, tmp_path)
    names, ann = said(run, 1, *["good fine", "bad poor"] * 12), Answers(tmp_path / "ratings/ann.jsonl", "ann")
    heard = []
    for i, name in enumerate(names):
        ann.add(name, 0, 5 - 4 * (i % 2))
    found = model.refit(run, 2, Ranks(), heard.append)
    assert found["human/fit_steps"] > 0
    assert found["human/correlation"] > 0.9
    assert found["human/rating"] == 3.0
    fitted = {name: value.clone() for name, value in model.model.state_dict().items()}
    assert model.refit(run, 3, Ranks(), heard.append) == {}, "it knows something, and 20 steps are not over"
    names = said(run, 3, *["good fine", "bad poor"] * 12)
    for i, name in enumerate(names):
        ann.add(name, 0, 5 - 4 * (i % 2))
    ann.close()
    losses = iter(range(99))
    monkeypatch.setattr(RewardTraining, "evaluate", lambda self: {"loss": next(losses), **_nothing()})
    found = model.refit(run, 21, Ranks(), heard.append)
    assert found["human/fit_steps"] == 0
    assert all(torch.equal(fitted[name], value) for name, value in model.model.state_dict().items())
    monkeypatch.undo()
    found = model.refit(run, 41, Ranks(), heard.append)
    assert found["human/ratings"] == 48
    assert "human/fit_steps" not in found
    assert heard[-1].startswith(f"step 41: no new ratings in {tmp_path / 'ratings'} (ppg-fast rate {tmp_path})")


def _nothing():
    return {"count": 1, "correlation": 0.0, "correlation_interval": (-1.0, 1.0), "length_correlation": 0.0}


def test_what_a_fit_does_not_learn_from_is_said(base, tmp_path):
    """Ratings of dialogues that the run does not hold, and of those that are held out."""
    model, run = made(base, tmp_path)
    names, ann, heard = said(run, 1, "good", "bad"), Answers(tmp_path / "ratings/ann.jsonl", "ann"), []
    ann.add(names[0], 0, 5)
    ann.add(names[1], 0, 1)
    ann.add("step-000001/7-elsewhere", 0, 3)
    ann.add("elsewhere", 0, 3)
    ann.close()
    model._apart = lambda label: True
    model.refit(run, 2, Ranks(), heard.append)
    assert heard[0] == f"2 ratings in {tmp_path / 'ratings'} are of dialogues that this run does not hold: not read"
    assert heard[1] == "step 2: all of 2 rated dialogues are held out: nothing to learn from yet"
    assert not model.informed
    kept_lines = (run.path / "rollouts/ratings-000002.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in kept_lines] == names


def test_a_tenth_to_a_third_is_held_out_whatever_comes_later(base, tmp_path):
    model, _ = made(base, tmp_path)
    label = lambda i: SimpleNamespace(dialogues=[SimpleNamespace(id=f"step-{i:06d}/0-a")])  # noqa: E731
    share = sum(model._apart(label(i)) for i in range(400)) / 400
    assert 0.1 < share < 0.33


def test_a_folder_that_is_none_is_refused_before_the_run(flags, tmp_path, capsys):
    argv = flags(tmp_path / "run")
    argv[argv.index("--reward-model") + 1] = str(tmp_path)
    assert main(argv) == 1
    assert "a reward model must be a folder with a Hugging Face checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()

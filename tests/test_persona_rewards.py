"""The interview under rewards that are not its own: they train, and what it pays itself is told beside them."""

import json

import pytest

pytest.importorskip("transformers")

from ppg_fast.cli import main
from ppg_fast.config import make_config
from ppg_fast.jobs.persona import PersonaJob

TINY = {"width": 16, "layers": 1, "num_prompts": 2, "num_generations": 2, "eval_dialogues": 3, "imitation_steps": 0}
SHORT = [part for name, value in TINY.items() for part in (f"--{name.replace('_', '-')}", str(value))]
CODE = """
def brief(messages):
    return 10.0 - len(messages[-1]["content"].split())


def none(messages):
    return None
"""


@pytest.fixture
def reward(tmp_path):
    (tmp_path / "rewards.py").write_text(CODE)
    return str(tmp_path / "rewards.py")


def brevity(sample_messages):
    return [10.0 - len(m.content.split()) for m in sample_messages if m.role == "assistant"]


def test_the_formula_trains_and_the_interview_is_told_beside_it(reward):
    plain = PersonaJob(make_config(TINY))
    job = PersonaJob(make_config({**TINY, "reward": f"2*{reward}:brief", "keep_rollouts": 9}))
    own, samples = plain.collect(1), job.collect(1)
    assert [s.tokens for s in samples] == [s.tokens for s in own]  # the same policy, the same partner
    for sample, said in zip(samples, job.policy.said, strict=True):
        assert sample.rewards == [2 * r for r in brevity(said["messages"])]
    turns = [r for s in own for r in s.rewards]
    assert job.rollout_metrics["rewards/interview/mean"] == pytest.approx(sum(turns) / len(turns))
    assert job.rollout_metrics["rewards/brief/mean"] == pytest.approx(
        sum(r for s in samples for r in s.rewards) / len(turns) / 2
    )
    mine, theirs = job.measure("").metrics, plain.measure("").metrics
    assert mine["eval/interview"] == theirs["eval/reward"]
    assert mine["eval/reward_share"] == theirs["eval/reward_share"]
    assert mine["eval/reward"] > 20
    assert "eval/interview" not in theirs
    assert "with reward `2*brief@turn`" in job.source()
    assert "2*brief@turn; the interview pays" in job.measure("").result


def test_what_nobody_could_score_is_no_reward(reward):
    with pytest.raises(ValueError, match="no turn of 4 dialogues could be scored by none"):
        PersonaJob(make_config({**TINY, "reward": f"{reward}:none"})).collect(1)


def test_a_run_keeps_both_curves_and_its_reward(reward, tmp_path, capsys):
    flags = ["train", "--output-dir", str(tmp_path / "run"), *SHORT, "--no-progress"]
    assert main([*flags, "--reward", f"{reward}:brief", "--max-steps", "1", "--eval-every", "1"]) == 0
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert {"eval/interview/start", "eval/interview/end", "eval/reward/end"} <= summary.keys()
    (tmp_path / "rewards.py").write_text(CODE.replace("10.0", "9.0"))
    assert main(["train", "--resume", str(tmp_path / "run"), "--max-steps", "2"]) == 1
    assert "the rewards" in capsys.readouterr().err

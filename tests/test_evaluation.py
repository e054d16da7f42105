"""Evaluation on held-out dialogues: turns on their logged prefix against plain logits, rollouts by turn, own answers
in the places of the log."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from ppg_fast.config import make_config
from ppg_fast.dialogues.packing import Sample
from ppg_fast.jobs import run_job
from ppg_fast.models.causal_lm import PolicyModule, make_model
from ppg_fast.policy_classes import Greedy, Lookahead
from ppg_fast.training.evaluation import of_rollouts, on_logged_prefix
from ppg_fast.training.objective import Objective

V = 23


def some_samples():
    generator = torch.Generator().manual_seed(0)
    layout = [-1, -1, 0, 0, -1, 1, 1, 1, -1, 2, 2]
    samples = []
    for number, length in enumerate((11, 4, 8)):
        turn_ids = layout[:length]
        rewards = torch.rand(max(turn_ids) + 1, generator=generator).tolist()
        samples.append(Sample(torch.randint(2, V, (length,), generator=generator).tolist(), turn_ids, rewards, number))
    return samples


@pytest.mark.parametrize("max_tokens", [1, 1000])
def test_turns_on_their_logged_prefix(max_tokens):
    """Against log-softmax of one dialogue at a time; micro-batches change nothing, nor does the model's mode stay
    changed."""
    model, samples = make_model(V, width=16, layers=1), some_samples()
    found = on_logged_prefix(PolicyModule(model), samples, Objective(Lookahead(2), gamma=0.5), max_tokens)
    assert model.training == make_model(V, width=16, layers=1).training
    means, weighted, total, count = {}, {}, 0.0, 0
    for sample in samples:
        with torch.no_grad():
            logp = model(torch.tensor([sample.tokens]), use_cache=False).logits[0].double().log_softmax(-1)
        for turn in range(len(sample.rewards)):
            own = [float(logp[i - 1, sample.tokens[i]]) for i, t in enumerate(sample.turn_ids) if t == turn]
            window = sample.rewards[turn : turn + 2]
            means.setdefault(turn, []).append(sum(own) / len(own))
            weighted.setdefault(turn, []).append(sum(own) * sum(r * 0.5**k for k, r in enumerate(window)))
            total, count = total + sum(own), count + len(own)
    for turn in range(3):
        assert found[f"eval/turns/logprob/{turn}"] == pytest.approx(sum(means[turn]) / len(means[turn]), abs=1e-5)
        assert found[f"eval/turns/weighted_logprob/{turn}"] == pytest.approx(
            sum(weighted[turn]) / len(weighted[turn]), abs=1e-5
        )
    assert found["eval/logprob"] == pytest.approx(total / count, abs=1e-5)
    assert found["eval/weighted_logprob"] == pytest.approx(sum(map(sum, weighted.values())) / 3, abs=1e-5)


def test_turns_that_were_not_read_do_not_count():
    model, (sample, *_) = make_model(V, width=16, layers=1), some_samples()
    cut = Sample(sample.tokens[:4], sample.turn_ids[:4], sample.rewards, 0)
    found = on_logged_prefix(PolicyModule(model), [cut], Objective(Greedy()), 100)
    assert "eval/turns/logprob/0" in found
    assert "eval/turns/logprob/1" not in found
    assert on_logged_prefix(PolicyModule(model), [], Objective(), 100) == {}


def test_rollouts_by_turn():
    found = of_rollouts(some_samples(), Objective(Greedy(), baseline="leave_one_out"))
    rewards = [s.rewards for s in some_samples()]
    assert found["eval/reward"] == pytest.approx(sum(map(sum, rewards)) / 3)
    assert found["eval/turns/return/0"] == pytest.approx(sum(r[0] for r in rewards) / 3)
    assert found["eval/turns/return/2"] == pytest.approx(rewards[0][2])
    assert "eval/completions/mean_length" in found
    assert not any("advantage" in name or "rows" in name for name in found)


@pytest.mark.parametrize("opening", ["user", "system"])
def test_an_offline_job_shows_the_policys_own_answers_without_a_reward(opening, tmp_path):
    """In the places of the log, before and after training: nobody can say what they are worth. It may speak first."""
    said = [(opening, "be anna"), ("assistant", "anna"), ("user", "who ?"), ("assistant", "anna")]
    line = {"group_id": "g", "messages": [{"role": r, "content": c} for r, c in said], "turn_rewards": [1.0, 0.5]}
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps({"id": str(i), **line}) for i in range(10)))
    settings = {"data": str(tmp_path / "log.jsonl"), "output_dir": str(tmp_path / "run"), "width": 16, "layers": 1}
    short = {"max_new_tokens": 3, "max_steps": 2, "eval_every": 1, "vocab_size": 280, "progress": False}
    assert run_job(make_config({**settings, **short})) == 0
    metrics = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(("eval/turns/logprob/1" in row) == (row["phase"] == "eval") for row in metrics)
    assert not any("eval/reward" in row for row in metrics)
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()]
    assert {(row["phase"], row["step"], row["turn"], row["reward"], row["return"]) for row in samples} == {
        ("eval", step, turn, None, None) for step in (0, 2) for turn in (0, 1)
    }
    text = (tmp_path / "run/samples_after.md").read_text()
    assert text.count(f"- **{opening}**: be anna") == 2, "two dialogues are held out"
    assert text.count("- **user**: who ?") == 2
    assert "`reward" not in text

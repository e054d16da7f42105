"""`--imitate`: demonstrations count 1 at every answer, whatever rewards they have or lack."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from ppg_fast.config import make_config
from ppg_fast.jobs.offline import OfflineJob
from ppg_fast.training.objective import Schedule
from ppg_fast.training.trainer import update

TALK = [("user", "say"), ("assistant", "a"), ("user", "more"), ("assistant", "b")]
MESSAGES = [{"role": role, "content": content} for role, content in TALK]
SETTINGS = {"device": "cpu", "width": 16, "layers": 1, "imitate": True, "eval_dialogues": 1}


def job(tmp_path, *rewards):
    lines = [{"id": f"d{i}", "messages": MESSAGES, **({"turn_rewards": r} if r else {})} for i, r in enumerate(rewards)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return OfflineJob(make_config({**SETTINGS, "data": str(tmp_path / "log.jsonl")}))


@pytest.mark.filterwarnings("error")
def test_every_answer_counts_one(tmp_path):
    made = job(tmp_path, [-3.0, None], [0.0, 0.0], None, [5.0, 1.0], [1.0, 1.0])
    assert all(sample.rewards == [1.0, 1.0] for sample in made.samples)
    assert "by imitation" in made.description()
    model, sample = made.policy.model, made.samples[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    metrics = update(model, optimizer, [sample], made.objective, Schedule(1, 1e-3))
    model.set_attn_implementation("eager")
    logp = model(torch.tensor([sample.tokens]), use_cache=False).logits[0].log_softmax(-1)
    nll = -sum(logp[i - 1, sample.tokens[i]].item() for i, turn in enumerate(sample.turn_ids) if turn >= 0)
    assert metrics["loss"] == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"data": None}, "^imitate goes with data, the demonstrations, got None$"),
        (
            {"policy_class": "full"},
            "^policy_class must be lookahead:3 with imitate, which does not use it, got 'full'$",
        ),
        ({"gamma": 0.5}, "^gamma must be 1.0 with imitate"),
        ({"loss_type": "turn_regression"}, "^loss_type must be reinforce with imitate"),
    ],
)
def test_what_it_does_not_use_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        make_config({"imitate": True, "data": "log.jsonl", **given})

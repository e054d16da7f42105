"""Regression on turns in the trainer: its gradient at any weights, over any passes, and what its settings exclude."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch

pytest.importorskip("transformers")

from ppg_fast.config import make_config
from ppg_fast.dialogues import Dialogue, Message, write_dialogues
from ppg_fast.dialogues.packing import Sample
from ppg_fast.jobs.offline import OfflineJob
from ppg_fast.jobs.policy import objective_of
from ppg_fast.models import causal_lm as models
from ppg_fast.models.adaptation import StartingWeights
from ppg_fast.policy_classes import Lookahead
from ppg_fast.training.objective import Objective, Schedule
from ppg_fast.training.trainer import update

V, ETA = 23, 0.6
TURNS = [-1, -1, 0, 0, -1, 1, 1, 1, -1, 2, 2]
PAIRS = Objective(Lookahead(2), reduction="sum", eta=ETA, num_iterations=2)


def tiny(seed=0):
    return models.make_model(V, width=16, layers=1, seed=seed)


def some_samples():
    """Two groups of three and one dialogue by itself, of unequal lengths; one turn has no token. The last turns have no
    reward: what is said there is wrong from the second iteration on."""
    g, out = torch.Generator().manual_seed(1), []
    for i in range(7):
        n = [11, 8, 11, 8, 11, 8, 11][i]
        tokens = torch.randint(2, V, (n,), generator=g).tolist()
        turns = TURNS[:n]
        rewards = torch.rand(max(turns) + 1 + (i == 1), generator=g).tolist()
        out.append(Sample(tokens, turns, [*rewards[:2], *(0.0 for _ in rewards[2:])], i // 3))
    return out


def written_out(model, old, samples, pairs=True):
    """The loss by its formula, in logits of one dialogue at a time."""
    model.set_attn_implementation("eager")
    x = {}
    for i, sample in enumerate(samples):
        l, was = (m(torch.tensor([sample.tokens]), use_cache=False).logits[0].log_softmax(-1) for m in (model, old))
        for t in range(len(sample.rewards)):
            at = [n for n, turn in enumerate(sample.turn_ids) if turn == t]
            if at:
                change = sum((l - was.detach())[n - 1, sample.tokens[n]] for n in at)
                x[i, t] = change / ETA - sum(sample.rewards[t : t + 2])
    if not pairs:
        errors = [value**2 for value in x.values()]
    else:
        mates = [(i, j) for i, j in combinations(range(7), 2) if samples[i].group_id == samples[j].group_id]
        errors = [(x[i, t] - x[j, t]) ** 2 for i, j in mates for t in range(3) if (i, t) in x and (j, t) in x]
    return sum(errors) / len(errors)


def plain_steps(start, samples, iterations, rate, old=None, pairs=True):
    """Weights after steps of SGD on the written-out loss, and the loss before the last."""
    model, loss = tiny(start), None
    old = old or tiny(start)
    old.set_attn_implementation("eager")
    for _ in range(iterations):
        model.zero_grad()
        loss = written_out(model, old, samples, pairs)
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= rate * p.grad
    return model, loss.item()


@pytest.mark.parametrize("case", ["pairs", "alone", "from the start"])
@pytest.mark.parametrize("max_tokens", [10_000, 13])
def test_steps_are_those_of_the_squared_error(case, max_tokens):
    samples, rate = some_samples(), 0.05
    objective = replace(PAIRS, baseline="none" if case == "alone" else "leave_one_out")
    old = tiny(5) if case == "from the start" else None
    if old:
        objective = replace(objective, from_start=True)
    model = tiny()
    metrics = update(
        model,
        torch.optim.SGD(model.parameters(), lr=rate),
        samples,
        objective,
        Schedule(1, rate, max_tokens=max_tokens, max_grad_norm=1e9),
        old and _weights_of(model, old),
    )
    truth, loss = plain_steps(0, samples, 2, rate, old, pairs=case != "alone")
    assert metrics["loss"] == pytest.approx(loss, rel=1e-4)
    for ours, theirs in zip(model.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    moved = [(a - b).abs().max() for a, b in zip(model.parameters(), tiny().parameters(), strict=True)]
    assert max(moved) > 1e-3


def _weights_of(model, other):
    """The starting weights of ``model``, had they been those of ``other``."""
    found = StartingWeights(model)
    found.load_state_dict(StartingWeights(other).state_dict())
    return found


def test_it_explains_more_with_every_iteration():
    steps = []
    for iterations in (1, 4, 16):
        model = tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        objective = replace(PAIRS, num_iterations=iterations)
        steps.append(update(model, optimizer, some_samples(), objective, Schedule(1, 0.05))["explained"])
    assert steps[0] == 0
    assert steps[0] < steps[1] < steps[2]


REFUSED = {
    "baseline with loss_type turn_regression must be": {"baseline": "group_std"},
    "reduction must be sequence_sum": {"reduction": "sum"},
    "clip_high must be left out": {"clip_high": 0.3},
    "opsm_delta must be 0.0": {"opsm_delta": 0.1},
    "kl_coef must be 0.0": {"kl_coef": 0.1},
    "eta must be a finite number > 0": {"eta": 0.0},
    "eta must be 1.0 without": {"loss_type": "ppo", "eta": 0.5},
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_it_does_not_use_are_refused(message):
    with pytest.raises(ValueError, match=message):
        make_config({"loss_type": "turn_regression", **REFUSED[message]})


def test_an_objective_over_another_loss_is_refused():
    with pytest.raises(ValueError, match="reduction sum"):
        Objective(eta=1.0)


def test_offline_it_compares_openings_with_the_policy_at_the_start(tmp_path):
    """Groups come whole, rewards may be negative, and the old policy is that of the start."""
    dialogues = [
        Dialogue(
            f"d{i}", f"g{i // 2}", [Message("user", "say"), Message("assistant", "ab"[i % 2])], [float(i % 2) - 0.5]
        )
        for i in range(12)
    ]
    write_dialogues(tmp_path / "log.jsonl", dialogues)
    config = make_config(
        {
            "data": str(tmp_path / "log.jsonl"), "loss_type": "turn_regression", "baseline": "leave_one_out",
            "eta": ETA, "width": 16, "layers": 1, "num_prompts": 2, "eval_dialogues": 1,
        }
    )  # fmt: skip
    objective = objective_of(config)
    assert (objective.eta, objective.from_start, objective.reduction) == (ETA, True, "sum")
    job = OfflineJob(config)
    for step in range(3):
        groups = [sample.group_id for sample in job.collect(step)]
        drawn = {g: sum(job.samples[i].group_id == g for i in job.seen) for g in groups}
        assert len(drawn) == 2
        assert all(groups.count(g) == count for g, count in drawn.items())

"""`--imitate`: demonstrations count 1 at every answer, whatever rewards they have or lack; `--imitate-td`: their
squared soft Q residuals beside it, against the formula in float64."""

import copy
import json

import pytest
import torch

pytest.importorskip("transformers")

from ppg_fast.config import make_config
from ppg_fast.inspection.inspector import Inspector
from ppg_fast.jobs.offline import OfflineJob
from ppg_fast.jobs.policy import objective_of
from ppg_fast.models.adaptation import StartingWeights
from ppg_fast.spec import SoftQSpec
from ppg_fast.training.objective import Objective, Schedule
from ppg_fast.training.state import TrainingState
from ppg_fast.training.trainer import optimise, update

TALK = [("user", "say"), ("assistant", "a"), ("user", "more"), ("assistant", "b")]
MESSAGES = [{"role": role, "content": content} for role, content in TALK]
SETTINGS = {"device": "cpu", "width": 16, "layers": 1, "imitate": True, "eval_dialogues": 1}


def job(tmp_path, *rewards, **settings):
    lines = [{"id": f"d{i}", "messages": MESSAGES, **({"turn_rewards": r} if r else {})} for i, r in enumerate(rewards)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return OfflineJob(make_config({**SETTINGS, "data": str(tmp_path / "log.jsonl"), **settings}))


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


# ---- with values -----------------------------------------------------------------------------------------------------
def residuals_of(model, reference, sample):
    """delta_t = u_t + L_t - u_(t+1) of each turn by plain logits, u_(t+1) without a gradient, and -l of the tokens."""
    z, base = (m(torch.tensor([sample.tokens]), use_cache=False).logits[0] for m in (model, reference))
    base = base.detach()
    values, ratios, nll = [], [], 0.0
    for turn in range(len(sample.rewards)):
        at = [i - 1 for i, t in enumerate(sample.turn_ids) if t == turn]
        said = [(z.log_softmax(-1)[i, sample.tokens[i + 1]], base.log_softmax(-1)[i, sample.tokens[i + 1]]) for i in at]
        values.append(z[at[0]].logsumexp(0) - base[at[0]].logsumexp(0))
        ratios.append(sum(l - l_ref for l, l_ref in said))
        nll -= sum(l for l, _ in said)
    behind = [*(u.detach() for u in values[1:]), 0.0]
    return [u + ratio - later for u, ratio, later in zip(values, ratios, behind, strict=True)], nll


def in_float64(model):
    """A copy that attends by plain formulas."""
    copied = copy.deepcopy(model).double()
    copied.set_attn_implementation("eager")
    return copied


def moved(model):
    """``model`` away from its starting weights, which are returned."""
    start, generator = StartingWeights(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return start


@pytest.mark.parametrize("max_tokens", [10_000, 13])
def test_the_squared_residual_joins_the_likelihood(tmp_path, max_tokens):
    made, K = job(tmp_path, None, [5.0, -1.0], None, None, imitate_td=0.3), 0.3
    model, samples = made.policy.model, made.samples[:3]
    reference, start = in_float64(model), moved(model)
    oracle, before = in_float64(model), [p.detach().clone() for p in model.parameters()]
    found = [residuals_of(oracle, reference, sample) for sample in samples]
    loss = sum(nll + K * sum(d**2 for d in deltas) for deltas, nll in found) / len(samples)
    loss.backward()
    schedule = Schedule(1, 1.0, max_grad_norm=1e9, max_tokens=max_tokens)
    metrics = update(model, torch.optim.SGD(model.parameters(), lr=1.0), samples, made.objective, schedule, start)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    for old, new, truth in zip(before, model.parameters(), oracle.parameters(), strict=True):
        close = {"rtol": 1e-4, "atol": 1e-4 * float(truth.grad.abs().max())}
        torch.testing.assert_close((old - new).double(), truth.grad, **close)
    weight = sum(1 - 2 * K * deltas[1].item() for deltas, _ in found) / len(samples)
    assert metrics["turns/advantage/1"] == pytest.approx(weight, rel=1e-4)
    assert metrics["reward"] == 2.0, "the answers count as without it"


def test_without_weight_it_is_imitation_to_the_bit(tmp_path):
    results = []
    for settings in ({}, {"imitate_td": 0.0}):
        made = job(tmp_path, None, None, **settings)
        optimizer = torch.optim.SGD(made.policy.model.parameters(), lr=0.1)
        metrics = update(made.policy.model, optimizer, made.samples, made.objective, Schedule(1, 0.1))
        results.append((metrics["loss"], *(p.detach().numpy().tobytes() for p in made.policy.model.parameters())))
    assert results[0] == results[1]
    assert made.objective == objective_of(make_config({"imitate": True, "data": "log.jsonl"}))


def test_values_are_learned_beside_what_is_said(tmp_path):
    squares = {}
    for K in (0.0, 0.02):
        made = job(tmp_path, None, None, imitate_td=K)
        model, collect = made.policy.model, lambda _, samples=made.samples: samples
        reference, schedule = in_float64(model), Schedule(60, 1e-2, warmup_steps=1)
        state = TrainingState.start(model, made.objective, schedule)
        rows = list(optimise(model, collect, made.objective, schedule, state))
        deltas, nll = residuals_of(in_float64(model), reference, made.samples[0])
        assert nll.item() < rows[0]["loss"] / 10
        squares[K] = sum(d.item() ** 2 for d in deltas)
        assert ("turns/value/0" in rows[-1]) == bool(K)
    assert squares[0.02] < 0.75 * squares[0.0]


def test_a_dialogue_that_is_cut_before_a_value_is_left_out(tmp_path):
    made = job(tmp_path, None, None, imitate_td=0.5)
    messages = [*MESSAGES[:3], {"role": "assistant", "content": "b " * 40}]
    with open(made.config.data, "a") as file:
        file.write(json.dumps({"id": "long", "messages": messages}) + "\n")
    given = {**SETTINGS, "data": made.config.data, "max_dialogue_tokens": len(made.samples[0].tokens) + 4}
    assert len(OfflineJob(make_config(given)).samples) == 3
    with pytest.warns(UserWarning, match=r"ends at turn 1, .* got none of its tokens \(raise max_dialogue_tokens\)$"):
        assert len(OfflineJob(make_config({**given, "imitate_td": 0.5})).samples) == 2


def test_inspect_shows_it_as_imitation(tmp_path):
    given = {"data": job(tmp_path, None, None).config.data, "imitate": True}
    both = {"policy_class": "greedy"}, {"imitate_td": 0.5}
    plain, valued = (next(Inspector(make_config(given | more)).views()) for more in both)
    assert plain == valued


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"imitate": False, "imitate_td": 0.1, "baseline": "none"}, "^imitate_td must be 0 without imitate, got 0.1$"),
        ({"imitate_td": -1.0}, "^imitate_td must be a finite number >= 0.0 and <= 1e.20, got -1.0$"),
        ({"imitate_td": 1e-21}, "^imitate_td must be 0 or so large that float32 holds .*, got 1e-21$"),
        ({"imitate_td": 0.1, "reduction": "token_mean"}, "^reduction must be sequence_sum with imitate_td, which does"),
        ({"imitate_td": 0.1, "kl_coef": 0.1}, "^kl_coef must be 0.0 with imitate_td, which does not use it, got 0.1$"),
        ({"imitate_td": 0.1, "token_share": 0.5}, "^token_share must be 1 with a loss of whole turns"),
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


def test_demonstrations_without_weight_are_no_objective_of_soft_q_learning():
    with pytest.raises(ValueError, match=r"^imitation with soft Q-learning goes with cql_coef > 0, .* got SoftQSpec"):
        Objective(baseline="none", reduction="sum", imitate=True, soft_q=SoftQSpec())

"""Auto in the trainer: the scores of turns from the step's own backward passes, steps credited with the weights, runs
that resume."""

import json
import random
import warnings
from dataclasses import replace

import pytest
import torch

from ppg_fast.dialogues.packing import pack
from ppg_fast.functional import turn_advantages
from ppg_fast.policy_classes import FullPlanning, Greedy, RewardWeights
from ppg_fast.rollouts.problems import PROBLEMS
from ppg_fast.spec import PolicyLossSpec
from ppg_fast.training.auto import CreditWeights


@pytest.fixture(scope="module")
def rollouts():
    transformers = pytest.importorskip("transformers")

    from ppg_fast.dialogues.chat_format import ChatFormat, make_word_tokenizer
    from ppg_fast.models.causal_lm import make_model
    from ppg_fast.rollouts.problems import ProblemDialogue, words
    from ppg_fast.rollouts.rollout import collect_groups

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    tokenizer = make_word_tokenizer(words())
    model = make_model(len(tokenizer), 16, 1, 0)
    noise, generator = random.Random(0), torch.Generator().manual_seed(0)

    def collect(step):
        make = lambda: ProblemDialogue(PROBLEMS["commitments"], noise)  # noqa: E731
        seeds = [2 * step, 2 * step + 1]
        groups = collect_groups(model, ChatFormat(tokenizer), make, seeds, 4, generator=generator, max_new_tokens=2)
        return [rollout.sample for rollout in groups]

    return model, collect


def signals_of(model, samples, max_tokens=10_000, **changes):
    from ppg_fast.training.objective import Objective, Schedule
    from ppg_fast.training.trainer import update

    objective = replace(Objective(policy_class=FullPlanning(), signals=True), **changes)
    optimizer, schedule = torch.optim.SGD(model.parameters(), lr=0.0), Schedule(1, 1.0, max_tokens=max_tokens)
    return update(model, optimizer, samples, objective, schedule)["signals"]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"policy_class": Greedy()},
        {"num_iterations": 2},
        {"scale": 3.0},
        {"eta": 1.0, "reduction": "sum"},
    ],
    ids=str,
)
def test_scores_are_those_of_a_pass_of_their_own(rollouts, changes):
    """Of every turn with an advantage, up to a factor that all have in common; whatever class trains, in however many
    passes."""
    from ppg_fast.models.score_sketch import ScoreSketch
    from ppg_fast.training.turn_scores import SIZE

    model, collect = rollouts
    samples = collect(0)
    batch = pack(samples)
    found, split = (signals_of(model, samples, max_tokens, **changes) for max_tokens in (10_000, 200))
    truth = ScoreSketch(model.get_output_embeddings().weight.shape[1], SIZE, 0).of_turns(model, batch)
    read = found.scores.any(-1)
    assert 0.9 < found.coverage == float(read[batch.turn_mask].double().mean())
    factor = (found.scores * truth).sum() / truth[read].square().sum()
    assert float(factor) > 0
    torch.testing.assert_close(found.scores[read], factor * truth[read], rtol=1e-3, atol=1e-4 * float(factor))
    torch.testing.assert_close(split.scores, found.scores, rtol=1e-3, atol=1e-4 * float(factor))
    expected = turn_advantages(batch.rewards, batch.group_ids, "leave_one_out", batch.turn_counts)
    torch.testing.assert_close(found.centred, expected.double())


def test_a_turn_without_advantage_is_not_read_and_said_to_be_so(rollouts):
    """Greedy with rewards at the end alone trains the last turn, although every turn has a reward to come."""
    model, collect = rollouts
    samples = [replace(s, rewards=[0.0] * (len(s.rewards) - 1) + s.rewards[-1:]) for s in collect(1)]
    found = signals_of(model, samples, policy_class=Greedy())
    turns = len(samples[0].rewards)
    assert found.coverage == pytest.approx(1 / turns)
    assert not found.scores[:, :-1].any()
    assert signals_of(model, samples).coverage == 1.0
    equal = [replace(s, rewards=[1.0] * len(s.rewards)) for s in samples]
    nothing = signals_of(model, equal)  # no reward beyond the mean of the others: nothing to read, nothing lacking
    assert (nothing.coverage, bool(nothing.scores.any())) == (0.0, False)
    assert CreditWeights().observe(nothing) == {"auto/coverage": 0.0}


def test_an_advantage_near_zero_is_not_divided_by(rollouts):
    """With a KL term such a turn's gradient is not of its advantage."""
    model, collect = rollouts
    samples = collect(2)
    tiny = replace(samples[0], rewards=[r + 1e-7 for r in samples[1].rewards])
    pair = [replace(s, group_id=7) for s in (tiny, samples[1])]  # alike but for rounding
    found = signals_of(model, [*pair, *samples[2:]], policy_class=Greedy())
    assert not found.scores[:2].any()
    assert found.scores[2:].any()


def test_reading_scores_changes_no_bit_of_a_step(rollouts):
    from ppg_fast.training.objective import Objective, Schedule
    from ppg_fast.training.trainer import update

    model, collect = rollouts
    samples, gradients = collect(3), []
    for signals in (False, True):
        model.zero_grad()
        objective = Objective(FullPlanning(), signals=signals)
        update(model, torch.optim.SGD(model.parameters(), lr=0.0), samples, objective, Schedule(1, 1.0))
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_step_is_credited_with_the_weights_of_the_steps_before(rollouts, monkeypatch):
    from ppg_fast.training import trainer
    from ppg_fast.training.objective import Objective, Schedule
    from ppg_fast.training.trainer import TrainingState, optimise

    model, collect = rollouts
    seen, real = [], trainer.update
    monkeypatch.setattr(trainer, "update", lambda *a: (seen.append(a[3]), real(*a))[1])
    objective, schedule = Objective(signals=True, auto=True), Schedule(3, 0.0)
    state = TrainingState.start(model, objective, schedule)
    matrices, scales = [], []
    for _ in optimise(model, collect, objective, schedule, state):
        matrices.append(state.credit_weights.matrix(12))
        scales.append(state.credit_weights.scale)
    assert seen[0].policy_class == FullPlanning()
    assert seen[0].scale == 1.0
    for number in (1, 2):
        assert isinstance(seen[number].policy_class, RewardWeights)
        assert torch.equal(seen[number].policy_class.weights, matrices[number - 1])
        assert seen[number].scale == scales[number - 1] > 1


SIZES = {
    "width": 16,
    "layers": 1,
    "imitation_steps": 2,
    "num_prompts": 2,
    "num_generations": 4,
    "eval_dialogues": 2,
    "eval_every": 99,
    "progress": False,
}


def trained(folder, resume=False, **settings):
    from ppg_fast.config import make_config
    from ppg_fast.jobs import run_job

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run_job(make_config({**SIZES, **settings, "output_dir": str(folder)}), resume=resume) == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if r["phase"] == "train"]


def test_auto_trains_logs_its_weights_and_resumes(tmp_path, capsys):
    pytest.importorskip("transformers")
    settings = {"policy_class": "auto", "loss_type": "reinforce"}
    trained(tmp_path, max_steps=3, **settings)
    steps = trained(tmp_path, resume=True, max_steps=5, **settings)
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5]
    assert all(0 <= r["auto/coverage"] <= 1 for r in steps)
    assert any(r["auto/coverage"] > 0.5 for r in steps)
    said = capsys.readouterr().out
    found = [f"{name.removeprefix('auto/weight/')}: {x:.2f}" for name, x in steps[-1].items() if "auto/weight/" in name]
    assert f"auto weighs rewards by the turns between, on average, {', '.join(found)}" in said
    for row in (r for r in steps if r["active_turns"]):
        assert {"auto/weight/0", "auto/weight/5", "auto/signal_to_noise/0", "auto/scale"} <= row.keys()
        assert all(0 <= value <= 1 for name, value in row.items() if name.startswith("auto/weight/"))


def test_signals_are_logged_whatever_class_trains(tmp_path):
    """The same run, with the weights that auto would have in its metrics."""
    pytest.importorskip("transformers")
    settings = {"policy_class": "lookahead:2", "max_steps": 3}
    plain, measured = (trained(tmp_path / str(s), signals=s, **settings) for s in (False, True))
    weights = [(tmp_path / str(s) / "checkpoint/model.safetensors").read_bytes() for s in (False, True)]
    assert weights[0] == weights[1]
    for one, other in zip(plain, measured, strict=True):
        assert one["grad_norm"] == other["grad_norm"]
        assert not any(name.startswith("auto/") for name in one)
        assert ("auto/weight/0" in other) == bool(other["active_turns"])
        assert "auto/scale" not in other
    assert any(row["active_turns"] for row in measured)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"policy_class": "full", "signals": True, "data": "x.jsonl"},
            "signals need rollouts of the policy itself, so",
        ),
        ({"data": "x.jsonl"}, "auto needs rollouts of the policy itself, so there must be no data, got 'x.jsonl'"),
        ({"candidates": "greedy,full"}, "unknown setting 'candidates'"),
    ],
)
def test_errors(settings, words):
    from ppg_fast.config import make_config

    with pytest.raises(ValueError, match=words):
        make_config({"policy_class": "auto", **settings})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"auto": True}, "auto goes with signals, which it learns from, got False"),
        ({"signals": True, "imitate": True}, "signals go without imitation, which knows no rewards"),
        ({"signals": True, "baseline": "value"}, 'baseline "value" goes without imitation and without signals'),
    ],
)
def test_objectives_that_make_no_sense(settings, words):
    from ppg_fast.training.objective import Objective

    with pytest.raises(ValueError, match=words):
        Objective(**settings)


def test_a_kl_term_beside_the_advantages_is_noise_in_the_scores(rollouts):
    """They still point where those of the advantages alone do."""
    model, collect = rollouts
    samples = collect(4)
    clean, mixed = (
        signals_of(model, samples, spec=spec).scores.flatten()
        for spec in (PolicyLossSpec(), PolicyLossSpec(entropy_coef=1e-3))
    )
    assert float(clean @ mixed / (clean.norm() * mixed.norm())) > 0.9

"""Auto in the trainer: signals of every class from the step's own pass, scaled steps, a log that says why, runs that
resume."""

import json
import random
import warnings
from dataclasses import replace

import pytest
import torch

from ppg_fast.dialogues.packing import pack
from ppg_fast.functional import partial_returns, turn_advantages
from ppg_fast.policy_classes import CANDIDATES, FullPlanning, Greedy
from ppg_fast.rollouts.problems import PROBLEMS
from ppg_fast.training.auto import WindowChooser, context_ids, measure_signals


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


def test_a_step_measures_every_class_once_and_whatever_the_micro_batches(rollouts):
    from ppg_fast.models import causal_lm as models
    from ppg_fast.training.objective import Objective, Schedule
    from ppg_fast.training.trainer import update

    model, collect = rollouts
    # greedy credits one turn only
    samples = [replace(s, rewards=[0.0] * (len(s.rewards) - 1) + s.rewards[-1:]) for s in collect(0)]
    objective = Objective(policy_class=Greedy(), candidates=CANDIDATES)

    def signals(max_tokens, **changes):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        return update(
            model, optimizer, samples, replace(objective, **changes), Schedule(1, 1.0, max_tokens=max_tokens)
        )["signals"]

    whole, split = signals(10_000), signals(200)
    torch.testing.assert_close(whole.inner, split.inner, rtol=1e-4, atol=1e-4)
    again = signals(10_000, policy_class=FullPlanning(), num_iterations=2)
    # whatever class trains, before the weights move
    torch.testing.assert_close(whole.square, again.square, rtol=1e-4, atol=1e-4)
    batch = pack(samples)
    returns = torch.stack([partial_returns(batch.rewards, c, turn_counts=batch.turn_counts) for c in CANDIDATES])
    advantages = torch.stack([turn_advantages(r, batch.group_ids, turn_counts=batch.turn_counts) for r in returns])
    taken = batch.labels >= 0
    rows = torch.repeat_interleave(torch.arange(len(samples)), torch.diff(batch.cu_seqlens).long())
    with torch.no_grad():
        logits = model.get_output_embeddings()(models.policy_hidden(model, batch))[taken]
    p = logits.double().softmax(-1)
    labels = batch.labels[taken]
    scores = torch.nn.functional.one_hot(labels, p.shape[1]) - p
    by_token = advantages[:, rows[taken], batch.turn_ids[taken]]
    found = measure_signals(
        context_ids(batch)[taken], rows[taken], labels, scores.square().sum(1), by_token, len(samples)
    )
    torch.testing.assert_close(whole.square, found.square, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole.inner, found.inner, rtol=1e-3, atol=1e-3)
    assert 0.5 < whole.coverage <= 1


def test_the_score_norms_are_those_of_the_loss(rollouts, monkeypatch):
    from ppg_fast import reference
    from ppg_fast.models import causal_lm as models
    from ppg_fast.models.output_head import Head
    from ppg_fast.training import trainer
    from ppg_fast.training.objective import Objective, Schedule

    model, collect = rollouts
    samples, loss = collect(1), models.policy_loss

    def squares():
        objective = Objective(candidates=(Greedy(), FullPlanning()))
        return trainer.update(model, torch.optim.SGD(model.parameters(), lr=0.0), samples, objective, Schedule(1, 1.0))[
            "signals"
        ].square

    def with_norms(model, batch, *args, **options):
        assert not options["skip_zero_advantages"]  # rows without an advantage in this class have one in another
        assert options["score_norms"]
        out = loss(model, batch, *args, **options)
        return out._replace(metrics={**out.metrics, "score_norms": torch.full(batch.labels.shape, 0.25)})

    def by_a_pass(model, batch, *args, **options):
        out = loss(model, batch, *args, **options)
        logits = Head.of(model).logits(models.policy_hidden(model, batch))
        return out._replace(metrics={**out.metrics, "score_norms": reference.score_norms(logits, batch.labels)})

    own = squares()
    monkeypatch.setattr(models, "policy_loss", by_a_pass)
    torch.testing.assert_close(own, squares(), rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(models, "policy_loss", with_norms)
    assert not torch.allclose(squares(), own)


def test_the_trainer_scales_the_advantages_of_the_class_and_not_the_signals(rollouts, monkeypatch):
    from ppg_fast.training import trainer
    from ppg_fast.training.objective import Objective, Schedule
    from ppg_fast.training.trainer import TrainingState, optimise

    model, collect = rollouts
    samples, seen = collect(2), []
    real = trainer.update
    monkeypatch.setattr(trainer, "update", lambda *a: (seen.append((a[3], out := real(*a))), out)[1].copy())

    def one_step(scale):
        monkeypatch.setattr(WindowChooser, "scale", scale)
        objective, schedule = (
            Objective(candidates=(Greedy(), FullPlanning()), auto=True),
            Schedule(1, 0.0, max_grad_norm=1e9),
        )
        list(
            optimise(model, lambda step: samples, objective, schedule, TrainingState.start(model, objective, schedule))
        )
        return seen[-1][1]

    plain, scaled = one_step(1.0), one_step(3.0)
    assert [o.scale for o, _ in seen] == [1.0, 3.0]
    assert scaled["grad_norm"] == pytest.approx(3 * plain["grad_norm"], rel=1e-4)
    torch.testing.assert_close(plain["signals"].square, scaled["signals"].square)


def test_score_norms_are_asked_of_the_first_iteration_alone(rollouts, monkeypatch):
    from ppg_fast.models import causal_lm as models
    from ppg_fast.training import trainer
    from ppg_fast.training.objective import Objective, Schedule

    model, collect = rollouts
    asked, loss = [], models.policy_loss
    monkeypatch.setattr(models, "policy_loss", lambda *a, **o: (asked.append(o["score_norms"]), loss(*a, **o))[1])
    for candidates, wanted in (((Greedy(), FullPlanning()), [True, False]), ((), [False, False])):
        asked.clear()
        objective = Objective(candidates=candidates, num_iterations=2)
        trainer.update(model, torch.optim.SGD(model.parameters(), lr=1e-3), collect(1), objective, Schedule(1, 1.0))
        assert asked == wanted


def test_auto_trains_logs_why_and_resumes(tmp_path):
    pytest.importorskip("transformers")
    from ppg_fast.config import make_config
    from ppg_fast.jobs import run_job

    sizes = {
        "width": 16,
        "layers": 1,
        "imitation_steps": 2,
        "num_prompts": 2,
        "num_generations": 4,
        "eval_dialogues": 2,
        "progress": False,
    }
    settings = {
        **sizes,
        "policy_class": "auto",
        "candidates": "greedy, lookahead:3, full",
        "output_dir": str(tmp_path),
        "eval_every": 99,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run_job(make_config({**settings, "max_steps": 3})) == 0
        assert run_job(make_config({**settings, "max_steps": 5}), resume=True) == 0
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in rows if r["phase"] == "train"]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5]
    assert all(r["policy_class"] in ("greedy", "lookahead:3", "full") for r in steps)
    assert all(0 <= r["auto/coverage"] <= 1 for r in steps)


def test_signals_are_logged_whatever_class_trains(tmp_path):
    """The same run, with what auto would look at in its metrics; the class that trains need not be a candidate."""
    pytest.importorskip("transformers")
    from ppg_fast.config import make_config
    from ppg_fast.jobs import run_job

    sizes = {
        "width": 16,
        "layers": 1,
        "imitation_steps": 2,
        "num_prompts": 1,
        "num_generations": 8,
        "eval_dialogues": 2,
        "progress": False,
    }
    settings = {**sizes, "policy_class": "lookahead:2", "candidates": "greedy,full", "eval_every": 99, "max_steps": 3}
    settings["max_new_tokens"] = 1  # so that every answer begins, and ends, after words of the partner alone
    runs = []
    for signals in (False, True):
        folder = tmp_path / str(signals)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert run_job(make_config({**settings, "signals": signals, "output_dir": str(folder)})) == 0
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        runs.append([r for r in rows if r["phase"] == "train"])
    for plain, measured in zip(*runs, strict=True):
        assert measured["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
        assert measured["policy_class"] == "lookahead:2"
        seen = {k for k in measured if k.startswith("auto/signal_to_noise/")}
        assert seen == (
            {f"auto/signal_to_noise/{c}" for c in ("greedy", "full")} if measured["active_turns"] else set()
        )
        assert not any(k.startswith("auto/") for k in plain)
        assert "auto/reason" not in measured
    assert any(measured["active_turns"] for measured in runs[1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"policy_class": "full", "signals": True, "data": "x.jsonl"},
            "signals need rollouts of the policy itself, so",
        ),
        (
            {"policy_class": "full", "signals": True, "candidates": "greedy"},
            "candidates must include full, got 'greedy'",
        ),
        ({"data": "x.jsonl"}, "auto needs rollouts of the policy itself, so there must be no data, got 'x.jsonl'"),
        ({"candidates": "greedy"}, "candidates must include full, got 'greedy'"),
        ({"candidates": "greedy,fully"}, 'a policy class is "greedy"'),
    ],
)
def test_errors(settings, words):
    from ppg_fast.config import make_config

    with pytest.raises(ValueError, match=words):
        make_config({"policy_class": "auto", **settings})

"""The most uncertain share of an answer's tokens (`token_share`): which they are, against a plain computation; their
gradient over the denominator of all; where the entropies come from; share 1 and a resumed run have the same bits."""

import json
import os
import signal
from dataclasses import replace
from fractions import Fraction

import pytest
import torch

pytest.importorskip("transformers")

from test_rollout import Ragged, make, one_thread, run  # noqa: F401
from test_trainer import gradients, some_samples, tiny

from ppg_fast.cli import main
from ppg_fast.config import make_config
from ppg_fast.dialogues.packing import pack
from ppg_fast.jobs.persona import PersonaJob
from ppg_fast.jobs.policy import objective_of
from ppg_fast.policy_classes import Greedy
from ppg_fast.rollouts.rollout import collect_groups
from ppg_fast.spec import PolicyLossSpec
from ppg_fast.training.objective import Objective, Schedule
from ppg_fast.training.token_share import kept_of_turns, most_uncertain
from ppg_fast.training.trainer import update

SHARES = ("0.2", "0.5", "0.07", "1e-9", "1")


def with_entropies(samples, levels=4, seed=1):
    """Few levels: many tokens of an answer are equally uncertain."""
    generator = torch.Generator().manual_seed(seed)
    return [
        replace(s, entropies=(torch.randint(levels, (len(s.tokens),), generator=generator) / 4).tolist())
        for s in samples
    ]


def chosen_of(sample, share):
    """Places of the trained tokens of one dialogue, by sorting each answer; ceil in exact fractions."""
    found = set()
    for turn in range(len(sample.rewards)):
        places = [i for i, t in enumerate(sample.turn_ids) if t == turn]
        count = -(-len(places) * Fraction(share) // 1)
        found |= set(sorted(places, key=lambda i: (-sample.entropies[i], i))[: int(count)])
    return found


@pytest.mark.parametrize("share", SHARES)
def test_the_most_uncertain_of_each_answer_the_earlier_of_two_alike(share):
    samples = with_entropies(some_samples(9))
    long = replace(samples[0], tokens=[3] * 101, turn_ids=[-1, *[0] * 100], rewards=[1.0])
    samples += with_entropies([long], levels=50)
    batch = pack(samples)
    chosen = most_uncertain(batch, batch.entropies, float(share)).tolist()
    at = 0
    for sample in samples:
        expected = chosen_of(sample, share)
        assert {i + 1 for i in range(len(sample.tokens)) if chosen[at + i]} == expected
        at += len(sample.tokens)
    counts = [[len([t for t in s.turn_ids if t == turn]) for turn in range(3)] for s in samples]
    kept = [[int(-(-n * Fraction(share) // 1)) for n in row] for row in counts]
    assert kept_of_turns(batch, float(share)).tolist() == kept
    assert (share == "0.07") <= (kept[-1][0] == 7), "0.07 * 100 is a hair above 7"


def entropies_of(model, sample):
    """By plain logits, of what each token was drawn from."""
    with torch.no_grad():
        logp = model(torch.tensor([sample.tokens]), use_cache=False).logits[0].log_softmax(-1)
    return [0.0, *(-(logp.exp() * logp).sum(-1))[:-1].tolist()]


@pytest.mark.parametrize("max_tokens", [10_000, 13])
@pytest.mark.parametrize("reduction", ["sequence_sum", "token_mean", "sum"])
@pytest.mark.parametrize("source", ["sampler", "old policy"])
def test_the_gradient_is_that_of_the_chosen_tokens_over_the_number_of_all(source, reduction, max_tokens):
    samples, model, oracle = some_samples(), tiny(), tiny()
    oracle.set_attn_implementation("eager")
    known = [replace(s, entropies=entropies_of(oracle, s)) for s in samples]
    objective = Objective(Greedy(), baseline="none", reduction=reduction, token_share=0.5)
    if source == "sampler":
        known = with_entropies(samples)  # not the model's own, so that nothing else can have been looked at
        metrics, found = gradients(model, known, objective, max_tokens)
    else:
        several = replace(objective, num_iterations=2, spec=PolicyLossSpec("ppo"))
        metrics, found = gradients(model, samples, several, max_tokens)
    terms, labels = [], sum(t >= 0 for s in samples for t in s.turn_ids)
    for sample in known:
        logp = oracle(torch.tensor([sample.tokens]), use_cache=False).logits[0].log_softmax(-1)
        said = [(i, sample.rewards[sample.turn_ids[i]]) for i in chosen_of(sample, "0.5")]
        terms += [-reward * logp[i - 1, sample.tokens[i]] for i, reward in said]
    total = {"sequence_sum": len(samples), "token_mean": labels, "sum": 1}[reduction]
    (torch.stack(terms).sum() / total).backward()
    expected = torch.cat([p.grad.flatten() for p in oracle.parameters()])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    tokens = sum(len(s.tokens) for s in samples)
    assert metrics["rows/full_share"] == len(terms) / tokens
    assert metrics["rows/skip_share"] == 1 - len(terms) / tokens
    assert metrics["perf/active_row_share"] == len(terms) / labels


def test_a_share_of_one_has_the_same_bits_whatever_is_known():
    samples, objective = some_samples(), Objective(Greedy(), spec=PolicyLossSpec(entropy_coef=0.1))
    metrics, plain = gradients(tiny(), samples, objective, 13)
    others, known = gradients(tiny(), with_entropies(samples), replace(objective, token_share=1.0), 13)
    assert torch.equal(plain, known)
    assert metrics == others


def test_the_samplers_entropies_are_those_of_what_it_draws_from():
    model, chat = make()
    plain = run(model, chat, seeds=range(4))
    rollouts = collect_groups(
        model, chat, Ragged, range(4), 2, generator=torch.Generator().manual_seed(0), max_new_tokens=5, entropies=True
    )
    assert all(r.sample.entropies is None for r in plain)
    assert [r.sample.tokens for r in rollouts] == [r.sample.tokens for r in plain], "nothing else is drawn"
    oracle, _ = make()
    oracle.eval().set_attn_implementation("eager")
    for sample in (rollout.sample for rollout in rollouts):
        said = torch.tensor(sample.turn_ids) >= 0
        expected = torch.tensor(entropies_of(oracle, sample))
        torch.testing.assert_close(torch.tensor(sample.entropies)[said], expected[said], rtol=1e-4, atol=1e-5)
        assert set(torch.tensor(sample.entropies)[~said].tolist()) == {0.0}


RUN = (
    "--device cpu --width 16 --layers 1 --no-progress --save-every 1 --eval-every 9 --eval-dialogues 1 "
    "--max-new-tokens 4 --imitation-steps 0 --max-steps 4 --num-prompts 1 --num-generations 4 --token-share 0.5"
)


def result(folder):
    clocks = ("seconds", "step_time", "perf/tokens_per_second", "perf/peak_memory_mb")
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    rows = [{k: v for k, v in json.loads(line).items() if k not in clocks} for line in lines]
    return rows, (folder / "checkpoint/model.safetensors").read_bytes()


def test_a_run_and_one_that_was_stopped_have_the_same_bits(tmp_path, monkeypatch):
    assert main(["train", "--output-dir", str(tmp_path / "whole"), *RUN.split()]) == 0
    collect = PersonaJob.collect

    def interrupted(self, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return collect(self, step)

    monkeypatch.setattr(PersonaJob, "collect", interrupted)
    assert main(["train", "--output-dir", str(tmp_path / "stopped"), *RUN.split()]) == 143
    monkeypatch.undo()
    assert main(["train", "--resume", str(tmp_path / "stopped"), "--no-progress"]) == 0
    rows, weights = result(tmp_path / "whole")
    assert (rows, weights) == result(tmp_path / "stopped")
    assert [row["perf/active_row_share"] < 0.9 for row in rows if row["phase"] == "train"] == [True] * 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"token_share": 0.0}, r"^token_share must be a finite number > 0.0 and <= 1.0, got 0.0$"),
        ({"token_share": 1.5}, r"^token_share must be a finite number > 0.0 and <= 1.0, got 1.5$"),
        ({"loss_type": "gspo"}, r"^token_share must be 1 with loss_type gspo, whose tokens share a ratio, got 0.2$"),
        ({"opsm_delta": 0.1, "loss_type": "ppo"}, r"^token_share must be 1 with opsm_delta, whose .*got 0.2$"),
        ({"reduction": "sequence_mean"}, r"^token_share must be 1 with reduction sequence_mean, .*got 0.2$"),
        ({"loss_type": "turn_regression"}, r"^token_share must be 1 with a loss of whole turns .*got 0.2$"),
        ({"policy_class": "auto"}, r"^token_share must be 1 with policy_class auto or signals, .*got 0.2$"),
        ({"data": "log.jsonl"}, r"^token_share must be 1 with data and num_iterations 1: .*got 0.2$"),
        ({"sampler": "http://x/v1"}, r"^token_share must be 1 with sampler and num_iterations 1: .*got 0.2$"),
    ],
)
def test_what_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        make_config({"token_share": 0.2, **settings})


def test_what_the_library_refuses():
    assert objective_of(make_config({"token_share": 0.2})).token_share == 0.2
    made = make_config({"token_share": 0.2, "data": "log.jsonl", "num_iterations": 2, "loss_type": "ppo"})
    assert objective_of(made).token_share == 0.2
    for options in ({"signals": True}, {"reduction": "sequence_mean"}, {"spec": PolicyLossSpec("gspo")}):
        with pytest.raises(ValueError, match=r"^token_share must be 1 with "):
            Objective(token_share=0.2, **options)
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(ValueError, match=r"^token_share must be 1 where neither .*got 0.2$"):
        update(model, optimizer, some_samples(), Objective(token_share=0.2), Schedule(1, 1e-3))
    with pytest.raises(ValueError, match=r"^entropies must be given for all samples or for none"):
        pack([*with_entropies(some_samples(1)), *some_samples(1)])
    with pytest.raises(ValueError, match=r"^sample 0, token 3: an entropy must be finite, got nan$"):
        pack([replace(some_samples(1)[0], entropies=[0.0, 0.0, 0.0, float("nan"), 0.0, 0.0])])

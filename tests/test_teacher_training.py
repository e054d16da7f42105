"""A teacher in the trainer: a step is that of float64 by transformers, whatever it refuses is one line, and runs go
on."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from test_trainer import gradients, some_samples, tiny

from ppg_fast.cli import main
from ppg_fast.config import TrainConfig, make_config
from ppg_fast.dialogues.packing import NOTHING, pack
from ppg_fast.jobs.memory_estimate import config_model, estimate
from ppg_fast.models.causal_lm import make_model, policy_loss
from ppg_fast.models.frozen_teacher import FrozenTeacher, require_same_vocabulary
from ppg_fast.policy_classes import Greedy
from ppg_fast.spec import PolicyLossSpec
from ppg_fast.training.objective import Objective, credit

V, T = 23, 0.7


def a_teacher(rows=V):
    return make_model(rows, width=24, layers=2, seed=5)


def divergence(name, logp, logq, beta):
    p, q = logp.exp(), logq.exp()
    if name == "forward_kl":
        return (q * (logq - logp)).sum(-1)
    if name == "reverse_kl":
        return (p * (logp - logq)).sum(-1)
    m = (beta * q + (1 - beta) * p).log()
    return (beta * q * (logq - m) + (1 - beta) * p * (logp - m)).sum(-1)


def logits64(model, tokens):
    """Of one dialogue in float64 by transformers, then the scale and softcap that the config tells."""
    out = model(torch.tensor([tokens]), use_cache=False).logits[0, :, :V]
    out = out * getattr(model.config, "logit_scale", 1.0)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return cap * torch.tanh(out / cap) if cap else out


def written_out(model, teacher, samples, objective):
    """Loss and mean divergence, token by token in float64."""
    model, teacher = (m.double() for m in (model, teacher))
    for m in (model, teacher):
        m.set_attn_implementation("eager")
    batch = pack(samples)
    _, advantages = credit(batch, objective)
    loss, found = 0.0, []
    for row, sample in zip(advantages, samples, strict=True):
        logp = (logits64(model, sample.tokens) / T).log_softmax(-1)
        with torch.no_grad():
            logq = (logits64(teacher, sample.tokens) / T).log_softmax(-1)
        for i, turn in enumerate(sample.turn_ids):
            if turn >= 0:
                distance = divergence(
                    objective.teacher.distance["divergence"],
                    logp[i - 1],
                    logq[i - 1],
                    objective.teacher.distance["beta"],
                )
                found.append(distance)
                value = -float(row[turn]) * logp[i - 1, sample.tokens[i]]
                loss = loss + value + objective.teacher.distance["coef"] * distance
    share = len(samples) if objective.reduction == "sequence_sum" else len(found)
    return loss / share, torch.stack(found).mean()


@pytest.mark.parametrize("reduction", ["sequence_sum", "token_mean"])
@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("max_tokens", [10_000, 13])
@pytest.mark.parametrize("plain", [True, False])
def test_a_step_is_that_of_float64(name, reduction, max_tokens, plain):
    """Also where rewards are 0 and only the teacher has a gradient, and with scales, softcaps and a padded head."""
    model, teacher = tiny(), a_teacher(V if plain else V + 5)
    if not plain:
        model.config.logit_scale, model.config.final_logit_softcapping = 0.5, 3.0
        teacher.config.logit_scale, teacher.config.final_logit_softcapping = 1.5, 2.0
    samples = [replace(s, rewards=[0.0] * len(s.rewards)) if i % 2 else s for i, s in enumerate(some_samples())]
    taught = FrozenTeacher(teacher, V, divergence=name, beta=0.3 if name == "jsd" else None, coef=0.8)
    spec = PolicyLossSpec(temperature=T)
    objective = Objective(Greedy(), baseline="none", spec=spec, reduction=reduction, teacher=taught)
    metrics, found = gradients(model, samples, objective, max_tokens)
    again = tiny()
    again.config.update({k: v for k, v in model.config.to_dict().items() if k.startswith(("logit_s", "final"))})
    loss, mean = written_out(again, teacher, samples, objective)
    loss.backward()
    loss, mean = float(loss.detach()), float(mean.detach())
    truth = torch.cat([p.grad.flatten() for p in again.parameters()])
    torch.testing.assert_close(found.double(), truth, rtol=2e-4, atol=2e-6)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert metrics["distillation/divergence"] == pytest.approx(mean, rel=1e-5)
    assert metrics["perf/active_row_share"] == 1.0
    assert all(p.grad is None for p in teacher.parameters())


def test_a_rank_without_work_has_a_gradient_of_zero():
    model, batch = tiny(), pack([NOTHING])
    taught = FrozenTeacher(a_teacher(), V)
    policy_loss(model, batch, torch.zeros(1, 1), PolicyLossSpec(), teacher=taught).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_k_tokens_of_it_are_nearly_all_of_it():
    some = [
        gradients(tiny(), some_samples(), Objective(teacher=FrozenTeacher(a_teacher(), V, top_k=k)), 10_000)[1]
        for k in (0, V, V - 1, 2)
    ]
    torch.testing.assert_close(some[1], some[0], rtol=1e-4, atol=1e-6)
    assert (some[2] - some[0]).norm() < (some[3] - some[0]).norm()


@pytest.mark.parametrize("rule", ["one", "drop"])
def test_a_token_whose_sampler_told_no_log_prob_is_what_nan_rollout_says(rule):
    """Weight 1, or no token of the loss; the distance to the sampler is that of the others."""
    samples = [replace(s, rollout_logprobs=[-2.5] * len(s.tokens)) for s in some_samples()]
    gaps = [replace(s, rollout_logprobs=[*[-2.5] * (len(s.tokens) - 1), float("nan")]) for s in samples]
    objective = Objective(spec=PolicyLossSpec(importance_cap=2.0, nan_rollout=rule), baseline="none")
    found, grad = gradients(tiny(), gaps, objective, 10_000)
    _, plain = gradients(tiny(), samples, objective, 10_000)
    assert torch.isfinite(grad).all()
    assert not torch.equal(grad, plain)
    assert 0 < found["sampling/sampling_logp_difference/max"] < 10


RUN = "--device cpu --width 16 --layers 1 --no-progress --max-new-tokens 2 --eval-dialogues 2 --eval-every 9 "
RUN += "--imitation-steps 1 --num-prompts 2 --num-generations 2 --max-turns 2 --distill-divergence reverse_kl"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The checkpoint of a run of other sizes."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    other = RUN.replace("--width 16", "--width 24").split(" --distill")[0].split()
    assert main(["train", "--output-dir", str(folder), *other, "--max-steps", "0"]) == 0
    return folder / "checkpoint"


def steps(run):
    return [r for r in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if r["phase"] == "train"]


def test_a_run_with_a_teacher_goes_on_with_it(teacher, tmp_path, capsys):
    flags = [*RUN.split(), "--teacher", str(teacher)]
    assert (
        main(["train", "--output-dir", str(tmp_path / "whole"), *flags, "--max-steps", "4", "--save-every", "2"]) == 0
    )
    rows = steps(tmp_path / "whole")
    assert all(row["distillation/divergence"] > 0 for row in rows)
    half = tmp_path / "half"
    shutil.copytree(tmp_path / "whole", half)
    shutil.rmtree(sorted((half / "checkpoints").glob("step-*"))[-1])
    moved = tmp_path / "moved"
    shutil.copytree(teacher, moved)
    assert main(["train", "--resume", str(half), "--teacher", str(moved)]) == 0
    assert [r["loss"] for r in steps(half)] == [r["loss"] for r in rows]
    weights = [(run / "checkpoint/model.safetensors").read_bytes() for run in (half, tmp_path / "whole")]
    assert weights[0] == weights[1]
    (moved / "config.json").write_text((moved / "config.json").read_text() + " ")
    capsys.readouterr()
    assert main(["train", "--resume", str(half), "--teacher", str(moved), "--max-steps", "5"]) == 1
    assert "a run goes on with the teacher (its weights, its tokenizer) it began with" in capsys.readouterr().err


def test_what_is_no_teacher_is_one_line(teacher, tmp_path, capsys):
    odd = tmp_path / "odd"
    shutil.copytree(teacher, odd)
    text = json.loads((odd / "tokenizer.json").read_text())
    words = text["model"]["vocab"]
    first, second = sorted(words)[-2:]
    words[first], words[second] = words[second], words[first]
    (odd / "tokenizer.json").write_text(json.dumps(text))
    empty = tmp_path / "empty"
    empty.mkdir()
    bare = tmp_path / "bare"
    shutil.copytree(teacher, bare, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*", "special*"))
    other = "teacher must have the vocabulary of the model beside it, and"
    for folder, said in (
        (odd, f"{other} {str(odd)!r} differs in 2 tokens: {first!r} is "),
        (empty, f"teacher must be a folder with a Hugging Face checkpoint (config.json), got {str(empty)!r}"),
        (bare, f"{other} {str(bare)!r} differs in "),
    ):
        run = tmp_path / "run"
        assert main(["train", "--output-dir", str(run), *RUN.split(), "--teacher", str(folder)]) == 1
        err = capsys.readouterr().err
        assert said in err
        assert err.count("\n") == 1
        assert not run.exists()
    with pytest.raises(ValueError, match="the teacher's head must have the 30 rows of the policy's, got 23"):
        FrozenTeacher(a_teacher(), 30)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"distill_coef": 0.5}, "^distill_coef must be 1.0 without teacher, got 0.5$"),
        ({"distill_top_k": 4}, "^distill_top_k must be 0 without teacher, got 4$"),
        ({"teacher": "t", "distill_coef": 0.0}, "^distill_coef must be a finite number > 0"),
        ({"teacher": "t", "distill_divergence": "kl"}, "^distill_divergence must be one of forward_kl, .*got 'kl'"),
        ({"teacher": "t", "distill_beta": 0.1}, "^distill_beta must be left out with distill_divergence forward_kl"),
        ({"teacher": "t", "distill_divergence": "jsd", "distill_beta": 1.0}, "^distill_beta must be < 1"),
        ({"teacher": "t", "loss_type": "turn_regression", "baseline": "none"}, "^teacher must be left out with loss_t"),
    ],
)
def test_settings_that_do_not_go_together_are_one_line(given, words):
    with pytest.raises(ValueError, match=words):
        make_config(given)


def test_its_memory_is_estimated(teacher):
    plain, taught = (estimate(TrainConfig(width=16, layers=1, teacher=t), 400) for t in (None, str(teacher)))
    own = sum(p.numel() for p in config_model(TrainConfig(model=str(teacher))).parameters())
    assert "teacher" not in plain.items
    assert taught.items["teacher"] > 4 * own + 4 * 400 * 24
    assert {k: v for k, v in taught.items.items() if k != "teacher"} == plain.items


def test_a_vocabulary_in_another_order_is_another_one():
    class Words:
        def __init__(self, *words):
            self.words = words

        def get_vocab(self):
            return {word: i for i, word in enumerate(self.words)}

    require_same_vocabulary("teacher", "t", Words("a", "b"), Words("a", "b"))
    with pytest.raises(ValueError, match=r"differs in 1 tokens: 'c' is 2 there and None here$"):
        require_same_vocabulary("teacher", "t", Words("a", "b", "c"), Words("a", "b"))

"""`ppg-fast reward`: its losses, its gradients, what a label is, that it goes on, and what it says of the model."""

import json
import math
import shlex
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

transformers = pytest.importorskip("transformers")

from ppg_fast.cli import main
from ppg_fast.config import REWARD_TRAINING_DEFAULTS, make_config
from ppg_fast.dialogues import make_word_tokenizer
from ppg_fast.jobs import reward_training
from ppg_fast.jobs.reward_report import correlation, fisher, wilson
from ppg_fast.jobs.reward_training import RewardTraining, Sources
from ppg_fast.rewards import Transcript, make_rewards
from ppg_fast.rewards.labels import read_labels
from ppg_fast.rewards.links import link_loss

WORDS = ["good", "fine", "bad", "poor", "ask", "more"]


def small_model(folder):
    """A language model of `WORDS`."""
    tokenizer = make_word_tokenizer(WORDS)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), **sizes, num_key_value_heads=1, head_dim=8, max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(1)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_model(tmp_path_factory.mktemp("base"))


def talk(*answers, ask="ask"):
    return [m for a in answers for m in ({"role": "user", "content": ask}, {"role": "assistant", "content": a})]


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def pairs(path, count=40):
    """The better side says more good things; turns differ in number."""
    lines = []
    for i in range(count):
        good, bad = ("good", "fine")[i % 2], ("bad", "poor")[i // 2 % 2]
        ask = WORDS[4 + i % 2] + " more" * (i % 5)
        lines.append({"chosen": talk(good, good, bad, ask=ask), "rejected": talk(bad, good, bad, ask=ask)})
    return write(path, lines)


def training(base, data, tmp_path, config=(), **sources):
    settings = {"device": "cpu", "num_prompts": 4, "max_grad_norm": 1e9, **dict(config)}
    made = make_config(REWARD_TRAINING_DEFAULTS, settings)
    return RewardTraining.of(Sources(data, str(base), tmp_path / "out", **sources), made)


def test_one_turn_is_the_loss_of_trls_reward_trainer():
    trl = pytest.importorskip("trl.trainer.reward_trainer")
    torch.manual_seed(0)
    logits, margin = torch.randn(6, 1, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    same = lambda value: value  # noqa: E731
    accelerator = SimpleNamespace(gather=same, gather_for_metrics=same)
    for center, margins in ((None, None), (0.01, None), (0.3, margin)):
        host = SimpleNamespace(
            args=SimpleNamespace(center_rewards_coefficient=center), model=SimpleNamespace(training=False),
            accelerator=accelerator, _metrics=defaultdict(lambda: defaultdict(list)), _total_train_tokens=0,
        )  # fmt: skip
        inputs = {} if margins is None else {"margin": margins}
        model = lambda **_: SimpleNamespace(logits=logits)  # noqa: E731
        theirs = trl.RewardTrainer.compute_loss(host, model, inputs)
        own = [
            link_loss("pairs", (logits[i], logits[i + 3]), 0.0 if margins is None else float(margins[i]), center or 0)
            for i in range(3)
        ]
        assert float(theirs) == pytest.approx(float(torch.stack(own).mean()), rel=1e-12)


def test_links_are_their_formulas():
    a, b = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    ls = lambda x: -math.log1p(math.exp(-x))  # noqa: E731
    values = {
        ("pairs", 0.5): -ls(0.6 - 1.0 - 0.5) + 0.1 * 1.6**2,
        ("pairs", None): -0.5 * (ls(0.4) + ls(-0.4)) + 0.1 * 1.6**2,
        ("scores", 2.0): 1.4**2,
        ("ratings", (1.0, None, 0.0)): (0.7**2 + 0.5**2) / 2,
        ("demonstrations", 1.0): -ls(0.6) + 0.1 * 0.36,
        ("demonstrations", -1.0): -ls(-0.6) + 0.1 * 0.36,
    }
    for (kind, target), value in values.items():
        assert float(link_loss(kind, (a, b), target, 0.1)) == pytest.approx(value, rel=1e-12), (kind, target)


@pytest.mark.parametrize("max_tokens", [10_000, 40])
def test_a_step_has_the_gradient_of_float64(base, tmp_path, max_tokens):
    """By transformers' own head, one prefix at a time, with a head that is not zero."""
    run = training(base, pairs(tmp_path / "p.jsonl"), tmp_path, {"max_tokens": max_tokens})
    torch.manual_seed(0)
    torch.nn.init.normal_(run.model.score.weight)
    truth = transformers.Qwen3ForSequenceClassification(run.model.config).double()
    truth.load_state_dict(run.model.state_dict())
    losses = []
    for i in run.chosen(1):
        rewards = []
        for dialogue in run.labels[i].dialogues:
            renderer = run.reader.renderer
            texts = [
                renderer.encode(renderer.text(p.messages))
                for p in Transcript(dialogue.id, dialogue.messages).prefixes()
            ]
            rewards.append(torch.stack([truth(input_ids=torch.tensor([t])).logits[0, 0] for t in texts]))
        losses.append(link_loss("pairs", rewards, 0.0, 0.01))
    loss = torch.stack(losses).mean()
    loss.backward()
    assert run.train_step() == pytest.approx(loss.item(), rel=1e-5)
    for name, p in truth.named_parameters():
        torch.testing.assert_close(
            run.model.get_parameter(name).grad.double(), p.grad, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


FLAGS = shlex.split("--device cpu --max-steps 30 --eval-every 10 --learning-rate 0.01 --num-prompts 8 --warmup-steps 2")


def test_pairs_become_a_reward_that_ppg_fast_reads(base, tmp_path, capsys):
    data, out = pairs(tmp_path / "p.jsonl"), tmp_path / "rm"
    command = ["reward", data, "--model", str(base), "-o", str(out), *FLAGS]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "32 pairs to train on, 8 held out" in said
    assert "held-out accuracy 1.000 (95 %: 0.676 to 1.000) of 8 pairs" in said
    assert "calibration: off by" in said
    assert "correlation of the reward with length: " in said
    assert not (out / "checkpoints").exists()
    report = json.loads((out / "reward.json").read_text())
    assert report["held_out"]["accuracy"] == 1.0
    (reward,) = make_rewards(f"model:{out}")
    assert reward.scorer.one_pass
    messages = [read_message(m) for m in talk("good", "poor")]
    (row,) = reward.turns([Transcript("d", tuple(messages))])
    assert row[0] > row[1]
    assert main(command) == 1
    assert "output must be a new folder, or one that this command began" in capsys.readouterr().err


def read_message(m):
    from ppg_fast.dialogues import Message

    return Message(m["role"], m["content"])


def test_a_run_that_was_stopped_goes_on_with_the_same_bits(base, tmp_path, capsys, monkeypatch):
    data = pairs(tmp_path / "p.jsonl")
    command = lambda out, *more: ["reward", data, "--model", str(base), "-o", str(tmp_path / out), *FLAGS, *more]  # noqa: E731
    assert main(command("whole")) == 0
    step = RewardTraining.train_step

    def stops(self):
        if self.step == 15:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(reward_training.RewardTraining, "train_step", stops)
    assert main(command("half")) == 130
    assert main(command("half", "--learning-rate", "0.02")) == 1
    assert "must be of the same labels, model and settings to go on" in capsys.readouterr().err
    monkeypatch.undo()
    assert main(command("half")) == 0
    assert "half goes on after step 10" in capsys.readouterr().out
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "half")]
    assert weights[0] == weights[1]


def test_it_stops_early_and_keeps_the_best(base, tmp_path, monkeypatch):
    run = training(base, pairs(tmp_path / "p.jsonl"), tmp_path, {"max_steps": 100}, patience=2)
    for number, loss in enumerate((0.5, 0.4, 0.6, 0.4)):
        assert not run.over
        run.step = number + 1
        with torch.no_grad():
            run.model.score.weight.fill_(number)
        run.observe({"loss": loss})
    assert run.over
    assert run.best["step"] == 2
    assert run.best["weights"]["score.weight"].eq(1).all()


def test_labels_are_told_by_the_file(tmp_path):
    kind, labels = read_labels(pairs(tmp_path / "p.jsonl", 4), None, None, True)
    assert kind == "pairs"
    assert [label.target for label in labels] == [0.0] * 4
    assert labels[0].dialogues[0].messages[1].content == "good"
    lines = [{"id": f"d{i}", "messages": talk("good", "bad"), "reward": i} for i in (1, 3)]
    kind, labels = read_labels(write(tmp_path / "s.jsonl", lines), None, None, True)
    assert (kind, [label.target for label in labels]) == ("scores", [-1.0, 1.0])
    lines = [{"id": f"d{i}", "messages": talk("good", "bad"), "turn_rewards": [i, None]} for i in (1, 3)]
    data = write(tmp_path / "t.jsonl", lines)
    kind, labels = read_labels(data, None, None, True)
    assert (kind, [label.target for label in labels]) == ("ratings", [(-1.0, None), (1.0, None)])
    rated = [{"id": "d1", "turn": 0, "rating": 4, "rater": "a"}, {"id": "d3", "rating": 8, "rater": "a"}]
    rated += [{"id": "d1", "turn": 0, "rating": 100, "rater": "b"}, {"id": "d1", "turn": 1, "rating": 90, "rater": "b"}]
    kind, labels = read_labels(data, write(tmp_path / "r.jsonl", rated), None, True)
    assert (kind, [label.target for label in labels]) == ("ratings", [(0.0, -1.0), (None, 1.0)])
    kind, labels = read_labels(data, None, data, True)
    assert (kind, [label.target for label in labels]) == ("demonstrations", [1.0, 1.0, -1.0, -1.0])


def test_ties_and_margins_and_what_says_nothing(tmp_path):
    sides = {"chosen": talk("good"), "rejected": talk("bad")}
    lines = [{**sides, "tie": True}, {**sides, "margin": 0.5}, {"chosen": talk("good"), "rejected": talk("good")}]
    with pytest.warns(UserWarning, match="1 pairs whose sides are alike are left out"):
        _, labels = read_labels(write(tmp_path / "p.jsonl", lines), None, None, True)
    assert [label.target for label in labels] == [None, 0.5]
    for line, said in (
        ({**sides, "margin": "much"}, "margin must be a finite number, got 'much'"),
        ({**sides, "tie": 1}, "tie must be true or false, got 1"),
        ({**sides, "tie": True, "margin": 1.0}, "a tie has no margin, got 1.0"),
    ):
        with pytest.raises(ValueError, match=said):
            read_labels(write(tmp_path / "p.jsonl", [line]), None, None, True)
    with pytest.raises(ValueError, match="must hold labels of one kind: pairs, or dialogues with rewards"):
        read_labels(write(tmp_path / "p.jsonl", [sides, {"messages": talk("a"), "reward": 1}]), None, None, True)


@pytest.mark.parametrize("kind", ["scores", "ratings", "demonstrations"])
def test_other_labels_are_learned_too(base, tmp_path, capsys, kind):
    rows = [(("good", "bad")[i % 2], ("fine", "poor")[i // 2 % 2], "ask more" if i % 3 else "more") for i in range(40)]
    worth = {"good": 1.0, "fine": 1.0, "bad": 0.0, "poor": 0.0}
    lines = [{"id": f"d{i}", "messages": talk(a, b, ask=ask)} for i, (a, b, ask) in enumerate(rows)]
    for line, (a, b, _) in zip(lines, rows, strict=True):
        line.update({"reward": worth[a] + worth[b]} if kind == "scores" else {"turn_rewards": [worth[a], worth[b]]})
    more = []
    if kind == "demonstrations":
        own = [{"id": f"o{i}", "messages": talk("bad", "poor", ask=ask)} for i, (*_, ask) in enumerate(rows)]
        lines = [{"id": f"d{i}", "messages": talk("good", "fine", ask=ask)} for i, (*_, ask) in enumerate(rows)]
        more = ["--own", write(tmp_path / "own.jsonl", own)]
    data = write(tmp_path / "d.jsonl", lines)
    flags = [*FLAGS, "--max-steps", "60", "--patience", "9"]
    # one prompt is in one part only; the prompts here are two or three
    assert main(["reward", data, "--model", str(base), "-o", str(tmp_path / "rm"), *more, *flags]) == 0
    (reward,) = make_rewards(f"model:{tmp_path / 'rm'}")
    texts = [Transcript(f"t{i}", tuple(read_message(m) for m in talk(w))) for i, w in enumerate(("good", "bad"))]
    (good,), (bad,) = reward.turns(texts)
    assert good > bad + 0.5


def test_figures_of_the_report():
    assert wilson(8, 8) == pytest.approx((0.6756, 1.0), abs=1e-3)
    assert wilson(0, 0) == (0.0, 1.0)
    assert fisher(0.5, 103) == pytest.approx((0.3398, 0.6321), abs=1e-3)
    assert correlation([1, 2, 3], [2, 4, 7]) == pytest.approx(0.9933, abs=1e-3)
    assert math.isnan(correlation([1, 1], [2, 3]))

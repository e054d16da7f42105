"""The window, measured: sketches of scores against dense gradients, inner products against enumeration, and made
problems whose delay is known."""

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from test_cli import write

from ppg_fast.cli import main
from ppg_fast.compare import window
from ppg_fast.compare.lags import LagSignals, measure, single_lag
from ppg_fast.compare.tabular import TabularProblem
from ppg_fast.dialogues.packing import Sample, pack
from ppg_fast.models.causal_lm import make_model, policy_hidden
from ppg_fast.models.score_sketch import ScoreSketch
from ppg_fast.policy_classes import FullPlanning, Greedy, LagWeights, Lookahead, Segment
from ppg_fast.rollouts.problems import problem

CLASSES = (Greedy(), Lookahead(3), Segment(2), FullPlanning())


# ---- sketches --------------------------------------------------------------------------------------------------------
def dense_scores(model, batch, temperature):
    """The gradient of each turn's log-prob by a linear map before the head, at the identity: (S, T, D, D)."""
    x, weight = policy_hidden(model, batch).detach(), model.get_output_embeddings().weight.detach()
    S, T = batch.rewards.shape
    scores = torch.zeros(S, T, x.shape[1], x.shape[1])
    for s in range(S):
        for t in range(T):
            own = (batch.dialogue_ids == s) & (batch.turn_ids == t) & (batch.labels >= 0)
            if own.any():
                a = torch.eye(x.shape[1], requires_grad=True)
                logprobs = (x[own] @ a.T @ weight.T / temperature).log_softmax(-1)
                total = logprobs.gather(1, batch.labels[own][:, None]).sum()
                (scores[s, t],) = torch.autograd.grad(total, a)
    return scores


@pytest.fixture(scope="module")
def model_and_batch():
    model, random = make_model(40, 16, 1, seed=3), torch.Generator().manual_seed(1)
    shapes = ([-1, -1, 0, 0, -1, 1], 2), ([-1, 0, 0, 0], 1), ([-1, 0, -1, 1, 1, -1, 2], 3)
    draw = lambda n: torch.randint(40, (n,), generator=random).tolist()  # noqa: E731
    samples = [Sample(draw(len(turn_ids)), turn_ids, [0.0] * turns, 0) for turn_ids, turns in shapes]
    return model, pack(samples)


def test_a_sketch_is_a_projection_of_the_score(model_and_batch):
    model, batch = model_and_batch
    sketch = ScoreSketch(16, 300, seed=5)
    G = dense_scores(model, batch, 0.7)
    expected = torch.einsum("dm,stde,em->stm", sketch.of_gradients, G, sketch.of_states)
    torch.testing.assert_close(sketch.of_turns(model, batch, 0.7), expected, rtol=1e-4, atol=1e-5)
    assert model.training
    assert not any(p.grad is not None for p in model.parameters())


def test_inner_products_of_sketches_are_those_of_scores(model_and_batch):
    model, batch = model_and_batch
    G = dense_scores(model, batch, 1.0).flatten(0, 1).flatten(1)
    s = [ScoreSketch(16, 512, seed).of_turns(model, batch).flatten(0, 1) for seed in range(40)]
    found = torch.stack([x @ x.T for x in s])
    error = found.std(0) / len(s) ** 0.5
    assert ((found.mean(0) - G @ G.T).abs() <= 4 * error + 1e-6).all()
    scale = (G @ G.T).diagonal()
    assert (error.diagonal()[scale > 0] < 0.1 * scale[scale > 0]).all()  # the test can fail


# ---- signals ---------------------------------------------------------------------------------------------------------
def test_products_are_those_of_the_expected_gradients():
    """On a problem that can be enumerated, the mean over many measurements, and the jackknife's error against their
    spread."""
    tabular, random, group = TabularProblem(problem("commitments")), torch.Generator().manual_seed(2), 4
    logits = tabular.start() + 0.3
    logits[:, 0] += 0.5
    everything = (Segment(2), Lookahead(2), FullPlanning(), *map(single_lag, range(4)))
    exact = torch.stack([tabular.gradient(logits, c).flatten() for c in everything])
    inner, errors, by_chance, last = [], [], [], []
    for _ in range(60):
        actions, rewards = tabular.sample(logits, 12 * group, random)
        scores = torch.nn.functional.one_hot(actions, 2).double() - logits.softmax(-1)
        at_once = torch.zeros(*scores.shape[:2], scores.shape[1], 2, dtype=torch.float64)
        at_once[:, torch.arange(scores.shape[1]), torch.arange(scores.shape[1])] = scores  # turn t moves row t
        signals, T = LagSignals(everything), scores.shape[1]
        counts, groups = torch.full((len(actions),), T), torch.arange(len(actions)) // group
        signals.add(at_once.flatten(2).float(), rewards.float(), counts, groups)
        products = signals.products()
        Z = torch.stack([products.weights(c) for c in everything])
        inner.append(Z @ products.inner[0] @ Z.T)
        by_chance.append(products.by_chance[-1])  # the last lag, which moves nothing
        last.append(products.inner[0, -1, -1])
        errors.append(products.compare(everything, 1)["signal"].error)
    found = torch.stack(inner)
    spread = found.std(0)
    assert ((found.mean(0) - exact @ exact.T).abs() <= 4 * spread / len(inner) ** 0.5 + 1e-9).all()
    ratio = torch.stack(errors).mean(0) / spread.diagonal()
    assert ((ratio > 0.7) & (ratio < 2.5)).all(), ratio
    assert tabular.gradient(logits, single_lag(T - 1)).norm() < 1e-9
    assert float(torch.stack(by_chance).mean() / torch.stack(last).std()) == pytest.approx(1, abs=0.3)


def drawn(groups, seed=0, offset=0.0):
    random = torch.Generator().manual_seed(seed)
    scores, rewards = torch.randn(48, 3, 5, generator=random), torch.randn(48, 3, generator=random)
    kept = torch.isin(torch.arange(48) // 4, torch.tensor(groups))
    signals = LagSignals(CLASSES)
    rewards = rewards + offset * torch.randn(12, 3, generator=random).repeat_interleave(4, 0)
    signals.add(scores[kept], rewards[kept], torch.full((len(kept),), 3)[kept], (torch.arange(48) // 4)[kept])
    return signals.products()


def test_the_jackknife_leaves_whole_groups_out():
    found = drawn(range(12))
    for left_out in (0, 5, 11):
        without = drawn([g for g in range(12) if g != left_out])
        torch.testing.assert_close(found.inner[1 + left_out], without.inner[0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.squares[1 + left_out], without.squares[0], rtol=1e-9, atol=1e-9)


def test_what_a_group_shares_is_no_signal():
    """Rewards that an opening or its partner gives to all rollouts of a group change nothing."""
    torch.testing.assert_close(drawn(range(12)).inner, drawn(range(12), offset=8.0).inner, rtol=1e-4, atol=1e-5)


def made(delay, seed, turns=8, rollouts=192, noise=1.0):
    """Answers of a coin, each paid ``delay`` turns later (None: never), under noise, in ragged dialogues."""
    random = torch.Generator().manual_seed(seed)
    answers = torch.randint(0, 2, (rollouts, turns), generator=random) * 2.0 - 1
    rewards = noise * torch.randn(rollouts, turns, generator=random)
    if delay is not None:
        rewards[:, delay:] += answers[:, : turns - delay]
    counts = torch.where(torch.arange(rollouts) % 5 == 0, turns - 1, turns)
    scores = torch.diag_embed(answers) * (torch.arange(turns) < counts[:, None])[..., None]
    signals = LagSignals(CLASSES)
    for half in (slice(None, rollouts // 2), slice(rollouts // 2, None)):
        groups = torch.arange(rollouts)[half] // 8
        signals.add(scores[half], rewards[half], counts[half], groups)
    return measure(signals, CLASSES, 64)


@pytest.mark.parametrize(
    ("delay", "expected"), [(0, "greedy"), (2, "lookahead:3"), (5, "lookahead:6"), (7, "full"), (None, "full")]
)
def test_the_window_of_a_known_delay(delay, expected):
    found = made(delay, seed=1, noise=0.3 if delay == 7 else 1.0)  # one turn alone has a reward 7 turns later
    assert found["window"] == expected
    assert found["last_clear_lag"] == delay
    assert [row["lag"] for row in found["lags"] if row["clear"]] == ([] if delay is None else [delay])
    assert (found["weights"] is None) == (delay is None)
    text = window.verdict(found)
    if delay is None:
        assert text.startswith("window: full. No lag beyond what chance gives in 192 rollouts")
        return
    assert text.startswith(f"window: {expected}. Answers move rewards up to {delay} turns later")
    shares = [row["share"]["value"] for row in found["lags"]]
    assert sum(shares) == pytest.approx(1)
    assert shares[delay] > 0.8
    best = max(found["classes"], key=lambda name: found["classes"][name]["alignment"]["value"])
    assert best in (expected, found["weights"])
    assert found["classes"]["full"]["bias"]["value"] == pytest.approx(0, abs=1e-9)
    if delay > 2:
        assert found["classes"]["lookahead:3"]["bias"]["value"] > 0.8


def test_false_alarms_are_few_and_weak_signals_are_not_called_absent():
    alarms = sum(made(None, seed)["window"] != "full" for seed in range(20))
    assert alarms <= 4
    weak = made(3, seed=4, noise=25.0)
    assert weak["window"] == "full"


@pytest.mark.parametrize("directions", [1, 3, 200])
def test_a_lag_without_a_signal_is_rarely_clear_whatever_way_scores_point(directions):
    random, alarms = torch.Generator().manual_seed(7), 0
    for _ in range(200):
        signals = LagSignals()
        scores, rewards = (torch.randn(128, 6, *n, generator=random) for n in ((directions,), ()))
        signals.add(scores, rewards, torch.full((128,), 6), torch.arange(128) // 8)
        alarms += measure(signals, (), 8)["last_clear_lag"] is not None
    assert alarms <= 20  # 10 are expected, and 3 standard errors more


def test_too_few_groups_are_refused():
    with pytest.raises(ValueError, match="at least 8 groups of rollouts, got 4"):
        made(1, 0, rollouts=32)


# ---- the command -----------------------------------------------------------------------------------------------------
TINY = ["--width", "32", "--layers", "1", "--max-new-tokens", "1", "--max-turns", "5", "--rollouts", "192"]
TINY += ["--num-prompts", "8", "--num-generations", "8", "--sketch", "256"]
DELAYED = """
def paid(messages):
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    return float(len(said) > 2 and bool(said[-3]) and ord(said[-3][0]) % 2)
"""
ENVIRONMENT = """
from ppg_fast.dialogues.message import Message

class Delayed:
    def reset(self, seed):
        self.said = []
        return [Message("user", f"Hello {seed}.")]

    def step(self, answer):
        self.said.append(answer)
        now = self.said[-2] if len(self.said) > 1 else ""
        return Message("user", "And?"), float(bool(now) and ord(now[0]) % 2), len(self.said) == 6
"""


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "reward.py").write_text(DELAYED)
    said = [{"role": role, "content": "ok ?"} for _ in range(5) for role in ("user", "assistant")]
    lines = [{"id": f"p{i}", "messages": [{"role": "user", "content": f"hello {i} !"}, *said[1:]]} for i in range(9)]
    return ["compare", "--prompts", write(tmp_path / "p.jsonl", lines), "--reward", f"{tmp_path}/reward.py:paid"]


def test_prompts_are_measured_and_reported(prompts, tmp_path, capsys):
    numbers = []
    for name in ("one", "two"):
        assert main([*prompts, *TINY, "--output-dir", str(tmp_path / name)]) == 0
        numbers.append(json.loads((tmp_path / name / "window.json").read_text()))
    found, again = numbers
    assert found["window"] == "lookahead:3"
    assert found["groups"] == 24
    assert found["turns"] == 192 * 5
    assert 0.1 < found["mean_return"] / 3 < 0.9
    differ = {key for key in found if found[key] != again[key]}
    assert differ <= {"seconds", "command"}
    out = capsys.readouterr().out
    assert "192/192 rollouts, mean return" in out
    assert "window: lookahead:3. Answers move rewards up to 2 turns later" in out
    page = (tmp_path / "one" / "window.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("data:image/svg+xml;base64,") == 1
    assert "http" not in page.split("</style>")[1].replace("data:image", "")
    flags = [*prompts, *TINY, "--output-dir", str(tmp_path / "one")]
    assert main(flags) == 1
    assert "must hold no window.html (--overwrite replaces it)" in capsys.readouterr().err


def test_environments_are_measured(tmp_path, capsys):
    from test_chat_runs import CHATML, folder

    (tmp_path / "env.py").write_text(ENVIRONMENT)
    model = folder(tmp_path / "model", CHATML)
    flags = ["compare", "--env", f"{tmp_path}/env.py:Delayed", "--model", model, *TINY[4:6], *TINY[8:]]
    assert main([*flags, "--output-dir", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "window.json").read_text())
    assert found["window"] == "lookahead:2"
    assert found["turns"] == 192 * 6  # as the environment ends them, which is later than the default of prompts
    assert "window: lookahead:2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rollouts", "100"], "rollouts must be a multiple of num_prompts x num_generations, 64, and at least 64"),
        (["--num-generations", "1"], "num_generations must be at least 2, to compare with, got 1"),
        (["--sketch", "0"], "sketch must be from 1 to 2"),
        (["--policy-classes", "greedy,auto"], 'a policy class is "greedy"'),
        (["--env", "x.py:X"], "compare measures prompts or env, one of them"),
        (["--reward", "human:run/ratings"], "reward must be given without people, who rate while ppg-fast train runs"),
    ],
)
def test_bad_input_is_named_before_anything_is_computed(prompts, flags, message, tmp_path, capsys):
    assert main([*prompts, "--output-dir", str(tmp_path / "out"), *flags]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_lag_weights_are_weights_of_the_lags_that_were_measured():
    signals = LagSignals()
    signals.add(torch.randn(64, 3, 5), torch.randn(64, 3), torch.full((64,), 3), torch.arange(64) // 8)
    products = signals.products()
    assert products.weights(LagWeights([1, 0.5, 0.25, 9])).tolist() == [1, 0.5, 0.25]
    assert products.weights(Lookahead(2)).tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match="must be measured, got 'segment:2'"):
        products.weights(Segment(2))

"""The trainer's critic: its regression against least squares, the advantages it completes against the formula, what it
may not depend on, and that a run goes on with what it learned."""

import copy
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from test_trainer import gradients, one_thread, some_samples, tiny  # noqa: F401 (a fixture)

import ppg_fast as ppg
from ppg_fast.config import make_config
from ppg_fast.dialogues.packing import pack
from ppg_fast.jobs.persona import PersonaJob
from ppg_fast.models.causal_lm import policy_hidden
from ppg_fast.policy_classes import FullPlanning, Lookahead
from ppg_fast.spec import PolicyLossSpec
from ppg_fast.training import critic as critics
from ppg_fast.training.critic import Critic, Lesson, explained, first_tokens, rewards_before, ridge
from ppg_fast.training.objective import Objective, Schedule, credit
from ppg_fast.training.trainer import TrainingState, optimise, update

VALUE = Objective(Lookahead(2), 0.9, "value")
GAE = Objective(FullPlanning(), 0.9, "value", gae_lambda=0.8)


def test_the_regression_is_ridge_on_standardised_features():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, dtype=torch.float64, generator=generator) * torch.tensor([1, 10, 0.1, 3, 0]) + 2.0
    y = x @ torch.tensor([1.0, -0.2, 5.0, 0.0, 9.0], dtype=torch.float64) + 4
    y = y + torch.randn(40, dtype=torch.float64, generator=generator)
    z = torch.cat([x, torch.ones(40, 1), y[:, None]], 1).double()
    found = ridge(z.T @ z)
    scaled = (x - x.mean(0))[:, :4] / x.std(0, correction=0)[:4]
    rows = torch.cat([scaled, torch.eye(4, dtype=torch.float64) * (critics.PRIOR * 5) ** 0.5])
    expected = torch.linalg.lstsq(rows, torch.cat([y - y.mean(), torch.zeros(4)])[:, None]).solution[:, 0]
    torch.testing.assert_close(found[:4], expected / x.std(0, correction=0)[:4])
    assert found[4] == 0  # of a feature that never varies
    assert float(found[5] + x.mean(0) @ found[:5]) == pytest.approx(float(y.mean()))


def test_the_hidden_state_is_the_one_before_the_answer():
    """Where the first token of the turn is predicted: it knows nothing of the answer."""
    batch = pack(some_samples())
    at, turns = first_tokens(batch)
    T = batch.rewards.shape[1]
    for position, turn in zip(at.tolist(), turns.tolist(), strict=True):
        dialogue, index = divmod(turn, T)
        own = (batch.turn_ids == index) & (batch.dialogue_ids == dialogue)
        assert position == int(own.nonzero()[0])
        assert batch.turn_ids[position - 1] != index
    assert len(at) == int(batch.turn_counts.sum())
    model = tiny()
    changed = some_samples()
    first = int(at[turns == T + 1])  # dialogue 1, turn 1
    before = policy_hidden(model, batch)[first]
    changed[1].tokens[changed[1].turn_ids.index(1)] ^= 1  # its first token
    assert torch.equal(policy_hidden(model, pack(changed))[first], before)


def test_rewards_so_far_end_before_the_turn_and_are_centred_in_the_group():
    samples = some_samples()
    batch = pack(samples)
    found, T = rewards_before(batch), batch.rewards.shape[1]
    assert found.shape == (6, T, critics.LAST_REWARDS + 1)
    for b, sample in enumerate(samples):
        group = [s for s in samples if s.group_id == sample.group_id and s is not sample]
        for t in range(len(sample.rewards)):
            others = [sum(s.rewards[:t]) for s in group if len(s.rewards) > t]
            mean = sum(others) / len(others) if others else 0.0
            assert float(found[b, t, 0]) == pytest.approx(sum(sample.rewards[:t]) - mean, abs=1e-6)
    assert bool((found[:, 0] == 0).all())


def taught(objective, steps=3, seed=1, max_tokens=10_000):
    """A critic after some steps at a learning rate of 0."""
    critic, model = Critic(), tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    rows = []
    for step in range(steps):
        schedule = Schedule(1, 1e-3, max_tokens=max_tokens)
        row = update(model, optimizer, some_samples(24, seed + step), objective, schedule, critic=critic)
        critic.take_in(row.pop("lesson"))
        rows.append(row)
    return critic, rows


@pytest.mark.parametrize("objective", [VALUE, GAE], ids=["window", "gae"])
def test_advantages_are_those_of_the_formula(objective):
    """A = (returns bootstrapped from the means, centred in the group) + what the critic sees beyond the means."""
    critic, _ = taught(objective)
    samples, model = some_samples(12, 9), tiny()
    batch = pack(samples)
    at, turns = first_tokens(batch)
    hidden = policy_hidden(model, batch).detach()[at]
    seen = torch.zeros(batch.rewards.numel(), dtype=torch.float64)
    features = torch.cat([hidden.double(), rewards_before(batch).flatten(0, 1)[turns]], 1)
    weights = ridge(critic.moments)
    seen[turns] = features @ weights[:-1] + weights[-1]
    seen, known = seen.view(batch.rewards.shape).float(), torch.tensor(critic.means).expand(batch.rewards.shape)
    assert seen.abs().max() > 0

    def advantages(rewards, values, groups):
        ahead = {} if objective.gae_lambda is None else {"values": values, "gae_lambda": objective.gae_lambda}
        returns = ppg.partial_returns(rewards, objective.policy_class, 0.9, batch.turn_counts, **ahead)
        return ppg.turn_advantages(returns, groups, "value", batch.turn_counts, values=values, alone="other_groups")

    expected = advantages(batch.rewards, known.float(), batch.group_ids)
    expected = expected + advantages(torch.zeros_like(batch.rewards), seen, None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    row = update(model, optimizer, samples, objective, Schedule(1, 1e-3), critic=critic)
    there = batch.turn_mask
    assert row["turns/adv_abs_mean"] == pytest.approx(float(expected[there].abs().mean()), rel=1e-5)
    for turn in range(batch.rewards.shape[1]):
        of_turn = expected[:, turn][there[:, turn]]
        assert row[f"turns/advantage/{turn}"] == pytest.approx(float(of_turn.mean()), abs=1e-5)
        assert row[f"turns/advantage_std/{turn}"] == pytest.approx(float(of_turn.std(correction=0)), rel=1e-4)


@pytest.mark.parametrize("iterations", [1, 2])
@pytest.mark.parametrize("objective", [VALUE, GAE], ids=["window", "gae"])
def test_micro_batches_give_the_gradient_of_the_whole(objective, iterations):
    objective = replace(objective, num_iterations=iterations, spec=PolicyLossSpec("ppo"))
    critic, _ = taught(objective)
    found = []
    for max_tokens in (10_000, 13):
        model = tiny()
        optimizer, schedule = torch.optim.SGD(model.parameters(), lr=0.0), Schedule(1, 1e-3, max_tokens=max_tokens)
        schedule = replace(schedule, max_grad_norm=1e9)
        row = update(model, optimizer, some_samples(12, 9), objective, schedule, critic=copy.deepcopy(critic))
        found.append((row, torch.cat([p.grad.flatten() for p in model.parameters()])))
    (whole, grad), (parts, grad_of_parts) = found
    torch.testing.assert_close(grad_of_parts, grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(parts["lesson"].moments, whole["lesson"].moments, rtol=1e-4, atol=1e-4)
    name = "value/explained_variance"
    assert parts[name] == pytest.approx(whole[name], abs=1e-4)
    _, without = gradients(tiny(), some_samples(12, 9), replace(objective, baseline="none", gae_lambda=None), 10_000)
    assert not torch.allclose(without, grad, rtol=1e-2)


def test_the_first_step_is_that_of_the_group_alone():
    samples = some_samples()
    row = update(tiny(), torch.optim.SGD(tiny().parameters(), lr=0.0), samples, GAE, Schedule(1, 1e-3), critic=Critic())
    _, advantages = credit(pack(samples), replace(GAE, baseline="leave_one_out", gae_lambda=None))
    assert row["turns/adv_abs_mean"] == pytest.approx(
        float(advantages.abs().sum() / pack(samples).turn_counts.sum()), rel=1e-6
    )
    assert row["value/explained_variance"] == 0.0


def lesson_of(x, y):
    z = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64), y[:, None]], 1)
    return Lesson(z.T @ z, torch.tensor([float(len(y))], dtype=torch.float64), y.sum()[None])


def test_what_is_in_the_features_is_learned_and_noise_hardly():
    generator = torch.Generator().manual_seed(2)
    normal = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    shares = []
    for informative in (True, False):
        critic = Critic()
        for _ in range(12):
            x = normal(200, 20)
            y = normal(200) + (x[:, 0] + x[:, 1] if informative else 0.0)
            share = explained(y[:, None], critic.foretell(x)[:, None], torch.ones(200, 1, dtype=torch.bool))
            critic.take_in(lesson_of(x, y))
        shares.append(share["value/explained_variance"])
    assert shares[0] == pytest.approx(2 / 3, abs=0.1)
    assert shares[1] == pytest.approx(0, abs=0.05)
    assert explained(torch.ones(3, 2), torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool)) == {}


def test_a_step_whose_sums_do_not_fit_teaches_nothing():
    """Its loss may fit all the same; one NaN would be all that the critic ever says again."""
    critic = Critic()
    critic.take_in(lesson_of(torch.ones(3, 2, dtype=torch.float64), torch.ones(3, dtype=torch.float64)))
    before = critic.state_dict()
    critic.take_in(lesson_of(torch.full((3, 2), torch.inf, dtype=torch.float64), torch.ones(3, dtype=torch.float64)))
    assert all(torch.equal(sums, critic.state_dict()[name]) for name, sums in before.items())


def test_past_steps_are_forgotten_by_a_tenth_a_step():
    one, two = (lesson_of(torch.full((3, 2), v, dtype=torch.float64), torch.ones(3).double() * v) for v in (1.0, 2.0))
    critic = Critic()
    critic.take_in(one)
    critic.take_in(two)
    torch.testing.assert_close(critic.moments, 0.9 * one.moments + two.moments)
    assert critic.means == [pytest.approx((0.9 * 3 + 6) / (0.9 * 3 + 3))]


def test_wide_hidden_states_are_projected_the_same_way_every_time():
    hidden, rewards = torch.randn(4, 700), torch.zeros(4, 4, dtype=torch.float64)
    one, other = Critic().features(hidden, rewards), Critic().features(hidden, rewards)
    assert one.shape == (4, critics.MOST_HIDDEN + 4)
    assert torch.equal(one, other)


def run(steps, state_of=None, bad=0, stop=0):
    model, schedule = tiny(), Schedule(steps, 0.01, warmup_steps=0, max_tokens=40)
    state = TrainingState.start(model, GAE, schedule)
    if state_of:
        state.load_state_dict(state_of)

    def collect(step):
        found = some_samples(9, step)
        return [replace(s, rewards=[3e38] * len(s.rewards)) for s in found] if step == bad else found

    rows = []
    for row in optimise(model, collect, GAE, schedule, state):
        rows.append(row)
        if row["step"] == stop:
            break
    return rows, state


def test_a_run_goes_on_with_what_was_learned_to_the_bit(tmp_path):
    whole, last = run(6)
    _, half = run(6, stop=3)
    torch.save(half.state_dict(), tmp_path / "state.pt")
    rows, resumed = run(6, state_of=torch.load(tmp_path / "state.pt", weights_only=False))
    names = [name for name in whole[-1] if name.startswith(("value/", "loss", "turns/"))]
    assert [[row[name] for name in names] for row in rows] == [[row[name] for name in names] for row in whole[3:]]
    assert any("value/explained_variance/2" in row for row in rows)
    for name, sums in last.critic.state_dict().items():
        assert torch.equal(sums, resumed.critic.state_dict()[name])
    for ours, theirs in zip(resumed.model.parameters(), last.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_nothing_is_learned_from_a_step_that_was_skipped():
    rows, state = run(3, bad=3)
    _, without = run(3, stop=2)
    assert rows[-1]["skipped_steps"] == 1
    for name, sums in without.critic.state_dict().items():
        assert torch.equal(sums, state.critic.state_dict()[name])


def test_it_reads_no_dialogue_twice():
    """No pass of its own: the model is called as often as without it, on as many tokens."""
    calls = []
    for objective, critic in ((VALUE, Critic()), (replace(VALUE, baseline="none"), None)):
        model = tiny()
        model.get_decoder().register_forward_hook(lambda *_: calls.append(1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        row = update(model, optimizer, some_samples(), objective, Schedule(1, 1e-3, max_tokens=13), critic=critic)
        calls.append(row["perf/tokens_read"])
    half = len(calls) // 2
    assert calls[:half] == calls[half:]


REFUSED = {
    'gae_lambda must be None without baseline "value"': {"gae_lambda": 0.9},
    'baseline "value" goes without imitation': {"baseline": "value", "imitate": True},
    'baseline "value" goes without imitation and without signals': {
        "baseline": "value",
        "signals": True,
    },
}


@pytest.mark.parametrize("rule", REFUSED)
def test_objectives_that_it_does_not_serve_are_refused(rule):
    with pytest.raises(ValueError, match=rule):
        Objective(**REFUSED[rule])


SETTINGS = {
    "gae_lambda must be left out with baseline leave_one_out: baseline value has it, got 0.9": {"gae_lambda": 0.9},
    "gae_lambda must be a finite number >= 0.0 and <= 1.0, got 1.5": {"baseline": "value", "gae_lambda": 1.5},
    "gae_lambda goes with windows, .* must be left out, got 0.9": {
        "baseline": "value",
        "policy_class": "lags:1,0.5",
        "gae_lambda": 0.9,
    },
    "baseline must be another than value with policy_class auto": {"baseline": "value", "policy_class": "auto"},
    "baseline must be another than value with policy_class auto or signals": {"baseline": "value", "signals": True},
    "baseline with loss_type soft_q must be one of none, leave_one_out": {"baseline": "value", "loss_type": "soft_q"},
    "baseline must be none with imitate": {"baseline": "value", "data": "log.jsonl", "imitate": True},
    "kl_estimator must be another than k1 with kl_coef": {"kl_coef": 0.1, "kl_estimator": "k1"},
    "num_iterations must be 1 with loss_type reinforce, .* got 2": {"num_iterations": 2},
}


@pytest.mark.parametrize("rule", SETTINGS)
def test_settings_that_do_not_go_together_are_refused(rule):
    with pytest.raises(ValueError, match=rule):
        make_config(SETTINGS[rule])


def test_settings_that_do_are_not():
    """k1 without a term, several iterations of a loss that corrects for them, or of likelihood offline."""
    for given in (
        {"kl_estimator": "k1"},
        {"num_iterations": 2, "loss_type": "ppo"},
        {"num_iterations": 2, "data": "log.jsonl"},
        {"baseline": "value", "gae_lambda": 0.0},
        {"baseline": "value", "policy_class": "lags:1,0.5"},
    ):
        make_config(given)


def test_the_interview_trains_with_it():
    """The whole job, with its own rollouts: what is foretold is measured by turn index."""
    config = make_config(
        {
            "baseline": "value", "gae_lambda": 0.9, "policy_class": "full", "num_iterations": 2, "loss_type": "ppo",
            "width": 16, "layers": 1, "num_prompts": 2, "num_generations": 3, "imitation_steps": 0, "max_turns": 3,
        }
    )  # fmt: skip
    job = PersonaJob(config)
    schedule = replace(job.policy.schedule(), max_steps=4)
    state = TrainingState.start(job.policy.model, job.objective, schedule)

    def collect(step):
        """Its rollouts, rewarded for something that an untrained model does too."""
        return [replace(s, rewards=[float(sum(s.tokens) % (t + 5)) for t in range(3)]) for s in job.collect(step)]

    rows = list(optimise(job.policy.model, collect, job.objective, schedule, state))
    assert all(row["active_turns"] > 0 for row in rows)
    assert "value/explained_variance" in rows[-1]
    assert len(state.critic.means) == 3
    assert state.critic.moments.shape == (16 + critics.LAST_REWARDS + 3,) * 2

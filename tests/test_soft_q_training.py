"""Soft Q-learning in the trainer: its steps at any weights and over any passes, replay, what its settings exclude."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from test_turn_regression_training import some_samples, tiny

from ppg_fast.config import make_config
from ppg_fast.dialogues import Dialogue, Message, write_dialogues
from ppg_fast.dialogues.dialogue import read_file
from ppg_fast.dialogues.packing import pack
from ppg_fast.jobs.offline import OfflineJob
from ppg_fast.jobs.persona import PersonaJob
from ppg_fast.jobs.policy import objective_of
from ppg_fast.models.adaptation import StartingWeights
from ppg_fast.models.causal_lm import PolicyModule
from ppg_fast.policy_classes import FullPlanning, Greedy, Lookahead
from ppg_fast.spec import PolicyLossSpec, SoftQSpec
from ppg_fast.training.experience import KEPT, Experience
from ppg_fast.training.objective import Objective, Schedule
from ppg_fast.training.trainer import TrainingState, optimise, update

BETA, GAMMA = 0.5, 0.9
MEANS = [0.7, 0.2, -0.4]
SOFT_Q = Objective(Lookahead(2), GAMMA, "none", reduction="sum", num_iterations=2, soft_q=SoftQSpec(beta=BETA))
WINDOWS = {Greedy(): 1, Lookahead(2): 2, FullPlanning(): 99}


def samples_of_read_turns():
    """Every turn has tokens: behind a window there must be a value."""
    return [replace(s, rewards=s.rewards[: max(s.turn_ids) + 1]) for s in some_samples()]


def written_out(model, reference, samples, window):
    """The loss by its formula, one dialogue at a time, targets without a gradient."""
    model.set_attn_implementation("eager")
    errors = []
    for sample in samples:
        z, of_ref = (m(torch.tensor([sample.tokens]), use_cache=False).logits[0] for m in (model, reference))
        T = len(sample.rewards)
        u, ratio = [], []
        for t in range(T):
            at = [n - 1 for n, turn in enumerate(sample.turn_ids) if turn == t]
            moved = z.log_softmax(-1) - of_ref.log_softmax(-1).detach()
            ratio.append(sum(moved[n, sample.tokens[n + 1]] for n in at))
            u.append(z[at[0]].logsumexp(0) - of_ref[at[0]].logsumexp(0).detach())
        for t in range(T):
            end = min(t + window, T)
            target = sum(GAMMA ** (k - t) * (sample.rewards[k] / BETA - ratio[k].detach()) for k in range(t, end))
            target = target + ratio[t].detach()
            if end < T:
                target = target + GAMMA ** (end - t) * (u[end].detach() + MEANS[end] / BETA)
            errors.append((MEANS[t] / BETA + u[t] + ratio[t] - target) ** 2 / 2)
    return sum(errors) / len(errors)


@pytest.mark.parametrize("policy_class", WINDOWS, ids=str)
@pytest.mark.parametrize("max_tokens", [10_000, 13])
def test_steps_are_those_of_the_formula(policy_class, max_tokens):
    """Two iterations, on new dialogues and on dialogues that come again; the metrics are those of the new ones."""
    samples, rate, other = samples_of_read_turns(), 0.02, tiny(5)
    new, again = samples[:4], samples[4:]
    model, found = tiny(), StartingWeights(tiny())
    found.load_state_dict(StartingWeights(other).state_dict())
    start, found.model = found, model
    metrics = update(
        model,
        torch.optim.SGD(model.parameters(), lr=rate),
        new,
        replace(SOFT_Q, policy_class=policy_class),
        Schedule(1, rate, max_tokens=max_tokens, max_grad_norm=1e9),
        start,
        again=again,
        mean_returns=MEANS,
    )
    truth = tiny()
    other.set_attn_implementation("eager")
    for _ in range(2):
        truth.zero_grad()
        loss = written_out(truth, other, samples, WINDOWS[policy_class])
        loss.backward()
        with torch.no_grad():
            for p in truth.parameters():
                p -= rate * p.grad
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for ours, theirs in zip(model.parameters(), truth.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    moved = [(a - b).abs().max() for a, b in zip(model.parameters(), tiny().parameters(), strict=True)]
    assert max(moved) > 1e-3
    assert metrics["reward"] == pytest.approx(sum(sum(s.rewards) for s in new) / len(new))
    assert metrics["turns/mean_count"] == sum(len(s.rewards) for s in new) / len(new)


def test_at_the_reference_values_are_mean_returns_and_advantages_what_they_leave():
    samples, model = samples_of_read_turns(), tiny()
    metrics = update(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        samples,
        replace(SOFT_Q, num_iterations=1, policy_class=FullPlanning()),
        Schedule(1, 1e-3),
        StartingWeights(model),
        mean_returns=MEANS,
    )
    ends = [sum(GAMMA**k * r for k, r in enumerate(s.rewards)) for s in samples]
    assert metrics["turns/value/0"] == pytest.approx(MEANS[0], abs=1e-5)
    assert metrics["turns/advantage/0"] == pytest.approx(sum(ends) / len(ends) - MEANS[0], abs=1e-5)
    assert metrics["active_turns"] == sum(len(s.rewards) for s in samples)


def test_only_soft_q_takes_dialogues_again():
    with pytest.raises(ValueError, match="again must be None without soft_q"):
        next(optimise(tiny(), lambda _: [], Objective(), Schedule(1, 1e-3), again=lambda *_: []))


class TestExperience:
    def test_it_keeps_the_last_steps_and_draws_by_step(self):
        kept, batches = Experience(2), [samples_of_read_turns()[i : i + 2] for i in (0, 2, 4)]
        assert kept.draw(1, 3) == []
        for batch in batches:
            kept.take_in(batch, [1.0])
        assert kept.kept == batches[1:]
        drawn = [kept.draw(step, 3) for step in (5, 5, 6, 7, 8)]
        assert drawn[0] == drawn[1]
        assert any(drawn[0] != other for other in drawn[2:])
        assert all(len(d) == 3 and all(s in batches[1] + batches[2] for s in d) for d in drawn)
        assert len(kept.draw(5, 99)) == 4
        other = Experience(2)
        other.load_state_dict(kept.state_dict())
        assert (other.kept, other.means, other.draw(5, 3)) == (kept.kept, kept.means, drawn[0])

    def test_without_steps_it_keeps_means_alone(self):
        kept = Experience(0)
        kept.take_in(samples_of_read_turns(), [1.0, 2.0])
        assert (kept.kept, kept.means) == ([], [1.0, 2.0])

    def test_means_are_of_the_return_from_a_turn_on_over_dialogues_that_reach_it(self):
        kept = Experience(0, gamma=0.5)
        rewards = torch.tensor([[1.0, 2.0, 4.0], [3.0, 0.0, 0.0]])
        assert kept.means_with(rewards, torch.tensor([3, 1])) == [(3.0 + 3.0) / 2, 4.0, 4.0]
        kept.take_in((), [3.0, 4.0])
        expected = [KEPT * 3.0 + (1 - KEPT) * 3.0, KEPT * 4.0 + (1 - KEPT) * 4.0, 4.0]
        assert kept.means_with(rewards, torch.tensor([3, 1])) == pytest.approx(expected)
        assert kept.means_with(rewards[1:, :1], torch.tensor([1])) == [3.0, 4.0]
        assert kept.means_with(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64)) == [3.0, 4.0]


def run(objective, steps=4, bad=0, state_of=None):
    """Rows and state of a training on other dialogues each step; of step ``bad`` no loss is finite."""
    model = tiny()
    schedule = Schedule(steps, 0.01, warmup_steps=0)
    state = TrainingState.start(model, objective, schedule)
    if state_of:
        state.load_state_dict(state_of)

    def collect(step):
        found = [replace(s, rewards=[r + step for r in s.rewards]) for s in samples_of_read_turns()]
        return [replace(s, rewards=[1e30 for _ in s.rewards]) for s in found] if step == bad else found

    return list(optimise(model, collect, objective, schedule, state)), state


def test_earlier_steps_are_read_again_and_a_skipped_one_is_not():
    rows, state = run(replace(SOFT_Q, replay=2), bad=3)
    alone, without = run(SOFT_Q)
    assert [len(kept) for kept in state.experience.kept] == [7, 7]
    assert [kept[0].rewards[0] > 4 for kept in state.experience.kept] == [False, True]  # of steps 2 and 4
    assert rows[0]["perf/tokens_read"] * 2 == rows[1]["perf/tokens_read"]
    assert rows[0]["perf/tokens_read"] < rows[3]["perf/tokens_read"]
    assert rows[1]["reward"] == alone[1]["reward"]
    assert rows[1]["loss"] != alone[1]["loss"]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 1]
    assert max(state.experience.means) < 20
    assert without.experience.kept == []


def test_a_run_goes_on_with_what_it_remembers():
    objective = replace(SOFT_Q, replay=2)
    whole, last = run(objective, 5)
    _, half = run(replace(objective), 5)  # the same states, and then those of step 3
    model, schedule = tiny(), Schedule(5, 0.01, warmup_steps=0)
    state = TrainingState.start(model, objective, schedule)
    collect = lambda step: [replace(s, rewards=[r + step for r in s.rewards]) for s in samples_of_read_turns()]  # noqa: E731
    for row in optimise(model, collect, objective, schedule, state):
        if row["step"] == 3:
            break
    rows, resumed = run(objective, 5, state_of=state.state_dict())
    assert [row["loss"] for row in rows] == [row["loss"] for row in whole[3:]]
    assert resumed.experience.state_dict() == last.experience.state_dict() == half.experience.state_dict()
    for ours, theirs in zip(resumed.model.parameters(), last.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_state_from_before_there_was_experience_is_taken_over():
    objective = Objective(Greedy())
    _, state = run(objective, 2)
    saved = state.state_dict()
    assert saved.pop("experience") is None
    run(objective, 3, state_of=saved)
    with pytest.raises(ValueError, match="a training state must have"):
        run(SOFT_Q, 3, state_of={**saved, "reference": None})


REFUSED = {
    "baseline with loss_type soft_q must be one of none, leave_one_out": {"baseline": "group_std"},
    "reduction must be sequence_sum with loss_type soft_q": {"reduction": "sum"},
    "kl_coef must be 0.0 with loss_type soft_q": {"kl_coef": 0.1},
    "beta must be a finite number > 0": {"beta": 0.0},
    "eta must be 1.0 without loss_type turn_regression": {"eta": 0.5},
    "max_residual must be a finite number >= 0": {"max_residual": -1.0},
    "cql_coef must be 0.0 without loss_type soft_q": {"loss_type": "reinforce", "cql_coef": 0.1},
    "replay must be an integer >= 0": {"replay": -1},
    "policy_class must be one class with loss_type soft_q": {"policy_class": "auto"},
    "signals must be off with loss_type soft_q": {"signals": True},
    "beta must be 0.1 without loss_type soft_q": {"loss_type": "ppo", "beta": 0.5},
    "replay must be 0 without loss_type soft_q: another loss would take": {"loss_type": "reinforce", "replay": 2},
    "replay must be 0 with data": {"data": "log.jsonl", "replay": 2},
    "baseline with loss_type soft_q must be one of none, got": {"data": "log.jsonl", "baseline": "leave_one_out"},
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_it_does_not_use_are_refused(message):
    with pytest.raises(ValueError, match=message):
        make_config({"loss_type": "soft_q", **REFUSED[message]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"baseline": "leave_one_out"}, "goes with baseline none"),
        ({"reduction": "sequence_sum"}, "goes with reduction sum"),
        ({"eta": 1.0}, "goes with eta 0"),
        ({"soft_q": None, "replay": 1}, "replay must be 0 without soft_q"),
        ({"signals": True}, "goes without signals"),
    ],
)
def test_an_objective_of_two_kinds_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SOFT_Q, **change)


def test_the_settings_make_the_objective():
    config = make_config({"loss_type": "soft_q", "beta": 0.3, "replay": 5, "num_iterations": 4})
    found = objective_of(config)
    assert (found.soft_q, found.replay, found.baseline, found.reduction) == (SoftQSpec(beta=0.3), 5, "none", "sum")
    assert config.keeps_start
    assert not objective_of(make_config({})).soft_q
    bounded = objective_of(make_config({"loss_type": "soft_q", "max_residual": 2.0, "cql_coef": 0.3}))
    assert bounded.soft_q == SoftQSpec(beta=0.1, cql_coef=0.3, max_residual=2.0)


def test_the_numbers_of_the_residuals_reach_the_step():
    """A bound and a likelihood term move the weights elsewhere, and the loss is that of the formula."""
    samples, losses = samples_of_read_turns(), {}
    for name, spec in (
        ("plain", SoftQSpec(beta=BETA)),
        ("bounded", SoftQSpec(beta=BETA, max_residual=0.5)),
        ("likely", SoftQSpec(beta=BETA, cql_coef=0.7)),
    ):
        model = tiny()
        once = replace(SOFT_Q, num_iterations=1, soft_q=spec)
        schedule, optimizer = Schedule(1, 1e-3), torch.optim.SGD(model.parameters(), lr=0.0)
        losses[name] = update(model, optimizer, samples, once, schedule, StartingWeights(model), mean_returns=MEANS)
    batch = pack(samples)
    logprobs = PolicyModule(tiny())(batch, None, PolicyLossSpec()).double().sum()
    turns = sum(len(s.rewards) for s in samples)
    extra = losses["likely"]["loss"] - losses["plain"]["loss"]
    assert extra == pytest.approx(-0.7 * float(logprobs) / turns, rel=1e-4)
    assert losses["bounded"]["loss"] < losses["plain"]["loss"]
    assert losses["bounded"]["grad_norm"] < losses["plain"]["grad_norm"]


def log_of(folder, count=12):
    """Rewards of both signs, three turns each."""
    said = [m for t in range(3) for m in (Message("user", "say"), Message("assistant", "ab" * 9 * t + "c"))]
    dialogues = [Dialogue(f"d{i}", f"g{i // 2}", said, [i % 2 - 0.5, 0.1 * i, -0.3]) for i in range(count)]
    write_dialogues(folder / "log.jsonl", dialogues)
    given = {"data": str(folder / "log.jsonl"), "loss_type": "soft_q", "policy_class": "greedy"}
    return {**given, "width": 16, "layers": 1, "num_prompts": 3, "eval_dialogues": 1, "num_iterations": 2}


def test_offline_it_takes_rewards_of_both_signs(tmp_path):
    job = OfflineJob(make_config(log_of(tmp_path)))
    assert "by soft Q-learning" in job.source()
    schedule = replace(job.policy.schedule(), max_steps=2)
    state = TrainingState.start(job.policy.model, job.objective, schedule)
    rows = list(optimise(job.policy.model, job.collect, job.objective, schedule, state))
    assert all(row["grad_norm"] > 0 for row in rows)
    assert len(state.experience.means) == 3


def test_a_dialogue_without_a_target_is_left_out_with_one_warning(tmp_path):
    """Of twelve dialogues, longer than what is read of them, two end within it, and one has too large a reward."""
    given = log_of(tmp_path)
    short = [Message("user", "say"), Message("assistant", "c")]
    log = [*read_file(given["data"]).dialogues, *(Dialogue(f"s{i}", f"s{i}", short, [0.5]) for i in range(2))]
    write_dialogues(tmp_path / "log.jsonl", [*log, Dialogue("large", "large", short, [-1e38])])
    cut = {**given, "max_dialogue_tokens": 12}
    with pytest.warns(
        UserWarning, match=r"13 of 15 dialogues are left out; the first: dialogue 'd0': .*turn 1"
    ) as said:
        job = OfflineJob(make_config(cut))
    assert len(said) == 1
    assert [dialogue.id for dialogue in job.dialogues] == ["s0", "s1"]
    assert sorted(job.held_out + job.seen) == [0, 1]
    with pytest.raises(ValueError, match=r"^dialogue 'd0': .*turn 1.*max_dialogue_tokens"):
        OfflineJob(make_config({**cut, "strict": True}))
    with pytest.warns(
        UserWarning, match=r"1 of 15.*'large': a reward must be at most 3.4e\+37 .*got '-1e\+38 at turn 0'"
    ):
        assert OfflineJob(make_config({**cut, "policy_class": "full"})).shortened == 12


def test_a_log_without_any_target_is_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"12 of 12 dialogues are left out; dialogue 'd0': the window of turn 1"):
        OfflineJob(make_config({**log_of(tmp_path), "max_dialogue_tokens": 12}))


def test_the_interview_trains_with_it():
    config = make_config(
        {
            "loss_type": "soft_q", "replay": 2, "num_iterations": 2, "width": 16, "layers": 1, "num_prompts": 2,
            "num_generations": 2, "max_new_tokens": 2, "max_turns": 3, "eval_dialogues": 1, "max_steps": 3,
        }
    )  # fmt: skip
    job = PersonaJob(config)
    state = TrainingState.start(job.policy.model, job.objective, job.policy.schedule())
    rows = list(optimise(job.policy.model, job.collect, job.objective, job.policy.schedule(), state))
    assert [len(kept) for kept in state.experience.kept] == [4, 4]
    assert all("turns/value/0" in row for row in rows)
    assert any(row["grad_norm"] > 0 for row in rows)  # of a model of random weights few answers earn anything

"""The loop: credit, denominators over micro-batches, errors and warnings, and that a short run of it learns."""

import warnings
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from ppg_fast import reference
from ppg_fast.config import make_config
from ppg_fast.dialogues.packing import Sample, cut_tokens, pack
from ppg_fast.jobs.persona import PersonaJob
from ppg_fast.models import causal_lm as models
from ppg_fast.models.adaptation import StartingWeights
from ppg_fast.policy_classes import FullPlanning, Greedy, Lookahead
from ppg_fast.spec import PolicyLossSpec
from ppg_fast.training import trainer
from ppg_fast.training.metrics import reading
from ppg_fast.training.objective import (
    Objective,
    Schedule,
    credit,
    require_nonnegative,
    tokens_to_read,
    warn_if_hardly_credited,
)
from ppg_fast.training.trainer import optimise, update


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These models are too small to share among threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


V = 23


def tiny(seed=0):
    return models.make_model(V, width=16, layers=1, seed=seed)


def some_samples(count=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    out = []
    for i in range(count):
        n = 6 + 3 * (i % 3)
        tokens = torch.randint(2, V, (n,), generator=generator).tolist()
        turn_ids = [-1, -1, 0, 0, -1, 1, 1, 1, -1, 2, 2, 2][:n]
        rewards = torch.rand(max(turn_ids) + 1, generator=generator).tolist()
        out.append(Sample(tokens, turn_ids, rewards, i // 3))
    return out


def gradients(model, samples, objective, max_tokens):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    metrics = update(model, optimizer, samples, objective, Schedule(1, 1e-3, max_tokens=max_tokens, max_grad_norm=1e9))
    return metrics, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("reduction", ["sequence_sum", "sequence_mean", "token_mean", "sum"])
@pytest.mark.parametrize("loss_type", ["reinforce", "ppo"])
def test_micro_batches_give_the_gradient_of_the_whole(reduction, loss_type):
    samples, objective = (
        some_samples(),
        Objective(policy_class=Lookahead(2), reduction=reduction, spec=PolicyLossSpec(loss_type=loss_type)),
    )
    whole, grad = gradients(tiny(), samples, objective, 10_000)
    parts, grad_of_parts = gradients(tiny(), samples, objective, 13)
    assert parts["loss"] == pytest.approx(whole["loss"], abs=1e-5)
    torch.testing.assert_close(grad_of_parts, grad, rtol=1e-4, atol=1e-6)
    assert grad.norm() > 0


def ending_early(count=6):
    """Dialogues whose last rewards, and under a greedy class advantages, are zero; the fourth has none at all."""
    out = []
    for i, sample in enumerate(some_samples(count)):
        rewards = [r if t <= i % 2 and i != 3 else 0.0 for t, r in enumerate(sample.rewards)]
        logprobs = [-0.1 * (n % 7) for n in range(len(sample.tokens))]
        out.append(replace(sample, rewards=rewards, rollout_logprobs=logprobs))
    return out


EARLY = {  # what is read of the dialogues' 6, 9, 12, 6, 9 and 12 tokens
    "reinforce": (PolicyLossSpec(importance_cap=1.5), "sequence_sum", 1, 4 + 8 + 4 + 4 + 8),
    "ppo": (PolicyLossSpec(loss_type="ppo"), "token_mean", 3, 4 + 8 + 4 + 4 + 8),
    "gspo_turn": (PolicyLossSpec(loss_type="gspo_turn"), "sequence_sum", 3, 4 + 8 + 4 + 4 + 8),
    "gspo": (PolicyLossSpec(loss_type="gspo"), "sequence_sum", 3, 6 + 8 + 12 + 8 + 12),
    "sequence_mean": (PolicyLossSpec(), "sequence_mean", 1, 6 + 8 + 12 + 8 + 12),
    "kl": (PolicyLossSpec(kl_coef=0.3), "sequence_sum", 2, 6 + 8 + 12 + 6 + 8 + 12),
    "entropy": (PolicyLossSpec(entropy_coef=0.3), "token_mean", 1, 6 + 8 + 12 + 6 + 8 + 12),
}


@pytest.mark.parametrize("case", EARLY)
@pytest.mark.parametrize("max_tokens", [10_000, 13])
def test_what_is_not_read_has_no_gradient(case, max_tokens, monkeypatch):
    """Weights and metrics after steps on trimmed dialogues equal those after steps on whole ones, in one pass."""
    spec, reduction, iterations, _ = EARLY[case]
    objective = Objective(Greedy(), baseline="none", spec=spec, reduction=reduction, num_iterations=iterations)
    samples, reference, results = ending_early(), StartingWeights(tiny(3)), []
    for whole in (False, True):
        if whole:
            monkeypatch.setattr(trainer, "tokens_to_read", lambda batch, *_: torch.diff(batch.cu_seqlens).long())
        model = tiny()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        schedule = Schedule(1, 0.02, max_tokens=10_000 if whole else max_tokens, max_grad_norm=1e9)
        metrics = update(model, optimizer, samples, objective, schedule, reference if spec.kl_coef else None)
        metrics.pop("perf/tokens_read")
        results.append((metrics, torch.cat([p.detach().flatten() for p in model.parameters()])))
    (metrics, weights), (whole_metrics, whole_weights) = results
    assert (weights - torch.cat([p.detach().flatten() for p in tiny().parameters()])).norm() > 1e-3
    torch.testing.assert_close(weights, whole_weights, rtol=1e-5, atol=1e-6)
    for name in (
        ("entropy", "approx_kl", *(f"clip_ratio/{part}_mean" for part in ("low", "high", "region")))
        if case == "gspo"
        else ()
    ):
        # means over what is read for the sake of the ratio, too, so the parts weigh otherwise
        del metrics[name], whole_metrics[name]
    assert metrics == pytest.approx(whole_metrics, abs=2e-5)


@pytest.mark.parametrize("case", EARLY)
def test_dialogues_are_read_up_to_their_last_credited_token(case):
    spec, reduction, iterations, tokens = EARLY[case]
    objective = Objective(Greedy(), baseline="none", spec=spec, reduction=reduction, num_iterations=iterations)
    batch = pack(samples := ending_early())
    _, advantages = credit(batch, objective)
    read = reading(batch, advantages, spec, tokens_to_read(batch, advantages, objective))
    assert read["perf/tokens_read"] == tokens
    credited = sum(1 for i, s in enumerate(samples) for t in s.turn_ids if 0 <= t <= i % 2 and i != 3)
    labels = sum(t >= 0 for s in samples for t in s.turn_ids)
    assert read["perf/active_row_share"] == pytest.approx(1 if spec.needs_every_row else credited / labels)


def test_a_dialogue_of_which_nothing_predicts_an_answer_is_not_read():
    batch = pack([Sample([1, 2], [0, -1], [1.0], 0), Sample([1, 2, 3], [0, 0, -1], [1.0], 0)])
    objective = Objective(Greedy(), baseline="none", spec=PolicyLossSpec(kl_coef=0.1))
    assert tokens_to_read(batch, batch.rewards, objective).tolist() == [0, 2]


def test_the_gradient_is_the_partial_policy_gradient():
    """Against autograd over plain logits, with returns and the leave-one-out baseline by hand; a turn that nobody else
    of its group reached is compared with the other groups, and is not left uncentred."""
    samples, model = some_samples(), tiny()
    _, grad = gradients(model, samples, Objective(policy_class=Lookahead(2)), 10_000)
    model.zero_grad()
    model.set_attn_implementation("eager")
    loss = 0.0
    for sample in samples:
        logp = model(torch.tensor([sample.tokens]), use_cache=False).logits[0].log_softmax(-1)
        for turn in range(len(sample.rewards)):
            reached = [s for s in samples if s is not sample and len(s.rewards) > turn]
            group = [s for s in reached if s.group_id == sample.group_id]
            window = [sum(s.rewards[turn : turn + 2]) for s in group or reached]
            advantage = sum(sample.rewards[turn : turn + 2]) - (sum(window) / len(window) if window else 0.0)
            at = [i for i, t in enumerate(sample.turn_ids) if t == turn]
            loss = loss - advantage * sum(logp[i - 1, sample.tokens[i]] for i in at) / len(samples)
    loss.backward()
    torch.testing.assert_close(grad, torch.cat([p.grad.flatten() for p in model.parameters()]), rtol=1e-4, atol=1e-5)


def test_imitation_is_the_mean_log_prob_of_the_answers():
    samples, model = some_samples(), tiny()
    metrics, _ = gradients(model, samples, Objective(imitate=True, reduction="token_mean"), 20)
    batch = pack(samples)
    mean = models.token_logprobs(model, batch).sum() / (batch.labels >= 0).sum()
    assert metrics["loss"] == pytest.approx(-mean.item(), abs=1e-5)
    assert metrics["logprob"] == pytest.approx(mean.item(), abs=1e-5)


def test_credit_uses_the_policy_class():
    batch = pack(some_samples())
    for policy_class in (Greedy(), Lookahead(2), FullPlanning()):
        returns, _ = credit(batch, Objective(policy_class=policy_class, gamma=0.5))
        truth = reference.partial_returns(batch.rewards, None, batch.turn_counts, policy_class.lookahead, 0, 0.5)
        torch.testing.assert_close(returns, truth)


def test_several_updates_clip_and_report():
    samples, model = some_samples(), tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0)
    spec = PolicyLossSpec(loss_type="ppo", clip_low=0.05, clip_high=0.05, kl_coef=0.1)
    metrics = update(
        model,
        optimizer,
        samples,
        Objective(spec=spec, num_iterations=4),
        Schedule(1, 1.0),
        reference=StartingWeights(tiny()),
    )
    assert metrics["clip_ratio/region_mean"] > 0
    assert metrics["kl"] > 0
    assert metrics["approx_kl"] > 0


def test_nothing_to_learn_is_a_zero_loss_and_no_step():
    model, equal = tiny(), [replace(s, rewards=[1.0] * len(s.rewards)) for s in some_samples()[::3]]
    before = [p.detach().clone() for p in model.parameters()]
    for samples in (equal, []):
        objective = Objective(policy_class=Greedy(), baseline="leave_one_out" if samples else "none")
        same_group = [replace(s, group_id=0) for s in samples]
        (metrics,) = optimise(
            model, lambda step, given=same_group: given, objective, Schedule(1, 1.0, weight_decay=0.1)
        )
        assert metrics["loss"] == 0
        assert metrics["active_turns"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change():
    model = tiny()
    before = [p.detach().clone() for p in model.parameters()]
    broken = [replace(s, rewards=[3e38] * len(s.rewards)) for s in some_samples()]
    schedule = Schedule(1, 1.0, max_skipped_steps=0)
    with pytest.raises(FloatingPointError, match="gradient must be finite"):
        list(optimise(model, lambda step: broken, Objective(policy_class=Greedy(), baseline="none"), schedule))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_negative_rewards_are_named():
    samples = some_samples(2)
    require_nonnegative(samples, ["a", "b"])
    samples[1].rewards[1] = -0.25
    with pytest.raises(ValueError, match=r"must be >= 0.*got -0\.25 in dialogue 'b', turn 1"):
        require_nonnegative(samples, ["a", "b"])


def test_terminal_rewards_under_a_short_window_are_warned_of():
    samples = [replace(s, rewards=[0.0] * (len(s.rewards) - 1) + [1.0]) for s in some_samples()]
    with pytest.warns(UserWarning, match=r"last turn only: greedy credits 6 of 14 turns, full all"):
        warn_if_hardly_credited(samples, Objective(policy_class=Greedy()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_hardly_credited(samples, Objective(policy_class=FullPlanning()))
        warn_if_hardly_credited(some_samples(), Objective(policy_class=Greedy()))


def test_learning_rate_rises_and_falls():
    schedule = Schedule(100, 1.0, warmup_steps=10, final_learning_rate=0.2)
    rates = [schedule.learning_rate_at(step) for step in range(1, 101)]
    assert rates[0] < 0.11
    assert max(rates) == rates[9]
    assert rates[-1] == pytest.approx(0.2)


def test_cut_keeps_whole_turns_and_all_rewards():
    sample = some_samples(3)[2]
    assert cut_tokens(sample, 0) is sample
    cut = cut_tokens(sample, 9)
    assert (cut.tokens, cut.rewards) == (sample.tokens[:8], sample.rewards)
    assert cut_tokens(sample, 1).tokens == sample.tokens[:4]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_short_persona_run_improves_on_its_start(seed, tmp_path):
    """Courtesies and choices are learned within a few steps from a weak warm start; facts take the whole job."""
    config = make_config(
        {"width": 64, "imitation_steps": 80, "max_steps": 24, "num_prompts": 4, "learning_rate": 3e-3, "seed": seed}
    )
    job = PersonaJob(config)
    log = Log(job.policy.model)
    job.train(log, log)
    job.evaluate(log, log, 24)
    rewards = [row["eval/reward"] for row in log.rows if "eval/reward" in row]
    assert rewards[-1] > rewards[0] + 0.3, rewards


class Log:
    """A run folder and progress bar that only remember."""

    def __init__(self, model):
        self.model, self.rows = model, []

    def log(self, phase, metrics):
        self.rows.append({"phase": phase, **metrics})

    def optimise(self, phase, collect, objective, schedule, again=None):
        return optimise(self.model, collect, objective, schedule)

    def of_phase(self, phase):
        return [row for row in self.rows if row["phase"] == phase]

    def phase(self, name, steps):
        import contextlib

        return contextlib.nullcontext(self)

    def __getattr__(self, name):
        return lambda *args, **kwargs: None

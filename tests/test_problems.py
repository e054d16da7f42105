"""The built-in problems: the window that each needs is what its table says, exactly, and its words pay what its table
pays."""

import itertools
import random
from dataclasses import replace

import pytest
import torch

from ppg_fast.compare import tabular_runs
from ppg_fast.compare.tabular import TabularProblem, estimate
from ppg_fast.policy_classes import policy_class
from ppg_fast.rollouts.problems import (
    FACTS,
    PROBLEMS,
    REVIEWED,
    Problem,
    ProblemDialogue,
    drawn,
    problem,
    problem_names,
    words,
)

CLASSES = ("greedy", "lookahead:2", "lookahead:3", "lookahead:4", "segment:4", "full")
GROUP = 8
EXACT = 1e-9


@pytest.fixture(scope="module", params=PROBLEMS)
def tabular(request):
    return TabularProblem(PROBLEMS[request.param])


def skewed(tabular, seed=0):
    """A policy that is not the coin."""
    return torch.randn(tabular.problem.turns, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / 2


def size(tabular, name):
    return float(tabular.window(name).sum())


def test_the_problem_class_is_the_smallest_without_bias(tabular):
    """Its gradient is that of the true value at every policy; of all classes that share this it credits the fewest
    rewards."""
    own = tabular.problem.policy_class
    assert own in CLASSES
    for logits in (tabular.start(), skewed(tabular)):
        unbiased = [c for c in CLASSES if tabular.moments(logits, c, GROUP).bias < EXACT]
        assert own in unbiased
        assert "full" in unbiased
        assert min(unbiased, key=lambda c: size(tabular, c)) == own


def test_longer_windows_add_noise_and_the_problem_class_has_the_best_direction(tabular):
    """Expected cosine of a batch's gradient with the true one: bias and variance in one number. By a margin, so it can
    be learned from."""
    alignment = {}
    for name in CLASSES:
        m = tabular.moments(tabular.start(), name, GROUP)
        signal = float(m.gradient.square().sum())
        alignment[name] = m.cosine * (signal / (signal + m.group_variance / 8)) ** 0.5
    own = tabular.problem.policy_class
    rivals = {name: a for name, a in alignment.items() if name != own}
    assert alignment[own] > 1.02 * max(rivals.values())


def test_value_gradient_is_the_derivative_of_the_value(tabular):
    logits = skewed(tabular, 1)
    found = tabular.gradient(logits, "full")
    for t, a in ((0, 0), (tabular.problem.turns - 1, 1), (3, 0)):
        step = torch.zeros_like(logits)
        step[t, a] = 1e-5
        difference = float(tabular.value(logits + step) - tabular.value(logits - step)) / 2e-5
        assert float(found[t, a]) == pytest.approx(difference, abs=1e-8)


def test_the_value_is_that_of_every_course(tabular):
    policies = torch.stack([skewed(tabular, seed) for seed in range(3)])
    expected = [tabular.probabilities(logits) @ tabular.rewards.sum(1) for logits in policies]
    torch.testing.assert_close(tabular.value(policies), torch.stack(expected))


def test_the_best_return_is_honesty(tabular):
    of = tabular.problem
    assert float(tabular.rewards.sum(1).max()) == pytest.approx(of.best_return)
    assert int(tabular.rewards.sum(1).argmax()) == 0  # the course of honest answers only
    assert tabular.value(tabular.start()) < 0.7 * of.best_return


# ---- exact moments against every outcome there is --------------------------------------------------------------------
SMALL = Problem(
    "small",
    "lookahead:2",
    "",
    3,
    ((0.5, 1.0, 0.0), (0.0, 0.25, 2.0), (0.0, 0.0, 1.5)),
    (0.75, 0.0, 0.5),
    ((0.5, 0.0), (1.0, -0.5), (0.25, 2.0)),
    finale=1.25,
)


@pytest.mark.parametrize("name", ["greedy", "lookahead:2", "segment:2", "full"])
@pytest.mark.parametrize("group_size", [2, 3])
def test_moments_are_those_of_all_outcomes(name, group_size):
    """Noise of two coins has the covariance of two normals, and can be enumerated: every group of every dialogue."""
    tabular = TabularProblem(SMALL)
    logits = skewed(tabular)
    p = tabular.probabilities(logits)
    coins = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=2)), dtype=torch.float64)
    outcome = [(float(p[i]) / 4, i, c) for i in range(8) for c in coins]
    probability = torch.tensor([o[0] for o in outcome], dtype=torch.float64)
    actions = torch.stack([tabular.actions[o[1]] for o in outcome])
    rewards = torch.stack([tabular.rewards[o[1]] + tabular.factor @ o[2] for o in outcome])
    returns = rewards @ tabular.window(name).T
    scores = torch.nn.functional.one_hot(actions, 2).double() - logits.softmax(-1)
    single = (scores * returns[..., None]).flatten(1)
    exact = tabular.moments(logits, name, group_size)
    torch.testing.assert_close(exact.gradient.flatten(), probability @ single)
    assert exact.variance == pytest.approx(
        float(probability @ single.square().sum(1) - (probability @ single).square().sum())
    )
    members = torch.cartesian_prod(*[torch.arange(len(outcome))] * group_size)
    weight = probability[members].prod(1)
    others = (returns[members].sum(1, keepdim=True) - returns[members]) / (group_size - 1)
    group = (scores[members] * (returns[members] - others)[..., None]).mean(1).flatten(1)
    mean = weight @ group
    torch.testing.assert_close(mean, exact.gradient.flatten())
    assert exact.group_variance == pytest.approx(float(weight @ group.square().sum(1) - mean.square().sum()))


def test_the_sampled_estimator_has_the_exact_moments():
    tabular, generator = TabularProblem(PROBLEMS["commitments"]), torch.Generator().manual_seed(0)
    logits, name, groups = skewed(tabular), "lookahead:3", 1500
    actions, rewards = tabular.sample(logits, groups * GROUP, generator)
    parts = [slice(i, i + GROUP) for i in range(0, groups * GROUP, GROUP)]
    drawn = torch.cat([estimate(logits[None], name, actions[None, s], rewards[None, s], GROUP) for s in parts])
    exact = tabular.moments(logits, name, GROUP)
    error = (drawn.mean(0) - exact.gradient).square().sum()
    assert float(error) < 3 * exact.group_variance / groups
    assert float((drawn - exact.gradient).square().sum((1, 2)).mean()) == pytest.approx(exact.group_variance, rel=0.1)


def test_noise_that_a_group_shares_is_taken_out_by_its_baseline():
    own, generator = TabularProblem(PROBLEMS["mood"], shared=True), torch.Generator().manual_seed(0)
    logits, name, groups = skewed(own), "full", 1500
    actions, rewards = own.sample(logits, groups * GROUP, generator, GROUP)
    noise = (rewards - own.rewards[own.courses(actions)]).view(groups, GROUP, -1)
    torch.testing.assert_close(noise, noise[:, :1].expand_as(noise))
    assert float(noise[:, 0].std()) == pytest.approx(2.5, rel=0.05)
    parts = [slice(i, i + GROUP) for i in range(0, groups * GROUP, GROUP)]
    drawn = torch.cat([estimate(logits[None], name, actions[None, s], rewards[None, s], GROUP) for s in parts])
    exact = own.moments(logits, name, GROUP)
    assert float((drawn - exact.gradient).square().sum((1, 2)).mean()) == pytest.approx(exact.group_variance, rel=0.1)
    apart = TabularProblem(PROBLEMS["mood"]).moments(logits, name, GROUP)
    assert exact.variance == apart.variance
    assert exact.group_variance < apart.group_variance / 10
    quiet = TabularProblem(PROBLEMS["mood"].with_noise(0.0)).moments(logits, name, GROUP)
    assert exact.group_variance == pytest.approx(quiet.group_variance)


def test_a_seed_of_many_is_that_seed_alone():
    problem = TabularProblem(PROBLEMS["plan"])
    for make in (
        lambda n: tabular_runs.PolicyGradient(policy_class("lookahead:2")),
        lambda n: tabular_runs.PolicyGradient(policy_class("full"), gamma=0.9),
        lambda n: tabular_runs.Gae(0.5, problem.problem.turns, n),
        tabular_runs.Auto,
        lambda n: tabular_runs.SoftQ(policy_class("full"), 0.1, problem.start(), n),
    ):
        many = tabular_runs.train(problem, make(3), [5, 6, 7], max_steps=12)
        assert many[1:2] == tabular_runs.train(problem, make(1), [6], max_steps=12)
        assert many[0] != many[1]


# ---- in words --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", PROBLEMS)
def test_words_pay_what_the_table_pays(name):
    """A dialogue in words earns, turn by turn, what the table of courses holds."""
    of, tabular = PROBLEMS[name], TabularProblem(PROBLEMS[name])
    rng = random.Random(0)
    for course in [0, len(tabular.actions) - 1, *(rng.randrange(len(tabular.actions)) for _ in range(8))]:
        world = ProblemDialogue(of)
        message, rewards, done = world.reset(course)[-1], [], False
        for action in tabular.actions[course].tolist():
            assert not done
            message, reward, done = world.step(FACTS[message.content.split()[1]][action])
            rewards.append(reward)
        assert done
        assert message is None
        assert rewards == pytest.approx(tabular.rewards[course].tolist())
        assert [right for _, right in world.agreement()] == (tabular.actions[course] == 0).tolist()


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_first_word_says_how_an_answer_is_paid(name):
    """Turns with the same first word are paid by the same rule, or a policy that shares parameters could not tell them
    apart."""
    world = ProblemDialogue(PROBLEMS[name])
    rules = {}
    for t in range(world.problem.turns):
        later = world.problem.finale > 0 or any(world.problem.honest_pays[t][t + 1 :])
        rules.setdefault(world._kind(t), set()).add((later, world.problem.tempting_pays[t]))
    assert all(len(rule) == 1 for rule in rules.values())
    spoken = " ".join(m.content for seed in range(9) for m in ProblemDialogue(PROBLEMS[name]).reset(seed)).split()
    assert set(spoken) <= set(words())


def test_silence_and_chatter_earn_nothing_and_noise_is_drawn_anew():
    of = replace(PROBLEMS["commitments"], honest_pays=PROBLEMS["immediate"].honest_pays)
    quiet = ProblemDialogue(of)
    quiet.reset(0)
    assert [quiet.step(text)[1] for text in ("", "anna oslo", "tell")] == [0.0, 0.0, 0.0]
    rng = random.Random(1)
    one, other = (ProblemDialogue(of, rng) for _ in range(2))
    assert one.reset(3) == other.reset(3)
    assert one.step("")[1] != other.step("")[1]


def test_noise_has_the_covariance_of_the_table():
    of, rng = PROBLEMS["mood"], random.Random(0)
    drawn = torch.tensor([ProblemDialogue(of, rng)._luck for _ in range(4000)], dtype=torch.float64)
    factor = torch.tensor(of.noise, dtype=torch.float64)
    expected = factor @ factor.T
    assert float((drawn.T @ drawn / 4000 - expected).abs().max()) < 0.6
    assert expected.diagonal() == pytest.approx(torch.full((12,), 2.5**2, dtype=torch.float64))
    assert float(expected[0, 5] / expected[0, 0]) == pytest.approx(0.95**5)


@pytest.mark.parametrize("seed", range(12))
def test_drawn_problems_need_the_window_that_they_say(seed):
    """The smallest of all classes without bias, by enumeration; honesty is best; the same seed, the same problem."""
    of = drawn(seed)
    assert of == problem(f"drawn:{seed}") != drawn(seed + 1)
    tabular = TabularProblem(of)
    assert float(tabular.rewards.sum(1).max()) == pytest.approx(of.best_return)
    every = ("greedy", *(f"lookahead:{k}" for k in range(2, of.turns)), *(f"segment:{n}" for n in range(2, 6)), "full")
    unbiased = [c for c in every if tabular.moments(skewed(tabular), c, GROUP).bias < EXACT]
    assert of.policy_class in unbiased
    assert min(size(tabular, c) for c in unbiased) == size(tabular, of.policy_class)


def test_drawn_problems_are_of_every_kind():
    kinds = [drawn(seed).policy_class.split(":")[0] for seed in range(40)]
    assert min(kinds.count(k) for k in ("greedy", "lookahead", "segment", "full")) >= 3


@pytest.mark.parametrize("name", ["drawn:3", "drawn:16", "review:first"])
def test_any_problem_is_a_dialogue(name):
    """Honesty in every turn earns the most there is; a temptation is asked for in its own words."""
    of = problem(name)
    dialogue, earned = ProblemDialogue(of), 0.0
    (message,) = dialogue.reset(5)
    for turn in range(of.turns):
        kind, fact = message.content.split()
        assert kind == ("surely" if of.tempting_pays[turn] else "tell")
        message, reward, done = dialogue.step(FACTS[fact][0])
        earned += reward
    assert done
    assert earned == pytest.approx(of.best_return)


def test_a_reviewer_s_problems_pay_for_honesty():
    """All but nothing of it goes to temptation, and the best return is what honesty earns, by hand."""
    best = {name: of.best_return for name, of in REVIEWED.items()}
    assert best == {name: 17.0 if "first" in name else 12.0 for name in REVIEWED}
    for of in REVIEWED.values():
        turns = range(of.turns)
        gained = [sum(of.honest_pays[t]) - of.tempting_pays[t] for t in turns]
        assert min(gained) > 0
        lags = {k - t for t in turns for k in turns if of.honest_pays[t][k]}
        windows = {"greedy": {0}, "lookahead:3": {0, 1, 2}, "lookahead:6": set(range(6)), "full": set(turns)}
        assert lags <= windows[of.policy_class]


def test_names():
    assert all(policy_class(p.policy_class) for p in PROBLEMS.values())
    assert problem_names("plan, drawn:3..5,drawn:4,all") == [
        "plan",
        "drawn:3",
        "drawn:4",
        "drawn:5",
        *(n for n in PROBLEMS if n != "plan"),
    ]
    assert problem_names("review,review:late") == list(REVIEWED)
    assert len(REVIEWED) == 6
    assert problem("review:moody") == REVIEWED["review:moody"]
    with pytest.raises(ValueError, match=r"must not end before it begins, got 'drawn:5..3'"):
        problem_names("drawn:5..3")
    with pytest.raises(ValueError, match=r"problem must be one of .*, drawn:SEED, got 'drawn:x'"):
        problem_names("drawn:x")
    with pytest.raises(ValueError, match=r"problem must be one of immediate, .*, got 'moody'"):
        problem("moody")

"""The estimator itself, on trees small enough to enumerate: what its expectation is the gradient of, for every policy
class and baseline.

Source of the estimator: arXiv:2603.06138. Everything but the last section is checked to the error of a finite
difference in float64.
"""

import itertools

import pytest
import torch
from dialogue_tree import FINITE_DIFFERENCE, Groups, Tree

import ppg_fast as ppg

TURNS = 4
FAR = 0.005  # relative; some hundred thousand times the error of the finite differences
ARBITRARY = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]], dtype=torch.bool)
POLICY_CLASSES = {  # the class, and whether turn t is credited for reward k, from the definition
    "greedy": (ppg.Greedy(), lambda t, k: k == t),
    "lookahead 2": (ppg.Lookahead(2), lambda t, k: t <= k < t + 2),
    "lookahead 3": (ppg.Lookahead(3), lambda t, k: t <= k < t + 3),
    "lookahead of all": (ppg.Lookahead(TURNS), lambda t, k: k >= t),
    "segments of 2": (ppg.Segment(2), lambda t, k: t <= k < (t // 2 + 1) * 2),
    "segments by ids": (ppg.Segment([7, 5, 5, 5]), lambda t, k: k == 0 if t == 0 else k >= t),
    "one segment": (ppg.Segment(TURNS), lambda t, k: k >= t),
    "full planning": (ppg.FullPlanning(), lambda t, k: k >= t),
    "reward mask": (ppg.RewardMask(ARBITRARY), lambda t, k: bool(ARBITRARY[t, k])),
}
SEE_EVERYTHING = ("lookahead of all", "one segment", "full planning")


def credited(rule, turns=TURNS):
    return torch.tensor([[rule(t, k) for k in range(turns)] for t in range(turns)])


@pytest.fixture(scope="module", params=[False, True], ids=["equal lengths", "ragged"])
def tree(request):
    tree = Tree(TURNS, tokens=2, replies=2, ragged=request.param)
    assert (tree.counts.unique().numel() > 1) == request.param
    assert float(tree.probabilities(tree.theta).sum()) == pytest.approx(1.0)
    return tree


@pytest.mark.parametrize("name", POLICY_CLASSES)
def test_fact_1_expectation_is_the_gradient_of_the_surrogate(tree, name):
    policy_class, rule = POLICY_CLASSES[name]
    expected = tree.surrogate_gradient(credited(rule))
    torch.testing.assert_close(tree.expected_gradient(tree.returns(policy_class)), expected, **FINITE_DIFFERENCE)


def test_fact_1_lag_weights_add_the_gradients_of_single_lags(tree):
    """sum_d w_d grad J_d, J_d = sum_k E[r_k | turn k - d acts by theta, all others as now]; with ones that of the true
    value."""
    weights, gamma = (0.75, 0.0, 2.5), 0.5
    lags = [tree.surrogate_gradient(credited(lambda t, k, d=d: k == t + d)) for d in range(TURNS)]
    expected = sum(w * gamma**d * lags[d] for d, w in enumerate(weights))
    found = tree.expected_gradient(tree.returns(ppg.LagWeights(weights), gamma))
    torch.testing.assert_close(found, expected, **FINITE_DIFFERENCE)
    whole = tree.expected_gradient(tree.returns(ppg.LagWeights([1.0] * TURNS)))
    torch.testing.assert_close(whole, tree.true_gradient(), **FINITE_DIFFERENCE)


def test_fact_1_reward_weights_add_the_gradients_of_pairs(tree):
    """sum over t, k of w[t, k] times the gradient of E[r_k] by turn t alone; ones are full planning."""
    weights = torch.rand(TURNS, TURNS, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weights, only = weights.triu(), torch.eye(TURNS, dtype=torch.bool)
    expected = sum(
        float(weights[t, k]) * tree.gradient(lambda theta, t=t, k=k: tree.expected_reward(theta, k, only[t]))
        for t in range(TURNS)
        for k in range(t, TURNS)
    )
    found = tree.expected_gradient(tree.returns(ppg.RewardWeights(weights)))
    torch.testing.assert_close(found, expected, **FINITE_DIFFERENCE)
    whole = tree.expected_gradient(tree.returns(ppg.RewardWeights(torch.ones(TURNS, TURNS).triu())))
    torch.testing.assert_close(whole, tree.true_gradient(), **FINITE_DIFFERENCE)


@pytest.mark.parametrize("name", POLICY_CLASSES)
def test_fact_1_with_a_discount(tree, name):
    """Turn by turn: only turn t moves, and reward k counts gamma^(k-t)."""
    policy_class, rule = POLICY_CLASSES[name]
    gamma, only = 0.5, torch.eye(TURNS, dtype=torch.bool)
    expected = sum(
        gamma ** (k - t) * tree.gradient(lambda theta, t=t, k=k: tree.expected_reward(theta, k, only[t]))
        for t in range(TURNS)
        for k in range(TURNS)
        if rule(t, k)
    )
    torch.testing.assert_close(tree.expected_gradient(tree.returns(policy_class, gamma)), expected, **FINITE_DIFFERENCE)


@pytest.mark.parametrize("name", POLICY_CLASSES)
def test_fact_1_only_full_planning_is_the_gradient_of_the_true_value(tree, name):
    truth, found = tree.true_gradient(), tree.expected_gradient(tree.returns(POLICY_CLASSES[name][0]))
    if name in SEE_EVERYTHING:
        torch.testing.assert_close(found, truth, **FINITE_DIFFERENCE)
    else:
        assert (found - truth).norm() > FAR * truth.norm()


@pytest.mark.parametrize("k", [2, 3])
def test_fact_3_triangular_weights_are_another_algorithm(tree, k):
    """Weights K-(k-j), from windows whose later actions are not frozen, are the gradient of another function and miss
    J_S."""
    windows = torch.tensor(
        [[sum(t <= j <= r < t + k for t in range(TURNS)) for r in range(TURNS)] for j in range(TURNS)]
    )
    triangular = tree.expected_gradient(tree.rewards @ windows.float().T)
    turns = torch.arange(TURNS)
    unfrozen = tree.gradient(
        lambda theta: sum(
            tree.expected_reward(theta, r, turns >= t) for t in range(TURNS) for r in range(t, min(TURNS, t + k))
        )
    )
    torch.testing.assert_close(triangular, unfrozen, **FINITE_DIFFERENCE)
    frozen = tree.surrogate_gradient(credited(lambda t, r: t <= r < t + k))
    assert (triangular - frozen).norm() > FAR * frozen.norm()
    torch.testing.assert_close(tree.expected_gradient(tree.returns(ppg.Lookahead(k))), frozen, **FINITE_DIFFERENCE)


# ---- baselines -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 3], ids="groups of {}".format)
def groups(request):
    return Groups(Tree(3, replies=2, seed=1), request.param)


@pytest.fixture(scope="module", params=[2, 3], ids="groups of {}".format)
def ragged_groups(request):
    groups = Groups(Tree(3, replies=2, ragged=True, seed=5), request.param)
    assert groups.tree.counts.unique().numel() > 1
    return groups


WINDOWS = [ppg.Greedy(), ppg.Lookahead(2), ppg.Segment(2), ppg.FullPlanning()]


def _assert_leave_one_out_is_exact(groups, policy_class):
    returns = groups.tree.returns(policy_class)
    found = groups.expected_gradient(groups.advantages(returns, "leave_one_out"))
    torch.testing.assert_close(found, groups.tree.expected_gradient(returns), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("policy_class", WINDOWS, ids=lambda p: type(p).__name__)
def test_leave_one_out_is_unbiased(groups, policy_class):
    _assert_leave_one_out_is_exact(groups, policy_class)


@pytest.mark.parametrize("policy_class", WINDOWS, ids=lambda p: type(p).__name__)
def test_leave_one_out_is_unbiased_where_dialogues_end_early(ragged_groups, policy_class):
    _assert_leave_one_out_is_exact(ragged_groups, policy_class)


@pytest.mark.parametrize("policy_class", WINDOWS, ids=lambda p: type(p).__name__)
def test_group_mean_scales_by_one_less_than_the_group(groups, policy_class):
    returns = groups.tree.returns(policy_class)
    expected = groups.tree.expected_gradient(returns) * (groups.size - 1) / groups.size
    torch.testing.assert_close(
        groups.expected_gradient(groups.advantages(returns, "group_mean")), expected, atol=1e-6, rtol=1e-6
    )


def _off_direction(found, direction):
    """Share of ``found`` that no multiple of ``direction`` explains."""
    along = (found @ direction) / (direction @ direction) * direction
    return float((found - along).norm() / found.norm())


@pytest.mark.parametrize("policy_class", WINDOWS, ids=lambda p: type(p).__name__)
def test_standard_deviation_and_pooled_mean_are_biased(groups, policy_class):
    returns = groups.tree.returns(policy_class)
    exact = groups.tree.expected_gradient(returns)
    by_member = returns[groups.members.flatten()].view(len(groups.members), -1)
    pooled = (by_member - by_member.mean(1, keepdim=True)).view(-1, returns.shape[1])
    for biased in (pooled, groups.advantages(returns, "group_std")):
        assert _off_direction(groups.expected_gradient(biased), exact) > FAR
    assert _off_direction(groups.expected_gradient(groups.advantages(returns, "group_mean")), exact) < 1e-6


def test_centring_rewards_instead_of_returns_loses_the_gradient():
    """One choice: end the dialogue, or go on to a second turn that pays. The number of baselines subtracted depends on
    that choice."""
    size, p, pay = 8, 0.5, 0.7
    # every group, all equally likely at p = 1/2
    goes_on = torch.tensor(list(itertools.product((0.0, 1.0), repeat=size)))
    score = goes_on - p  # d log pi / d logit of the choice
    rewards = torch.stack([torch.zeros_like(goes_on), goes_on * pay], -1)  # (groups, size, 2)
    ids, counts = torch.arange(len(goes_on)).repeat_interleave(size), 1 + goes_on.flatten().long()
    truth = p * (1 - p) * pay

    def gradient(advantages):  # only turn 0 has a choice
        return float((score * advantages.view(len(goes_on), size, 2)[..., 0]).mean())

    returns = ppg.partial_returns(rewards.flatten(0, 1), ppg.FullPlanning(), turn_counts=counts)
    assert gradient(ppg.turn_advantages(returns, ids, "leave_one_out", counts)) == pytest.approx(truth)
    assert gradient(ppg.turn_advantages(returns, ids, "group_mean", counts)) == pytest.approx(truth * (size - 1) / size)
    reached = torch.stack([torch.ones_like(goes_on), goes_on], -1)
    mean = rewards.sum(1, keepdim=True) / reached.sum(1, keepdim=True).clamp(min=1)
    centred_then_summed = ((rewards - mean) * reached).sum(-1, keepdim=True).expand(-1, -1, 2)
    assert gradient(centred_then_summed) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize(
    "policy_class", [ppg.RewardMask(torch.ones(3, 3, dtype=torch.bool)), ppg.FullPlanning()], ids=["mask", "full"]
)
def test_terminal_reward_gives_trajectory_level_rloo_and_grpo(policy_class):
    """Every turn of a rollout gets its RLOO or GRPO advantage (TRL's formulas) when all that is rewarded is the end."""
    size, turns = 4, 3
    outcome = torch.randn(2, size, generator=torch.Generator().manual_seed(2))
    rewards = torch.zeros(2 * size, turns)
    rewards[:, -1] = outcome.flatten()
    returns = ppg.partial_returns(rewards, policy_class)
    ids = torch.arange(2).repeat_interleave(size)
    rloo = outcome - (outcome.sum(1, keepdim=True) - outcome) / (size - 1)
    centred = outcome - outcome.mean(1, keepdim=True)
    expected = {
        "leave_one_out": rloo,
        "group_mean": centred,
        "group_std": centred / (outcome.std(1, keepdim=True) + 1e-6),
    }
    for baseline, advantages in expected.items():
        torch.testing.assert_close(
            ppg.turn_advantages(returns, ids, baseline), advantages.view(-1, 1).expand(-1, turns)
        )


def test_all_ones_mask_adds_nothing_but_noise(tree):
    """Past rewards have no expected gradient: crediting a turn with the whole dialogue is unbiased, and of larger
    variance."""
    returns = tree.returns(ppg.RewardMask(torch.ones(TURNS, TURNS, dtype=torch.bool)))
    torch.testing.assert_close(tree.expected_gradient(returns), tree.true_gradient(), **FINITE_DIFFERENCE)


@pytest.mark.parametrize(("correlation", "shorter_is_better"), [(-0.75, False), (-0.25, True), (0.5, True)])
def test_fact_4_a_longer_window_may_have_the_smaller_variance(correlation, shorter_is_better):
    """Rewards of +-1 that no action influences: dropping the second raises the variance where their correlation is
    below -1/2."""
    outcomes = torch.tensor(list(itertools.product((0.0, 1.0), (-1.0, 1.0), (-1.0, 1.0))))
    action, rewards = outcomes[:, 0], outcomes[:, 1:].contiguous()
    probability = (1 + correlation * rewards.prod(1)) / 8
    assert float(probability.sum()) == pytest.approx(1.0)
    assert float(probability @ rewards.prod(1)) == pytest.approx(correlation)

    def variance(policy_class):
        gradient = (action - 0.5) * ppg.partial_returns(rewards, policy_class)[:, 0]
        return float(probability @ gradient**2 - (probability @ gradient) ** 2)

    assert (variance(ppg.Greedy()) < variance(ppg.FullPlanning())) == shorter_is_better


def test_apart_from_full_planning_a_class_is_the_gradient_of_no_function():
    """The Jacobian of theta -> E[g] is symmetric for a gradient field; for a short window it is not: no objective to
    improve."""
    tree = Tree(3, replies=2, seed=4)
    start = tree.theta.clone()

    def curl(policy_class):
        columns = []
        for step in torch.eye(len(start), dtype=torch.float64) * 1e-5:
            ends = []
            for tree.theta in (start + step, start - step):
                ends.append(tree.expected_gradient(tree.returns(policy_class)))
            columns.append((ends[0] - ends[1]) / 2e-5)
        tree.theta = start
        jacobian = torch.stack(columns)
        return float((jacobian - jacobian.T).abs().max() / jacobian.abs().max())

    assert curl(ppg.FullPlanning()) < 1e-7
    assert all(curl(c) > FAR for c in (ppg.Greedy(), ppg.Lookahead(2), ppg.Segment(2)))


# ---- variance and soft windows ---------------------------------------------------------------------------------------


def _variance(tree, returns):
    """tr Cov of one dialogue's gradient, exactly."""
    single = (tree.scores(tree.theta) * returns.double()[..., None]).sum(1)
    p = tree.probabilities(tree.theta)
    return float(p @ single.square().sum(1) - (p @ single).square().sum())


def _bound(tree, policy_class):
    """Worst case over rewards of this size: n (max |score|)^2 (max |reward|)^2 sum_t |S_t|^2, by Cauchy-Schwarz over
    turns."""
    credited_rewards = ppg.partial_returns(torch.eye(tree.turns), policy_class).sum(0)
    largest = float(tree.scores(tree.theta).norm(dim=-1).max()) * float(tree.rewards.abs().max())
    return tree.turns * largest**2 * float(credited_rewards.square().sum())


@pytest.mark.parametrize("seed", range(4))
def test_fact_4_measured_variance_beside_the_bound(seed):
    """The bound falls with the number of credited rewards; the variance lies below it and is measured, not assumed."""
    tree = Tree(3, replies=2, seed=seed)
    bounds = [_bound(tree, c) for c in (ppg.Greedy(), ppg.Lookahead(2), ppg.FullPlanning())]
    variances = [_variance(tree, tree.returns(c)) for c in (ppg.Greedy(), ppg.Lookahead(2), ppg.FullPlanning())]
    assert bounds == sorted(bounds)
    assert all(0 < v < b for v, b in zip(variances, bounds, strict=True))


@pytest.mark.parametrize("gamma", [0.5, 2 / 3])
def test_a_soft_discount_of_matched_length_is_not_the_hard_window(gamma):
    """gamma with 1/(1-gamma) = K has the effective length of Lookahead(K), and both have bias; but the hard window is
    exact where what a
    turn causes comes within K turns, and the soft one is not: it shrinks every delayed reward."""
    length = round(1 / (1 - gamma))
    tree = Tree(4, replies=1, seed=2)
    hard, soft, truth = (
        tree.returns(ppg.Lookahead(length)),
        tree.returns(ppg.FullPlanning(), gamma),
        tree.true_gradient(),
    )
    for returns in (hard, soft):
        assert (tree.expected_gradient(returns) - truth).norm() > FAR * truth.norm()
    p, delay = 0.5, length - 1  # one choice, paid ``delay`` turns later, and noise-free otherwise
    action = torch.tensor([0.0, 1.0])
    rewards = torch.zeros(2, 4)
    rewards[:, delay] = action

    def gradient(returns):
        return float(((action - p) * returns[:, 0]).mean())

    assert gradient(ppg.partial_returns(rewards, ppg.Lookahead(length))) == pytest.approx(p * (1 - p))
    assert gradient(ppg.partial_returns(rewards, ppg.FullPlanning(), gamma)) == pytest.approx(
        gamma**delay * p * (1 - p)
    )
    assert gradient(ppg.partial_returns(rewards, ppg.Lookahead(length - 1))) == 0.0


@pytest.mark.parametrize("count", [1, 4])
def test_classes_that_are_one_another(count):
    """One reward is greedy, a window past the end full planning, one segment full planning, segments of one turn
    greedy; n = 1 too."""
    rewards = torch.randn(5, count, generator=torch.Generator().manual_seed(0))
    counts = torch.tensor([1, count, max(1, count - 1), 1, count])
    equal = {
        "greedy": [ppg.Lookahead(1), ppg.Segment(1), ppg.Segment(list(range(count)))],
        "full": [ppg.Lookahead(count), ppg.Lookahead(99), ppg.Segment(count), ppg.Segment([3] * count)],
    }
    for name, classes in equal.items():
        expected = ppg.partial_returns(rewards, name, 0.75, counts)
        assert all(torch.equal(ppg.partial_returns(rewards, c, 0.75, counts), expected) for c in classes)


# ---- from rewards to dlogits in one op -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", POLICY_CLASSES)
def test_partial_policy_loss_has_the_gradient_of_the_surrogate(tree, name):
    """The whole chain: packed dialogues of context and answers, rewards, one op, and the gradient in theta against
    J_S."""
    policy_class, rule = POLICY_CLASSES[name]
    batch, width = len(tree.counts), 1 + tree.tokens
    logits = torch.randn(batch, TURNS, width, 2, generator=tree.random)  # the first token of a turn is context
    logits[:, :, 1:] = tree.token_logits(tree.theta)[tree.rows].float()
    labels = torch.full((batch, TURNS, width), -100)
    labels[:, :, 1:] = torch.where(tree.there[..., None], tree.chosen, -100)
    turn_ids = torch.where(labels >= 0, torch.arange(TURNS)[:, None], -1)
    logits = logits.view(batch, -1, 2).requires_grad_()
    out = ppg.partial_policy_loss(
        logits,
        labels.view(batch, -1),
        tree.rewards,
        turn_ids.view(batch, -1),
        policy_class,
        turn_counts=tree.counts,
        reduction="none",
    )
    (out.loss * tree.probabilities(tree.theta).float()[:, None]).sum().backward()
    dlogits = logits.grad.view(batch, TURNS, width, 2)
    assert bool((dlogits[:, :, 0] == 0).all()), "context gets no gradient"
    found = torch.einsum("btkv,btkvd->d", dlogits[:, :, 1:].double(), tree.features[tree.rows])
    torch.testing.assert_close(-found, tree.surrogate_gradient(credited(rule)), atol=1e-5, rtol=1e-5)


def test_one_scalar_per_turn_reaches_its_tokens_and_no_others():
    """Context rows get exact zeros; a turn's rows get its return times (p - 1[v = y]), and a reward moves the turns
    that are credited."""
    vocabulary, turn_ids = 7, torch.tensor([[-1, 0, 0, -1, 1, 1, 1, -1, 2], [-1, 0, 1, 1, -1, -1, -1, -1, -1]])
    random = torch.Generator().manual_seed(3)
    logits = torch.randn(*turn_ids.shape, vocabulary, generator=random)
    tokens = torch.randint(vocabulary, turn_ids.shape, generator=random)
    labels = torch.where(turn_ids >= 0, tokens, -100)
    rewards, counts = torch.tensor([[0.5, -2.0, 3.0], [1.5, 0.25, 9.0]]), torch.tensor([3, 2])

    def dlogits(rewards, policy_class):
        x = logits.clone().requires_grad_()
        ppg.partial_policy_loss(
            x, labels, rewards, turn_ids, policy_class, turn_counts=counts, reduction="sum"
        ).loss.backward()
        return x.grad

    direction = logits.softmax(-1) - torch.nn.functional.one_hot(tokens, vocabulary)
    for policy_class in (ppg.Greedy(), ppg.Lookahead(2), ppg.FullPlanning()):
        returns = ppg.partial_returns(rewards, policy_class, turn_counts=counts)
        scalar = torch.where(turn_ids >= 0, returns.gather(1, turn_ids.clamp(min=0)), 0.0)
        found = dlogits(rewards, policy_class)
        torch.testing.assert_close(found, scalar[..., None] * direction)
        assert bool((found[turn_ids < 0] == 0).all())
    changed = rewards.clone()
    changed[0, 1] += 1.0
    for policy_class, moved_turns in ((ppg.Greedy(), [1]), (ppg.Lookahead(2), [0, 1]), (ppg.Segment([4, 6, 6]), [1])):
        moved = (dlogits(changed, policy_class) != dlogits(rewards, policy_class)).any(-1)
        assert moved[0].tolist() == [turn in moved_turns for turn in turn_ids[0].tolist()]
        assert not moved[1].any()

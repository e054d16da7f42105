"""Values of turns: GAE and n-step returns against sums written out in float64, and what each baseline does to the
expected gradient on a tree."""

import pytest
import torch
from dialogue_tree import FINITE_DIFFERENCE, Groups, Tree

import ppg_fast as ppg

B, T = 4, 7
COUNTS = [7, 1, 0, 5]
IDS = [[4, 4, 2, 2, 2, 9, 9]] * B
WINDOWS = {  # the class, and the end (exclusive) of turn t's window of n turns, from the definition
    "greedy": (ppg.Greedy(), lambda t, n: t + 1),
    "lookahead:3": (ppg.Lookahead(3), lambda t, n: min(n, t + 3)),
    "segment:2": (ppg.Segment(2), lambda t, n: min(n, t // 2 * 2 + 2)),
    "segment ids": (ppg.Segment(IDS), lambda t, n: min(n, 2 if t < 2 else 5 if t < 5 else 7)),
    "full": (ppg.FullPlanning(), lambda t, n: n),
}


def some_turns(seed=0):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, B, T, generator=generator)
    beyond = torch.arange(T) >= torch.tensor(COUNTS)[:, None]
    return rewards.masked_fill(beyond, torch.nan), values.masked_fill(beyond, torch.nan)


def written_out(rewards, values, end, gamma, lam):
    """V_t + sum over the window of (gamma lam)^(k-t) (r_k + gamma V_(k+1) - V_k), each term by itself."""
    out = torch.zeros(B, T, dtype=torch.float64)
    for b, n in enumerate(COUNTS):
        r, v = rewards[b].tolist(), [*values[b, :n].tolist(), 0.0]
        for t in range(n):
            total = v[t]
            for k in range(t, end(t, n)):
                total += (gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k])
            out[b, t] = total
    return out


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("name", WINDOWS)
def test_generalised_returns_are_those_written_out(name, gamma):
    (policy_class, end), (rewards, values) = WINDOWS[name], some_turns()
    counts = torch.tensor(COUNTS)
    for lam in (0.0, 0.7, 1.0):
        found = ppg.partial_returns(rewards, policy_class, gamma, counts, values=values, gae_lambda=lam)
        truth = written_out(rewards, values, end, gamma, lam)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), truth, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("name", WINDOWS)
def test_at_lambda_one_it_is_the_n_step_return_with_a_bootstrap(name):
    (policy_class, end), (rewards, values), gamma = WINDOWS[name], some_turns(1), 0.9
    found = ppg.partial_returns(rewards, policy_class, gamma, torch.tensor(COUNTS), values=values, gae_lambda=1.0)
    for b, n in enumerate(COUNTS):
        r, v = rewards[b].tolist(), [*values[b, :n].tolist(), 0.0]
        for t in range(n):
            stop = end(t, n)
            expected = sum(gamma ** (k - t) * r[k] for k in range(t, stop)) + gamma ** (stop - t) * v[stop]
            assert float(found[b, t]) == pytest.approx(expected, abs=2e-6)


def test_backends_agree(backend, device):
    rewards, values = some_turns(2)
    given = rewards.to(device), "lookahead:3", 0.9, torch.tensor(COUNTS, device=device)
    found = ppg.partial_returns(*given, values=values.to(device), gae_lambda=0.8, backend=backend)
    truth = written_out(rewards, values, WINDOWS["lookahead:3"][1], 0.9, 0.8)
    torch.testing.assert_close(found.double().cpu(), truth, atol=2e-6, rtol=1e-6)


def test_the_baseline_is_the_value_and_what_it_leaves_is_centred():
    rewards, values = some_turns(3)
    counts, groups = torch.tensor(COUNTS), torch.tensor([0, 0, 1, 1])
    returns = ppg.partial_returns(rewards, "full", 0.9, counts)
    plain = ppg.turn_advantages(returns, None, "value", counts, values=values)
    there = torch.arange(T) < counts[:, None]
    left = torch.where(there, returns.double() - values, 0.0)
    torch.testing.assert_close(plain.double(), left)
    found = ppg.turn_advantages(returns, groups, "value", counts, values=values)
    assert float(found[0, 0]) == pytest.approx(float(left[0, 0] - left[1, 0]), abs=1e-6)  # both reached it
    assert torch.equal(found[0, 1:], plain[0, 1:])  # alone from there on
    zero = torch.zeros_like(values)
    assert torch.equal(
        ppg.turn_advantages(returns, groups, "value", counts, values=zero),
        ppg.turn_advantages(returns, groups, "leave_one_out", counts),
    )


def test_alone_a_turn_is_compared_with_the_other_groups():
    """By the formula, turn by turn; whoever is not alone is not touched."""
    groups, counts = torch.tensor([0, 0, 1, 1, 2]), torch.tensor([3, 2, 3, 1, 4])
    returns = torch.randn(5, 4, generator=torch.Generator().manual_seed(4))
    for baseline in ("leave_one_out", "group_mean", "group_std"):
        usual = ppg.turn_advantages(returns, groups, baseline, counts)
        found = ppg.turn_advantages(returns, groups, baseline, counts, alone="other_groups")
        for b, n in enumerate(counts.tolist()):
            for t in range(4):
                group = [i for i in range(5) if groups[i] == groups[b] and counts[i] > t]
                others = [float(returns[i, t]) for i in range(5) if groups[i] != groups[b] and counts[i] > t]
                if t >= n or len(group) > 1 or not others:
                    assert found[b, t] == usual[b, t]
                else:
                    expected = float(returns[b, t]) - sum(others) / len(others)
                    assert float(found[b, t]) == pytest.approx(expected, abs=1e-6)
                    assert usual[b, t] == returns[b, t]


# ---- the expected gradient -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree():
    tree = Tree(3, replies=2, ragged=True, seed=5)
    assert tree.counts.unique().numel() > 1
    return tree


def history_values(tree):
    """Some function of what came before each turn's answer: of the features that its first token is drawn from."""
    return torch.where(tree.there, tree.features[tree.rows[..., 0]].sum((-1, -2)), 0.0).float()


def true_values(tree):
    """E[r_t + r_(t+1) + ... | history before turn t], by enumeration: histories are told apart by their features."""
    p, later = tree.probabilities(tree.theta), tree.returns(ppg.FullPlanning()).double()
    values = torch.zeros_like(later)
    for t in range(tree.turns):
        for row in tree.rows[:, t, 0].unique():
            here = tree.there[:, t] & (tree.rows[:, t, 0] == row)
            values[here, t] = (p * later[:, t])[here].sum() / p[here].sum()
    return values.float()


@pytest.mark.parametrize("policy_class", [ppg.Greedy(), ppg.Lookahead(2), ppg.FullPlanning()], ids=str)
def test_a_function_of_the_history_is_an_unbiased_baseline(tree, policy_class):
    returns, values = tree.returns(policy_class), history_values(tree)
    found = ppg.turn_advantages(returns, None, "value", tree.counts, values=values)
    assert not torch.equal(found, returns)
    torch.testing.assert_close(tree.expected_gradient(found), tree.expected_gradient(returns), atol=1e-6, rtol=1e-6)


def test_a_group_may_be_centred_besides(tree):
    groups, returns = Groups(tree, 2), tree.returns(ppg.FullPlanning())
    at = groups.members.flatten()
    found = ppg.turn_advantages(returns[at], groups.ids, "value", groups.counts, values=history_values(tree)[at])
    torch.testing.assert_close(groups.expected_gradient(found), tree.expected_gradient(returns), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_with_true_values_every_window_and_lambda_has_the_true_gradient(tree, lam):
    """The point of a bootstrap: a short window is unbiased too, as far as the values are right."""
    values, truth = true_values(tree), tree.true_gradient()
    for policy_class in (ppg.Greedy(), ppg.Lookahead(2), ppg.FullPlanning()):
        given = tree.rewards, policy_class, 1.0, tree.counts
        returns = ppg.partial_returns(*given, values=values, gae_lambda=lam)
        found = ppg.turn_advantages(returns, None, "value", tree.counts, values=values)
        torch.testing.assert_close(tree.expected_gradient(found), truth, atol=1e-5, rtol=1e-5)
    wrong = history_values(tree)
    returns = ppg.partial_returns(tree.rewards, "greedy", 1.0, tree.counts, values=wrong, gae_lambda=1.0)
    assert (tree.expected_gradient(returns - wrong) - truth).norm() > 0.005 * truth.norm()


def test_the_mean_of_a_ragged_group_is_off_in_direction_too():
    """(m-1)/m with the m of each turn: where dialogues end early no single factor does, and a group of 2 shows it."""
    tree = Tree(3, replies=2, ragged=True, seed=5)
    groups, returns = Groups(tree, 2), tree.returns(ppg.FullPlanning())
    exact = tree.expected_gradient(returns)
    found = groups.expected_gradient(groups.advantages(returns, "group_mean"))
    along = (found @ exact) / (exact @ exact) * exact
    assert float((found - along).norm() / found.norm()) > 0.01
    reached = groups.advantages(returns, "group_mean").double()
    both = (groups.counts.view(-1, 2, 1) > torch.arange(3)).all(1).repeat_interleave(2, 0)
    mended = torch.where(both, 2 * reached, reached)  # 1/2 where both reached the turn, and all of it alone
    torch.testing.assert_close(groups.expected_gradient(mended), exact, atol=1e-6, rtol=1e-6)


def test_with_a_discount_the_expected_gradient_is_that_of_no_surrogate():
    """Reward k counts gamma^(k-t) for turn t, another factor for every turn: no weights of the rewards in J_S do that.
    `test_fact_1_with_a_discount` says what it is."""
    tree, gamma = Tree(4, tokens=2, replies=2), 0.5
    everyone = torch.ones(4, dtype=torch.bool)
    found = tree.expected_gradient(tree.returns(ppg.FullPlanning(), gamma))
    of_rewards = torch.stack(
        [tree.gradient(lambda theta, k=k: tree.expected_reward(theta, k, everyone)) for k in range(4)]
    )
    discounted = sum(gamma**k * of_rewards[k] for k in range(4))
    for candidate in (discounted, of_rewards.sum(0)):
        cosine = float(found @ candidate / found.norm() / candidate.norm())
        assert cosine < 0.9995
    torch.testing.assert_close(
        tree.expected_gradient(tree.returns(ppg.FullPlanning())), of_rewards.sum(0), **FINITE_DIFFERENCE
    )


# ---- one call, and what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lam", [None, 0.8])
def test_losses_take_values_and_lambda(lam):
    """From logits and from hidden states: the loss of the advantages made by hand."""
    generator = torch.Generator().manual_seed(7)
    hidden, weight = torch.randn(2, 6, 5, generator=generator), torch.randn(11, 5, generator=generator)
    labels, turn_ids = torch.randint(11, (2, 6), generator=generator), torch.tensor([[-1, 0, 0, 1, 1, 2]] * 2)
    rewards, values = torch.randn(2, 2, 3, generator=generator)
    counts, groups = torch.tensor([3, 3]), torch.tensor([0, 0])
    ahead = {} if lam is None else {"values": values, "gae_lambda": lam}
    returns = ppg.partial_returns(rewards, "lookahead:2", 0.9, counts, **ahead)
    advantages = ppg.turn_advantages(returns, groups, "value", counts, values=values)
    per_token = torch.where(turn_ids >= 0, advantages.gather(1, turn_ids.clamp(min=0)), 0.0)
    logits = hidden @ weight.T
    expected = ppg.policy_loss(logits, labels, per_token, loss_mask=turn_ids >= 0).loss
    given = {"gamma": 0.9, "baseline": "value", "group_ids": groups, "turn_counts": counts, "values": values}
    turns = labels, rewards, turn_ids, "lookahead:2"
    for out in (
        ppg.partial_policy_loss(logits, *turns, **given, gae_lambda=lam),
        ppg.linear_partial_policy_loss(hidden, weight, *turns, **given, gae_lambda=lam),
    ):
        assert float(out.loss) == pytest.approx(float(expected), abs=1e-6)
    assert float(expected) != 0


def refused(message, call, *given, **options):
    with pytest.raises(ValueError, match=message):
        call(*given, **options)


def test_what_does_not_go_together_is_refused_in_one_line():
    rewards, values = torch.zeros(2, 3), torch.zeros(2, 3)
    mask = ppg.RewardMask(torch.ones(3, 3, dtype=torch.bool))
    returns, advantages = ppg.partial_returns, ppg.turn_advantages
    refused("gae_lambda goes with windows", returns, rewards, mask, values=values, gae_lambda=1.0)
    refused("gae_lambda goes with windows", returns, rewards, "lags:1,0.5", values=values, gae_lambda=1.0)
    rule = "gae_lambda must be a finite number >= 0.0 and <= 1.0, got 1.5"
    refused(rule, returns, rewards, "full", values=values, gae_lambda=1.5)
    refused("values .* must be given", returns, rewards, "full", gae_lambda=1.0)
    refused("values bootstrap a return where gae_lambda is given", returns, rewards, "full", values=values)
    refused("values .* must be given", advantages, rewards, None, "value")
    refused("values go with baseline", advantages, rewards, None, "none", values=values)
    refused(r"values must be \(B, T\) = \(2, 3\)", advantages, rewards, None, "value", values=values[:, :2])
    nan = values.index_fill(1, torch.tensor([1]), torch.nan)
    refused(r"values must be finite.*\[\[0, 1\]\]", advantages, rewards, None, "value", values=nan)
    advantages(rewards, None, "value", torch.tensor([1, 0]), values=nan)  # beyond the dialogue it may be anything
    refused("alone must be one of", advantages, rewards, None, "none", alone="zero")
    tokens = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64), rewards, torch.zeros(2, 3, dtype=torch.int64)
    refused('values must be None with baseline "none"', ppg.partial_policy_loss, *tokens, "full", values=values)
    refused('gae_lambda must be None with baseline "none"', ppg.partial_policy_loss, *tokens, "full", gae_lambda=0.9)

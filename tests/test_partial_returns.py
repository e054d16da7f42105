"""Windowed returns on every backend: every policy class against the plain loop, and what windows have in common."""

import pytest
import torch
from closeness import assert_as_good_as

import ppg_fast as ppg
from ppg_fast import ops, reference

B, T = 5, 41
COUNTS = torch.tensor([T, 1, 17, 0, 30])
IDS = torch.tensor([3, 3, 3, 9, 9, 1, 1, 1, 1, 5]).repeat_interleave(5)[:T].expand(B, T)
CLASSES = {
    "greedy": ppg.Greedy(),
    "lookahead:1": ppg.Lookahead(1),
    "lookahead:4": ppg.Lookahead(4),
    "lookahead:100": ppg.Lookahead(100),
    "segment:3": ppg.Segment(3),
    "segment ids": ppg.Segment(IDS),
    "full": ppg.FullPlanning(),
    "lags": ppg.LagWeights([0.5, 0, 3.25, 1e-3]),
    "mask": ppg.RewardMask(torch.rand(T, T, generator=torch.Generator().manual_seed(3)) < 0.3),
    "weights": ppg.RewardWeights(torch.rand(T, T, generator=torch.Generator().manual_seed(4)).triu()),
}


def rewards_with_garbage_beyond(counts, device):
    rewards = torch.randn(B, T, device=device)
    return rewards.where(torch.arange(T, device=device) < counts[:, None], torch.tensor(torch.nan, device=device))


def weights_by_window(lags):
    """Weights of windows of 1, 2, ... turns that add up to those of the lags."""
    weights = [*lags.weights, 0.0]
    return [(d, weights[d] - weights[d + 1]) for d in range(len(lags.weights))]


def truth_of(policy_class, rewards, gamma, counts, dtype):
    rewards, window = rewards.cpu().to(dtype), (policy_class.lookahead, policy_class.segment_length)
    if isinstance(policy_class, ppg.RewardMask):
        return reference.masked_returns(rewards, policy_class.mask, counts, gamma)
    if isinstance(policy_class, ppg.RewardWeights):
        weights = policy_class.weights.to(dtype)
        there = torch.arange(T) < counts[:, None]
        paid = torch.where(there, rewards, 0.0)
        found = [sum(weights[t, k] * gamma ** (k - t) * paid[:, k] for k in range(t, T)) for t in range(T)]
        return torch.where(there, torch.stack(found, 1), 0.0)
    if isinstance(policy_class, ppg.LagWeights):
        windows = weights_by_window(policy_class)
        return sum(w * reference.partial_returns(rewards, None, counts, d + 1, 0, gamma) for d, w in windows)
    ids = IDS if policy_class.segment_ids is not None else None
    return reference.partial_returns(rewards, ids, counts, *window, gamma)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
@pytest.mark.parametrize("name", CLASSES)
def test_matches_the_plain_loop(backend, device, name, gamma):
    if name == "mask" and gamma == 0.0:
        pytest.skip("a mask below the diagonal needs gamma > 0: an error, tested with the contract")
    counts, rewards = COUNTS.to(device), rewards_with_garbage_beyond(COUNTS.to(device), device)
    actual = ppg.partial_returns(rewards, CLASSES[name], gamma, counts, backend=backend)
    plain, truth = (truth_of(CLASSES[name], rewards, gamma, COUNTS, dtype) for dtype in (torch.float32, torch.float64))
    assert_as_good_as(actual, plain, truth, name)
    assert (actual[torch.arange(T, device=device) >= counts[:, None]] == 0).all()


def test_windows_do_not_cancel(backend, device):
    """A huge reward just outside of the window leaves no trace, as a difference of prefix sums would."""
    rewards = torch.tensor([[1.0, 2.0, 3.0, 1e30, 4.0, 5.0]], device=device)
    returns = ppg.partial_returns(rewards, ppg.Lookahead(2), backend=backend)
    assert returns[0, [0, 1, 4, 5]].tolist() == [3.0, 5.0, 9.0, 5.0]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1)], ids=str)
def test_degenerate_shapes(backend, device, shape):
    rewards = torch.ones(shape, device=device)
    assert torch.equal(ppg.partial_returns(rewards, "full", backend=backend), rewards)


def test_special_cases_coincide(backend, device):
    """K = 1 is greedy, K >= n and one segment are full planning, segments of one turn are greedy."""
    rewards = torch.randn(3, 12, device=device)
    texts = ("lookahead:1", "greedy", "segment:1", "lookahead:12", "full", "segment:12", "lookahead:999999999999")
    same = [ppg.partial_returns(rewards, text, 0.9, backend=backend) for text in texts]
    assert torch.equal(same[0], rewards)
    assert all(torch.equal(a, same[0]) for a in same[1:3])
    assert all(torch.equal(a, same[3]) for a in same[4:])


def test_lag_weights_of_ones_are_a_window(backend, device):
    rewards, counts = torch.randn(4, 12, device=device), torch.tensor([12, 5, 0, 7], device=device)
    for text, same in (("lags:1", "greedy"), ("lags:1,1,1", "lookahead:3"), (f"lags:{','.join('1' * 20)}", "full")):
        found, window = (ppg.partial_returns(rewards, name, 0.9, counts, backend=backend) for name in (text, same))
        torch.testing.assert_close(found, window, rtol=1e-6, atol=1e-6)


def test_a_reward_that_is_none_is_named_by_its_own_place():
    with pytest.raises(ValueError, match="rewards must be finite, got inf for dialogue 0, turn 2"):
        ppg.partial_returns(torch.tensor([[1.0, 2.0, torch.inf]]), "lags:1,0.5")


def test_op_is_well_formed(backend, device):
    rewards, counts = torch.randn(3, 5, device=device), torch.tensor([5, 2, 3], device=device)
    torch.library.opcheck(ops.partial_returns_op, (rewards, None, counts, None, [3, 0], 0.9, False, backend))

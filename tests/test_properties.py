"""Properties over shapes, masks and ragged turns that nobody would think of writing down."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import ppg_fast as ppg
from ppg_fast import reference

quickly = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
seeds = st.integers(0, 2**32 - 1)


@quickly
@given(
    B=st.integers(1, 4),
    T=st.integers(0, 9),
    lookahead=st.integers(1, 11),
    length=st.integers(0, 4),
    gamma=st.floats(0, 1),
    seed=seeds,
)
def test_returns_of_ragged_dialogues_are_the_plain_loop(B, T, lookahead, length, gamma, seed):
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(B, T, generator=generator)
    counts = torch.randint(0, T + 1, (B,), generator=generator)
    policy_class = ppg.Segment(length) if length else ppg.Lookahead(lookahead)
    actual = ppg.partial_returns(rewards, policy_class, gamma, counts)
    window = (policy_class.lookahead, policy_class.segment_length)
    expected = reference.partial_returns(rewards.double(), None, counts, *window, gamma)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


@quickly
@given(
    B=st.integers(1, 3),
    L=st.integers(0, 6),
    V=st.integers(1, 70),
    share=st.floats(0, 1),
    reduction=st.sampled_from(["sum", "token_mean"]),
    seed=seeds,
)
def test_any_shape_and_mask_agrees_with_plain_pytorch(B, L, V, share, reduction, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, L, V, generator=generator).requires_grad_()
    labels, advantages = torch.randint(V, (B, L), generator=generator), torch.randn(B, L, generator=generator)
    mask = torch.rand(B, L, generator=generator) < share
    out = ppg.policy_loss(logits, labels, advantages, loss_mask=mask, reduction=reduction)
    logprobs = torch.log_softmax(logits.double(), -1).gather(-1, labels[..., None]).squeeze(-1)
    expected = -(logprobs * advantages * mask).sum() / (mask.sum().clamp(min=1) if reduction == "token_mean" else 1)
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-5)
    (ours,), (plain,) = torch.autograd.grad(out.loss, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
    assert (ours[~mask] == 0).all()


@quickly
@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    reduction=st.sampled_from(["sequence_mean", "sequence_sum", "token_mean"]),
    seed=seeds,
)
def test_packed_and_padded_sequences_are_the_same_loss(lengths, reduction, seed):
    generator = torch.Generator().manual_seed(seed)
    S, L, V = len(lengths), max(1, *lengths), 13
    there = torch.arange(L) < torch.tensor(lengths)[:, None]
    logits, labels = torch.randn(S, L, V, generator=generator), torch.randint(V, (S, L), generator=generator)
    advantages = torch.randn(S, L, generator=generator)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    padded = ppg.policy_loss(logits, labels, advantages, loss_mask=there, reduction=reduction).loss
    packed = ppg.policy_loss(
        logits[there], labels[there], advantages[there], cu_seqlens=cu_seqlens, reduction=reduction
    ).loss
    torch.testing.assert_close(packed, padded, rtol=1e-5, atol=1e-6)


@quickly
@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4), T=st.integers(1, 5), seed=seeds)
def test_leave_one_out_does_not_depend_on_the_order_of_rollouts(sizes, T, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)) * 7 - 3
    returns, counts = (
        torch.randn(len(groups), T, generator=generator),
        torch.randint(0, T + 1, (len(groups),), generator=generator),
    )
    advantages = ppg.turn_advantages(returns, groups, turn_counts=counts)
    order = torch.randperm(len(groups), generator=generator)
    shuffled = ppg.turn_advantages(returns[order], groups[order], turn_counts=counts[order])
    torch.testing.assert_close(shuffled, advantages[order], rtol=1e-6, atol=1e-6)
    there = torch.arange(T) < counts[:, None]
    for group in groups.unique():  # with g members at a turn, leave-one-out sums to zero, but for a lonely one
        rows = groups == group
        several = there[rows].sum(0) > 1
        assert (advantages[rows].sum(0)[several].abs() < 1e-5).all()

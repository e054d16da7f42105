"""The reference where it is a user's backend: gradients added up in float32, returns without a Python loop over
rewards."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ppg_fast as ppg
from ppg_fast import reference

N, D, V = 1024, 16, 40


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("what", ["loss", "logprobs"])
def test_a_head_in_16_bits_has_its_chunks_added_in_float32(dtype, what):
    """64 chunks of 16 rows: each is rounded once to 16 bits, their sum at the end and not 64 times."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=draw).to(dtype), (0.3 * torch.randn(V, D, generator=draw)).to(dtype)
    bias, labels = torch.randn(V, generator=draw).to(dtype), torch.randint(V, (N,), generator=draw)
    A = torch.rand(N, generator=draw) + 0.5
    truth_of = [t.double().requires_grad_() for t in (weight, bias)]
    l = torch.log_softmax(hidden.double() @ truth_of[0].T + truth_of[1], -1).gather(-1, labels[:, None])[:, 0]
    truth = torch.autograd.grad(-(A.double() * l).sum(), truth_of)
    inputs = [t.clone().requires_grad_() for t in (weight, bias)]
    how = {"bias": inputs[1], "chunk_rows": 16, "backend": "reference"}
    if what == "loss":
        loss = ppg.linear_policy_loss(hidden, inputs[0], labels, A, reduction="sum", **how).loss
    else:
        loss = -(A * ppg.linear_token_logprobs(hidden, inputs[0], labels, **how)).sum()
    found = torch.autograd.grad(loss, inputs)
    assert all(g.dtype == dtype for g in found)
    assert all(relative(g, t) < torch.finfo(dtype).eps for g, t in zip(found, truth, strict=True))


class Count(TorchDispatchMode):
    calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        return func(*args, **(kwargs or {}))


def plain(rewards, ids, counts, lookahead, length, gamma):
    """The definition, reward by reward."""
    returns = torch.zeros(rewards.shape, dtype=torch.float64)
    B, T = rewards.shape
    for b in range(B):
        count = T if counts is None else int(counts[b])
        for t in range(count):
            for k in range(t, min(count, t + lookahead)):
                apart = length and k // length != t // length
                if apart or (ids is not None and (ids[b, t : k + 1] != ids[b, t]).any()):
                    break
                returns[b, t] += gamma ** (k - t) * float(rewards[b, k])
    return returns


@pytest.mark.parametrize("lookahead", [1, 3, 2**31 - 1])
@pytest.mark.parametrize("length", [0, 2])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("counts", [None, [7, 0, 4]])
def test_returns_are_those_of_the_definition(lookahead, length, with_ids, counts):
    draw = torch.Generator().manual_seed(lookahead % 7)
    rewards = torch.randn(3, 7, generator=draw)
    ids = torch.tensor([[4, 4, 2, 2, 2, 4, 4], [0] * 7, [1, 1, 1, 0, 5, 5, 5]]) if with_ids else None
    counts = None if counts is None else torch.tensor(counts)
    if counts is not None:
        rewards[1], rewards[2, 4:] = torch.nan, torch.inf  # beyond the dialogue
    for gamma in (0.0, 0.9, 1.0):
        expected = plain(rewards, ids, counts, lookahead, length, gamma)
        found = reference.partial_returns(rewards, ids, counts, lookahead, length, gamma)
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_returns_take_a_few_calls_a_turn_and_not_one_a_reward():
    """8 dialogues of 50 turns took 10,200 times some calls."""
    with Count() as count:
        reference.partial_returns(torch.ones(8, 50), None, None, 2**31 - 1, 0, 0.9)
    assert count.calls < 20 * 50

"""Packed batches: one packed row equal to its dialogues one by one, micro-batches under a budget."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ppg_fast.dialogues.packing import Sample, micro_batches, pack


@st.composite
def samples(draw, with_logprobs=False):
    turns = draw(st.integers(0, 4))
    turn_ids = draw(st.lists(st.integers(-1, turns - 1), min_size=1, max_size=9))
    tokens = [draw(st.integers(0, 99)) for _ in turn_ids]
    rewards = [draw(st.floats(-9, 9, width=32)) for _ in range(turns)]
    logprobs = (
        [float("nan") if turn < 0 else -draw(st.floats(0, 9, width=32)) for turn in turn_ids] if with_logprobs else None
    )
    return Sample(tokens, turn_ids, rewards, draw(st.integers(0, 2**63 - 1)), logprobs)


@settings(deadline=None)
@given(st.booleans().flatmap(lambda with_logprobs: st.lists(samples(with_logprobs), max_size=5)))
def test_packed_row_is_its_dialogues_one_by_one(drawn):
    batch = pack(drawn)
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == [
        0,
        *torch.tensor([len(s.tokens) for s in drawn], dtype=torch.int64).cumsum(0).tolist(),
    ]
    assert {
        t.dtype
        for t in (batch.tokens, batch.labels, batch.turn_ids, batch.position_ids, batch.turn_counts, batch.group_ids)
    } == {torch.int64}
    assert batch.rewards.dtype == torch.float32
    assert batch.rewards.shape == (len(drawn), max([1, *(len(s.rewards) for s in drawn)]))
    assert batch.turn_counts.tolist() == [len(s.rewards) for s in drawn]
    assert batch.group_ids.tolist() == [s.group_id for s in drawn]
    assert batch.dialogue_ids.tolist() == [n for n, sample in enumerate(drawn) for _ in sample.tokens]
    assert batch.dialogue_ids.dtype == torch.int64
    widest = batch.rewards.shape[1]
    assert batch.turn_mask.tolist() == [[t < len(s.rewards) for t in range(widest)] for s in drawn]
    for n, sample in enumerate(drawn):
        rows = slice(batch.cu_seqlens[n], batch.cu_seqlens[n + 1])
        assert batch.tokens[rows].tolist() == sample.tokens
        assert batch.position_ids[rows].tolist() == list(range(len(sample.tokens)))
        assert batch.turn_ids[rows].tolist() == [*sample.turn_ids[1:], -1]
        following = zip(sample.tokens[1:], sample.turn_ids[1:], strict=True)
        assert batch.labels[rows].tolist() == [*(token if turn >= 0 else -100 for token, turn in following), -100]
        assert batch.rewards[n].tolist() == sample.rewards + [0.0] * (batch.rewards.shape[1] - len(sample.rewards))
        if sample.rollout_logprobs is not None:
            following = zip(sample.rollout_logprobs[1:], sample.turn_ids[1:], strict=True)
            assert batch.rollout_logprobs[rows].tolist() == [
                *(value if turn >= 0 else 0.0 for value, turn in following),
                0.0,
            ]
    assert (batch.rollout_logprobs is None) == all(s.rollout_logprobs is None for s in drawn)


BROKEN = {
    "no tokens": (Sample([], [], [], 0), "sample 1 must have tokens"),
    "turn ids": (Sample([1, 2], [0], [0.5], 0), "sample 1 must have one turn id per token: 2, got 1"),
    "turn beyond": (
        Sample([1], [2], [0.5, 0.5], 0),
        "sample 1: a turn id must be -1 or below the number of rewards 2, got 2",
    ),
    "turn below": (Sample([1], [-2], [0.5], 0), "sample 1: a turn id must be -1 .* got -2"),
    "nan reward": (
        Sample([1], [0], [0.5, float("nan")], 0),
        "sample 1, turn 1: a reward must be finite in float32, got nan",
    ),
    "large reward": (Sample([1], [0], [-1e39], 0), "sample 1, turn 0: a reward must be finite in float32, got -1e"),
    "some logprobs": (Sample([1], [0], [0.5], 0, [-0.3]), "rollout_logprobs must be given for all samples or for none"),
}


@pytest.mark.parametrize(("sample", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_samples_are_named(sample, message):
    with pytest.raises(ValueError, match=message):
        pack([Sample([1], [0], [0.5], 0), sample])


def test_broken_logprobs_are_named():
    with pytest.raises(ValueError, match="sample 0 must have one rollout log-prob per token: 2, got 1"):
        pack([Sample([1, 2], [-1, 0], [0.5], 0, [-0.3])])
    with pytest.raises(ValueError, match="sample 0, token 1: a rollout log-prob must be finite, got -inf"):
        pack([Sample([1, 2], [-1, 0], [0.5], 0, [0.0, float("-inf")])])
    assert pack([Sample([1, 2], [-1, 0], [0.5], 0, [0.0, float("nan")])]).rollout_logprobs.isnan().any()


def test_to_moves_every_tensor():
    batch = pack([Sample([1, 2], [-1, 0], [0.5], 3, [0.0, -0.3])])
    moved = batch.to("meta")
    assert {value.device.type for value in vars(moved).values() if isinstance(value, torch.Tensor)} == {"meta"}
    assert moved.longest_part == batch.longest_part
    assert pack([Sample([1], [0], [0.5], 3)]).to("meta").rollout_logprobs is None


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 25))
def test_micro_batches_hold_everything_under_the_budget(lengths, max_tokens):
    batches = micro_batches(lengths, max_tokens)
    assert sorted(n for batch in batches for n in batch) == list(range(len(lengths)))
    assert all(batch == sorted(batch) for batch in batches), "a batch keeps the order of the dialogues"
    totals = [sum(lengths[n] for n in batch) for batch in batches]
    assert all(total <= max_tokens or len(batch) == 1 for total, batch in zip(totals, batches, strict=True))
    assert totals == sorted(totals, reverse=True)


def test_micro_batches_are_few_and_even():
    """Consecutive filling would need four, of 9, 2, 9 and 1 tokens; best fit alone would leave 10, 10 and 1."""
    assert micro_batches([5, 4, 2, 9, 1], 11) == [[2, 3], [0, 1, 4]]
    batches = micro_batches(sizes := [6, 6, 2, 2, 2, 2], 12)
    assert [sum(sizes[n] for n in batch) for batch in batches] == [10, 10], "best fit alone would make 12 and 8"


@pytest.mark.parametrize("max_tokens", [0, -3, 2.5, True])
def test_micro_batches_refuse_a_budget(max_tokens):
    with pytest.raises(ValueError, match=f"max_tokens must be an integer >= 1, got {max_tokens}"):
        micro_batches([], max_tokens)


@pytest.mark.parametrize("logprobs", [False, True])
def test_a_part_is_what_packing_its_dialogues_gives(logprobs):
    """Dialogues picked out of a packed batch, each up to a length, against packing samples that were cut by hand."""
    layout, rewards = [-1, 0, -1, 1, 1, -1], [0.5, 1.0]
    samples = [
        Sample([10 * n + i for i in range(6)], layout, [r + n for r in rewards], n, [-0.1 * i for i in range(6)])
        for n in range(4)
    ]
    samples[1] = Sample([7, 8], [-1, 0], [0.25], 9, [0.0, -0.5])
    if not logprobs:
        samples = [replace(s, rollout_logprobs=None) for s in samples]
    lengths, chosen = [4, 2, 6, 5], [3, 0, 1]
    cut = [
        replace(
            samples[n],
            tokens=samples[n].tokens[: lengths[n]],
            turn_ids=samples[n].turn_ids[: lengths[n]],
            rollout_logprobs=samples[n].rollout_logprobs[: lengths[n]] if logprobs else None,
        )
        for n in chosen
    ]
    whole = pack(samples)
    for found, truth in (
        (whole.part(chosen, torch.tensor(lengths)), pack(cut)),
        (whole.part(chosen), pack([samples[n] for n in chosen])),
        (whole.part([2]), pack([samples[2]])),
    ):
        for name, value in vars(truth).items():
            other = getattr(found, name)
            if isinstance(value, torch.Tensor):
                assert other.dtype == value.dtype
                assert torch.equal(other, value), name
            else:
                assert other == value, name

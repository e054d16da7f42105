"""Generation in lockstep: the cache against transformers' own, whatever leaves the batch, and memory that does not grow
token by token."""

import pytest
import torch

pytest.importorskip("transformers")

from test_rollout import Ragged, make, one_thread, run  # noqa: F401
from transformers.cache_utils import DynamicLayer

from ppg_fast.dialogues.packing import pack
from ppg_fast.models import causal_lm as models
from ppg_fast.rollouts.generation import LocalSampler, Request, lockstep
from ppg_fast.rollouts.generation.lockstep import GrowingLayer, Lockstep
from ppg_fast.rollouts.rollout import collect_groups


def test_a_growing_layer_holds_what_a_concatenating_one_does_and_rarely_allocates(monkeypatch):
    monkeypatch.setattr(lockstep, "FIRST_CAPACITY", 4)
    torch.manual_seed(0)
    ours, theirs, places = GrowingLayer(), DynamicLayer(), set()
    for width in [5, *[1] * 60]:
        states = torch.randn(3, 2, width, 4), torch.randn(3, 2, width, 4)
        keys, values = ours.update(*states)
        for mine, other in zip((keys, values), theirs.update(*states), strict=True):
            assert torch.equal(mine, other)
        places.add(keys.untyped_storage().data_ptr())
    assert ours.get_seq_length() == theirs.get_seq_length() == 65
    assert len(places) <= 5, "64 columns need 4 doublings"
    rows, columns = torch.tensor([2, 0]), torch.tensor([[0, 3, 64], [1, 2, 5]])
    ours.select(rows, columns)
    expected = torch.stack([theirs.keys[r][:, c] for r, c in zip(rows, columns, strict=True)])
    assert torch.equal(ours.keys, expected)
    fresh = torch.randn(2, 2, 1, 4), torch.randn(2, 2, 1, 4)
    assert torch.equal(ours.update(*fresh)[0], torch.cat([expected, fresh[0]], 2))


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_long_openings_in_blocks_and_rows_that_leave_change_nothing(kind, monkeypatch):
    """Against one forward pass of transformers' own over each dialogue alone, without a cache."""
    monkeypatch.setattr(lockstep, "READ_BLOCK", 3)
    (model, _), (oracle, _) = make(kind), make(kind)
    oracle.eval().set_attn_implementation("eager")
    said = [[4, 9, 12, 7, 15, 6, 8, 5], [10, 4], [11, 13, 5, 9, 14]]
    more = [[[7, 5], [12], []], [[8], [], [6, 6, 6, 6]], [[4], [5, 5]]]
    columns = []
    with torch.no_grad():
        reader = Lockstep(model.eval(), 3)
        reader.read(said)
        whole = [list(row) for row in said]
        for number, rows in enumerate(more):
            if number == 2:
                reader.keep([0, 2])
                whole = [whole[0], whole[2]]
            logits = reader.read(rows)
            for row, tokens in enumerate(rows):
                whole[row] += tokens
                if tokens:
                    alone = oracle(torch.tensor([whole[row]]), use_cache=False).logits[0, -1]
                    torch.testing.assert_close(logits[row], alone, rtol=1e-4, atol=1e-5)
            columns.append(reader.kept.shape[1])
    assert columns[1] > max(map(len, whole)), "the holes took room"


def test_holes_are_squeezed_out(monkeypatch):
    monkeypatch.setattr(lockstep, "LOOSE", 1.0)
    model, _ = make()
    with torch.no_grad():
        reader = Lockstep(model.eval(), 2)
        reader.read([[4, 5, 6, 7], [8]])
        reader.read([[], [9, 10, 11]])
        assert reader.kept.shape[1] == 7
        reader.keep([0, 1])
        assert reader.kept.shape[1] == 4
        logits = reader.read([[12], [13]])
        for row, tokens in enumerate([[4, 5, 6, 7, 12], [8, 9, 10, 11, 13]]):
            torch.testing.assert_close(
                logits[row], model(torch.tensor([tokens]), use_cache=False).logits[0, -1], rtol=1e-4, atol=1e-5
            )


def test_batches_of_any_size_give_the_same_dialogues():
    model, chat = make()
    whole, split = run(model, chat), run(model, chat, batch_size=3)
    assert [r.sample.tokens for r in whole] == [r.sample.tokens for r in split]
    assert [r.sample.group_id for r in split] == [r.sample.group_id for r in whole]
    for one, other in zip(whole, split, strict=True):
        torch.testing.assert_close(
            torch.tensor(one.sample.rollout_logprobs), torch.tensor(other.sample.rollout_logprobs), rtol=1e-4, atol=1e-5
        )


def test_dialogues_that_are_over_are_not_computed(monkeypatch):
    sizes = []
    read = Lockstep.read
    monkeypatch.setattr(Lockstep, "read", lambda self, rows: (sizes.append(len(rows)), read(self, rows))[1])
    model, chat = make()
    run(model, chat, group_size=1, seeds=range(4))  # one to four turns
    assert sizes == sorted(sizes, reverse=True)
    assert set(sizes) == {4, 3, 2, 1}


def test_a_dialogue_never_exceeds_its_tokens():
    model, chat = make()
    free, bound = (run(model, chat, seeds=range(4), max_dialogue_tokens=n) for n in (0, 40))
    assert max(len(r.sample.tokens) for r in free) > 40 >= max(len(r.sample.tokens) for r in bound)
    assert all(len(r.sample.rewards) == max(r.sample.turn_ids) + 1 >= 1 for r in bound)
    for one, other in zip(free, bound, strict=True):
        assert one.sample.tokens[: len(other.sample.tokens)] == other.sample.tokens
    with pytest.raises(ValueError, match="an opening must be shorter than the 10 tokens of a dialogue"):
        run(model, chat, max_dialogue_tokens=10)
    model.config.max_position_embeddings = 30
    assert max(len(r.sample.tokens) for r in run(model, chat, seeds=range(2))) <= 30


def test_draws_follow_the_distribution():
    """40,000 draws against the probabilities, banned tokens left out; the token drawn always has some probability."""
    model, chat = make()
    sampler = LocalSampler(model, chat.end_id, [0, 3], 0.7)
    logits = torch.linspace(-2, 2, 8).repeat(40000, 1)
    logits[:, 5] = -torch.inf
    draws = 1.0 - torch.rand(40000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws[0], draws[1] = 1.0, 2.0**-53
    tokens, logprobs, _ = sampler._sample(logits, draws)
    share = torch.bincount(torch.tensor(tokens), minlength=8) / 40000
    logp = (logits[0] / 0.7).log_softmax(-1)
    p = logp.exp()
    p[[0, 3]] = 0
    p /= p.sum()
    assert ((share - p).abs() <= 4 * (p * (1 - p) / 40000).sqrt()).all()
    assert share[[0, 3, 5]].sum() == 0
    torch.testing.assert_close(torch.tensor(logprobs[:100]), logp[tokens[:100]])
    with pytest.raises(FloatingPointError, match="logits must be finite"):
        sampler._sample(torch.full((1, 8), torch.nan), draws[:1])


def test_many_turns_with_entering_and_leaving_keep_the_log_probs(monkeypatch):
    monkeypatch.setattr(lockstep, "LOOSE", 1.1)

    class Long(Ragged):
        def reset(self, seed):
            opening = super().reset(seed)
            self.turns = 3 + 4 * (seed % 4)
            return opening

    model, chat = make("gemma2")
    generator = torch.Generator().manual_seed(5)
    rollouts = collect_groups(model, chat, Long, range(8), 1, generator=generator, max_new_tokens=7)
    batch = pack([r.sample for r in rollouts])
    torch.testing.assert_close(batch.rollout_logprobs, models.token_logprobs(model, batch), rtol=1e-4, atol=3e-5)
    assert max(len(r.sample.rewards) for r in rollouts) == 15


def test_a_request_may_end_at_its_limit():
    model, chat = make()
    sampler = LocalSampler(model.eval(), chat.end_id, chat.banned_token_ids(model.config.vocab_size), 1.0)
    with torch.no_grad():
        answers = sampler.answer([Request(i, [4, 5, 6], i + 1, torch.Generator().manual_seed(i)) for i in range(3)])
    assert all(len(a.tokens) == i + 1 or a.ended for i, a in enumerate(answers))
    assert any(not a.ended for a in answers)

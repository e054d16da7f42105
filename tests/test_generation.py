"""Generation in lockstep: the cache against transformers' own, whatever leaves the batch, and memory that does not grow
token by token."""

from itertools import pairwise

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
from ppg_fast.spec import PolicyLossSpec


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


@pytest.mark.parametrize(("top_p", "top_k"), [(0.6, 0), (1.0, 3), (0.8, 4)])
def test_draws_from_kept_sets_follow_the_renormalised_distribution(top_p, top_k):
    """Against the whole distribution, sorted by hand; banned tokens are in no set, and NaN is refused."""
    model, chat = make()
    sampler = LocalSampler(model, chat.end_id, [6], 0.7, top_p, top_k, entropies=True)
    row = torch.tensor([0.3, -1.0, 1.2, 0.8, -torch.inf, 0.1, 3.0, 1.1])
    draws = 1.0 - torch.rand(20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draws[0], draws[1] = 1.0, 2.0**-53
    tokens, logprobs, entropies, kept = sampler._sample_kept(row.repeat(20000, 1), draws)
    order = [2, 7, 3, 0, 5, 1][: top_k or None]
    p = (row / 0.7)[order].softmax(0)
    size = next(n for n in range(1, len(order) + 1) if p[:n].sum() >= top_p or n == len(order))
    assert kept[0] == kept[-1] == order[:size]
    q = p[:size] / p[:size].sum()
    share = torch.bincount(torch.tensor(tokens), minlength=8)[order[:size]] / 20000
    assert float(share.sum()) == 1
    assert ((share - q).abs() <= 4 * (q * (1 - q) / 20000).sqrt()).all()
    expected = q.log()[[order.index(token) for token in tokens[:100]]]
    torch.testing.assert_close(torch.tensor(logprobs[:100]), expected)
    torch.testing.assert_close(torch.tensor(entropies), torch.full((20000,), float(-(q * q.log()).sum())))
    with pytest.raises(FloatingPointError, match="logits must be finite"):
        sampler._sample_kept(torch.full((1, 8), torch.nan), draws[:1])


def test_kept_sets_reach_the_loss_and_make_the_ratio_one():
    """At top_p 0.9 the sampler's log-probs are those of the kept sets; the whole vocabulary's are off by the log of the
    mass that was kept, so that its mean ratio to the sampler is that mass."""
    model, chat = make()
    rollouts = run(model, chat, top_p=0.9)
    samples = [r.sample for r in rollouts]
    batch = pack(samples)
    read = batch.labels >= 0
    kept = batch.kept
    assert ((kept.offsets.diff() > 0) == read).all()
    l = models.token_logprobs(model, batch)
    torch.testing.assert_close(l, batch.rollout_logprobs, rtol=1e-4, atol=1e-5)
    hidden, head = models.policy_hidden(model, batch), model.get_output_embeddings().weight
    whole = (hidden @ head.T).log_softmax(-1)
    mass = [float(whole[i, kept.ids[a:b]].exp().sum()) for i, (a, b) in enumerate(pairwise(kept.offsets.tolist()))]
    mass = torch.tensor(mass)[read]
    allowed = whole.exp().index_fill(1, torch.tensor(chat.banned_token_ids(whole.shape[1])), 0.0).sum(1)[read]
    ratio = (whole.gather(1, batch.labels.clamp(min=0)[:, None])[:, 0] - batch.rollout_logprobs).exp()[read]
    torch.testing.assert_close(ratio, mass, rtol=1e-3, atol=1e-4)
    assert (mass / allowed > 0.9 - 1e-5).all()
    assert float((mass / allowed).mean()) < 0.98
    advantages = torch.ones_like(batch.rewards)
    spec = PolicyLossSpec("ppo", importance_cap=2.0)
    out = models.policy_loss(model, batch, advantages, spec, rollout_logprobs=batch.rollout_logprobs)
    assert float(out.metrics["importance_weight"]) == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(out.logprobs, l)
    part = batch.part([2, 0], torch.diff(batch.cu_seqlens).long() - 1)
    torch.testing.assert_close(
        models.token_logprobs(model, part),
        torch.where(part.labels >= 0, part.rollout_logprobs, 0.0),
        rtol=1e-4,
        atol=1e-5,
    )
    samples[0].kept = None
    with pytest.raises(ValueError, match="kept must be given for all samples or for none, got 'some with and some"):
        pack(samples)

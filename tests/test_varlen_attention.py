"""The attention of packed rows in every other use of the same model: padded batches, caches, windows, masks, against
eager attention."""

from itertools import pairwise

import pytest
import torch

transformers = pytest.importorskip("transformers")

from test_model import KINDS, SIZES, tiny
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from ppg_fast.models import varlen_attention

LENGTH = 12  # longer than every window in KINDS
PADDING = 5


@pytest.fixture(params=KINDS)
def model(request):
    return tiny(request.param).eval()


@pytest.fixture
def tokens():
    return torch.randint(3, SIZES["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(0))


def both(model, call):
    """What ``call`` gives with eager attention, and with ours."""
    results = []
    for name in ("eager", varlen_attention.NAME):
        model.set_attn_implementation(name)
        with torch.no_grad():
            results.append(call(model))
    return results


def padded(tokens, left):
    mask = torch.ones_like(tokens)
    mask[1, slice(0, PADDING) if left else slice(LENGTH - PADDING, None)] = 0
    return mask


@pytest.mark.parametrize("left", [True, False])
def test_padding_is_not_seen_and_windows_hold(model, tokens, left):
    mask = padded(tokens, left)
    expected, ours = both(model, lambda m: m(input_ids=tokens, attention_mask=mask).logits)
    torch.testing.assert_close(ours[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-5)
    assert bool(ours.isfinite().all())  # rows of padding too
    expected, ours = both(model, lambda m: m(input_ids=tokens, use_cache=False).logits)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generation_is_that_of_eager_attention(model, tokens, cache):
    """With a cache that grows and with one of fixed size, from an opening with padding, beyond every window."""
    mask = padded(tokens, left=True)
    settings = {
        "max_new_tokens": 8,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": None,
        "cache_implementation": cache,
    }
    settings |= {"output_logits": True, "return_dict_in_generate": True, "disable_compile": True}
    expected, ours = both(model, lambda m: m.generate(tokens, attention_mask=mask, **settings))
    assert torch.equal(ours.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-5)


def test_several_new_tokens_at_once_after_a_cache(model, tokens):
    """As an assistant of speculative decoding asks: the queries are the last of the keys."""

    def call(m):
        first = m(input_ids=tokens[:, :7], use_cache=True)
        return m(input_ids=tokens[:, 7:], past_key_values=first.past_key_values, use_cache=True).logits

    expected, ours = both(model, call)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_a_mask_of_the_caller_is_followed(model, tokens):
    """Boolean, (B, 1, Q, K), a hole in the middle; windows are the caller's then, as in transformers."""
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    seen[8:, 2] = False
    added = torch.zeros(2, 1, LENGTH, LENGTH).masked_fill(~seen, torch.finfo(torch.float32).min)
    expected, ours = both(model, lambda m: m(input_ids=tokens, attention_mask=added).logits)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    model.set_attn_implementation(varlen_attention.NAME)
    with torch.no_grad():
        boolean = model(input_ids=tokens, attention_mask=seen.expand(2, 1, -1, -1)).logits
    torch.testing.assert_close(boolean, expected, rtol=1e-4, atol=1e-5)


def test_position_ids_that_restart_are_bounds(model, tokens):
    """What transformers' own collator of packed rows gives: no mask, no bounds."""
    row, lengths = tokens.flatten()[None], [3, 9, 12]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    expected, ours = both(model, lambda m: m(input_ids=row, position_ids=positions, use_cache=False).logits)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_masks_are_made_in_blocks_and_have_no_empty_row(model, monkeypatch):
    """An empty row is NaN in some kernels, and a NaN of the padding would be a NaN of everybody in the next layer."""
    monkeypatch.setattr(varlen_attention, "QUERY_BLOCK", 4)
    monkeypatch.setattr(varlen_attention, "sdpa_mask", None)
    masks, masked = [], varlen_attention._masked
    monkeypatch.setattr(varlen_attention, "_masked", lambda *a: (masks.append(a[3]), masked(*a))[1])
    model.set_attn_implementation(varlen_attention.NAME)
    tokens = torch.randint(3, SIZES["vocab_size"], (2, LENGTH))
    with torch.no_grad():
        model(input_ids=tokens, attention_mask=padded(tokens, left=True))
    assert masks
    assert max(m.shape[-2] for m in masks) <= 4
    assert all(bool(m.any(-1).all()) for m in masks)


class Copies(TorchDispatchMode):
    """Counts the operations that only move what is there."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.cat, torch.ops.aten.clone)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("lengths", "times"), [([9], 0), ([4, 5], 1)])
def test_what_comes_out_of_the_dialogues_is_copied_once_and_of_a_lone_one_never(lengths, times):
    q, k, v = (torch.randn(1, 9, heads, 16).transpose(1, 2) for heads in (4, 2, 2))  # as a model's projections lie
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    with Copies() as copies:
        out, _ = varlen_attention.varlen_attention(torch.nn.Module(), q, k, v, None, cu_seq_lens_q=bounds)
    assert copies.count == times
    assert out.is_contiguous()
    parts = [[t[:, :, a:b] for t in (q, k, v)] for a, b in pairwise(bounds.tolist())]
    alone = [scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True) for part in parts]
    assert torch.equal(out, torch.cat(alone, 2).transpose(1, 2))


def test_chunks_beyond_the_first_and_sinks_are_refused():
    class Module(torch.nn.Module):
        layer_idx, config = 0, transformers.PretrainedConfig(attention_chunk_size=8, layer_types=["chunked_attention"])

    states = torch.randn(1, 2, 9, 4)
    with pytest.raises(ValueError, match="a row must have at most the 8 tokens of the first, got 9"):
        varlen_attention.varlen_attention(Module(), states, states, states, None)
    assert varlen_attention.varlen_attention(Module(), *[states[:, :, :8]] * 3, None)[0].shape == (1, 8, 2, 4)
    with pytest.raises(ValueError, match="no attention sinks"):
        varlen_attention.varlen_attention(Module(), states, states, states, None, s_aux=states)

"""The linear head's memory: rows of logits that begin cache lines whatever the vocabulary, and no float32 copy of the
head where one product makes its gradient."""

import pytest
import torch

import ppg_fast as ppg
from ppg_fast import native
from ppg_fast.ops import head as head_ops
from ppg_fast.ops import products

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
N, D = 40, 16


def call(dtype, V, device="cpu", backend="cpu", **options):
    """Loss and gradients of a head of V rows, where every third row is masked and holds NaN."""
    torch.manual_seed(V)
    hidden, weight, bias = torch.randn(N, D), torch.randn(V, D), torch.randn(V)
    labels, advantages = torch.randint(V, (N,)), torch.randn(N)
    labels[::3], hidden[::3] = -100, torch.nan
    leaves = [t.to(device, dtype).requires_grad_() for t in (hidden, weight, bias)]
    out = ppg.linear_policy_loss(
        *leaves[:2], labels.to(device), advantages.to(device), bias=leaves[2], backend=backend, **options
    )
    return (out.loss.detach(), out.logprobs, *torch.autograd.grad(out.loss, leaves))


@pytest.mark.parametrize("V", [7, 64, 209, 257, 1000])
def test_rows_of_logits_begin_cache_lines(V):
    for dtype in DTYPES:
        hidden, weight = torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype)
        head = head_ops.Head(hidden, weight, None, 16, (True, True, False), native)
        for chunk in head.chunks(torch.arange(N)):
            assert chunk.logits.shape[1] == V
            stride = chunk.logits.stride(0)
            assert stride % head_ops.LINE == 0
            assert 0 <= stride - V < head_ops.LINE
            assert chunk.logits.stride(1) == 1


@pytest.mark.parametrize("V", [7, 209])
@pytest.mark.parametrize("chunk_rows", [16, 1000])
def test_what_lies_between_rows_takes_no_part(backend, device, monkeypatch, V, chunk_rows):
    """Not in a log-prob, not in a product, whatever is there; nor is what the memory of a gradient held before."""
    if backend == "reference":
        pytest.skip("reference: plain PyTorch, no chunks of its own")
    fresh = head_ops.fresh
    for dtype in DTYPES:
        found = []
        for filler in (0.0, torch.nan, 3e4):
            monkeypatch.setattr(head_ops, "fresh", lambda *of, filler=filler: fresh(*of).fill_(filler))
            found.append(call(dtype, V, device, backend, chunk_rows=chunk_rows))
        for values in zip(*found, strict=True):
            assert torch.equal(values[0], values[1])
            assert torch.equal(values[0], values[2])
            assert values[0].isfinite().all()


def test_the_budget_holds_the_padded_rows():
    for V, size in ((50257, 2), (151669, 2), (128257, 4), (151936, 2)):
        for device, budget in head_ops.CHUNK_BYTES.items():
            rows = head_ops.default_chunk_rows(V, size, device)
            row_bytes = head_ops.row_stride(V) * size
            assert rows * row_bytes <= budget or rows == head_ops.MIN_CHUNK_ROWS
            assert rows % head_ops.GEMM_ROWS == 0
        frozen = head_ops.default_chunk_rows(V, size, "cpu", frozen=True)
        assert frozen * row_bytes <= head_ops.FROZEN_CHUNK_BYTES or frozen == head_ops.MIN_FROZEN_ROWS
        assert head_ops.default_chunk_rows(V, size, "cuda", frozen=True) == rows, "the last of the devices"
    wide = [head_ops.default_chunk_rows(262144, 4, "cpu", frozen) for frozen in (False, True)]
    assert wide == [head_ops.MIN_CHUNK_ROWS, head_ops.MIN_FROZEN_ROWS]


@pytest.mark.parametrize("has_products", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_product_has_no_float32_copy(dtype, has_products, monkeypatch):
    """And is the same as before, to the bit where the sum of chunks is one product."""
    monkeypatch.setattr(products, "has_products", lambda dtype: has_products or dtype == torch.float32)
    made, fresh = [], head_ops.fresh
    monkeypatch.setattr(head_ops, "fresh", lambda *of: made.append(fresh(*of)) or made[-1])
    V = 4099
    whole = call(dtype, V)
    heads = [t for t in made if t.shape == (V, D)]
    # float16 by products of its own, whose range they may leave before the loss scale is taken back
    kept_in_32_bits = dtype == torch.float16 and has_products
    assert [t.dtype for t in heads] == ([torch.float32, dtype] if kept_in_32_bits else [dtype])
    assert whole[3].data_ptr() == heads[-1].data_ptr(), "the caller has that memory, no copy"
    made.clear()
    chunks = call(dtype, V, chunk_rows=16)
    heads = [t for t in made if t.shape == (V, D)]
    assert [t.dtype for t in heads] == ([dtype] if dtype == torch.float32 else [torch.float32, dtype])
    for one, other in zip(whole, chunks, strict=True):
        torch.testing.assert_close(
            one.float(), other.float(), rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
        )


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_an_upstream_gradient_takes_no_memory(dtype, monkeypatch):
    """The gradients are scaled where they are, rounded once."""
    made, fresh = [], head_ops.fresh
    monkeypatch.setattr(head_ops, "fresh", lambda *of: made.append(fresh(*of)) or made[-1])
    torch.manual_seed(0)
    hidden, weight = torch.randn(N, D).to(dtype).requires_grad_(), torch.randn(300, D).to(dtype).requires_grad_()
    labels, advantages = torch.randint(300, (N,)), torch.randn(N)

    def backward(upstream):
        hidden.grad = weight.grad = None
        loss = ppg.linear_policy_loss(hidden, weight, labels, advantages, backend="cpu").loss
        loss.backward(torch.tensor(upstream))
        assert weight.grad.data_ptr() == made[-1].data_ptr()
        return hidden.grad, weight.grad

    for one, third in zip(backward(1.0), backward(1 / 3), strict=True):
        assert torch.equal(third, (one.double() * torch.tensor(1 / 3).double()).to(dtype))


@pytest.mark.parametrize("logits_dtype", [None, "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_product_reads_what_lies_between_the_rows(monkeypatch, dtype, logits_dtype):
    """Rows of a chunk have gaps where the vocabulary does not fill their last line. oneDNN's products on AMX read them,
    times 0: memory in which somebody else has left NaN must not reach a gradient. On every CPU the gaps of what the
    products were given are zeros."""
    chunks = []

    def used_before(like, shape, dtype=None):
        memory = like.new_full(shape, torch.nan, dtype=dtype or like.dtype)
        if tuple(shape)[1] != 64:  # not the gradient of the head
            chunks.append(memory)
        return memory

    monkeypatch.setattr(head_ops, "fresh", used_before)
    monkeypatch.setattr(products, "has_products", lambda dtype: True)
    torch.manual_seed(0)
    x, w = torch.randn(96, 64).to(dtype).requires_grad_(), (torch.randn(3000, 64) / 8).to(dtype).requires_grad_()
    labels, options = torch.randint(3000, (96,)), {"chunk_rows": 32, "logits_dtype": logits_dtype}
    ppg.linear_policy_loss(x, w, labels, torch.ones(96), **options).loss.backward()
    assert x.grad is not None
    assert w.grad is not None
    assert x.grad.isfinite().all()
    assert w.grad.isfinite().all()
    leaf = x.detach().requires_grad_()
    ppg.linear_token_logprobs(leaf, w.detach(), labels, **options).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert len(chunks) >= 2
    for memory in chunks:  # as the logits were, or as their gradient was rounded in place
        rounded = memory.view(dtype).view(-1, memory.shape[1])
        assert any(bool((rows[:32, 3000:] == 0).all()) for rows in (memory, rounded))

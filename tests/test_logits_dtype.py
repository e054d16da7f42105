"""float32 logits of 16-bit operands: exact log-probs, a gradient that is rounded once or not at all, no more memory."""

import pytest
import torch

import ppg_fast as ppg
from ppg_fast import native, ops
from ppg_fast.ops import head as head_ops
from ppg_fast.ops import products

HALVES = (torch.bfloat16, torch.float16)
N, D, V = 25, 64, 501


@pytest.fixture(params=[True, False], ids=["16-bit products", "float32 products"])
def multiplies(request, monkeypatch):
    """On a CPU that has products of 16-bit matrices, and on one that has not."""
    monkeypatch.setattr(products, "has_products", lambda dtype: request.param or dtype == torch.float32)
    return request.param


def confident(dtype, device="cpu", bias=True):
    """A head and tokens of p = 0.9999 about, between masked ones that hold NaN."""
    torch.manual_seed(0)
    weight, labels, advantages = torch.randn(V, D), torch.randint(V, (N,)), 64 * torch.randn(N)
    of_label = weight[labels]
    hidden = 18 * of_label / of_label.norm(dim=1, keepdim=True) ** 2 + 0.01 * torch.randn(N, D)
    labels[::4], hidden[::4] = -100, torch.nan
    given = hidden, weight, *([0.1 * torch.randn(V)] if bias else [])
    leaves = [t.to(device, dtype).requires_grad_() for t in given]
    return leaves, labels.to(device), advantages.to(device)


def call(loss, leaves, labels, advantages, **options):
    """Log-probs, and the gradients of -sum A l."""
    bias = leaves[2] if len(leaves) > 2 else None
    if loss == "logprobs":
        logprobs = ppg.linear_token_logprobs(*leaves[:2], labels, bias=bias, **options)
        total = -(advantages * logprobs).sum()
    else:
        spec = ppg.PolicyLossSpec("gspo" if loss == "gspo" else "ppo")
        reduction = "none" if loss == "none" else "sum"
        out = ppg.linear_policy_loss(
            *leaves[:2], labels, advantages, bias=bias, spec=spec, reduction=reduction, **options
        )
        logprobs, total = out.logprobs, out.loss.sum()
    return logprobs.detach(), torch.autograd.grad(total, leaves)


def truth(leaves, labels, advantages):
    """The same in float64: on-policy, every loss has that gradient."""
    exact = [t.detach().double().requires_grad_() for t in leaves]
    active = (labels >= 0).nonzero().squeeze(1)
    z = torch.nn.functional.linear(exact[0][active], *exact[1:])
    l = torch.log_softmax(z, -1).gather(1, labels[active, None])[:, 0]
    logprobs = torch.zeros(len(labels), dtype=torch.float64, device=z.device).index_put((active,), l)
    return logprobs.detach(), torch.autograd.grad(-(advantages.double()[active] * l).sum(), exact)


def row_errors(found, expected):
    """Relative error of each row that is not zero."""
    size = expected.norm(dim=-1)
    return ((found.double() - expected).norm(dim=-1) / size)[size > 0]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_confident_rows_are_exact(backend, device, multiplies, dtype):
    simulated = backend in ("triton", "cuda") and device == "cpu"
    if simulated and not (multiplies and dtype == torch.bfloat16):
        pytest.skip("simulated, its row kernels are what differs: float32, and one rounding")
    leaves, labels, advantages = confident(dtype, device)
    l, expected = truth(leaves, labels, advantages)
    options = {"backend": backend, "logits_dtype": "float32", "chunk_rows": 16}
    bound = (16 if dtype == torch.float16 else 2) * torch.finfo(dtype).eps  # one loss scale for all rows of float16
    for loss in ("sum", "none") if simulated else ("sum", "none", "gspo", "logprobs"):
        logprobs, gradients = call(loss, leaves, labels, advantages, **options)
        assert (logprobs.double() - l).abs().max() < 1e-6
        assert row_errors(gradients[0], expected[0]).max() < bound
        assert (gradients[0][labels < 0] == 0).all()
        for found, exact in zip(gradients[1:], expected[1:], strict=True):
            assert found.dtype == dtype
            assert row_errors(found.flatten(), exact.flatten()) < bound / 2


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_logits_of_their_own_dtype_are_not(multiplies, dtype):
    """What float32 logits are for; by either kind of product the logits are rounded alike."""
    leaves, labels, advantages = confident(dtype)
    logprobs, gradients = call("sum", leaves, labels, advantages, logits_dtype=dtype)
    l, expected = truth(leaves, labels, advantages)
    assert 1e-6 < (logprobs.double() - l).abs().max() < 1e-4
    for found, exact in zip(gradients[1:], expected[1:], strict=True):
        assert 3 < row_errors(found.flatten(), exact.flatten()) / torch.finfo(dtype).eps < 8


def test_the_default_is_what_is_multiplied_fastest(multiplies):
    leaves, labels, advantages = confident(torch.bfloat16)
    by_default, half, whole = (
        call("sum", leaves, labels, advantages, logits_dtype=given) for given in (None, torch.bfloat16, "float32")
    )
    assert torch.equal(by_default[0], (half if multiplies else whole)[0])
    assert not torch.equal(half[0], whole[0])
    for device in ("cuda", "xpu"):
        assert ops.product_dtype(torch.bfloat16, device) == torch.bfloat16
    assert ops.product_dtype(torch.float32, "cpu") == torch.float32


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_row_has_the_same_bits_in_any_chunk(multiplies, dtype):
    leaves, labels, advantages = confident(dtype)
    options = {"logits_dtype": "float32"}
    logprobs, gradients = call("sum", leaves, labels, advantages, **options)
    for loss, chunk_rows in (("sum", 16), ("none", 16), ("logprobs", 32), ("gspo", None)):
        again, others = call(loss, leaves, labels, advantages, chunk_rows=chunk_rows, **options)
        assert torch.equal(again, logprobs), loss
        if loss == "sum":
            assert torch.equal(others[0], gradients[0])


@pytest.mark.parametrize("n", [1, 16, 17, 48, 100])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_gradient_is_rounded_in_its_own_memory(backend, device, monkeypatch, dtype, n):
    if backend == "reference":
        pytest.skip("reference: plain PyTorch, no chunks of its own")
    monkeypatch.setattr(products, "has_products", lambda _: True)
    kernels = ppg.backends.load(backend)
    hidden, weight = torch.randn(n, D).to(device, dtype), torch.randn(V, D).to(device, dtype)
    head = head_ops.Head(hidden, weight, None, 1000, (True, True, False), kernels, float32=True)
    (chunk,) = head.chunks(torch.arange(n, device=device))
    chunk.logits[0, ::7] = torch.nan
    expected = chunk.logits.to(dtype)
    found = head._rounded(chunk.logits)
    assert found.untyped_storage().data_ptr() == chunk.logits.untyped_storage().data_ptr()
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))
    assert found[0, ::7].isnan().all()
    assert found.stride(0) % head_ops.LINE == 0


def test_the_budget_is_that_of_bytes(multiplies, monkeypatch):
    """One chunk of logits, of half as many rows, and what is rounded lies in it."""
    made, fresh = [], head_ops.fresh
    monkeypatch.setattr(head_ops, "fresh", lambda *of: made.append(fresh(*of)) or made[-1])
    monkeypatch.setitem(head_ops.CHUNK_BYTES, "cpu", 64 * 512 * 4)
    monkeypatch.setattr(head_ops, "MIN_CHUNK_ROWS", 16)
    hidden, weight = torch.randn(300, D).bfloat16().requires_grad_(), torch.randn(V, D).bfloat16()
    labels, advantages = torch.randint(V, (300,)), torch.randn(300)
    for dtype, rows in ((torch.bfloat16, 112), ("float32", 64)):
        made.clear()
        call("sum", [hidden, weight.requires_grad_()], labels, advantages, logits_dtype=dtype)
        (logits,) = (t for t in made if t.shape[1] != D)
        spare = head_ops.SPARE if multiplies and dtype == "float32" else 0
        assert logits.shape[0] == rows + spare


def test_under_autocast_it_is_the_dtype_of_autocast():
    leaves, labels, advantages = confident(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        half, whole = (
            call("sum", leaves, labels, advantages, logits_dtype=given) for given in (torch.bfloat16, "float32")
        )
    rounded = [t.detach().bfloat16().requires_grad_() for t in leaves]
    l, expected = truth(rounded, labels, advantages)
    assert (whole[0].double() - l).abs().max() < 1e-6 < (half[0].double() - l).abs().max()
    assert row_errors(whole[1][0], expected[0]).max() < torch.finfo(torch.bfloat16).eps


def test_a_compiled_call_has_the_same_bits():
    leaves, labels, advantages = confident(torch.bfloat16)

    def loss(hidden, weight, bias):
        return ppg.linear_policy_loss(hidden, weight, labels, advantages, bias=bias, logits_dtype="float32").loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    for one, other in zip(
        torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True
    ):
        assert torch.equal(one, other)


def test_a_bound_on_the_active_rows_holds(multiplies):
    leaves, labels, advantages = confident(torch.bfloat16)
    options = {"logits_dtype": torch.float32}
    expected = call("sum", leaves, labels, advantages, **options)
    found = call("sum", leaves, labels, advantages, max_active_rows=N, **options)
    assert torch.equal(found[0], expected[0])
    with pytest.raises(ValueError, match="max_active_rows must be at least"):
        call("sum", leaves, labels, advantages, max_active_rows=3, **options)


def test_partial_returns_take_it_too():
    (hidden, weight, _), labels, _ = confident(torch.bfloat16)
    rewards, turns = torch.ones(1, 1), torch.zeros(1, N, dtype=torch.int64)
    given = hidden[None], weight, labels[None], rewards, turns, ppg.Greedy()
    out = ppg.linear_partial_policy_loss(*given, logits_dtype="float32")
    same = ppg.linear_token_logprobs(hidden, weight, labels, logits_dtype="float32")
    assert torch.equal(out.logprobs[0], same)


@pytest.mark.parametrize("given", ["float16", "fp32", "torch.float32", torch.float64, 4])
def test_another_dtype_is_refused(given):
    leaves, labels, advantages = confident(torch.bfloat16)
    rule = "logits_dtype must be float32 or the dtype of hidden and weight, torch.bfloat16, got "
    with pytest.raises(ValueError, match="logits_dtype must be float32 or") as error:
        call("sum", leaves, labels, advantages, logits_dtype=given)
    assert str(error.value) == rule + repr(given)
    with pytest.raises(ValueError, match=r"dtype of hidden and weight, torch[.]float32"):
        call("sum", [t.detach().float() for t in leaves], labels, advantages, logits_dtype="bfloat16")


def test_any_kernels_round_the_same(multiplies):
    """What the row kernel wrote is what is multiplied: a gradient of one element by hand."""
    hidden, weight = torch.ones(1, 8).bfloat16(), torch.randn(16, 8).bfloat16()
    head = head_ops.Head(hidden, weight, None, 16, (True, True, False), native, float32=True)

    def kernel(rows, logits):
        logits.zero_()
        logits[0, 0, 3] = 1 + 2.0**-12

    head.sweep(torch.arange(1), kernel, True)
    d_hidden, d_weight, _ = head.gradients()
    exact = 1.0 if multiplies else 1 + 2.0**-12
    assert torch.equal(d_hidden[0], (exact * weight[3].double()).to(torch.bfloat16))
    assert torch.equal(d_weight[3], torch.full((8,), exact).bfloat16())


def test_the_trainer_and_a_patched_model_pass_it_on(monkeypatch):
    """Where 16 bits are multiplied, float32 logits are what differs; losses and log-probs have the same."""
    from ppg_fast.dialogues import Sample
    from ppg_fast.dialogues.packing import pack
    from ppg_fast.integrations.transformers import patch
    from ppg_fast.models import make_model
    from ppg_fast.models.causal_lm import PolicyModule

    monkeypatch.setattr(products, "has_products", lambda _: True)
    model = make_model(vocab_size=64, width=32, layers=1).bfloat16()
    batch = pack([Sample(list(range(12)), [-1] * 4 + [0] * 8, [1.0], 0)])
    with torch.no_grad():
        half, whole = (
            PolicyModule(model, None, given)(batch, None, ppg.PolicyLossSpec()) for given in (None, "float32")
        )
        out = PolicyModule(model, None, "float32")(batch, torch.ones(1, 1), ppg.PolicyLossSpec())
    assert torch.equal(out.logprobs, whole)
    assert not torch.equal(half, whole)
    with patch(model, logits_dtype="float32"), torch.no_grad():
        patched = model(input_ids=batch.tokens[None], shift_labels=batch.labels[None]).logprobs
    assert torch.equal(patched[0], whole)

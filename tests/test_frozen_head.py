"""A frozen head: every loss on log-probs takes two GEMMs, the logits and what their gradient is a multiple of."""

import importlib
from dataclasses import replace

import pytest
import torch
from cases import LOSSES
from closeness import assert_as_good_as
from test_linear import D, N, V, inputs, textbook

import ppg_fast as ppg
from ppg_fast import ops
from ppg_fast.contract import Chunks, Wanted
from ppg_fast.ops import head as head_ops

logprob_ops = importlib.import_module("ppg_fast.ops.linear_token_logprobs")
GSPO = replace(LOSSES["ppo"], loss_type="gspo", temperature=0.7)


@pytest.fixture
def products(monkeypatch):
    """Rows that went through the GEMM of the logits and through those of the gradient so far."""
    seen = {"logits": 0, "gradient": 0}
    chunks, accumulate = head_ops.Head.chunks, head_ops.Head.accumulate

    def counting_chunks(self, *arguments):
        for chunk in chunks(self, *arguments):
            seen["logits"] += chunk.rows.numel()
            yield chunk

    def counting_accumulate(self, chunk):
        seen["gradient"] += chunk.rows.numel()
        accumulate(self, chunk)

    monkeypatch.setattr(head_ops.Head, "chunks", counting_chunks)
    monkeypatch.setattr(head_ops.Head, "accumulate", counting_accumulate)
    return seen


def frozen(dtype, device):
    """Hidden states that require a gradient, a head that does not, and what a loss needs."""
    (hidden, weight, bias), labels, advantages, arguments = inputs(dtype, device)
    return (hidden.requires_grad_(), weight, bias), labels, advantages, arguments


def logprobs_of(head, labels, **options):
    return ppg.linear_token_logprobs(*head[:2], labels, bias=head[2], **options)


def loss_of(head, labels, advantages, arguments, **options):
    return ppg.linear_policy_loss(*head[:2], labels, advantages, bias=head[2], **arguments, **options).loss


@pytest.mark.parametrize("loss", ["log-probs", "with entropy", "gspo", "none", "float16"])
def test_two_products_and_none_in_the_backward_pass(loss, products):
    dtype = torch.float16 if loss == "float16" else torch.float32
    head, labels, *rest = frozen(dtype, "cpu")
    if loss in ("log-probs", "with entropy"):
        out = logprobs_of(head, labels, entropy=loss == "with entropy", backend="cpu")
        value = (out if isinstance(out, torch.Tensor) else out[0]).sum()
    else:
        options = {"spec": GSPO} if loss == "gspo" else {"reduction": "none"} if loss == "none" else {}
        value = loss_of(head, labels, *rest, **options, backend="cpu").sum()
    active = int((labels != -100).sum())
    assert products == {"logits": active, "gradient": active}
    value.backward()
    assert products == {"logits": active, "gradient": active}
    assert head[0].grad.isfinite().all()


def test_no_gradient_no_second_product(products):
    head, labels, *rest = frozen(torch.float32, "cpu")
    calls = (lambda: logprobs_of(head, labels, backend="cpu")), (lambda: loss_of(head, labels, *rest, spec=GSPO))
    with torch.no_grad():
        quiet = [call() for call in calls]
    head[0].requires_grad_(False)
    assert [call().equal(other) for call, other in zip(calls, quiet, strict=True)] == [True, True]
    assert products["gradient"] == 0


@pytest.mark.parametrize(("dtype", "softcap"), [(torch.float32, 4.0), (torch.bfloat16, 0.0)], ids=str)
def test_the_same_bits_with_and_without_a_gradient(backend, device, dtype, softcap):
    head, labels, *_ = frozen(dtype, device)
    options = {"logit_softcap": softcap, "temperature": 0.7, "entropy": True, "backend": backend}
    trained = head[0], head[1].clone().requires_grad_(), head[2]
    with torch.no_grad():
        quiet = logprobs_of(head, labels, **options)
    for found in (logprobs_of(head, labels, **options), logprobs_of(trained, labels, **options)):
        assert all(torch.equal(a, b) for a, b in zip(found, quiet, strict=True))


@pytest.mark.parametrize(("loss", "chunk_rows"), [("gspo", 5), ("ppo", 1000)])
def test_the_gradient_is_as_good_as_the_textbooks(backend, device, loss, chunk_rows):
    head, labels, advantages, arguments = frozen(torch.float32, device)
    spec = replace(LOSSES["ppo"], loss_type=loss, kl_coef=0.1, z_coef=0.01, temperature=0.7, logit_softcap=4.0)
    loss = loss_of(
        head, labels, advantages, arguments, spec=spec, reduction="none", chunk_rows=chunk_rows, backend=backend
    )
    (actual,) = torch.autograd.grad(loss.sum(), head[0])
    plain, truth = (
        textbook(head, labels, advantages, arguments, dtype, spec=spec, reduction="sum")["d_hidden"]
        for dtype in (torch.float32, torch.float64)
    )
    assert_as_good_as(actual, plain, truth, "d_hidden")
    assert (actual[labels == -100] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_error_is_that_of_a_head_that_trains(device, dtype):
    """Against float64: the product of 16 bits is rounded once more where it is scaled, and never overflows."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(256, 64, device=device).to(dtype), torch.randint(3000, (256,), device=device)
    weight = (torch.randn(3000, 64, device=device) / 3).to(dtype)
    upstream = torch.randn(256, device=device) * 10.0 ** torch.randint(-3, 3, (256,), device=device)
    errors = []
    wide = hidden.double().requires_grad_()
    logprobs = torch.log_softmax(wide @ weight.double().t(), -1).gather(1, labels[:, None]).squeeze(1)
    (truth,) = torch.autograd.grad((logprobs * upstream).sum(), wide)
    for trains in (True, False):
        leaf, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trains)
        (found,) = torch.autograd.grad((ppg.linear_token_logprobs(leaf, head, labels) * upstream).sum(), leaf)
        errors.append(float(((found.double() - truth).norm(dim=1) / truth.norm(dim=1)).max()))
    assert errors[1] < errors[0] + torch.finfo(dtype).eps / 2, errors


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("softcap", "temperature"), [(0.0, 0.7), (4.0, "per token")])
def test_a_log_sum_exp_takes_no_further_product(backend, device, products, softcap, temperature, bias):
    """Its gradient is the label's row of the head less what was kept; masked rows get exact zeros."""
    head, labels, *_ = frozen(torch.float32, device)
    head = head if bias else (*head[:2], None)
    active, rows = labels != -100, torch.arange(N, device=device)
    by = torch.linspace(0.5, 2.0, N, device=device) if temperature == "per token" else temperature
    l, lse = logprobs_of(head, labels, lse=True, temperature=by, logit_softcap=softcap, backend=backend, chunk_rows=7)
    upstream = [torch.randn(N, device=device) for _ in range(2)]
    upstream[0] = torch.where(rows % 3 == 0, upstream[1], upstream[0])  # a first token of soft Q-learning
    upstream[0][8], upstream[1][8], upstream[1][9] = 0.0, 0.0, 0.0
    (d_hidden,) = torch.autograd.grad((l, lse), head[0], upstream)
    n = int(active.sum())
    assert backend == "reference" or products == {"logits": n, "gradient": n}
    found, known = {"l": l, "lse": lse, "d_hidden": d_hidden}, []
    for dtype in (torch.float32, torch.float64):
        x, w, b = (None if t is None else t.detach().to(dtype) for t in head)
        x = x.nan_to_num().requires_grad_()
        z = torch.nn.functional.linear(x, w, b)
        z = (softcap * torch.tanh(z / softcap) if softcap else z) / (by[:, None].to(dtype) if softcap else by)
        sums = torch.where(active, z.logsumexp(-1), 0.0)
        logprob = torch.where(active, torch.log_softmax(z, -1).gather(1, labels.clamp(min=0)[:, None])[:, 0], 0.0)
        d = torch.autograd.grad((logprob, sums), x, [u.to(dtype) for u in upstream])[0]
        known.append({"l": logprob, "lse": sums, "d_hidden": d})
    for name in found:
        assert_as_good_as(found[name], *(of[name].detach().cpu() for of in known), name)
    assert (d_hidden[~active | (rows == 8)] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_log_sum_exps_error_in_16_bits_is_that_of_a_head_that_trains(device, dtype):
    torch.manual_seed(0)
    hidden, labels = torch.randn(64, 64, device=device).to(dtype), torch.randint(3000, (64,), device=device)
    weight = (torch.randn(3000, 64, device=device) / 3).to(dtype)
    upstream, errors = [torch.randn(64, device=device) for _ in range(2)], []
    wide = hidden.double().requires_grad_()
    z = wide @ weight.double().t()
    outputs = torch.log_softmax(z, -1).gather(1, labels[:, None]).squeeze(1), z.logsumexp(-1)
    (truth,) = torch.autograd.grad(outputs, wide, [u.double() for u in upstream])
    for trains in (True, False):
        leaf, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trains)
        (found,) = torch.autograd.grad(ppg.linear_token_logprobs(leaf, head, labels, lse=True), leaf, upstream)
        errors.append(float(((found.double() - truth).norm(dim=1) / truth.norm(dim=1)).max()))
    assert errors[1] < 2 * errors[0] + torch.finfo(dtype).eps, errors


def test_rows_that_do_not_count_hold_anything(backend, device):
    """Masked rows get exact zeros, whatever comes down to them; an active NaN stays in its row, and only where it is
    asked for."""
    if backend == "reference":
        pytest.skip("reference: PyTorch's own product of 0 and NaN")
    head, labels, *_ = frozen(torch.float32, device)
    with torch.no_grad():
        head[0][0], head[0][4] = torch.nan, torch.nan  # active: every fourth row is masked
    upstream = torch.where(labels == -100, torch.nan, 1.0)
    upstream[4] = 0.0
    (d_hidden,) = torch.autograd.grad(logprobs_of(head, labels, backend=backend), head[0], upstream)
    assert d_hidden[0].isnan().all()
    assert (d_hidden[(labels == -100) | (torch.arange(N, device=device) == 4)] == 0).all()
    assert d_hidden[1:].isfinite().all()


def test_a_second_backward_pass_is_the_first(backend, device):
    head, labels, advantages, arguments = frozen(torch.float32, device)
    if backend == "reference":
        pytest.skip("reference: plain PyTorch")
    loss = loss_of(head, labels, advantages, arguments, spec=GSPO, backend=backend)
    first, second = (torch.autograd.grad(loss, head[0], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    (again,) = torch.autograd.grad(loss, head[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        again.sum().backward()


def test_an_entropy_that_is_differentiated_computes_the_logits_again(products):
    head, labels, advantages, arguments = frozen(torch.float32, "cpu")
    trained = head[0], head[1].clone().requires_grad_(), head[2]
    active, found = int((labels != -100).sum()), []
    for one in (head, trained):
        products.update(logits=0, gradient=0)
        logprobs, entropy = logprobs_of(one, labels, temperature=0.7, entropy=True, backend="cpu")
        found.append(torch.autograd.grad((logprobs * 2 - entropy).sum(), head[0])[0])
    assert torch.equal(*found)
    products.update(logits=0, gradient=0)
    loss_of(head, labels, advantages, arguments, spec=replace(GSPO, entropy_coef=0.1), backend="cpu").backward()
    assert products == {"logits": 2 * active, "gradient": active}, "three products where the loss has an entropy term"


@pytest.mark.parametrize("entropy", [False, True])
def test_what_is_kept_is_one_row_of_an_active_token(entropy):
    """No log-prob keeps the hidden states or the head, unless an entropy may need them again."""
    head, labels, *_ = frozen(torch.float32, "cpu")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        logprobs_of(head, labels, entropy=entropy, backend="cpu")
    wide = [tuple(t.shape) for t in kept if t.dim() == 2 and t.numel()]
    assert wide == ([(N, D), (V, D)] if entropy else []) + [(int((labels != -100).sum()), D)]


# ---- rows that are bounded by the caller, not counted by the host ----------------------------------------------------
@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(logprob_ops, "counted", lambda labels, bound, validate: bound is None or validate)


@pytest.mark.parametrize("bound", [18, 4 * N])
def test_bounded_rows_give_the_same(backend, device, as_on_a_gpu, bound):
    head, labels, advantages, arguments = frozen(torch.float32, device)
    options = {"spec": GSPO, "chunk_rows": 7, "backend": backend}
    expected, actual = (
        torch.autograd.grad(loss_of(head, labels, advantages, arguments, **options, max_active_rows=most), head[0])[0]
        for most in (None, bound)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    if backend != "reference":
        logprobs = logprobs_of(head, labels, max_active_rows=bound, backend=backend)
        (d_hidden,) = torch.autograd.grad(logprobs, head[0], torch.where(labels == -100, torch.nan, 1.0))
        assert d_hidden.isfinite().all(), "masked rows hold anything"
    if backend != "reference" and bound == 18:
        logprobs = logprobs_of(head, labels, max_active_rows=17, backend=backend)
        (d_hidden,) = torch.autograd.grad(logprobs.sum(), head[0])
        assert d_hidden.isnan().any(1).sum() == 17, "more rows than the bound are NaN"


# ---- under tracers ---------------------------------------------------------------------------------------------------
def test_the_op_is_well_formed():
    head, labels, *_ = frozen(torch.float32, "cpu")
    clean = head[0].detach().nan_to_num().requires_grad_()
    flags = list(Wanted(entropy=True, score_norms=False, gradient=True, validate=False))
    given = (clean, *head[1:], labels, None, [0.7, 3.0], flags, Chunks(8, 20).pack(), "cpu")
    torch.library.opcheck(ops.linear_token_logprobs_op, given)
    flags = list(Wanted(entropy=False, score_norms=False, gradient=True, validate=False, lse=True))
    torch.library.opcheck(ops.linear_token_logprobs_op, (*given[:6], flags, *given[7:]))


def test_grad_mode_changes_no_chunk(monkeypatch):
    """The log-probs of a rollout and of its training step come from the same products, so that their ratio is 1."""
    head, labels, *_ = frozen(torch.float32, "cpu")
    asked, rows = [], ops.default_chunk_rows
    monkeypatch.setattr(ops, "default_chunk_rows", lambda *of: asked.append(of[-1]) or rows(*of))
    for trains in (False, True):
        logprobs_of((head[0], head[1].requires_grad_(trains), head[2]), labels)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logprobs_of(head, labels)
    assert asked == [True, True, False, False]

"""The losses from hidden states: equal to the losses from logits, whatever the chunk, in less memory and with fewer
GEMMs."""

import importlib
from dataclasses import replace

import pytest
import torch
from cases import LOSSES, TERMS
from closeness import assert_as_good_as

import ppg_fast as ppg
from ppg_fast import ops, reference
from ppg_fast.contract import Chunks, PerRow, RowArguments, Wanted
from ppg_fast.functional.loss import LossRows
from ppg_fast.ops import head as head_ops
from ppg_fast.ops import rows as rows_ops

loss_ops = importlib.import_module("ppg_fast.ops.linear_policy_loss")  # `ops` has functions of these names
logprob_ops = importlib.import_module("ppg_fast.ops.linear_token_logprobs")

N, D, V = 23, 16, 209


def inputs(dtype, device, bias=True):
    """Hidden states with NaN in masked rows, a head, and the per-token arguments."""
    hidden, weight = torch.randn(N, D), torch.randn(V, D)
    labels, rows = torch.randint(V, (N,)), torch.arange(N)
    labels[rows % 4 == 3] = -100
    hidden[rows % 4 == 3] = torch.nan
    advantages = torch.randn(N).where(rows % 4 != 2, torch.tensor(0.0))
    z = (hidden.nan_to_num().to(dtype) @ weight.to(dtype).t()).float()
    old = ppg.token_logprobs(z, labels, temperature=0.7, backend="reference") + 0.3 * torch.randn(N)
    arguments = {
        "old_logprobs": old,
        "ref_logprobs": old + 0.2 * torch.randn(N),
        "rollout_logprobs": old + 0.1 * torch.randn(N),
    }
    moved = {name: t.to(device) for name, t in arguments.items()}
    head = (hidden.to(device, dtype), weight.to(device, dtype), torch.randn(V).to(device, dtype) if bias else None)
    return head, labels.to(device), advantages.to(device), moved


def textbook(head, labels, advantages, arguments, dtype, **options):
    """The logits in ``dtype``, the loss of them by the reference, gradients of the three inputs."""
    hidden, weight, bias = (None if t is None else t.detach().to(dtype).requires_grad_() for t in head)
    active = (labels != -100).nonzero().squeeze(1)
    logits = torch.zeros(labels.numel(), V, dtype=dtype, device=hidden.device)
    logits = logits.index_put((active,), torch.nn.functional.linear(hidden[active], weight, bias))
    rows = LossRows.of(labels, advantages, labels.device, **arguments, **options)
    *per_row, _, nll = (None if t is None else t.to(dtype) for t in rows.per_row)
    more = rows.spec, rows.groups, nll
    loss, logprob, entropy = reference.policy_loss(logits, rows.tokens.labels, *per_row, *more)
    grads = torch.autograd.grad(loss.sum(), [t for t in (hidden, weight, bias) if t is not None])
    named = dict(zip(("d_hidden", "d_weight", "d_bias"), grads, strict=False))
    return {
        k: v.detach().cpu() for k, v in {"loss": loss.sum(), "logprob": logprob, "entropy": entropy, **named}.items()
    }


def ours(head, labels, advantages, arguments, backend, **options):
    hidden, weight, bias = (None if t is None else t.detach().requires_grad_() for t in head)
    out = ppg.linear_policy_loss(hidden, weight, labels, advantages, bias=bias, **arguments, backend=backend, **options)
    grads = torch.autograd.grad(out.loss, [t for t in (hidden, weight, bias) if t is not None])
    return {"loss": out.loss, "logprob": out.logprobs, "entropy": out.entropy} | dict(
        zip(("d_hidden", "d_weight", "d_bias"), grads, strict=False)
    )


@pytest.mark.parametrize("chunk_rows", [1, 5, 1000])
@pytest.mark.parametrize("loss", [*LOSSES, "gspo"])
def test_matches_the_loss_from_logits(backend, device, loss, chunk_rows):
    terms = "all-new" if chunk_rows == 5 and loss in LOSSES else "everything"
    spec = replace(LOSSES.get(loss, replace(LOSSES["ppo"], loss_type="gspo")), **TERMS[terms])
    head, labels, advantages, arguments = inputs(torch.float32, device)
    if chunk_rows == 5:
        arguments["nll_weights"] = torch.rand(N, device=device) * (torch.arange(N, device=device) % 3 > 0)
    options = {"spec": spec, "reduction": "sum"}
    actual = ours(head, labels, advantages, arguments, backend, chunk_rows=chunk_rows, **options)
    plain, truth = (
        textbook(head, labels, advantages, arguments, dtype, **options) for dtype in (torch.float32, torch.float64)
    )
    for name in truth:
        assert_as_good_as(actual[name], plain[name], truth[name], name)
    assert (actual["d_hidden"][labels == -100] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_good_as_its_logits(backend, device, dtype):
    """Gradients of 16-bit inputs, against the loss of logits made by the same 16-bit GEMM."""
    head, labels, advantages, arguments = inputs(dtype, device)
    spec = LOSSES["ppo"]
    actual = ours(head, labels, advantages, arguments, backend, spec=spec, chunk_rows=7)
    hidden, weight, bias = (t.detach().requires_grad_() for t in head)
    clean = torch.where((labels != -100)[:, None], hidden, 0.0)
    out = ppg.policy_loss(
        torch.nn.functional.linear(clean, weight, bias), labels, advantages, spec=spec, **arguments, backend=backend
    )
    expected = dict(
        zip(("d_hidden", "d_weight", "d_bias"), torch.autograd.grad(out.loss, (hidden, weight, bias)), strict=True)
    )
    torch.testing.assert_close(actual["loss"], out.loss, rtol=2e-3, atol=2e-3)
    for name, grad in expected.items():
        difference = (actual[name].float() - grad.float()).norm() / grad.float().norm()
        assert difference < 8 * torch.finfo(dtype).eps, (name, difference)
        assert actual[name].dtype == dtype


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_frozen_inputs_get_no_gradient(backend, device, frozen):
    (hidden, weight, _), labels, advantages, arguments = inputs(torch.float32, device, bias=False)
    hidden.requires_grad_(frozen == "weight")
    weight.requires_grad_(frozen == "hidden")
    out = ppg.linear_policy_loss(hidden, weight, labels, advantages, spec=LOSSES["ppo"], **arguments, backend=backend)
    assert out.loss.requires_grad == (frozen != "both")
    if frozen != "both":
        out.loss.backward()
        assert (hidden.grad is not None, weight.grad is not None) == (frozen == "weight", frozen == "hidden")


def test_log_probs_of_hidden_states(backend, device):
    (hidden, weight, bias), labels, _, _ = inputs(torch.float32, device)
    hidden, weight, bias = (t.requires_grad_() for t in (hidden, weight, bias))
    options = {"temperature": torch.linspace(0.5, 1.5, N, device=device), "logit_softcap": 4.0, "entropy": True}
    logprobs, entropy = ppg.linear_token_logprobs(
        hidden, weight, labels, bias=bias, chunk_rows=4, backend=backend, **options
    )
    upstream = torch.randn(2, N, device=device)
    actual = torch.autograd.grad((logprobs * upstream[0] + entropy * upstream[1]).sum(), (hidden, weight, bias))
    active = (labels != -100)[:, None]
    z = torch.nn.functional.linear(torch.where(active, hidden, 0.0).double(), weight.double(), bias.double())
    expected_logprobs, expected_entropy = reference.token_logprobs(z, labels, options["temperature"].double(), 4.0)
    expected = torch.autograd.grad(
        (expected_logprobs * upstream[0] + expected_entropy * upstream[1]).sum(), (hidden, weight, bias)
    )
    torch.testing.assert_close(logprobs.double(), expected_logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=1e-5, atol=1e-5)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=2e-4, atol=2e-5)


def test_reduction_none_takes_any_upstream_gradient(backend, device):
    head, labels, advantages, arguments = inputs(torch.float32, device)
    upstream = torch.randn(N, device=device)
    hidden, weight, bias = (t.detach().requires_grad_() for t in head)
    options = {"spec": LOSSES["ppo"], "reduction": "none", **arguments}
    loss = ppg.linear_policy_loss(hidden, weight, labels, advantages, bias=bias, backend=backend, **options).loss
    actual = torch.autograd.grad(loss, (hidden, weight), upstream)
    hidden64 = torch.where((labels != -100)[:, None], hidden, 0.0)
    z = torch.nn.functional.linear(hidden64, weight, bias)
    loss = ppg.policy_loss(z, labels, advantages, backend="reference", **options).loss
    for a, e in zip(actual, torch.autograd.grad(loss, (hidden, weight), upstream), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


def test_only_full_rows_reach_the_gradient_gemms(monkeypatch):
    """Counts GEMM rows: FULL rows go through three, FORWARD-ONLY rows through one, SKIP rows through none."""
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
    (hidden, weight, _), labels, advantages, _ = inputs(torch.float32, "cpu", bias=False)
    full, active = int(((advantages != 0) & (labels != -100)).sum()), int((labels != -100).sum())
    for skip, expected in ((False, active), (True, full)):
        seen.update(logits=0, gradient=0)
        ppg.linear_policy_loss(
            hidden.requires_grad_(), weight, labels, advantages, skip_zero_advantages=skip, backend="cpu"
        )
        assert seen == {"logits": expected, "gradient": full}


def test_metrics_wait_until_they_are_read(monkeypatch):
    called, metrics = [], LossRows.metrics
    monkeypatch.setattr(LossRows, "metrics", lambda self, *of: called.append(self) or metrics(self, *of))
    (hidden, weight, _), labels, advantages, arguments = inputs(torch.float32, "cpu", bias=False)
    rows = hidden, weight, labels, advantages
    out, late = (ppg.linear_policy_loss(*rows, spec=LOSSES["ppo"], **arguments, backend="cpu") for _ in range(2))
    assert called == []
    assert {"entropy", "approx_kl", "clip_fraction", "active_tokens"} <= set(out.metrics)
    assert len(called) == 1
    arguments["old_logprobs"].add_(1.0)
    with pytest.raises(RuntimeError, match="old_logprobs was modified in place"):
        late.metrics["entropy"]


@pytest.mark.parametrize("bias", [True, False])
def test_ops_are_well_formed(backend, device, bias):
    if backend == "reference":
        pytest.skip("reference: plain PyTorch, no op")
    head, labels, advantages, _ = inputs(torch.float32, device, bias)
    head = [None if t is None else t.nan_to_num().requires_grad_() for t in head]
    gradients = [t is not None for t in head]
    rows = RowArguments(labels, PerRow(advantages, *[None] * 5), LOSSES["ppo"])
    flags = list(Wanted(entropy=True, score_norms=False, gradient=True, validate=False))
    arguments = (*head, *rows.pack(), flags, gradients, Chunks(8, None).pack(), backend)
    torch.library.opcheck(ops.linear_policy_loss_op, arguments)
    flags = list(Wanted(entropy=True, score_norms=False, gradient=False, validate=False))
    scored = (*head, labels, None, [0.7, 3.0], flags, Chunks(8, 20).pack(), backend)
    torch.library.opcheck(ops.linear_token_logprobs_op, scored)


# ---- rows that are bounded by the caller, not counted by the host ----------------------------------------------------
@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Counting rows costs a sync there, so a bound takes its place; here counting is free and would hide that path."""
    for module in (loss_ops, logprob_ops):
        monkeypatch.setattr(module, "counted", lambda labels, bound, validate: bound is None or validate)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("bound", [18, 20, N, 4 * N])
def test_bounded_rows_give_the_same(backend, device, as_on_a_gpu, bound, skip):
    """Masked rows full of NaN fill the chunks up to the bound and leave no trace."""
    head, labels, advantages, arguments = inputs(torch.float32, device)
    options = {"spec": LOSSES["ppo"], "chunk_rows": 7, "skip_zero_advantages": skip}
    expected = ours(head, labels, advantages, arguments, backend, **options)
    actual = ours(head, labels, advantages, arguments, backend, max_active_rows=bound, **options)
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        out = ppg.linear_policy_loss(
            *head[:2], labels, advantages, bias=head[2], max_active_rows=bound, backend=backend, **arguments, **options
        )
    torch.testing.assert_close(out.logprobs, expected["logprob"], rtol=1e-5, atol=1e-6)


def test_bounded_log_probs_give_the_same(backend, device, as_on_a_gpu):
    results = []
    for bound in (None, 18):
        (hidden, weight, bias), labels, _, _ = inputs(torch.float32, device)
        hidden, weight, bias = (t.requires_grad_() for t in (hidden, weight, bias))
        torch.manual_seed(1)
        upstream = torch.randn(N).where(torch.arange(N) % 3 != 0, torch.tensor(0.0)).to(device)
        options = {"bias": bias, "chunk_rows": 5, "backend": backend, "max_active_rows": bound}
        torch.manual_seed(0)
        logprobs = ppg.linear_token_logprobs(hidden, weight, labels, **options)
        results.append((logprobs.detach(), *torch.autograd.grad((logprobs * upstream).sum(), (hidden, weight, bias))))
        torch.manual_seed(0)
    for counted, bounded in zip(*results, strict=True):
        torch.testing.assert_close(bounded, counted, rtol=1e-5, atol=1e-6)


def test_more_rows_than_the_bound_are_an_error_or_nan(backend, device, as_on_a_gpu, monkeypatch):
    head, labels, advantages, arguments = inputs(torch.float32, device)
    options = {"spec": LOSSES["ppo"], "max_active_rows": 17, "backend": backend, **arguments}
    rule = "max_active_rows must be at least the number of active rows, got '17 for 18'"
    with pytest.raises(ValueError, match=rule):
        ppg.linear_policy_loss(*head[:2], labels, advantages, validate=True, **options)
    with pytest.raises(ValueError, match="max_active_rows must be an integer >= 1, got 0"):
        ppg.linear_token_logprobs(*head[:2], labels, max_active_rows=0, backend=backend)
    if backend != "reference":  # which counts
        out = ours(head, labels, advantages, {}, backend, spec=LOSSES["ppo"], max_active_rows=17)
        assert out["loss"].isnan()
        assert out["d_weight"].isnan().all()
        assert out["d_hidden"][(labels >= 0) & (advantages != 0)][:-1].isnan().all()
        logprobs = ppg.linear_token_logprobs(*head[:2], labels, max_active_rows=17, backend=backend)
        assert logprobs.isnan().sum() == 17
    if device == "cpu":  # by default counting is free there
        monkeypatch.undo()
        with pytest.raises(ValueError, match=rule):
            ppg.linear_policy_loss(*head[:2], labels, advantages, **options)


@pytest.mark.parametrize(("bound", "expected"), [(None, 1), (20, 0)])
def test_one_sync_or_none(as_on_a_gpu, monkeypatch, bound, expected):
    """Every way in which these functions could look at values, counted on the CPU; on a GPU tests/test_gpu.py asks the
    driver."""
    from torch.utils._python_dispatch import TorchDispatchMode

    looked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function.overloadpacket.__name__ in (
                "nonzero",
                "_local_scalar_dense",
                "masked_select",
                "unique_dim",
                "_unique2",
            ):
                looked.append(function)
            return function(*arguments, **(keywords or {}))

    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: (looked.append("tolist"), tolist(self))[1])
    for module in (loss_ops, logprob_ops):
        monkeypatch.setattr(module, "check_labels", lambda *_: None)  # looks on a CPU only
    (hidden, weight, bias), labels, advantages, _ = inputs(torch.float32, "cpu")
    rows = RowArguments(labels, PerRow(advantages, *[None] * 5), LOSSES["ppo"])
    flags = list(Wanted(entropy=True, score_norms=False, gradient=True, validate=False))
    chunks, scale = Chunks(8, bound).pack(), [0.7, 0.0]
    with Watch():
        loss_ops._loss_and_gradients(hidden, weight, bias, *rows.pack(), flags, [True] * 3, chunks, "cpu")
    assert len(looked) == expected
    flags = list(Wanted(entropy=True, score_norms=False, gradient=False, validate=False))
    with Watch():
        _, lse, entropy, *_ = logprob_ops._logprobs(hidden, weight, bias, labels, None, scale, flags, chunks, "cpu")
    assert len(looked) == 2 * expected
    with Watch():
        of_rows = [labels, lse, entropy, advantages, None, None, None]
        logprob_ops._logprobs_gradients(hidden, weight, bias, of_rows, scale, chunks, [True] * 3, "cpu")
    assert len(looked) == 3 * expected


@pytest.mark.parametrize("N", [0, 1, 5, 64, 1000])
def test_the_partition_is_stable(N):
    kind = torch.randint(3, (N,))
    for counting in (True, False):
        parts = rows_ops.partition(kind == 0, kind == 1, N, counting)
        full, forward = ((kind == k).nonzero().squeeze(1) for k in (0, 1))
        if counting:
            assert torch.equal(parts.full, full)
            assert torch.equal(parts.forward, forward)
            assert parts.skip is parts.excess is None
        else:
            assert torch.equal(parts.full[~parts.skip], torch.cat([full, forward]))
            assert torch.equal(parts.full[parts.skip], (kind == 2).nonzero().squeeze(1))
            assert parts.excess == 0


def test_chunks_are_alike():
    for rows, most in [(2048, 560), (2048, 496), (1024, 560), (23, 5), (17, 16), (1, 1000), (100, 99), (8192, 8368)]:
        size = head_ops.equal_chunks(rows, most)
        assert 1 <= size <= most
        pieces = -(-rows // size)
        assert pieces == -(-rows // most)  # no more passes over d_weight than there have to be
        assert size - rows / max(pieces, 1) < head_ops.GEMM_ROWS

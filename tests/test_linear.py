"""The losses from hidden states: equal to the losses from logits, whatever the chunk, in less memory and with fewer GEMMs."""

from dataclasses import replace

import pytest
import torch
from cases import LOSSES, TERMS
from closeness import assert_as_good_as

import ppg_fast as ppg
from ppg_fast import ops, reference
from ppg_fast.functional.loss import LossRows

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
    arguments = {"old_logprobs": old, "ref_logprobs": old + 0.2 * torch.randn(N), "rollout_logprobs": old + 0.1 * torch.randn(N)}
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
    per_row = (None if t is None else t.to(dtype) for t in rows.per_row[:5])
    loss, logprob, entropy = reference.policy_loss(logits, rows.tokens.labels, *per_row, rows.spec, rows.groups)
    grads = torch.autograd.grad(loss.sum(), [t for t in (hidden, weight, bias) if t is not None])
    named = dict(zip(("d_hidden", "d_weight", "d_bias"), grads, strict=False))
    return {k: v.detach().cpu() for k, v in {"loss": loss.sum(), "logprob": logprob, "entropy": entropy, **named}.items()}


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
    spec = replace(LOSSES.get(loss, replace(LOSSES["ppo"], loss_type="gspo")), **TERMS["everything"])
    head, labels, advantages, arguments = inputs(torch.float32, device)
    options = {"spec": spec, "reduction": "sum"}
    actual = ours(head, labels, advantages, arguments, backend, chunk_rows=chunk_rows, **options)
    plain, truth = (textbook(head, labels, advantages, arguments, dtype, **options) for dtype in (torch.float32, torch.float64))
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
    out = ppg.policy_loss(torch.nn.functional.linear(clean, weight, bias), labels, advantages, spec=spec, **arguments, backend=backend)
    expected = dict(zip(("d_hidden", "d_weight", "d_bias"), torch.autograd.grad(out.loss, (hidden, weight, bias)), strict=True))
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
    logprobs, entropy = ppg.linear_token_logprobs(hidden, weight, labels, bias=bias, chunk_rows=4, backend=backend, **options)
    upstream = torch.randn(2, N, device=device)
    actual = torch.autograd.grad((logprobs * upstream[0] + entropy * upstream[1]).sum(), (hidden, weight, bias))
    active = (labels != -100)[:, None]
    z = torch.nn.functional.linear(torch.where(active, hidden, 0.0).double(), weight.double(), bias.double())
    expected_logprobs, expected_entropy = reference.token_logprobs(z, labels, options["temperature"].double(), 4.0)
    expected = torch.autograd.grad((expected_logprobs * upstream[0] + expected_entropy * upstream[1]).sum(), (hidden, weight, bias))
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
    from ppg_fast.ops.linear import Head

    seen = {"logits": 0, "gradient": 0}
    chunks, accumulate = Head.chunks, Head.accumulate

    def counting_chunks(self, rows):
        for chunk, logits in chunks(self, rows):
            seen["logits"] += logits.shape[1]
            yield chunk, logits

    def counting_accumulate(self, rows):
        seen["gradient"] += rows.numel()
        accumulate(self, rows)

    monkeypatch.setattr(Head, "chunks", counting_chunks)
    monkeypatch.setattr(Head, "accumulate", counting_accumulate)
    (hidden, weight, _), labels, advantages, _ = inputs(torch.float32, "cpu", bias=False)
    full, active = int(((advantages != 0) & (labels != -100)).sum()), int((labels != -100).sum())
    for skip, expected in ((False, active), (True, full)):
        seen.update(logits=0, gradient=0)
        ppg.linear_policy_loss(hidden.requires_grad_(), weight, labels, advantages, skip_zero_advantages=skip, backend="cpu")
        assert seen == {"logits": expected, "gradient": full}


@pytest.mark.parametrize("bias", [True, False])
def test_ops_are_well_formed(backend, device, bias):
    if backend == "reference":
        pytest.skip("reference: plain PyTorch, no op")
    head, labels, advantages, _ = inputs(torch.float32, device, bias)
    head = [None if t is None else t.nan_to_num().requires_grad_() for t in head]
    numbers = [getattr(LOSSES["ppo"], name) for name in ops.NUMBERS]
    wanted = [t is not None for t in head]
    arguments = (*head, labels, advantages, *[None] * 5, *numbers, True, True, False, backend, 8, wanted)
    torch.library.opcheck(ops.linear_policy_loss_op, arguments)
    torch.library.opcheck(ops.linear_token_logprobs_op, (*head, labels, None, 0.7, 3.0, True, False, backend, 8))

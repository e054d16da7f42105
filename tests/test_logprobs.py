"""The differentiable log-probs on every backend, and the op around them."""

import pytest
import torch
from cases import make_case
from closeness import assert_as_good_as

from ppg_fast import ops, reference
from ppg_fast.contract import Wanted
from ppg_fast.spec import IGNORE, PolicyLossSpec

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def wanted(entropy, lse=False):
    return Wanted(entropy, score_norms=False, gradient=True, validate=False, lse=lse)


def numbers_of(case):
    return case.spec.temperature, case.spec.logit_softcap


def ours(case, backend, d_logprob, d_entropy, d_lse):
    x, flags = case.logits.detach().requires_grad_(), wanted(d_entropy is not None, d_lse is not None)
    logprob, entropy, _, lse = ops.token_logprobs(x, case.labels, case.temperatures, *numbers_of(case), flags, backend)
    return with_gradient(x, {"logprob": (logprob, d_logprob), "entropy": (entropy, d_entropy), "lse": (lse, d_lse)})


def with_gradient(x, outputs):
    """The outputs that have an upstream gradient, and the gradient of x."""
    outputs = {name: pair for name, pair in outputs.items() if pair[1] is not None}
    (grad,) = torch.autograd.grad(sum((value * d).sum() for value, d in outputs.values()), x)
    return {name: value for name, (value, _) in outputs.items()} | {"dlogits": grad}


def textbook(case, dtype, d_logprob, d_entropy, d_lse):
    x = case.logits.detach().flatten(0, 1).to(dtype).requires_grad_()
    scale = case.spec.temperature if case.temperatures is None else case.temperatures.to(dtype)
    logprob, entropy = reference.token_logprobs(x, case.labels, scale, case.spec.logit_softcap)
    lse = reference.log_sum_exps(x, case.labels, scale, case.spec.logit_softcap)
    given = {"logprob": (logprob, d_logprob), "entropy": (entropy, d_entropy), "lse": (lse, d_lse)}
    out = with_gradient(x, given)
    out["dlogits"] = out["dlogits"].view(case.logits.shape)
    return {name: value.detach().cpu() for name, value in out.items()}


@pytest.mark.parametrize("more", ["", "entropy", "lse", "entropy+lse"])
@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["nocap", "cap"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 7), (2, 4, 1003)], ids=lambda s: "x".join(map(str, s)))
def test_matches_reference(backend, device, shape, dtype, softcap, more):
    spec = PolicyLossSpec(temperature=0.8, logit_softcap=softcap)
    case = make_case(shape, spec, DTYPES[dtype], device, strided=True, per_token=softcap != 0)
    N = case.labels.numel()
    upstream = [torch.randn(N, device=device) if name in more else None for name in ("", "entropy", "lse")]
    if upstream[2] is not None:  # rows whose label alone has a gradient, and rows that have one of this alone
        upstream[0][::3], upstream[0][1::3] = upstream[2][::3], 0.0
    actual, plain, truth = (
        ours(case, backend, *upstream),
        textbook(case, torch.float32, *upstream),
        textbook(case, torch.float64, *upstream),
    )
    for name in truth:
        assert_as_good_as(actual[name], plain[name], truth[name], name)
    assert (actual["dlogits"].flatten(0, 1)[case.labels == IGNORE] == 0).all()


def test_rows_without_a_gradient_are_not_read(backend, device):
    """The logits may be gone by the time of the backward pass where nothing is asked of them."""
    case = make_case((1, 5, 100), PolicyLossSpec(temperature=0.8), device=device)
    upstream = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0], device=device)
    x = case.logits.detach().requires_grad_()
    logprob, *_ = ops.token_logprobs(x, case.labels, None, 0.8, 0.0, wanted(False), backend)
    if backend == "reference":
        pytest.skip("reference: plain autograd reads what it likes")
    x.data[0, 1] = torch.nan  # .data: behind autograd's back
    grad = torch.autograd.grad(logprob, x, upstream)[0]
    assert (grad[0, [1, 3, 4]] == 0).all()
    assert grad.isfinite().all()


def test_op_is_well_formed(backend, device):
    if backend == "reference":
        pytest.skip("reference: plain PyTorch, no op")
    case = make_case((2, 3, 60), PolicyLossSpec(), device=device, per_token=True)
    for more in ((True, True), (False, False)):
        x = case.logits.nan_to_num().requires_grad_()
        torch.library.opcheck(
            ops.token_logprobs_op, (x, case.labels, case.temperatures, [1.0, 4.0], list(wanted(*more)), backend)
        )


@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_a_log_sum_exp_changes_no_bits(backend, device, softcap):
    """Of the others, nor of the gradient while nothing is asked of it; far from 0 it keeps its digits."""
    case = make_case((1, 6, 501), PolicyLossSpec(), device=device)
    x, found = case.logits.detach().requires_grad_(), []
    for lse in (False, True):
        flags = wanted(True, lse)
        logprob, entropy, *_ = ops.token_logprobs(x, case.labels, None, 0.7, softcap, flags, backend)
        found.append((logprob, entropy, torch.autograd.grad(logprob.sum() + entropy.sum(), x)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    far = case.logits.detach() if softcap else case.logits.detach() + 1e4
    *_, sums = ops.token_logprobs(far, case.labels, None, 0.7, softcap, wanted(False, True), backend)
    truth = reference.log_sum_exps(far.double().flatten(0, 1), case.labels, 0.7, softcap)
    torch.testing.assert_close(sums.double(), truth, rtol=2e-7, atol=2e-6)

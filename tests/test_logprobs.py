"""The differentiable log-probs on every backend, and the op around them."""

import pytest
import torch
from cases import make_case
from closeness import assert_as_good_as

from ppg_fast import ops, reference
from ppg_fast.contract import Wanted
from ppg_fast.spec import IGNORE, PolicyLossSpec

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def wanted(entropy):
    return Wanted(entropy, score_norms=False, gradient=True, validate=False)


def numbers_of(case):
    return case.spec.temperature, case.spec.logit_softcap


def ours(case, backend, d_logprob, d_entropy):
    x = case.logits.detach().requires_grad_()
    logprob, entropy, *_ = ops.token_logprobs(
        x, case.labels, case.temperatures, *numbers_of(case), wanted(d_entropy is not None), backend
    )
    total = (logprob * d_logprob).sum() + (0 if d_entropy is None else (entropy * d_entropy).sum())
    return {"logprob": logprob, "dlogits": torch.autograd.grad(total, x)[0]} | (
        {} if d_entropy is None else {"entropy": entropy}
    )


def textbook(case, dtype, d_logprob, d_entropy):
    x = case.logits.detach().flatten(0, 1).to(dtype).requires_grad_()
    scale = case.spec.temperature if case.temperatures is None else case.temperatures.to(dtype)
    logprob, entropy = reference.token_logprobs(x, case.labels, scale, case.spec.logit_softcap)
    total = (logprob * d_logprob).sum() + (0 if d_entropy is None else (entropy * d_entropy).sum())
    grad = torch.autograd.grad(total, x)[0].view(case.logits.shape)
    out = {"logprob": logprob, "dlogits": grad} | ({} if d_entropy is None else {"entropy": entropy})
    return {name: value.detach().cpu() for name, value in out.items()}


@pytest.mark.parametrize("with_entropy", [False, True], ids=["logprob", "logprob+entropy"])
@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["nocap", "cap"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 2, 7), (2, 4, 1003)], ids=lambda s: "x".join(map(str, s)))
def test_matches_reference(backend, device, shape, dtype, softcap, with_entropy):
    spec = PolicyLossSpec(temperature=0.8, logit_softcap=softcap)
    case = make_case(shape, spec, DTYPES[dtype], device, strided=True, per_token=softcap != 0)
    N = case.labels.numel()
    upstream = torch.randn(N, device=device), torch.randn(N, device=device) if with_entropy else None
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
    for entropy in (True, False):
        x = case.logits.nan_to_num().requires_grad_()
        torch.library.opcheck(
            ops.token_logprobs_op, (x, case.labels, case.temperatures, [1.0, 4.0], list(wanted(entropy)), backend)
        )

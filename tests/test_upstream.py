"""An upstream gradient that 16 bits do not hold, such as 1/3, scales every gradient by itself, not by its rounding."""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ppg_fast as ppg

N, V, D = 192, 96, 16
UPSTREAMS = (1 / 3, 5e-5)  # by the last, float16 has a loss scale that 16 bits do not hold
NOISE = {torch.bfloat16: 1.3e-3, torch.float16: 1.5e-4}  # 1/3 in 16 bits is off by 2e-3 and 2.4e-4
PRODUCTS = {"mul", "mul_", "div", "div_"}
OPS = [
    f"ppg_fast.ops.{name}" for name in ("policy_loss", "token_logprobs", "linear_policy_loss", "linear_token_logprobs")
]


def as_on_a_gpu(name, arguments):
    """The operands as a GPU's kernels take them: a number in its memory is rounded to the 16 bits of what it multiplies
    or divides. A CPU keeps it in float32, and so would hide that fault."""
    tensors = [t for t in arguments if isinstance(t, torch.Tensor)]
    short = [t.dtype for t in tensors if t.dim() and t.dtype in (torch.bfloat16, torch.float16)]
    if name not in PRODUCTS or not short or any(t.dim() and t.dtype not in short for t in tensors):
        return arguments
    return [t.to(short[0]) if isinstance(t, torch.Tensor) and t.dim() == 0 else t for t in arguments]


class AsOnAGPU(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        return function(*as_on_a_gpu(function.overloadpacket.__name__, arguments), **(keywords or {}))


def inputs(dtype, device):
    hidden, weight, bias = torch.randn(N, D), 0.5 * torch.randn(V, D), torch.randn(V)
    labels, advantages = torch.randint(V, (N,)), torch.randn(N)
    leaves = [t.to(device, dtype).requires_grad_() for t in (hidden, weight, bias)]
    return leaves, labels.to(device), advantages.to(device)


def logits_of(leaves):
    return torch.nn.functional.linear(*leaves).detach().requires_grad_()


# leaves, labels, advantages, backend -> what is differentiated, and the loss, its sum that of -A l over the rows
FORMS = {
    "policy_loss": lambda x, y, A, b: (z := logits_of(x), ppg.policy_loss(z, y, A, reduction="sum", backend=b).loss),
    "policy_loss, a loss a token": lambda x, y, A, b: (
        z := logits_of(x),
        ppg.policy_loss(z, y, A, reduction="none", backend=b).loss,
    ),
    "token_logprobs": lambda x, y, A, b: (z := logits_of(x), -A * ppg.token_logprobs(z, y, backend=b)),
    "linear_policy_loss": lambda x, y, A, b: (
        x,
        ppg.linear_policy_loss(x[0], x[1], y, A, bias=x[2], reduction="sum", backend=b).loss,
    ),
    "linear_policy_loss, in chunks": lambda x, y, A, b: (
        x,
        ppg.linear_policy_loss(x[0], x[1], y, A, bias=x[2], reduction="sum", backend=b, chunk_rows=16).loss,
    ),
    "linear_token_logprobs": lambda x, y, A, b: (
        x,
        -A * ppg.linear_token_logprobs(x[0], x[1], y, bias=x[2], backend=b, chunk_rows=32),
    ),
}


def gradients(form, dtype, upstream, backend, device):
    torch.manual_seed(0)
    leaves, labels, advantages = inputs(dtype, device)
    with AsOnAGPU():
        of, loss = FORMS[form](leaves, labels, advantages, backend)
        factor = torch.full(loss.shape, upstream, dtype=torch.float32, device=device)
        return torch.autograd.grad(loss, of, factor)


def truth(form, dtype, device):
    """Gradients of sum -A l in float64, from the inputs as they are and logits in ``dtype``."""
    torch.manual_seed(0)
    leaves, labels, advantages = inputs(dtype, device)
    x = [t.detach().double().requires_grad_() for t in leaves]
    exact = torch.nn.functional.linear(*x)
    z = exact + (torch.nn.functional.linear(*leaves).detach().double() - exact.detach())
    l = torch.log_softmax(z, 1).gather(1, labels[:, None])[:, 0]
    return torch.autograd.grad(-(advantages.double() * l).sum(), x if "linear" in form else [z])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "traced"])
def test_it_is_not_rounded(backend, device, monkeypatch, form, eager):
    if backend == "reference":
        pytest.skip("plain PyTorch rounds its gradients as PyTorch does")
    if backend == "triton" and device == "cpu":
        pytest.skip("interpreted, this many rows take a minute; tests of scale_rows go through its kernel")
    for module in OPS if eager else ():  # the mode that plays a GPU would pass for a tracer
        monkeypatch.setattr(importlib.import_module(module), "traced", lambda *_: False)
    for dtype, noise in NOISE.items():
        expected = truth(form, dtype, device)
        for upstream in UPSTREAMS:
            found = gradients(form, dtype, upstream, backend, device)
            for name, actual, right in zip(("x", "weight", "bias"), found, expected, strict=False):
                slope = float((actual.detach().double() * right).sum() / (right * right).sum())
                assert abs(slope / upstream - 1) < noise, (name, dtype, upstream, slope)

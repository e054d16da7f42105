"""Eager mode goes past the operators, straight to the kernels; tracers get them, and torch.func is told the way out."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile

import ppg_fast as ppg

N, V, D = 6, 17, 8
draw = torch.Generator().manual_seed(0)
LOGITS, HIDDEN, REWARDS = (torch.randn(shape, generator=draw) for shape in ((N, V), (N, D), (2, 5)))
LABELS, ADVANTAGES = torch.randint(V, (N,), generator=draw), torch.randn(N, generator=draw)
WEIGHT = torch.randn(V, D, generator=draw)


def policy_loss(x, **options):
    return ppg.policy_loss(x, LABELS, ADVANTAGES, **options).loss


def token_logprobs(x, **options):
    return ppg.token_logprobs(x, LABELS, **options).sum()


def linear_policy_loss(x, **options):
    return ppg.linear_policy_loss(x, WEIGHT, LABELS, ADVANTAGES, **options).loss


def linear_token_logprobs(x, **options):
    return ppg.linear_token_logprobs(x, WEIGHT, LABELS, **options).sum()


def partial_returns(x, **options):
    return ppg.partial_returns(x, "lookahead:2", 0.9, **options).sum()


CALLS = {
    "policy_loss": (policy_loss, LOGITS),
    "token_logprobs": (token_logprobs, LOGITS),
    "linear_policy_loss": (linear_policy_loss, HIDDEN),
    "linear_token_logprobs": (linear_token_logprobs, HIDDEN),
    "partial_returns": (partial_returns, REWARDS),
}
calls = pytest.mark.parametrize("name", CALLS)
losses = pytest.mark.parametrize("name", [name for name in CALLS if name != "partial_returns"])


def gradient(function, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


def fused(**options):
    """In place, from rewards, padded: the fused path of a training step."""
    logits = LOGITS.view(2, 3, V).clone().requires_grad_()
    turns = torch.tensor([[0, 0, 1], [0, -1, 2]])
    inplace = {"inplace": True, "validate": True}
    out = ppg.partial_policy_loss(logits.mul(1), LABELS.view(2, 3), REWARDS, turns, "greedy", **inplace, **options)
    return torch.autograd.grad(out.loss * 0.5, logits)


def operators_of(call):
    """Names of the operators of ours that the dispatcher saw."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    return {event.key for event in seen.key_averages() if event.key.startswith("ppg_fast")}


@calls
def test_eager_mode_dispatches_the_kernels_alone(name):
    """A custom op in Python costs several times what its kernel's launch does."""
    function, x = CALLS[name]
    grad = name != "partial_returns"
    seen = operators_of(lambda: gradient(function, x) if grad else function(x))
    assert seen
    assert all(operator.startswith("ppg_fast_native::") for operator in seen), seen


def test_eager_mode_dispatches_the_fused_kernels_alone():
    seen = operators_of(fused)
    assert "ppg_fast_native::fused_policy_loss" in seen
    assert all(operator.startswith("ppg_fast_native::") for operator in seen), seen


@calls
def test_tracers_see_the_operator(name):
    function, x = CALLS[name]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert function(mode.from_tensor(x)).shape == ()
    traced = make_fx(lambda x: function(x))(x)
    assert f"ppg_fast.{name}.default" in {str(node.target) for node in traced.graph.nodes}
    assert torch.equal(traced(x), function(x))


@calls
def test_export_keeps_the_operator(name):
    function, x = CALLS[name]

    class Module(torch.nn.Module):
        def forward(self, x):
            return function(x)

    program = torch.export.export(Module(), (x,))
    assert f"ppg_fast.{name}.default" in {str(node.target) for node in program.graph.nodes}
    assert torch.equal(program.module()(x), function(x))


@losses
def test_autocast_keeps_the_gradient(name):
    function, x = CALLS[name]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradient(function, x)
    torch.testing.assert_close(found, gradient(function, x), rtol=0.05, atol=0.02)


# ---- torch.func ------------------------------------------------------------------------------------------------------
def transforms(function, x):
    return {
        "grad": lambda: torch.func.grad(function)(x),
        "vmap": lambda: torch.func.vmap(function)(torch.stack([x, 2 * x])),
        "jvp": lambda: torch.func.jvp(function, (x,), (x,)),
    }


@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp"])
@calls
def test_the_kernels_refuse_torch_func(name, transform):
    function, x = CALLS[name]
    with pytest.raises(RuntimeError, match='give backend="reference"'):
        transforms(function, x)[transform]()


@losses
def test_the_kernels_refuse_forward_mode(name):
    """It gave a tangent of 0 without a word."""
    function, x = CALLS[name]
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match='give backend="reference"'):
        function(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("name", ["policy_loss", "token_logprobs"])
def test_plain_pytorch_serves_torch_func(name):
    function, x = CALLS[name]
    found = transforms(lambda x: function(x, backend="reference"), x)
    truth = gradient(function, x)
    torch.testing.assert_close(found["grad"](), truth)
    torch.testing.assert_close(found["vmap"](), torch.stack([function(x), function(2 * x)]))
    torch.testing.assert_close(found["jvp"]()[1], (truth * x).sum())

"""What a call refuses in one line, and what it gives for nothing: numbers, masks, memory, derivatives, empty shapes."""

import itertools
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.testing

import ppg_fast as ppg
from ppg_fast import backends

V, D = 7, 4
X, HIDDEN, WEIGHT = torch.randn(2, 3, V), torch.randn(2, 3, D), torch.randn(V, D)
LABELS, A, REWARDS = torch.randint(0, V, (2, 3)), torch.randn(2, 3), torch.rand(2, 3)
TURNS = torch.tensor([[0, 1, 2], [0, 1, 2]])
Spec = ppg.PolicyLossSpec


def ppo(**numbers):
    return ppg.policy_loss(X, LABELS, A, old_logprobs=A, ref_logprobs=A, spec=Spec(loss_type="ppo", **numbers)).loss


NUMBERS = {
    **{name: lambda v, name=name: ppo(**{name: v}) for name in ("clip_low", "clip_high", "kl_coef", "importance_cap")},
    "temperature": lambda v: ppg.policy_loss(X, LABELS, A, spec=Spec(temperature=v)).loss,
    "temperature of log-probs": lambda v: ppg.linear_token_logprobs(HIDDEN, WEIGHT, LABELS, temperature=v),
    "logit_softcap": lambda v: ppg.token_logprobs(X, LABELS, logit_softcap=v),
    "normalizer": lambda v: ppg.linear_policy_loss(HIDDEN, WEIGHT, LABELS, A, normalizer=v).loss,
    "gamma": lambda v: ppg.partial_returns(REWARDS, "full", v),
    "std_eps": lambda v: ppg.turn_advantages(REWARDS, torch.zeros(2, dtype=torch.long), "group_std", std_eps=v),
}
HALVES = [
    np.float64(0.5),
    np.float32(0.5),
    np.array(0.5),
    torch.tensor(0.5),
    torch.tensor(0.5).double(),
    Fraction(1, 2),
]
NO_NUMBERS = [True, np.bool_(True), torch.tensor(True), np.float64(-1), np.float32("nan"), torch.tensor(torch.inf), "1"]


@pytest.mark.parametrize("name", NUMBERS)
def test_one_rule_for_numbers(name):
    for half in HALVES:
        assert torch.equal(NUMBERS[name](half), NUMBERS[name](0.5))
    for wrong in NO_NUMBERS:
        with pytest.raises(ValueError, match="must be a finite number"):
            NUMBERS[name](wrong)
    if name not in ("gamma", "std_eps"):
        with pytest.raises(ValueError, match="must be a finite number"):
            NUMBERS[name](1e-50)  # 0 in float32: off, or not given, or a division by it


INTEGERS = {
    "chunk_rows": lambda v: ppg.linear_policy_loss(HIDDEN, WEIGHT, LABELS, A, chunk_rows=v).loss,
    "max_active_rows": lambda v: ppg.linear_policy_loss(HIDDEN, WEIGHT, LABELS, A, max_active_rows=v).loss,
    "K of Lookahead": lambda v: ppg.partial_returns(REWARDS, ppg.Lookahead(v)),
    "length of Segment": lambda v: ppg.partial_returns(REWARDS, ppg.Segment(v)),
}


@pytest.mark.parametrize("name", INTEGERS)
def test_one_rule_for_integers(name):
    for eight in (np.int64(8), np.array(8), torch.tensor(8)):
        assert torch.equal(INTEGERS[name](eight), INTEGERS[name](8))
    for wrong in (True, 8.0, np.float32(8), 0, np.int32(-1), "8"):
        with pytest.raises(ValueError, match=f"{name} must be an integer >= 1"):
            INTEGERS[name](wrong)


MASKED = {
    "policy_loss": lambda m, b: ppg.policy_loss(X, LABELS, A, loss_mask=m, backend=b).loss,
    "token_logprobs": lambda m, b: ppg.token_logprobs(X, LABELS, loss_mask=m, backend=b),
    "linear_token_logprobs": lambda m, b: ppg.linear_token_logprobs(HIDDEN, WEIGHT, LABELS, loss_mask=m, backend=b),
    "linear": lambda m, b: ppg.linear_policy_loss(HIDDEN, WEIGHT, LABELS, A, loss_mask=m, backend=b).loss,
    "partial": lambda m, b: ppg.partial_policy_loss(X, LABELS, REWARDS, TURNS, "full", loss_mask=m, backend=b).loss,
    "logprobs": lambda m, _: ppg.policy_loss_from_logprobs(A, A, loss_mask=m).loss,
}


@pytest.mark.parametrize("name", MASKED)
def test_a_weight_in_a_mask_is_refused(name):
    mask = torch.tensor([[0, 1, 1], [1, 0, 1]])
    for dtype, backend in itertools.product((torch.float32, torch.float16, torch.int64), ("cpu", "reference")):
        assert torch.equal(MASKED[name](mask.to(dtype), backend), MASKED[name](mask.bool(), backend))
        for wrong in (-1, 2, *((0.5, torch.nan, torch.inf) if dtype.is_floating_point else ())):
            other = mask.to(dtype).index_put((torch.tensor(1), torch.tensor(1)), torch.tensor(wrong, dtype=dtype))
            with pytest.raises(ValueError, match=r"loss_mask must be 0 or 1 \(advantages .* at row 4"):
                MASKED[name](other, backend)
    with pytest.raises(ValueError, match="loss_mask must be 0 or 1"):
        torch.compile(MASKED[name], fullgraph=True, backend="eager")(mask * 0.5, "cpu")


def test_in_place_needs_memory_of_its_own():
    def refused(make, match):
        with pytest.raises(ValueError, match=match):
            ppg.policy_loss(make(X.clone().requires_grad_()), LABELS, A, inplace=True)

    refused(lambda x: (x * 1)[:1, :1].expand(2, 3, V), "rows lie in memory of their own")
    refused(lambda x: (x * 1)[:, :1].expand(2, 3, V), "rows lie in memory of their own")
    refused(lambda x: (x * 1).flatten().as_strided((2, 3, V), (9, 3, 1)), "rows lie in memory of their own")
    refused(lambda x: x[:, :], "would overwrite the leaf")
    refused(lambda x: (x * 1).transpose(1, 2).contiguous().transpose(1, 2), "read where they are")
    for make in (lambda x: x * 1, lambda x: torch.cat([x, x], 1)[:, :3], lambda x: (x * 1).flip(0)):
        x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
        ppg.policy_loss(make(x), LABELS, A, inplace=True).loss.backward()
        ppg.policy_loss(make(y), LABELS, A).loss.backward()
        assert torch.equal(x.grad, y.grad)


FORMS = {
    "policy_loss": lambda h, w: ppg.policy_loss(h @ w.T, LABELS, A).loss,
    "linear_policy_loss": lambda h, w: ppg.linear_policy_loss(h, w, LABELS, A).loss,
    "none": lambda h, w: ppg.linear_policy_loss(h, w, LABELS, A, reduction="none").loss.sum(),
    "gspo": lambda h, w: ppg.policy_loss(h @ w.T, LABELS, A, old_logprobs=A, spec=Spec(loss_type="gspo")).loss,
    "token_logprobs": lambda h, w: ppg.token_logprobs(h @ w.T, LABELS).sum(),
    "linear_token_logprobs": lambda h, w: ppg.linear_token_logprobs(h, w, LABELS).sum(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives_and_retained_graphs(form, dtype):
    h, w = (t.to(dtype).requires_grad_() for t in (HIDDEN, WEIGHT))
    for of in ([h], [w], [h, w]):
        gradients = torch.autograd.grad(FORMS[form](h, w), of, create_graph=True)
        for g in gradients:
            with pytest.raises(RuntimeError, match="no second derivative: leave create_graph"):
                g.square().sum().backward(retain_graph=True)
    loss = FORMS[form](h, w)
    first = torch.autograd.grad(loss, (h, w), retain_graph=True)
    kept = [g.clone() for g in first]
    given_away = form in ("policy_loss", "linear_policy_loss") and dtype != torch.float16
    if given_away:
        with pytest.raises(RuntimeError, match="differentiated a second time"):
            torch.autograd.grad(2 * loss, (h, w))
    else:
        second = torch.autograd.grad(2 * loss, (h, w))
        assert all(torch.allclose(g, 2 * k, rtol=0.02, atol=1e-6) for g, k in zip(second, kept, strict=True))
    assert all(torch.equal(g, k) for g, k in zip(first, kept, strict=True))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (2, 3)], ids=str)
def test_nothing_is_a_connected_zero(backend, device, shape):
    labels, ones = torch.full(shape, -100, device=device), torch.ones(shape, device=device)
    none = torch.zeros(shape, dtype=torch.int64, device=device)
    cases = itertools.product(
        ("reinforce", "gspo", "gspo_turn"), ("token_mean", "sequence_mean", "none"), (False, True)
    )
    for loss_type, reduction, linear in cases:
        spec = Spec(loss_type=loss_type, kl_coef=0.1, entropy_coef=0.01)
        options = {"old_logprobs": ones, "ref_logprobs": ones, "turn_ids": none, "score_norms": True}
        options |= {"spec": spec, "reduction": reduction, "backend": backend}
        if linear:
            leaves = torch.zeros(*shape, D, device=device), torch.zeros(V, D, device=device)
            out = ppg.linear_policy_loss(*(t.requires_grad_() for t in leaves), labels, ones, **options)
        else:
            leaves = (torch.zeros(*shape, V, device=device),)
            out = ppg.policy_loss(leaves[0].requires_grad_(), labels, ones, **options)
        assert out.loss.requires_grad
        assert out.loss.shape == (shape if reduction == "none" else ())
        assert not out.loss.any()
        assert all(value.isfinite().all() for value in out.metrics.values())
        assert not any(g.any() for g in torch.autograd.grad(out.loss.sum(), leaves))


@pytest.mark.parametrize(("name", "dynamic"), [("normalizer", True), ("kl_coef", None), ("temperature", None)])
def test_a_number_that_changes_breaks_no_graph(name, dynamic):
    """More values than torch.compile compiles a function for (8), which would be an error under fullgraph."""

    def call(x, number):
        spec = Spec(loss_type="ppo", **({} if name == "normalizer" else {name: number}))
        options = {"normalizer": number} if name == "normalizer" else {}
        return ppg.policy_loss(x, LABELS, A, old_logprobs=A, ref_logprobs=A, spec=spec, **options).loss

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=counter)
    for number in (0.5 + i / 16 for i in range(10)):
        assert torch.equal(compiled(X, number), call(X, number))
    assert counter.frame_count <= 3  # of ten: the first value, those that change, 1


def test_importing_the_package_imports_no_compiler():
    """Which takes longer than all the rest."""
    program = "import ppg_fast, sys; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(ppg.__file__).parents[1]).returncode == 0
    marked = torch.compiler.assume_constant_result(lambda: None)
    assert vars(backends.constant_result(lambda: None)) == vars(marked) != {}, "as torch marks it itself"

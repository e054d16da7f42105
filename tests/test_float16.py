"""float16 under a loss scale: what is rounded before the scale reaches it is lost, so gradients wait for it."""

import pytest
import torch

import ppg_fast as ppg

N, V, D = 512, 2000, 16  # N V as large that p A / m is below the smallest float16, 6e-8


def problem():
    hidden, weight = (0.05 * torch.randn(N, D)).half(), (0.1 * torch.randn(V, D) + 0.3).half()
    return hidden, weight, torch.randint(0, V // 2, (N,)), torch.randn(N)


def truth(hidden, weight, labels, advantages, weights=1 / N, entropy_coef=0.0):
    """Gradients of -sum of weights A l in float64."""
    leaves = [t.double().requires_grad_() for t in (hidden, weight)]
    logp = torch.log_softmax(leaves[0] @ leaves[1].T, -1)
    l, entropy = logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(1)
    return torch.autograd.grad((weights * (-advantages.double() * l - entropy_coef * entropy)).sum(), leaves)


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("scale", [1.0, 65536.0])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "sum", "none"])
def test_hidden_states_keep_their_digits(backend, device, scale, reduction):
    if backend == "triton" and device == "cpu":
        pytest.skip("interpreted, this many rows take minutes; the logits below go through its kernels")
    if backend == "reference" and scale == 1.0:
        pytest.skip("plain PyTorch rounds its gradients as PyTorch does")
    hidden, weight, labels, advantages = problem()
    leaves = [t.to(device).requires_grad_() for t in (hidden, weight)]
    normalizer = torch.tensor(float(N), device=device) if reduction == "sum" else None
    out = ppg.linear_policy_loss(
        *leaves, labels.to(device), advantages.to(device), reduction=reduction, normalizer=normalizer, backend=backend
    )
    loss = out.loss.sum() / (N if reduction == "none" else 1)
    d_hidden, d_weight = (g.cpu().double() / scale for g in torch.autograd.grad(scale * loss, leaves))
    expected = truth(hidden, weight, labels, advantages)
    assert relative(d_hidden, expected[0]) < 2e-3
    assert relative(d_weight, expected[1]) < 5e-3
    if scale > 1:  # of a token that is no label the gradient itself is too small for float16 otherwise
        assert relative(d_weight[V // 2 :], expected[1][V // 2 :]) < 2e-3


@pytest.mark.parametrize("advantage", [1e-3, 1.0, 3e4])
def test_nothing_overflows_at_the_other_end(backend, advantage):
    """The gradient with an upstream of 1 fits float16: so do all the numbers on the way."""
    hidden, weight, _, advantages = problem()
    labels, advantages = torch.full((N,), 3), advantage * advantages
    spec = ppg.PolicyLossSpec(entropy_coef=0.01 * advantage)
    if backend == "triton":
        pytest.skip("the products are those of the cpu backend")
    leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
    out = ppg.linear_policy_loss(*leaves, labels, advantages, spec=spec, backend=backend)
    upstream = max(1.0, 1.0 / advantage)
    found = torch.autograd.grad(upstream * out.loss, leaves)
    expected = truth(hidden, weight, labels, advantages, upstream / N, 0.01 * advantage)
    assert all(g.isfinite().all() for g in found)
    if backend != "reference":
        assert relative(found[0], expected[0]) < 5e-3
        assert relative(found[1], expected[1]) < 5e-3


def test_logits_are_as_exact_as_eager(backend, device):
    hidden, weight, labels, advantages = problem()
    n = 64 if backend == "triton" else N
    z = (hidden @ weight.T)[:n]
    x, y = z.to(device).requires_grad_(), z.double().requires_grad_()
    out = ppg.policy_loss(x, labels[:n].to(device), advantages[:n].to(device), normalizer=float(N), backend=backend)
    (found,) = torch.autograd.grad(65536.0 * out.loss, x)
    l = torch.log_softmax(y, -1).gather(1, labels[:n, None])[:, 0]
    (expected,) = torch.autograd.grad(-(advantages[:n].double() * l).sum() * 65536.0 / N, y)
    assert relative(found.cpu(), expected) < 1e-3


def test_training_under_a_scaler_is_that_of_eager():
    hidden, head, labels, advantages = problem()

    def train(ours: bool) -> tuple[torch.Tensor, float]:
        weight = head.float().clone().requires_grad_()
        optimiser, scaler = torch.optim.SGD([weight], lr=300.0), torch.amp.GradScaler("cpu", init_scale=65536.0)
        for _ in range(4):
            with torch.autocast("cpu", torch.float16):
                if ours:
                    loss = ppg.linear_policy_loss(hidden, weight, labels, advantages).loss
                else:
                    logp = torch.log_softmax(torch.nn.functional.linear(hidden, weight).float(), -1)
                    loss = -(advantages * logp.gather(1, labels[:, None])[:, 0]).mean()
            optimiser.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
        return weight.detach() - head.float(), float(scaler.get_scale())

    (ours, our_scale), (eager, scale) = train(True), train(False)
    assert our_scale == scale
    assert relative(ours, eager.double()) < 0.02
    assert relative(ours[V // 2 :], eager[V // 2 :].double()) < 0.02

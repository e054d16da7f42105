"""Log ratios far beyond float32: loss and gradient stay finite and are those of the formula with min(d, 20) on every
backend."""

import math

import pytest
import torch
from torch import Tensor

import ppg_fast as ppg
from ppg_fast.spec import MAX_LOG_RATIO, PolicyLossSpec

V = 5
FAR = 90.0  # exp(90) is infinite in float32
LOGITS = [0.3, -1.1, 0.7, 2.0, -0.4]
L = 0.7 - math.log(sum(math.exp(z) for z in LOGITS))  # log-prob of label 2
P = [math.exp(z) / sum(math.exp(y) for y in LOGITS) for z in LOGITS]


def one_row(backend: str, device: str, spec: PolicyLossSpec, advantage: float, **columns: float):
    """Loss of one token, (), and its derivative in the token's log-prob."""
    logits = torch.tensor([LOGITS], device=device, requires_grad=True)
    given = {name: torch.tensor([value], device=device) for name, value in columns.items()}
    label, A = torch.tensor([2], device=device), torch.tensor([advantage], device=device)
    out = ppg.policy_loss(logits, label, A, spec=spec, backend=backend, **given)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    scale = gradient[0] / torch.tensor([(v == 2) - p for v, p in enumerate(P)], device=device)
    torch.testing.assert_close(scale, scale[:1].expand(V), rtol=1e-3, atol=1e-6)  # a multiple of d l / d z
    return out.loss.item(), scale[2].item(), {k: v.item() for k, v in out.metrics.items()}


EDGE = math.exp(MAX_LOG_RATIO)


@pytest.mark.parametrize(
    ("spec", "advantage", "columns", "loss", "slope"),
    [
        # kl_coef (exp(d) - d - 1) at d = min(ref - l, 20), which stands still beyond
        (PolicyLossSpec(kl_coef=0.1), 0.0, {"ref_logprobs": L + FAR}, 0.1 * (EDGE - 21), 0.0),
        (PolicyLossSpec(kl_coef=0.1), 0.0, {"ref_logprobs": L + math.inf}, 0.1 * (EDGE - 21), 0.0),
        # below there is nothing to bound: exp(-90) - (-90) - 1, slope -(exp(d) - 1)
        (PolicyLossSpec(kl_coef=0.1), 0.0, {"ref_logprobs": L - FAR}, 0.1 * (FAR - 1), 0.1),
        (PolicyLossSpec(kl_coef=0.1, kl_estimator="k1"), 0.0, {"ref_logprobs": L + FAR}, -0.1 * FAR, 0.1),
        (PolicyLossSpec(kl_coef=0.1, kl_estimator="k2"), 0.0, {"ref_logprobs": L + FAR}, 0.05 * FAR**2, -0.1 * FAR),
        (PolicyLossSpec("ppo"), -0.5, {"old_logprobs": L - FAR}, 0.5 * EDGE, 0.0),
        (PolicyLossSpec("ppo"), -0.5, {"old_logprobs": -math.inf}, 0.5 * EDGE, 0.0),
        (PolicyLossSpec("ppo"), 0.5, {"old_logprobs": L - FAR}, -0.5 * 1.2, 0.0),
        (PolicyLossSpec("ppo"), 0.0, {"old_logprobs": L - FAR}, 0.0, 0.0),
        (PolicyLossSpec("ppo", clip_high=1e30), 0.5, {"old_logprobs": L - FAR}, -0.5 * EDGE, 0.0),
        (PolicyLossSpec("ppo", dual_clip=3.0), -0.5, {"old_logprobs": L - FAR}, 1.5, 0.0),
        (PolicyLossSpec("ppo", kl_coef=0.1), 0.0, {"old_logprobs": L - FAR, "ref_logprobs": L}, 0.0, 0.0),
        (PolicyLossSpec("gspo"), -0.5, {"old_logprobs": L - FAR}, 0.5 * EDGE, 0.0),
        (PolicyLossSpec("gspo"), 0.0, {"old_logprobs": L - FAR}, 0.0, 0.0),
        (PolicyLossSpec("gspo", dual_clip=3.0), -0.5, {"old_logprobs": L - FAR}, 1.5, 0.0),
        (PolicyLossSpec("cispo"), -0.5, {"old_logprobs": L - FAR}, 0.5 * 1.2 * L, 0.5 * 1.2),
        (PolicyLossSpec("cispo", clip_high=1e30), -0.5, {"old_logprobs": L - FAR}, 0.5 * EDGE * L, 0.5 * EDGE),
        (PolicyLossSpec(importance_cap=2.0), -0.5, {"rollout_logprobs": L - FAR}, L, 1.0),
        (PolicyLossSpec(importance_cap=1e30), -0.5, {"rollout_logprobs": L - FAR}, 0.5 * EDGE * L, 0.5 * EDGE),
        # the last log ratio that has a slope, in exact binary fractions of L's rounding
        (PolicyLossSpec("ppo"), -0.5, {"old_logprobs": L - 19.5}, 0.5 * math.exp(19.5), 0.5 * math.exp(19.5)),
        (PolicyLossSpec(kl_coef=1.0), 0.0, {"ref_logprobs": L + 19.5}, math.exp(19.5) - 20.5, 1 - math.exp(19.5)),
    ],
    ids=str,
)
def test_an_outlier(backend, device, spec, advantage, columns, loss, slope):
    found, derivative, metrics = one_row(backend, device, spec, advantage, **columns)
    assert found == pytest.approx(loss, rel=2e-5, abs=1e-6)
    assert derivative == pytest.approx(slope, rel=2e-5, abs=1e-6)
    assert all(math.isfinite(value) for value in metrics.values()), metrics


def test_a_sequence_with_an_outlier(backend, device):
    """One of four tokens at a log ratio of 400: the mean, 100, is bounded, and no token of the sequence has a slope."""
    spec = PolicyLossSpec("gspo")
    logits = torch.tensor([LOGITS] * 4, device=device, requires_grad=True)
    labels, A = torch.full((4,), 2, device=device), torch.full((4,), -0.5, device=device)
    old = torch.tensor([L - 400.0, L, L, L], device=device)
    out = ppg.policy_loss(logits, labels, A, old_logprobs=old, spec=spec, backend=backend)
    (gradient,) = torch.autograd.grad(out.loss, logits)
    assert out.loss.item() == pytest.approx(0.5 * EDGE, rel=2e-5)
    assert (gradient == 0).all()


@pytest.mark.parametrize("loss_type", ["ppo", "gspo", "cispo", "reinforce"])
def test_from_log_probs_and_from_hidden_states(backend, device, loss_type):
    """The same bounds wherever the log-probs come from."""
    spec = PolicyLossSpec(loss_type, kl_coef=0.1, importance_cap=1.5)
    logits = torch.tensor([LOGITS] * 3, device=device, requires_grad=True)
    labels, A = torch.full((3,), 2, device=device), torch.tensor([-1.0, 0.0, 1.0], device=device)
    far = torch.tensor([L - FAR, L - 2 * FAR, L - 3 * FAR], device=device)
    columns = {"old_logprobs": far, "rollout_logprobs": far - FAR, "ref_logprobs": far + 4 * FAR}
    results: list[tuple[Tensor, ...]] = []
    out = ppg.policy_loss(logits, labels, A, **columns, spec=spec, backend=backend)
    results.append((out.loss.detach(), *torch.autograd.grad(out.loss, logits)))
    out = ppg.linear_policy_loss(logits, torch.eye(V, device=device), labels, A, **columns, spec=spec, backend=backend)
    results.append((out.loss.detach(), *torch.autograd.grad(out.loss, logits)))
    l = torch.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0]
    out = ppg.policy_loss_from_logprobs(l, A, **columns, spec=spec)
    results.append((out.loss.detach(), *torch.autograd.grad(out.loss, logits)))
    for loss, gradient in results:
        assert loss.isfinite()
        torch.testing.assert_close(loss, results[2][0], rtol=2e-5, atol=1e-5)
        torch.testing.assert_close(gradient, results[2][1], rtol=2e-5, atol=1e-5)

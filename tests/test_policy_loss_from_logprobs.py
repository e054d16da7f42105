"""The loss of a caller's own log-probs is the loss from logits after the sweep over the vocabulary: same value, same
gradient."""

from dataclasses import replace

import pytest
import torch
from cases import spec_of

import ppg_fast as ppg
from ppg_fast.losses import LOSS_TYPES
from ppg_fast.spec import REDUCTIONS

B, L, V = 3, 7, 29
FULL = {"dual_clip": 1.4, "kl_coef": 0.13, "kl_estimator": "k2", "entropy_coef": 0.03, "importance_cap": 1.25}


@pytest.fixture
def batch():
    torch.manual_seed(7)
    logits, labels = torch.randn(B, L, V, requires_grad=True), torch.randint(V, (B, L))
    mask = torch.tensor([[1, 1, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 1, 1, 0, 1]])
    near = ppg.token_logprobs(logits, labels).detach()
    around = {
        name: near + 0.8 * torch.rand(B, L) - 0.4 for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs")
    }
    turn_ids = torch.tensor([[0, 0, -1, 1, 1, 1, -1]] * B)
    return logits, labels, torch.randn(B, L), {"loss_mask": mask, "turn_ids": turn_ids, **around}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_equals_the_loss_from_logits(batch, loss_type, reduction):
    logits, labels, advantages, options = batch
    options |= {"spec": spec_of(loss_type, clip_low=0.15, clip_high=0.3, **FULL), "reduction": reduction}
    expected = ppg.policy_loss(logits, labels, advantages, **options)
    logprobs, entropy = ppg.token_logprobs(logits, labels, entropy=True)
    ours = ppg.policy_loss_from_logprobs(logprobs, advantages, entropy=entropy, **options)
    upstream = torch.randn(expected.loss.shape)
    for mine, truth in zip(ours[:3], expected[:3], strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-6)
    for name, value in expected.metrics.items():
        torch.testing.assert_close(ours.metrics[name], value, rtol=1e-4, atol=1e-6)
    gradients = [
        torch.autograd.grad((out.loss * upstream).sum(), logits, retain_graph=True)[0] for out in (ours, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf])
def test_masked_rows_may_hold_anything(batch, garbage):
    _, _, advantages, options = batch
    options["spec"] = ppg.PolicyLossSpec("ppo", **FULL)
    logprobs, entropy = -torch.rand(B, L), torch.rand(B, L)
    clean = ppg.policy_loss_from_logprobs(logprobs, advantages, entropy=entropy, **options)
    mask = options["loss_mask"] == 0
    dirty = logprobs.masked_fill(mask, garbage).requires_grad_()
    out = ppg.policy_loss_from_logprobs(
        dirty, advantages.masked_fill(mask, garbage), entropy=entropy.masked_fill(mask, garbage), **options
    )
    assert torch.equal(out.loss, clean.loss)
    gradient = torch.autograd.grad(out.loss, dirty)[0]
    assert torch.equal(gradient[mask], torch.zeros(int(mask.sum())))
    assert (gradient[~mask] != 0).any()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_ratio_that_overflows_keeps_the_gradient_of_the_kernels(loss_type, advantage):
    """A token the old policy all but excluded: clipped, so without a gradient, and not 0 * inf."""
    torch.manual_seed(9)
    logits, labels = torch.randn(1, 3, 5, requires_grad=True), torch.tensor([[0, 1, 2]])
    options = {
        "old_logprobs": torch.tensor([[-120.0, -1.5, -300.0]]),
        "spec": spec_of(loss_type, dual_clip=3.0),
    }
    options["turn_ids"] = torch.tensor([[0, 1, 1]])
    advantages = torch.full((1, 3), advantage)
    from_logprobs = ppg.policy_loss_from_logprobs(ppg.token_logprobs(logits, labels), advantages, **options)
    losses = ppg.policy_loss(logits, labels, advantages, **options).loss, from_logprobs.loss
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in losses]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)


def test_no_active_row_is_a_connected_zero():
    logprobs = torch.full((2, 3), torch.nan, requires_grad=True)
    loss = ppg.policy_loss_from_logprobs(logprobs, torch.ones(2, 3), loss_mask=torch.zeros(2, 3)).loss
    assert loss == 0
    assert torch.equal(torch.autograd.grad(loss, logprobs)[0], torch.zeros(2, 3))


def test_options_keep_their_meaning(batch):
    mask, logprobs = batch[3]["loss_mask"], -torch.rand(B, L)
    packed = ppg.policy_loss_from_logprobs(
        logprobs.reshape(-1), torch.ones(B * L), cu_seqlens=torch.arange(0, B * L + 1, L, dtype=torch.int32),
        reduction="sequence_mean",
        loss_mask=mask.reshape(-1),
    ).loss  # fmt: skip
    one_each = torch.ones(B)
    padded = ppg.policy_loss_from_logprobs(logprobs, one_each, reduction="sequence_mean", loss_mask=mask).loss
    assert torch.equal(packed, padded)
    half = ppg.policy_loss_from_logprobs(logprobs.half(), one_each, normalizer=2.0).loss
    torch.testing.assert_close(half, -logprobs.half().float().sum() / 2)


@pytest.mark.parametrize("loss_type", ["ppo", "gspo"])
def test_a_z_loss_takes_log_sum_exps(loss_type):
    logits, labels, mask = torch.randn(2, 4, 9, requires_grad=True), torch.randint(9, (2, 4)), torch.ones(2, 4)
    mask[0, 1] = 0
    options = {"spec": ppg.PolicyLossSpec(loss_type, z_coef=0.1), "loss_mask": mask}
    options["old_logprobs"] = ppg.token_logprobs(logits, labels).detach() + 0.1
    l, lse = ppg.token_logprobs(logits, labels, lse=True)
    losses = [
        ppg.policy_loss(logits, labels, torch.ones(2), **options).loss,
        ppg.policy_loss_from_logprobs(l, torch.ones(2), lse=lse, **options).loss,
    ]
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in losses))


def test_errors_name_the_rule(batch):
    logprobs = -torch.rand(B, L)
    with pytest.raises(ValueError, match=r"a z-loss .* needs lse"):
        ppg.policy_loss_from_logprobs(logprobs, torch.ones(B), spec=ppg.PolicyLossSpec(z_coef=0.1))
    with pytest.raises(ValueError, match="an entropy term"):
        ppg.policy_loss_from_logprobs(logprobs, torch.ones(B), spec=ppg.PolicyLossSpec(entropy_coef=0.1))
    with pytest.raises(ValueError, match="entropy must have the shape"):
        ppg.policy_loss_from_logprobs(logprobs, torch.ones(B), entropy=torch.ones(B))
    with pytest.raises(ValueError, match="floating point"):
        ppg.policy_loss_from_logprobs(logprobs.long(), torch.ones(B))
    with pytest.raises(ValueError, match="KL term"):
        ppg.policy_loss_from_logprobs(logprobs, torch.ones(B), spec=replace(ppg.PolicyLossSpec(), kl_coef=0.1))

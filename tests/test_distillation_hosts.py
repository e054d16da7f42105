"""Our divergences and gradients are those of TRL's and Liger's own functions."""

import pytest
import torch

import ppg_fast as ppg

BETA = {0.0: ("forward_kl", None), 1.0: ("reverse_kl", None), 0.4: ("jsd", 0.4)}


@pytest.fixture
def sides():
    labels = torch.randint(71, (21,))
    labels[::4] = -100
    pairs = [(torch.randn(21, width), torch.randn(71, width), torch.randn(71)) for width in (8, 12)]
    return [tuple(t.requires_grad_() for t in pairs[0]), pairs[1], labels]


def ours(sides, beta, **options):
    (hidden, weight, bias), taught, labels = sides
    divergence, share = BETA[beta]
    teacher = ppg.Teacher(*taught, divergence=divergence, beta=share, logit_softcap=options.pop("theirs", 0.0))
    return ppg.linear_distillation_loss(hidden, weight, labels, teacher, bias=bias, backend="cpu", **options)


def gradients_agree(sides, mine, theirs):
    for a, e in zip(*(torch.autograd.grad(loss, sides[0]) for loss in (mine, theirs)), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", BETA)
def test_trl(sides, beta):
    kernels = pytest.importorskip("trl.kernels.chunked_divergence", reason="trl is not installed")
    student, taught, labels = sides
    out = ours(sides, beta, temperature=0.7, logit_softcap=5.0, theirs=6.0)
    found = kernels.ChunkedDivergenceFunction.apply(*student, *taught, beta, 0.7, 1.0, 5.0, 1.0, 6.0)[0]
    active = labels >= 0
    torch.testing.assert_close(out.divergences[active], found[active], rtol=1e-4, atol=2e-6)
    gradients_agree(sides, out.loss, found[active].mean())


@pytest.mark.parametrize("beta", BETA)
def test_trl_of_k_tokens_and_a_tail(sides, beta):
    """The candidates of a served teacher, as AsyncDistillationTrainer scores them."""
    name = "trl.experimental.async_distillation.async_distillation_trainer"
    trainer = pytest.importorskip(name, reason="trl is not installed, or has no such trainer")
    (hidden, weight, bias), taught, labels = sides
    logprobs, ids = torch.nn.functional.linear(*taught).log_softmax(-1).topk(5)
    divergence, share = BETA[beta]
    teacher = ppg.TopKTeacher(ids, logprobs, divergence=divergence, beta=share)
    out = ppg.linear_distillation_loss(hidden, weight, labels, teacher, bias=bias, backend="cpu")
    student = torch.nn.functional.linear(hidden, weight, bias).log_softmax(-1).gather(-1, ids)
    there = torch.ones_like(ids, dtype=torch.bool)
    (s, support), (t, _) = (trainer._add_tail_bucket(side, there) for side in (student, logprobs))
    found = trainer._jsd_divergence(s, t, beta=beta, support_mask=support)
    each = found.sum(-1) if found.dim() == 2 else found
    active = labels >= 0
    torch.testing.assert_close(out.divergences[active], each[active], rtol=1e-4, atol=2e-6)
    gradients_agree(sides, out.loss, each[active].mean())


@pytest.mark.parametrize("beta", BETA)
def test_liger(sides, beta):
    chunked = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    loss = chunked.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=0.7, compiled=False, chunk_size=8
    )
    (hidden, weight, bias), (teacher_hidden, teacher_weight, teacher_bias), labels = sides
    found = loss(hidden, weight, teacher_hidden, teacher_weight, labels, bias, teacher_bias)
    out = ours(sides, beta, temperature=0.7)
    torch.testing.assert_close(out.loss, found, rtol=1e-4, atol=1e-6)
    gradients_agree(sides, out.loss, found)

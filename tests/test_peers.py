"""Public functions of other projects as oracles: Liger's GRPO losses, TRL's log-probs and fused head. Where they are
installed."""

import pytest
import torch

import ppg_fast as ppg

B, L, V, D = 4, 9, 113, 16


@pytest.fixture
def batch():
    lengths = torch.tensor([9, 4, 1, 7])
    labels = torch.randint(V, (B, L))
    return {
        "hidden": torch.randn(B, L, D, requires_grad=True),
        "weight": torch.randn(V, D, requires_grad=True),
        "bias": torch.randn(V, requires_grad=True),
        "labels": labels,
        "mask": (torch.arange(L) < lengths[:, None]).float(),
        "advantages": torch.randn(B),
    }


def near(logprobs, spread):
    return logprobs + spread * (torch.rand_like(logprobs) - 0.5)


def gradients(loss, batch):
    return torch.autograd.grad(loss, [batch[name] for name in ("hidden", "weight", "bias")])


LIGER = {  # loss_type -> our surrogate, reduction, and the normalizer where the caller owns the denominator
    "grpo": ("ppo", "sequence_mean", None),
    "bnpo": ("ppo", "token_mean", None),
    "dr_grpo": ("ppo", "sum", float(B * L)),
    "cispo": ("cispo", "token_mean", None),
}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LIGER)
def test_liger_fused_linear_grpo(batch, loss_type, level):
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    surrogate, reduction, normalizer = LIGER[loss_type]
    if level == "sequence" and loss_type == "cispo":
        pytest.skip("CISPO has one ratio a token")
    logprobs = ppg.linear_token_logprobs(
        batch["hidden"], batch["weight"], batch["labels"], bias=batch["bias"], temperature=0.8
    ).detach()
    old, ref = near(logprobs, 1.5), near(logprobs, 1.0)
    high = 0.31
    peer = liger.LigerFusedLinearGRPOLoss(
        beta=0.07, compiled=False, use_ref_model=True, epsilon_low=0.17,
        epsilon_high=1 + high if surrogate == "cispo" else high,
        loss_type=loss_type, temperature=0.8, importance_sampling_level=level, max_completion_length=L,
    )  # fmt: skip
    rows = (batch["hidden"], batch["weight"], batch["labels"])
    expected, _ = peer(
        *rows, batch["mask"], batch["advantages"], bias=batch["bias"], ref_per_token_logps=ref, old_per_token_logps=old
    )
    spec = ppg.PolicyLossSpec(
        "gspo" if level == "sequence" else surrogate,
        clip_low=None if surrogate == "cispo" else 0.17,
        clip_high=high,
        kl_coef=0.07,
        kl_estimator="k3",
        temperature=0.8,
    )
    actual = ppg.linear_policy_loss(
        *rows, batch["advantages"], bias=batch["bias"], loss_mask=batch["mask"], old_logprobs=old, ref_logprobs=ref,
        spec=spec,
        reduction=reduction, normalizer=normalizer,
    )  # fmt: skip
    torch.testing.assert_close(actual.loss, expected, rtol=1e-5, atol=2e-5)  # both sum float32 terms of order 10
    for ours, theirs in zip(gradients(actual.loss, batch), gradients(expected, batch), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-6)


def test_trl_selective_log_softmax(batch):
    trainer_utils = pytest.importorskip("trl.trainer.utils", reason="trl is not installed")
    logits = (batch["hidden"] @ batch["weight"].t()).detach()
    ours, entropy = ppg.token_logprobs(logits, batch["labels"], temperature=0.7, entropy=True)
    torch.testing.assert_close(
        ours, trainer_utils.selective_log_softmax(logits / 0.7, batch["labels"]), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(entropy, trainer_utils.entropy_from_logits(logits / 0.7), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 9.0])
def test_trl_chunked_head(batch, softcap):
    chunked = pytest.importorskip("trl.kernels.chunked_logprob", reason="trl is not installed")
    hidden, labels = batch["hidden"].reshape(-1, D), batch["labels"].reshape(-1)
    theirs, their_entropy, *_ = chunked.ChunkedLogProbFunction.apply(
        hidden, batch["weight"], batch["bias"], labels, 0.7, 32, softcap, 1.0, ("entropy",)
    )
    ours, entropy = ppg.linear_token_logprobs(
        hidden,
        batch["weight"],
        labels,
        bias=batch["bias"],
        temperature=0.7,
        logit_softcap=softcap or 0.0,
        entropy=True,
        chunk_rows=5,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, their_entropy, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(2, B * L)
    expected = gradients((theirs * upstream[0] + their_entropy * upstream[1]).sum(), batch)
    for mine, peer in zip(gradients((ours * upstream[0] + entropy * upstream[1]).sum(), batch), expected, strict=True):
        torch.testing.assert_close(mine, peer, rtol=2e-4, atol=2e-4)


def test_torch_cross_entropy_is_imitation(batch):
    """A = 1 and reinforce: supervised fine-tuning is the same kernel."""
    logits = (batch["hidden"] @ batch["weight"].t()).detach().requires_grad_()
    labels = batch["labels"].masked_fill(batch["mask"] == 0, -100)
    ours = ppg.policy_loss(logits, labels, torch.ones(B, L)).loss
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    (mine,), (peer,) = torch.autograd.grad(ours, logits), torch.autograd.grad(theirs, logits)
    torch.testing.assert_close(mine, peer, rtol=1e-5, atol=1e-8)

"""Losses and the fused head of the verl integration against verl's own: `make test-verl`."""

from types import SimpleNamespace

import pytest
import torch

verl = pytest.importorskip("verl", reason="verl is not installed here; make test-verl builds its environment")

from tensordict import TensorDict
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from verl.models.transformers.monkey_patch import patch_forward_with_backends
from verl.trainer.ppo import core_algos
from verl.utils import tensordict_utils
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.workers.config import FSDPActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

import ppg_fast as ppg
from ppg_fast.integrations.verl import losses

FOUR_MODES = ("token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
RUNS = ["1101110000", "1111000000", "1110110000", "1011110100", "1101101000", "1011011100"]  # dialogues of 1 to 3 turns
MASK = torch.tensor([[int(c) for c in row] for row in RUNS])


# ---- losses ----------------------------------------------------------------------------------------------------------
def actor(**fields):
    numbers = {
        "rollout_n": 1,
        "ppo_micro_batch_size_per_gpu": 2,
        "clip_ratio_low": 0.15,
        "clip_ratio_high": 0.3,
        "clip_ratio_c": 1.7,
    }
    return FSDPActorConfig(strategy="fsdp", **{**numbers, **fields})


@pytest.fixture
def batch():
    torch.manual_seed(3)
    log_prob = -2 * torch.rand(MASK.shape)
    spread = torch.randn(MASK.shape)
    return SimpleNamespace(
        log_prob=log_prob.requires_grad_(), old=log_prob.detach() - 0.6 * spread, advantages=torch.randn(MASK.shape),
        weights=torch.rand(MASK.shape) + 0.5, mask=MASK.bool(),
    )  # fmt: skip


GLOBAL = {"dp_size": 2, "batch_num_tokens": 77, "global_batch_size": 13, "loss_scale_factor": 9}


def both(batch, ours, theirs, config, mode, weights=None):
    """Loss and gradient of a registered loss of ours and of verl's."""
    for name in (ours, theirs):
        loss, metrics = core_algos.get_policy_loss_fn(name)(
            old_log_prob=batch.old, log_prob=batch.log_prob, advantages=batch.advantages, response_mask=batch.mask,
            loss_agg_mode=mode,
            config=config, rollout_is_weights=weights,
        )  # fmt: skip
        yield loss.detach(), torch.autograd.grad(loss, batch.log_prob)[0], metrics


@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("mode", [*FOUR_MODES, "token-sum"])
def test_ppg_is_vanilla(batch, mode, info):
    config = actor()
    config.global_batch_info.update(info)
    for weights in (None, batch.weights):
        (loss, grad, metrics), (expected, expected_grad, their_metrics) = both(
            batch, "ppg", "vanilla", config, mode, weights
        )
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)
        assert 0 < metrics["actor/pg_clipfrac"] < 1
        assert abs(metrics["actor/pg_clipfrac"] - their_metrics["actor/pg_clipfrac"]) < 1e-6


LOWER = {"cispo": {}, "sapo": {"tau_pos": 1.5, "tau_neg": 2.0}, "dppo_tv": {}, "dppo_kl": {"clip_ratio_low": 0.02}}


@pytest.mark.parametrize("name", LOWER)
def test_ppg_losses_of_one_token_are_verls(batch, name):
    """Of dppo the clip fraction too; sapo's mode is fixed in verl."""
    config = actor(**LOWER[name])
    batch.old = batch.old.clamp(max=-1e-3)  # of a probability, whose complement dppo_kl takes
    for weights in (None, batch.weights):
        (loss, grad, ours), (expected, expected_grad, theirs) = both(
            batch, f"ppg_{name}", name, config, "seq-mean-token-mean", weights
        )
        torch.testing.assert_close((loss, grad), (expected, expected_grad), rtol=1e-5, atol=1e-6)
        assert ours.get("actor/pg_clipfrac", 0.0) == pytest.approx(theirs["actor/pg_clipfrac"], abs=1e-6)


def test_ppg_gspo_is_gspo(batch):
    config = actor(clip_ratio_low=0.05, clip_ratio_high=0.07, clip_ratio_c=1e6)
    (loss, grad, _), (expected, expected_grad, _) = both(batch, "ppg_gspo", "gspo", config, "seq-mean-token-mean")
    torch.testing.assert_close((loss, grad), (expected, expected_grad), rtol=1e-5, atol=1e-6)


def test_ppg_reinforce_is_verls_reinforce(batch):
    ours, _ = losses.LOSSES["ppg_reinforce"](
        batch.old, batch.log_prob, batch.advantages, batch.mask, "token-mean", actor()
    )
    theirs, _ = core_algos.compute_policy_loss_reinforce(
        batch.old, batch.log_prob, batch.advantages, batch.mask, "token-mean", actor()
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("mode", FOUR_MODES)
def test_our_reductions_are_verls_modes(batch, mode, info):
    """For a caller that goes from logits to the loss in one pass: reduction and normalizer in place of agg_loss."""
    dp, horizon = info.get("dp_size", 1), info.get("loss_scale_factor", MASK.shape[1])
    sequences, tokens = info.get("global_batch_size", len(MASK)), info.get("batch_num_tokens", int(MASK.sum()))
    reduction, normalizer = {
        "token-mean": ("token_mean", tokens / dp),
        "seq-mean-token-sum": ("sequence_sum", sequences / dp),
        "seq-mean-token-sum-norm": ("sequence_sum", sequences * horizon / dp),
        "seq-mean-token-mean": ("sequence_mean", sequences / dp),
    }[mode]
    logits, labels = torch.randn(*MASK.shape, 17), torch.randint(17, MASK.shape)
    arguments = {"loss_mask": batch.mask, "old_logprobs": batch.old}
    spec = ppg.PolicyLossSpec("ppo", clip_low=0.15, clip_high=0.3)
    per_token = ppg.policy_loss(logits, labels, batch.advantages, spec=spec, reduction="none", **arguments).loss
    expected = core_algos.agg_loss(per_token, batch.mask, mode, **info)
    ours = ppg.policy_loss(
        logits, labels, batch.advantages, spec=spec, reduction=reduction, normalizer=normalizer, **arguments
    ).loss
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_ppo_loss_runs_the_chosen_loss():
    """verl's engine-side function: log-probs of packed sequences in, loss and metrics out; micro-batches add up."""
    prompt, (B, T) = 3, MASK.shape
    lengths = MASK.shape[1] - MASK.flip(1).argmax(1)
    attention = torch.cat([torch.ones(B, prompt), (torch.arange(T) < lengths[:, None]).float()], 1).long()
    torch.manual_seed(1)
    log_probs, old, credit = -torch.rand(B, prompt + T), -torch.rand(B, T), torch.randn(B, T)

    def loss(rows):
        config = actor(policy_loss=PolicyLossConfig(loss_mode="ppg"), entropy_coeff=0.1)
        fields = {
            "prompts": torch.ones(B, prompt, dtype=torch.long), "responses": torch.ones(B, T, dtype=torch.long),
            "attention_mask": attention, "response_mask": MASK, "old_log_probs": old, "advantages": credit,
        }  # fmt: skip
        data = TensorDict({name: value[rows] for name, value in fields.items()}, batch_size=len(attention[rows]))
        tensordict_utils.assign_non_tensor(data, dp_size=1, batch_num_tokens=float(MASK.sum()), global_batch_size=B)
        packed = log_probs[rows][attention[rows].bool()]
        value, metrics = ppo_loss(config, {"log_probs": packed, "entropy": packed.abs()}, data)
        assert {"actor/pg_loss", "actor/pg_clipfrac", "actor/approx_kl"} <= set(metrics)
        return value

    whole = loss(slice(None))
    torch.testing.assert_close(loss(slice(0, 2)) + loss(slice(2, None)), whole, rtol=1e-5, atol=1e-6)


# ---- head ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(11,), (3, 7)], ids=["packed", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
def test_the_head_is_verls_torch_head(shape, dtype):
    torch.manual_seed(2)
    hidden, weight = torch.randn(*shape, 24, requires_grad=True), torch.randn(131, 24, requires_grad=True)
    tokens, upstream = torch.randint(131, shape, dtype=torch.int32), torch.randn(2, *shape)
    results = {}
    for backend in ("torch", "ppg"):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            logprobs, entropy = FusedLinearForPPO(impl_backend=backend)(hidden, weight, tokens, temperature=0.7)
        assert logprobs.dtype == torch.float32
        loss = (logprobs * upstream[0] + entropy.float() * upstream[1]).sum()
        results[backend] = (logprobs.detach(), entropy.detach().float(), *torch.autograd.grad(loss, [hidden, weight]))
    # they round dlogits
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 0.35}
    for ours, theirs in zip(results["ppg"], results["torch"], strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)
    # entropy not in the loss
    only_logprobs, _ = FusedLinearForPPO(impl_backend="ppg")(hidden, weight, tokens, temperature=0.7)
    assert torch.autograd.grad(only_logprobs.sum(), hidden)[0].isfinite().all()


TINY = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MODELS = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**TINY, head_dim=8)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=True)),
}


@pytest.mark.parametrize("name", MODELS)
def test_training_with_our_head_is_training_with_verls(name):
    """impl_backend=ppg through verl's own switch, five steps of its policy loss, parameters compared step by step."""
    tokens = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(4))
    credit, runs = torch.randn(2, 11, generator=torch.Generator().manual_seed(6)), {}
    for backend in ("torch", "ppg"):
        torch.manual_seed(0)
        model = MODELS[name]()
        original = model.__class__.forward
        try:
            patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=backend)
            optimizer, steps = torch.optim.SGD(model.parameters(), lr=0.3), []
            for _ in range(5):
                out = model(input_ids=tokens, use_cache=False, temperature=0.9, return_dict=True)
                arguments = (
                    out.log_probs[:, :-1].detach(),
                    out.log_probs[:, :-1],
                    credit,
                    torch.ones(2, 11),
                    "token-mean",
                    actor(),
                )
                loss = losses.LOSSES["ppg"](*arguments)[0] - 0.01 * out.entropy[:, :-1].mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                steps.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
            runs[backend] = steps
        finally:
            model.__class__.forward = original
    assert (runs["ppg"][-1] - runs["ppg"][0]).abs().max() > 1e-3
    for ours, theirs in zip(runs["ppg"], runs["torch"], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_other_backends_stay_verls():
    with pytest.raises(ValueError, match="Unsupported FusedLinearForPPO backend"):
        FusedLinearForPPO(impl_backend="nothing")
    assert FusedLinearForPPO().impl_backend == "torch"

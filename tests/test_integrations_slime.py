"""The contract of slime, by stand-ins with its documented names: lists of responses, its reducer, groups over ranks."""

from dataclasses import dataclass
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from host_case import GROUPS, MASK, OPTIONS, TURN_REWARDS, expected_credit, put


@dataclass
class Sample:
    index: int
    group_index: int
    response_length: int
    loss_mask: list | None
    reward: float
    metadata: dict | None = None

    def get_reward_value(self, args):
        return self.reward


def slime_args(**fields):
    numbers = {
        "eps_clip": 0.1, "eps_clip_high": 0.15, "eps_clip_c": 1.3, "entropy_coef": 0.05, "use_kl_loss": True,
        "kl_loss_coef": 0.2,
        "kl_loss_type": "low_var_kl", "rollout_temperature": 0.8, "use_rollout_logprobs": False, "use_tis": False,
        "tis_clip": 1.2,
    }  # fmt: skip
    return SimpleNamespace(**{**numbers, **fields})


@pytest.fixture
def slime(monkeypatch):
    sizes = SimpleNamespace(tp=1, cp=1)
    mpu = SimpleNamespace(
        get_tensor_model_parallel_world_size=lambda: sizes.tp, get_context_parallel_world_size=lambda: sizes.cp
    )
    put(monkeypatch, "megatron.core", mpu=mpu)
    put(
        monkeypatch,
        "slime.backends.megatron_utils.cp_utils",
        slice_log_prob_with_cp=lambda values, total, response: values[:: sizes.cp],
    )
    return import_module("ppg_fast.integrations.slime"), sizes


def test_slime_credits_turns_across_ranks(slime):
    module, sizes = slime
    args = slime_args(**{f"ppg_{name}": value for name, value in OPTIONS.items()})
    samples = [
        Sample(b, int(GROUPS[b]), 9, MASK[b].tolist(), 7.0, {"turn_rewards": TURN_REWARDS[b]}) for b in range(4)
    ]  # fmt: skip
    raw, rewards = module.reward_post_process(args, samples)
    assert raw == [7.0] * 4
    assert [tuple(r.shape) for r in rewards] == [(2,), (3,), (1,), (2,)]
    for rank in ([0, 3], [2, 1]):  # a group is spread over ranks, in another order
        data = {"rewards": [rewards[i] for i in rank], "loss_masks": [MASK[i] for i in rank]}
        data |= {"total_lengths": [12, 13], "response_lengths": [9, 9]}
        module.ppg_advantages(args, data)
        torch.testing.assert_close(torch.stack(data["advantages"]), expected_credit()[rank])
        assert len(data["returns"]) == 2
    sizes.cp = 2
    module.ppg_advantages(args, data)
    torch.testing.assert_close(data["advantages"][0], expected_credit()[2][::2])
    data["loss_masks"] = [torch.zeros(9), torch.ones(9)]  # a sample taken out of the loss; one whose turns have merged
    with pytest.raises(ValueError, match="one per turn"):
        module.ppg_advantages(args, data)
    data["loss_masks"][1] = MASK[1]
    module.ppg_advantages(args, data)
    assert not data["advantages"][0].any()


def test_slime_without_rewards_of_turns_is_rloo(slime):
    module, _ = slime
    scores = [1.0, 4.0, -2.0, 0.5]
    samples = [Sample(b, int(GROUPS[b]), 5, None if b % 2 else [1, 0, 1, 1, 0], r) for b, r in enumerate(scores)]
    _, rewards = module.reward_post_process(slime_args(), samples)
    assert [r[0].item() for r in rewards] == [1.0 - 1.0, 4.0 + 0.5, -2.0 - 2.5, 0.5]
    samples[0].metadata = {"turn_rewards": [1.0]}
    with pytest.raises(ValueError, match="sample 0 needs one number for each of its 2 turns"):
        module.reward_post_process(slime_args(), samples)


@pytest.mark.parametrize("old", ["log_probs", "rollout_log_probs", None])
@pytest.mark.parametrize(("padding", "use_tis"), [(0, False), (3, True)])
def test_slime_loss_in_one_pass_is_its_loss_in_several(slime, old, padding, use_tis):
    """Naive PyTorch in the order of slime's own loss: temperature, log-probs, entropy, clipped ratio, KL, its
    reducer."""
    module, _ = slime
    torch.manual_seed(5)
    totals, responses, V = [6, 9, 5], [4, 7, 2], 19
    tokens = [torch.randint(V, (n,)) for n in totals]
    masks = [torch.tensor(m) for m in ([1, 0, 1, 1], [1, 1, 0, 0, 1, 1, 0], [0, 0])]
    logits = torch.randn(1, sum(totals) + padding, V, requires_grad=True)
    args = slime_args(use_rollout_logprobs=old == "rollout_log_probs", use_tis=use_tis)

    def per_token():
        return [-torch.rand(n) - 1.5 for n in responses]

    batch = {
        "unconcat_tokens": tokens, "total_lengths": totals, "response_lengths": responses, "loss_masks": masks,
        "advantages": [torch.randn(n) for n in responses], "ref_log_probs": per_token(), "log_probs": None,
        "rollout_log_probs": per_token(),
    }  # fmt: skip
    if old:
        batch[old] = per_token()

    def reduce(x):  # sum of sample means
        parts = zip(x.split(responses), masks, strict=True)
        return sum((values * mask).sum() / mask.sum().clamp(min=1) for values, mask in parts)

    dirty = [a.masked_fill(m == 0, torch.nan) for a, m in zip(batch["advantages"], masks, strict=True)]
    loss, metrics = module.ppg_loss(args, {**batch, "advantages": dirty}, logits, reduce)
    scaled, starts = torch.log_softmax(logits[0] / 0.8, -1), [0, 6, 15]
    rows = torch.cat(
        [torch.arange(s + n - R - 1, s + n - 1) for s, n, R in zip(starts, totals, responses, strict=True)]
    )
    taken = torch.cat([t[-R:] for t, R in zip(tokens, responses, strict=True)])
    logprobs = scaled[rows].gather(1, taken[:, None])[:, 0]
    entropy = -(scaled[rows].exp() * scaled[rows]).sum(-1)
    before = torch.cat(batch[old]) if old else logprobs.detach()
    ratio, A = (logprobs - before).exp(), torch.cat(batch["advantages"])
    surrogate = -torch.minimum(ratio * A, ratio.clamp(0.9, 1.15) * A)
    surrogate = torch.where(A < 0, torch.minimum(surrogate, -1.3 * A), surrogate)
    if use_tis:
        surrogate = surrogate * (before - torch.cat(batch["rollout_log_probs"])).exp().clamp(max=1.2)
    delta = torch.cat(batch["ref_log_probs"]) - logprobs
    naive = reduce(surrogate) - 0.05 * reduce(entropy) + 0.2 * reduce(delta.exp() - delta - 1)
    torch.testing.assert_close(loss, naive, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(value, logits)[0] for value in (loss, naive)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metrics["entropy_loss"], reduce(entropy).detach(), rtol=1e-5, atol=1e-6)
    assert all(value.dim() == 0 and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("loss_type", ["gspo", "gspo_turn", "cispo", "reinforce"])
def test_slime_loss_keeps_its_samples_apart(slime, loss_type):
    module, _ = slime
    torch.manual_seed(6)
    totals, responses = [6, 9], [4, 7]
    logits, args = (
        torch.randn(1, 15, 19),
        slime_args(ppg_loss_type=loss_type, use_tis=True, entropy_coef=0.0, use_kl_loss=False),
    )
    fields = {
        "log_probs": lambda n: -2 - torch.rand(n),
        "rollout_log_probs": lambda n: -2 - torch.rand(n),
        "advantages": torch.randn,
    }
    batch = {name: [make(n) for n in responses] for name, make in fields.items()}
    masks = [torch.tensor(m) for m in ([1, 0, 1, 1], [1, 1, 0, 0, 1, 1, 0])]
    batch |= {
        "unconcat_tokens": [torch.randint(19, (n,)) for n in totals],
        "loss_masks": masks,
        "total_lengths": totals,
    }
    batch["response_lengths"] = responses
    both, _ = module.ppg_loss(args, batch, logits, torch.sum)
    alone = []
    for i, span in enumerate((slice(6), slice(6, 15))):
        one = {name: [values[i]] for name, values in batch.items()}
        alone.append(module.ppg_loss(args, one, logits[:, span], torch.sum)[0])
    torch.testing.assert_close(both, sum(alone))


def test_slime_loss_says_what_it_cannot_do(slime):
    module, sizes = slime
    with pytest.raises(ValueError, match="kl_loss_type"):
        module.loss_spec(slime_args(kl_loss_type="abs"))
    with pytest.raises(ValueError, match="tis_clip_low"):
        module.loss_spec(slime_args(use_tis=True, tis_clip_low=0.5))
    sizes.tp = 2
    with pytest.raises(ValueError, match="tensor and context parallel"):
        module.ppg_loss(slime_args(), {}, torch.randn(1, 3, 4), torch.sum)

"""The contract of SkyRL, by stand-ins with its documented names: registries, a sum, advantages scaled before."""

from dataclasses import dataclass
from importlib import import_module

import pytest
import torch
from host_case import MASK, OPTIONS, TURN_REWARDS, a_batch, expected_credit, own_logprobs, put, same, truth

import ppg_fast as ppg
from ppg_fast.integrations import turns


@pytest.fixture
def batch():
    return a_batch()


UTILS = "skyrl.backends.skyrl_train.utils"


@dataclass
class AlgorithmConfig:
    eps_clip_low: float = 0.1
    eps_clip_high: float = 0.15
    use_kl_in_reward: bool = False
    off_policy_correction: float | None = None  # of the stand-in below: the cap of token weights


class RayPPOTrainer:
    """The estimator's call in SkyRL's trainer, and the scaling of advantages before its losses."""

    def __init__(self, estimators, config):
        self.estimators, self.config = estimators, config

    def compute_advantages_and_returns(self, data):
        data["advantages"], data["returns"] = self.estimators["ppg"](
            token_level_rewards=data["rewards"], response_mask=data["response_mask"], index=data["uids"], values=None,
            grpo_norm_by_std=True, gamma=1.0, lambd=1.0, config=self.config,
        )  # fmt: skip
        return data


@pytest.fixture
def sky(monkeypatch):
    registries = {"advantage": {}, "loss": {}}

    def register(kind):
        return lambda name: lambda function: registries[kind].setdefault(name, function)

    put(monkeypatch, 
        f"{UTILS}.ppo_utils",
        register_advantage_estimator=register("advantage"), register_policy_loss=register("loss"),
        reduce_loss=lambda loss, mask: loss.sum() if mask is None else (loss * mask).sum(),
    )  # fmt: skip

    def apply_off_policy_correction(loss, old, rollout, mask, cap):
        weights = torch.ones_like(loss) if cap is None else (old - rollout).exp().clamp(max=cap)
        return loss * weights, mask, {"corrected": float(cap is not None)}

    put(monkeypatch, f"{UTILS}.off_policy_correction_utils", apply_off_policy_correction=apply_off_policy_correction)
    return import_module("ppg_fast.integrations.skyrl"), registries


def test_skyrl_estimator_sees_turns_through_the_loss_mask(sky):
    skyrl, registries = sky
    skyrl.register(**OPTIONS)

    class Trainer(skyrl.CreditByLossMask, RayPPOTrainer):
        pass

    # SkyRL aligns to the right, and its response mask covers observations
    loss_mask = torch.zeros(4, 11)
    loss_mask[:, 2:] = MASK
    ids = turns.turn_ids_of_mask(loss_mask)
    data = {
        "rewards": turns.place_turn_rewards(TURN_REWARDS, ids), "uids": ["p", "p", "p", "q"], "loss_mask": loss_mask,
        "response_mask": torch.ones(4, 11),
    }  # fmt: skip
    out = Trainer(registries["advantage"], AlgorithmConfig()).compute_advantages_and_returns(dict(data))
    torch.testing.assert_close(out["advantages"][:, 2:], expected_credit())
    assert torch.equal(out["response_mask"], data["response_mask"])
    with pytest.raises(ValueError, match="CreditByLossMask"):  # one run: all turns merged
        RayPPOTrainer(registries["advantage"], AlgorithmConfig()).compute_advantages_and_returns(dict(data))
    kl = AlgorithmConfig(use_kl_in_reward=True)
    penalised = {**data, "rewards": data["rewards"] + 0.01 * loss_mask}
    everywhere = Trainer(registries["advantage"], kl).compute_advantages_and_returns(penalised)
    assert everywhere["advantages"].isfinite().all()


@pytest.mark.parametrize("loss_type", ["ppo", "reinforce", "cispo", "gspo"])
def test_skyrl_sums_what_the_advantages_have_scaled(batch, sky, loss_type):
    skyrl, registries = sky
    skyrl.register(loss_type=loss_type)
    scaled = batch.advantages / batch.mask.sum()  # SkyRL's loss_reduction token_mean
    arguments = (own_logprobs(batch), batch.old, scaled, AlgorithmConfig(), batch.mask.float())
    loss, metrics = registries["loss"]["ppg"](*arguments, rollout_logprobs=batch.rollout)
    same(loss, batch, truth(batch, ppg.PolicyLossSpec(loss_type, clip_low=0.1, clip_high=0.15)))
    assert {"clip_ratio", "corrected"} <= set(metrics)
    capped = (
        own_logprobs(batch),
        batch.old,
        scaled,
        AlgorithmConfig(off_policy_correction=1.1),
        batch.mask.float(),
        batch.rollout,
    )
    corrected = ppg.PolicyLossSpec(loss_type, clip_low=0.1, clip_high=0.15, importance_cap=1.1)
    same(registries["loss"]["ppg"](*capped)[0], batch, truth(batch, corrected))
    assert registries["loss"]["ppg"].__name__ == "ppg_policy_loss"

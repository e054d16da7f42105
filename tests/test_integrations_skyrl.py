"""The contract of SkyRL, by stand-ins with its documented names: registries, a sum, advantages scaled before."""

import re
from dataclasses import dataclass, field
from importlib import import_module
from types import SimpleNamespace

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
class CISPOConfig:
    cispo_eps_clip_low: float = 0.1
    cispo_eps_clip_high: float = 0.15
    cispo_anchor: str = "old"


@dataclass
class SAPOConfig:
    tau_pos: float = 1.0
    tau_neg: float = 1.05


@dataclass
class ClipCovConfig:
    clip_ratio: float = 0.0002
    clip_cov_lb: float = 1.0
    clip_cov_ub: float = 5.0


@dataclass
class KLCovConfig:
    kl_cov_frac: float = 0.2
    ppo_kl_coef: float = 1.0


@dataclass
class DPPOConfig:
    dppo_type: str = "binary_tv"
    delta_low: float = 0.2
    delta_high: float = 0.2


@dataclass
class AlgorithmConfig:  # of SkyRL 0.3.0
    eps_clip_low: float = 0.1
    eps_clip_high: float = 0.15
    use_kl_in_reward: bool = False
    gamma: float = 1.0
    lambd: float = 1.0
    grpo_norm_by_std: bool = True
    clip_ratio_c: float = 3.0
    loss_reduction: str = "token_mean"
    use_entropy_loss: bool = False
    later: float = 0.5
    cispo: CISPOConfig = field(default_factory=CISPOConfig)
    sapo: SAPOConfig = field(default_factory=SAPOConfig)
    clip_cov: ClipCovConfig = field(default_factory=ClipCovConfig)
    kl_cov: KLCovConfig = field(default_factory=KLCovConfig)
    dppo: DPPOConfig = field(default_factory=DPPOConfig)
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
    numbers = {} if loss_type == "reinforce" else {"clip_low": 0.1, "clip_high": 0.15}
    same(loss, batch, truth(batch, ppg.PolicyLossSpec(loss_type, **numbers)))
    assert {"clip_ratio", "corrected"} <= set(metrics)
    capped = (
        own_logprobs(batch),
        batch.old,
        scaled,
        AlgorithmConfig(off_policy_correction=1.1),
        batch.mask.float(),
        batch.rollout,
    )
    corrected = ppg.PolicyLossSpec(loss_type, importance_cap=1.1, **numbers)
    same(registries["loss"]["ppg"](*capped)[0], batch, truth(batch, corrected))
    assert registries["loss"]["ppg"].__name__ == "ppg_policy_loss"


REFUSED = {
    "advantages": {"gamma": 0.9, "lambd": 0.95, "grpo_norm_by_std": False, "later": 0.25},
    "loss": {
        "clip_ratio_c": 2.0, "cispo.cispo_anchor": "sampler", "clip_cov.clip_ratio": 0.1, "clip_cov.clip_cov_lb": 0.0,
        "clip_cov.clip_cov_ub": 1.0, "kl_cov.kl_cov_frac": 0.1, "kl_cov.ppo_kl_coef": 0.5, "later": 0.25,
    },
}  # fmt: skip


def configured(name, value):
    config = AlgorithmConfig()
    *outer, last = name.split(".")
    setattr(getattr(config, outer[0]) if outer else config, last, value)
    return config


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, cases in REFUSED.items() for name in cases])
def test_skyrls_options_that_we_cannot_honour_are_refused(sky, part, name):
    skyrl, registries = sky
    skyrl.register()
    value = REFUSED[part][name]
    config, row, mask = configured(name, value), torch.zeros(1, 2), torch.ones(1, 2)
    calls = {
        "loss": lambda: registries["loss"]["ppg"](row, row, row, config, mask),
        "advantages": lambda: registries["advantage"]["ppg"](row, mask, ["p"], config=config),
    }
    with pytest.raises(ValueError, match=rf"^{name} .*of SkyRL .*must .*, got {re.escape(repr(value))}$"):
        calls[part]()


def test_every_row_that_refuses_has_a_case(sky):
    skyrl, _ = sky
    for part, cases in REFUSED.items():
        rows = [o for o in skyrl.OPTIONS if o.part == part and o.allows]
        assert {name for o in rows for name in o.names.split()} | {"later"} == set(cases)


def test_skyrls_own_terms_are_its_own(sky):
    skyrl, registries = sky
    skyrl.register()
    config = AlgorithmConfig(use_entropy_loss=True, loss_reduction="sequence_mean")
    loss, _ = registries["loss"]["ppg"](*[torch.ones(1, 2)] * 3, config, torch.ones(1, 2))
    assert loss == -2.0  # a sum of ratio 1 times advantage 1


def test_rows_of_steps_are_refused(sky):
    skyrl, _ = sky

    class Trainer(skyrl.CreditByLossMask, RayPPOTrainer):
        cfg = SimpleNamespace(generator=SimpleNamespace(step_wise_trajectories=True))

    with pytest.raises(ValueError, match=r"^generator.step_wise_trajectories of SkyRL must be False .*, got True$"):
        Trainer({}, None).compute_advantages_and_returns({})

"""What hosts call their losses, through our adapters, against their formulas in float64: loss where ours has the same
value, gradient always."""

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from host_case import put

MASK = torch.tensor([[1, 1, 1, 1, 1, 0, 1, 1], [0, 1, 1, 0, 1, 1, 1, 1]]).bool()


@pytest.fixture
def rows():
    """Log-probs far enough apart that every bound below cuts somewhere, on both sides."""
    torch.manual_seed(4)
    l = -3 * torch.rand(2, 8, dtype=torch.float64)
    around = {name: l + 1.2 * torch.rand_like(l) - 0.6 for name in ("old", "rollout")}
    around = {name: values.clamp(max=-1e-3) for name, values in around.items()}
    return SimpleNamespace(l=l.requires_grad_(), A=torch.randn_like(l), mask=MASK, **around)


def clipped(x, low, high):
    return x.clamp(1 - low, 1 + high)


def probabilities(l, against):
    return l.exp().detach() - against.exp()


def total_variation(l, against, A, low, high):
    """1 where DPPO lets a token train, by the difference of probabilities (arXiv:2602.04879, equation 13)."""
    moved = probabilities(l, against)
    return (~torch.where(A > 0, moved > high, moved < -low)).double()


def binary_kl(l, against, A, low, high):
    """The same by the KL of two Bernoullis, where the probability moved the way of the advantage (equation 14)."""
    p, q, moved = l.exp().detach(), against.exp(), probabilities(l, against)
    kl = q * (against - l.detach()) + (1 - q) * torch.log((1 - q + 1e-8) / (1 - p + 1e-8))
    return (~torch.where(A > 0, (moved > 0) & (kl > high), (moved < 0) & (kl > low))).double()


def sapo(l, old, A, positive, negative):
    tau = torch.where(A > 0, positive, negative).double()
    return -torch.sigmoid(tau * ((l - old).exp() - 1)) * 4 / tau * A


def same(ours, theirs, rows, *, value=True):
    """``theirs`` (B, L), summed over the mask; every formula has tokens that train and tokens that do not."""
    expected = (theirs * rows.mask).sum()
    if value:
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(loss, rows.l, retain_graph=True)[0] for loss in (ours, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-6)
    return (gradients[1] == 0)[rows.mask]


# ---- prime-rl --------------------------------------------------------------------------------------------------------
def prime_default(l, b, A):
    r = (l - b).exp()
    return -total_variation(l, b, A, 0.05, 0.1) * 0.7 * A * r + 0.03 * (l - b) ** 2


def prime_ipo(l, b, A):
    kept = (probabilities(l, b).abs() <= 0.03).double()
    return -kept * A * (l - b).exp() + 0.03 * (l - b) ** 2


PRIME = {
    "default": (
        prime_default,
        {"loss_type": "dppo_tv", "dppo_mask_low": 0.05, "dppo_mask_high": 0.1, "adv_tau": 0.7, "kl_tau": 0.03},
    ),
    "ipo": (prime_ipo, {"loss_type": "ipo", "ipo_threshold": 0.03, "kl_tau": 0.03}),
    "ipo, a preset that is changed": (prime_ipo, {"preset": "ipo", "ipo_threshold": 0.03, "log_ratio_coef": 0.03}),
}


@pytest.mark.parametrize("name", PRIME)
def test_the_losses_of_prime_rl(rows, name, monkeypatch):
    put(monkeypatch, "prime_rl.trainer.rl.loss", LossOutputs=SimpleNamespace)
    prime, (formula, kwargs) = import_module("ppg_fast.integrations.prime_rl"), PRIME[name]
    inputs = [
        SimpleNamespace(trainer_logprobs=l, inference_logprobs=b, ref_logprobs=None, advantages=A, loss_mask=m,
                        loss_weights=None)
        for l, b, A, m in zip(rows.l, rows.rollout, rows.A, rows.mask, strict=True)
    ]  # fmt: skip
    ours = sum(prime.ppg_loss(sample, **kwargs).loss for sample in inputs)
    same(ours, formula(rows.l, rows.rollout, rows.A), rows, value=name != "default")  # of dppo ours is -sg[r] A l


# ---- SkyRL -----------------------------------------------------------------------------------------------------------
def sky_config(**fields):
    nested = {
        "cispo": SimpleNamespace(cispo_eps_clip_low=0.2, cispo_eps_clip_high=0.25, cispo_anchor="old"),
        "sapo": SimpleNamespace(tau_pos=1.5, tau_neg=2.0),
        "dppo": SimpleNamespace(dppo_type="binary_tv", delta_low=0.05, delta_high=0.1),
        "off_policy_correction": SimpleNamespace(tis_ratio_type=None),
    }
    for name, value in fields.items():
        first, _, last = name.partition("__")
        setattr(nested[first], last, value)
    return SimpleNamespace(eps_clip_low=0.2, eps_clip_high=0.25, **nested)


def rollout_is(l, old, b, A):
    r = (l - b).exp()
    return -r.masked_fill((r <= 0.8) | (r >= 1.25), 0.0).detach() * A * l


SKY = {  # loss type of register, configuration, formula, whether ours has its value
    "cispo": ({}, lambda l, old, b, A: -clipped((l - old).exp(), 0.2, 0.25).detach() * A * l, True),
    "cispo, of the sampler": (
        {"cispo__cispo_anchor": "rollout"},
        lambda l, old, b, A: -clipped((l - b).exp(), 0.2, 0.25).detach() * A * l,
        True,
    ),
    "sapo": ({}, lambda l, old, b, A: sapo(l, old, A, 1.5, 2.0), True),
    "dppo_tv": ({}, lambda l, old, b, A: -total_variation(l, b, A, 0.05, 0.1) * (l - b).exp() * A, False),
    "dppo_kl": (
        {"dppo__dppo_type": "binary_kl", "dppo__delta_low": 0.01, "dppo__delta_high": 0.02},
        lambda l, old, b, A: -binary_kl(l, b, A, 0.01, 0.02) * (l - b).exp() * A,
        False,
    ),
    "icepop": ({}, rollout_is, False),
}


@pytest.fixture
def sky(monkeypatch):
    utils, losses = "skyrl.backends.skyrl_train.utils", {}

    def register(name):
        return lambda function: losses.__setitem__(name, function)

    put(monkeypatch, f"{utils}.ppo_utils", register_policy_loss=register, register_advantage_estimator=register,
        reduce_loss=lambda loss, mask: (loss * mask).sum())  # fmt: skip
    put(monkeypatch, f"{utils}.off_policy_correction_utils",
        apply_off_policy_correction=lambda loss, old, rollout, mask, config: (loss, mask, {}))  # fmt: skip
    return import_module("ppg_fast.integrations.skyrl"), losses


@pytest.mark.parametrize("name", SKY)
def test_the_losses_of_skyrl(rows, name, sky):
    skyrl, losses = sky
    fields, formula, value = SKY[name]
    skyrl.register(loss_type=name.partition(",")[0])
    ours, _ = losses["ppg"](rows.l, rows.old, rows.A, sky_config(**fields), rows.mask, rows.rollout)
    stopped = same(ours, formula(rows.l, rows.old, rows.rollout, rows.A), rows, value=value)
    assert bool(stopped.any()) == (name.partition("_")[0] in ("dppo", "icepop"))
    assert not stopped.all()


def test_what_skyrls_anchored_losses_need(rows, sky):
    skyrl, losses = sky
    given = rows.l, rows.old, rows.A
    skyrl.register(loss_type="dppo_kl")
    with pytest.raises(ValueError, match=r"dppo.dppo_type of SkyRL must be binary_kl for .* dppo_kl .*'binary_tv'$"):
        losses["ppg"](*given, sky_config(), rows.mask, rows.rollout)
    skyrl.register(loss_type="icepop")
    with pytest.raises(ValueError, match="loss type icepop, anchored at the sampler, needs rollout_logprobs"):
        losses["ppg"](*given, sky_config(), rows.mask, None)
    twice = sky_config(off_policy_correction__tis_ratio_type="token")
    with pytest.raises(ValueError, match=r"tis_ratio_type of SkyRL must be None for icepop .*got 'token'$"):
        losses["ppg"](*given, twice, rows.mask, rows.rollout)


# ---- AReaL, by the spec alone ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["truncate", "mask"])
def test_the_decoupled_loss_of_areal(rows, mode):
    """docs/losses.md: proximal log-probs are the old ones, the sampler's the rollout ones; rejection sampling of tokens
    by their ratio, action clamp or mask."""
    import ppg_fast as ppg

    numbers = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}
    weights = {"importance_floor": 0.8, "importance_cap": 1.3, "importance_mode": mode}
    ours = ppg.policy_loss_from_logprobs(
        rows.l, rows.A, old_logprobs=rows.old, rollout_logprobs=rows.rollout, loss_mask=rows.mask, reduction="sum",
        spec=ppg.PolicyLossSpec("ppo", **numbers, **weights),
    ).loss  # fmt: skip
    r, behave = (rows.l - rows.old).exp(), (rows.old - rows.rollout).exp()
    loss = torch.maximum(-rows.A * r, -rows.A * clipped(r, 0.2, 0.28))
    loss = torch.minimum(loss, rows.A.sign() * 3.0 * rows.A)
    bounded = behave.clamp(0.8, 1.3) if mode == "truncate" else behave * ((behave >= 0.8) & (behave <= 1.3))
    same(ours, loss * bounded, rows)


# ---- verl, without verl ----------------------------------------------------------------------------------------------
VERL = {
    "ppg_cispo": lambda l, old, A: -clipped((l - old).exp(), 0.2, 0.25).detach() * A * l,
    "ppg_sapo": lambda l, old, A: sapo(l, old, A, 1.5, 2.0),
    "ppg_dppo_tv": lambda l, old, A: (
        -total_variation(l, old, A, 0.2, 0.25) * (l - old).exp().clamp(max=1.4).detach() * A * l
    ),
    "ppg_dppo_kl": lambda l, old, A: -binary_kl(l, old, A, 0.2, 0.25) * (l - old).exp().clamp(max=1.4).detach() * A * l,
    "ppg_reinforce": lambda l, old, A: -A * l,
}


@pytest.mark.parametrize("name", VERL)
def test_the_numbers_of_verl(rows, name):
    """Which of the actor's options a loss takes; against verl itself: tests/test_integrations_verl_losses.py."""
    import ppg_fast as ppg
    from ppg_fast.integrations.options import own_numbers

    loss_type = name.removeprefix("ppg_")
    numbers = {"clip_low": 0.2, "clip_high": 0.25, "dual_clip": 1.4, "ratio_cap": 1.4, "tau_positive": 1.5,
               "tau_negative": 2.0}  # fmt: skip
    spec = ppg.PolicyLossSpec(loss_type, **own_numbers(loss_type, **numbers))
    ours = ppg.policy_loss_from_logprobs(
        rows.l, rows.A, old_logprobs=rows.old, loss_mask=rows.mask, spec=spec, reduction="sum"
    ).loss
    same(ours, VERL[name](rows.l, rows.old, rows.A), rows)


def test_a_lower_bound_of_a_ratio_is_at_most_one():
    from ppg_fast.integrations.options import own_numbers

    assert own_numbers("cispo", clip_low=3, clip_high=4.0, dual_clip=2.0) == {"clip_low": 1.0, "clip_high": 4.0}
    assert own_numbers("dppo_kl", clip_low=3)["clip_low"] == 3

"""The losses of the table against the functions of verl's core_algos, token by token in float64: `make test-verl`."""

import pytest
import torch

verl = pytest.importorskip("verl", reason="verl is not installed here; make test-verl builds its environment")

from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig, FSDPActorConfig

from ppg_fast import reference
from ppg_fast.reference.policy_term import kl_term
from ppg_fast.spec import PolicyLossSpec

N = 200
# verl's loss, its options, ours
CASES = {
    "vanilla": (
        {"clip_ratio_low": 0.15, "clip_ratio_high": 0.3, "clip_ratio_c": 1.4},
        {"loss_type": "ppo", "clip_low": 0.15, "clip_high": 0.3, "dual_clip": 1.4},
    ),
    "dppo_tv": (
        {"clip_ratio_low": 0.05, "clip_ratio_high": 0.1, "clip_ratio_c": 1.4},
        {"loss_type": "dppo_tv", "clip_low": 0.05, "clip_high": 0.1, "ratio_cap": 1.4},
    ),
    "dppo_kl": (
        {"clip_ratio_low": 0.03, "clip_ratio_high": 0.06, "clip_ratio_c": 1.4},
        {"loss_type": "dppo_kl", "clip_low": 0.03, "clip_high": 0.06, "ratio_cap": 1.4},
    ),
    "sapo": ({"tau_pos": 0.8, "tau_neg": 1.4}, {"loss_type": "sapo", "tau_positive": 0.8, "tau_negative": 1.4}),
    "cispo": (
        {"clip_ratio_low": 0.15, "clip_ratio_high": 0.3},
        {"loss_type": "cispo", "clip_low": 0.15, "clip_high": 0.3},
    ),
}
FADES = ("sapo", "cispo")  # a weight of 0 nowhere


@pytest.fixture
def columns():
    draw = torch.Generator().manual_seed(6)
    uniform = lambda low, high: low + (high - low) * torch.rand(N, generator=draw).double()  # noqa: E731
    l = -torch.exp(uniform(-5.0, 1.0))
    old, A = (l - uniform(-0.8, 0.8)).clamp(max=-1e-3), uniform(-1.5, 1.5)
    A[::9] = 0.0
    old[:3] = l[:3] - 23.0  # beyond what is exponentiated
    return l, old, A, uniform(0.3, 2.0)


def actor(**fields):
    return FSDPActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=2, **fields)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_verls(columns, name):
    l, old, A, weights = columns
    options, numbers = CASES[name]
    spec, everywhere = PolicyLossSpec(**numbers), torch.ones(N, dtype=torch.bool)
    function, each = core_algos.get_policy_loss_fn(name), torch.ones(1, 1, dtype=torch.float64)
    theirs, ours = l.clone().requires_grad_(), l.clone().requires_grad_()
    rows = [
        function(
            *(c[i].view(1, 1) for c in (old, theirs, A)), each, "seq-mean-token-mean", actor(**options),
            weights[i].view(1, 1),
        )[0]
        for i in range(N)
    ]  # fmt: skip
    expected = torch.stack(rows)
    found = weights * reference.loss_from_logprobs(ours, None, everywhere, A, None, old, None, None, spec)
    slopes = [torch.autograd.grad(of.sum(), at)[0] for of, at in ((found, ours), (expected, theirs))]
    # verl adds 1e-8 to the tokens that it divides by, and its gate rounds 1 - p
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)
    torch.testing.assert_close(*slopes, rtol=1e-7, atol=1e-10)
    still = (slopes[1] == 0) & (A != 0)
    assert still.sum() > N // 20 or name in FADES


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("k1", "k1"), ("kl", "k1"), ("abs", "abs"), ("k2", "k2"), ("mse", "k2"), ("k3", "k3"), ("low_var_kl", "k3"),
     ("k3+", "k3_plus")],
)  # fmt: skip
def test_estimators_of_the_kl_are_verls(theirs, ours):
    """k3 is kept within 10, whose slope is 0 beyond; the clamp of the log ratio at 20 lies behind it."""
    ref = torch.linspace(-30.0, 0.0, 61, dtype=torch.float64)
    l, x = (torch.full((61,), -8.03, dtype=torch.float64).requires_grad_() for _ in range(2))
    spec = PolicyLossSpec(kl_coef=1.0, kl_estimator=ours, kl_cap=10.0 if "3" in ours else 0.0)
    expected, found = core_algos.kl_penalty(l, ref, theirs), kl_term(x, x.detach(), ref, spec)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert (expected == 10).any() == ("3" in ours)
    slopes = [torch.autograd.grad(of.sum(), at)[0] for of, at in ((found, x), (expected, l))]
    # below -20, where exp(ref - l) is nothing, verl's clamp stops the slope, ours has none
    bounded = ref - l.detach() >= -20
    torch.testing.assert_close(*(slope[bounded] for slope in slopes), rtol=1e-12, atol=1e-12)


def test_presets_are_verls_defaults():
    default = {name: field.default for name, field in ActorConfig.__dataclass_fields__.items()}
    sapo, grpo = PolicyLossSpec.preset("sapo"), PolicyLossSpec.preset("grpo")
    assert (sapo.tau_positive, sapo.tau_negative) == (default["tau_pos"], default["tau_neg"])
    clips = default["clip_ratio_low"], default["clip_ratio_high"]
    assert (grpo.clip_low, grpo.clip_high) == clips
    dppo = PolicyLossSpec.preset("dppo_tv")
    assert (dppo.clip_low, dppo.clip_high) == clips
    # of ratio_cap the preset has what verl's function falls back to and its comment asks for: its actor's own default
    # is that of the dual clip
    assert dppo.ratio_cap == 20
    assert default["clip_ratio_c"] == 3

"""What lies behind a mask never reaches a loss, a gradient or a metric, in any adapter; and a batch in which nothing is
left is a 0 that is connected to the log-probs. By stand-ins of the hosts, which multiply by their masks as they do."""

import importlib
import sys
from dataclasses import dataclass
from enum import Enum
from types import SimpleNamespace

import pytest
import torch
from host_case import found_is, put

OURS, UTILS = "ppg_fast.integrations", "skyrl.backends.skyrl_train.utils"
PER_TOKEN = ("logprobs", "old", "ref", "rollout", "advantages", "weights")


def a_case(mask):
    """(B, L) values of every kind, the same each time, and the mask."""
    generator = torch.Generator().manual_seed(2)
    mask = torch.tensor(mask)
    values = {name: torch.randn(mask.shape, generator=generator) for name in PER_TOKEN}
    values = {name: v if name == "advantages" else -v.abs() - 0.5 for name, v in values.items()}
    values["weights"] = values["weights"].abs()
    return {**values, "mask": mask}


def poisoned(case, value):
    """Everything behind the mask replaced, and the log-probs a leaf."""
    dirty = {name: case[name].masked_fill(case["mask"] == 0, value) for name in PER_TOKEN}
    return {**dirty, "mask": case["mask"], "logprobs": dirty["logprobs"].requires_grad_()}


def prime_rl(monkeypatch, case):
    @dataclass
    class LossOutputs:
        loss: torch.Tensor
        metrics: dict

    put(monkeypatch, "prime_rl.trainer.rl.loss", LossOutputs=LossOutputs)
    names = ["trainer_logprobs", "inference_logprobs", "ref_logprobs", "advantages", "loss_mask", "loss_weights"]
    columns = zip(
        case["logprobs"], case["old"], case["ref"], case["advantages"], case["mask"].bool(), case["weights"],
        strict=True,
    )  # fmt: skip
    ppg_loss = importlib.import_module(f"{OURS}.prime_rl").ppg_loss
    outs = [ppg_loss(SimpleNamespace(**dict(zip(names, c, strict=True))), kl_coef=0.1) for c in columns]
    return sum(out.loss for out in outs), {f"{n}{i}": v for i, out in enumerate(outs) for n, v in out.metrics.items()}


def skyrl(monkeypatch, case):
    def apply_off_policy_correction(loss, old, rollout, mask, config):
        weights = (old - rollout).exp().clamp(max=2.0)  # with a metric over the mask, as SkyRL's own
        return loss * weights, mask, {"weight": (weights * mask).sum()}

    put(monkeypatch, f"{UTILS}.ppo_utils", reduce_loss=lambda loss, mask: (loss * mask).sum())
    put(monkeypatch, f"{UTILS}.off_policy_correction_utils", apply_off_policy_correction=apply_off_policy_correction)
    config = SimpleNamespace(eps_clip_low=0.2, eps_clip_high=0.2, off_policy_correction=None)
    values = case["logprobs"], case["old"], case["advantages"], config, case["mask"].float(), case["rollout"]
    return importlib.import_module(f"{OURS}.skyrl").policy_loss("ppo", *values)


def nemo_rl(monkeypatch, case):
    levels = Enum("LossType", "TOKEN_LEVEL SEQUENCE_LEVEL")
    put(monkeypatch, "nemo_rl.algorithms.loss.interfaces", LossType=levels, LossInputType=SimpleNamespace(LOGPROB=0))
    module = importlib.import_module(f"{OURS}.nemo_rl")
    spec = module.PolicyLossSpec("ppo", kl_coef=0.1, importance_cap=2.0)
    fields = {"prev_logprobs": "old", "generation_logprobs": "rollout", "reference_policy_logprobs": "ref"}
    fields |= {"advantages": "advantages", "token_mask": "mask"}
    data = {name: torch.nn.functional.pad(case[ours].float(), (1, 0)) for name, ours in fields.items()}
    data["sample_mask"] = torch.ones(len(case["mask"]))
    counts = (case["mask"].any(1).sum(), case["mask"].sum())
    return module.PPGLossFn(spec)(case["logprobs"], data, *counts)


def slime(monkeypatch, case):
    one = SimpleNamespace(
        get_tensor_model_parallel_world_size=lambda: 1, get_context_parallel_world_size=lambda: 1
    )  # fmt: skip
    put(monkeypatch, "megatron.core", mpu=one)
    put(monkeypatch, "slime")
    module = importlib.import_module(f"{OURS}.slime")
    B, R = case["mask"].shape
    args = SimpleNamespace(
        eps_clip=0.2, eps_clip_high=None, entropy_coef=0.01, use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type="k3",
        rollout_temperature=1.0, use_rollout_logprobs=False, use_tis=True, tis_clip=2.0,
    )  # fmt: skip
    scores = torch.nan_to_num(case["logprobs"], neginf=-9.0, posinf=9.0)
    logits = torch.nn.functional.pad(scores[..., None], (1, 3, 0, 1)).reshape(1, B * (R + 1), 5)
    batch = {
        "unconcat_tokens": [torch.ones(R + 1, dtype=torch.long)] * B, "total_lengths": [R + 1] * B,
        "response_lengths": [R] * B, "loss_masks": list(case["mask"]), "advantages": list(case["advantages"]),
        "log_probs": list(case["old"]), "ref_log_probs": list(case["ref"]), "rollout_log_probs": list(case["rollout"]),
    }  # fmt: skip

    def sum_of_sample_mean(x):
        parts = zip(x.split([R] * B), case["mask"], strict=True)
        return sum((x_i * mask).sum() / mask.sum().clamp(min=1) for x_i, mask in parts)

    return module.ppg_loss(args, batch, logits, sum_of_sample_mean)


def verl(monkeypatch, case):
    def agg_loss(loss_mat, loss_mask, loss_agg_mode, **_):
        return (loss_mat * loss_mask).sum() / loss_mask.sum()

    unused = SimpleNamespace(patch_forward_with_backends=print, FusedLinearForPPO=object)
    registers = dict.fromkeys(("register_adv_est", "register_policy_loss"), lambda _: lambda function: function)
    put(monkeypatch, "verl.trainer.ppo.core_algos", agg_loss=agg_loss, **registers)
    put(monkeypatch, "verl.trainer.config", AlgoConfig=dict)
    put(monkeypatch, "verl.models.transformers", monkey_patch=unused)
    put(monkeypatch, "verl.utils.experimental", torch_functional=unused)
    found_is(monkeypatch, "0.9.1")

    class Config(SimpleNamespace):
        def get(self, name, default):
            return getattr(self, name, default)

    config = Config(clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None, global_batch_info={})
    values = case["old"], case["logprobs"], case["advantages"], case["mask"].bool(), "token-mean", config
    module = importlib.import_module(f"{OURS}.verl.losses")
    return module.policy_loss("ppo", *values, rollout_is_weights=case["weights"])


HOSTS = {function.__name__: function for function in (prime_rl, skyrl, nemo_rl, slime, verl)}


@pytest.fixture(params=HOSTS)
def host(request, monkeypatch):
    if request.param == "verl" and importlib.util.find_spec("verl"):
        pytest.skip("the stand-ins are for environments without verl")

    def run(case):
        loss, metrics = HOSTS[request.param](monkeypatch, case)
        return loss, torch.autograd.grad(loss, case["logprobs"])[0], metrics

    yield run
    for name in [name for name in sys.modules if name.startswith(f"{OURS}.verl")]:
        del sys.modules[name]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_behind_the_mask_change_nothing(host, value):
    case = a_case([[1, 1, 0, 1, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    loss, gradient, metrics = host(poisoned(case, value))
    expected, clean, numbers = host(poisoned(case, -1.0))
    assert loss.isfinite()
    assert clean.abs().sum() > 0
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient, clean, rtol=1e-6, atol=1e-7)
    assert not gradient[case["mask"] == 0].any()
    for name, number in metrics.items():
        torch.testing.assert_close(
            torch.as_tensor(number), torch.as_tensor(numbers[name]), rtol=1e-6, atol=1e-7, msg=name
        )


@pytest.mark.parametrize("rows", [[[0, 0, 0], [0, 0, 0]], [[0]], [[]]], ids=["rows", "a token", "no token"])
def test_a_batch_with_nothing_left_is_a_connected_zero(host, rows):
    case = a_case(rows) if rows != [[]] else {**a_case([[0]]), "mask": torch.zeros(1, 0, dtype=torch.long)}
    case |= {name: case[name][:, : case["mask"].shape[1]] for name in PER_TOKEN}
    loss, gradient, metrics = host(poisoned(case, float("nan")))
    assert loss == 0
    assert gradient.shape == case["mask"].shape
    assert not gradient.any()
    assert all(torch.as_tensor(number).isfinite() for number in metrics.values())

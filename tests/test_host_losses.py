"""The losses of the table against TRL's own: GRPOTrainer._compute_loss on a stand-in that carries a real GRPOConfig,
token by token in float64, and the presets against the defaults of that config."""

import ast
import inspect
import math
import textwrap
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")
from trl import GRPOConfig, GRPOTrainer

from ppg_fast import reference
from ppg_fast.losses import PRESETS
from ppg_fast.spec import PolicyLossSpec

RUNS = ["11011", "11110", "10000", "01110"]  # completion masks, as of tools' answers
MASK = torch.tensor([[int(c) for c in row] for row in RUNS], dtype=torch.float64)
LONGEST = 9  # max_completion_length


def config(folder, **options):
    return GRPOConfig(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], gradient_accumulation_steps=1,
        max_completion_length=LONGEST, **options,
    )  # fmt: skip


def trainer_of(args):
    """What _compute_loss reads of a trainer, as GRPOTrainer.__init__ sets it."""
    same = SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x)
    names = ("beta", "loss_type", "importance_sampling_level", "off_policy_mask_threshold", "top_entropy_quantile")
    names += ("max_completion_length", "use_vllm", "vllm_importance_sampling_correction")
    names += tuple(f"vllm_importance_sampling_{of}" for of in ("mode", "clip_min", "clip_max"))
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    return SimpleNamespace(
        args=args, epsilon_low=args.epsilon, epsilon_high=high, accelerator=same, aux_loss_enabled=False,
        model=SimpleNamespace(training=True), current_gradient_accumulation_steps=1, _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)), **{name: getattr(args, name) for name in names},
    )  # fmt: skip


@pytest.fixture
def columns():
    """(B, T) in float64: log-probs, old, ref and rollout ones, advantages of each sign and 0."""
    draw = torch.Generator().manual_seed(4)
    uniform = lambda low, high: low + (high - low) * torch.rand(MASK.shape, generator=draw).double()  # noqa: E731
    l = -uniform(0.05, 2.0)
    old, ref, rollout = (l - uniform(-0.7, 0.7) for _ in range(3))
    A = uniform(-1.5, 1.5)
    A[0, 3] = 0.0
    return {"l": l, "old": old, "ref": ref, "rollout": rollout, "A": A}


def hosts(args, columns, mask, weights=None):
    """-> TRL's loss of rows (B, T) and its gradient in the log-probs."""
    trainer, l = trainer_of(args), columns["l"].clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (l, torch.zeros_like(l), None)
    trainer.use_vllm = weights is not None
    ids = torch.zeros(l.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask,
        "advantages": columns["A"], "old_per_token_logps": columns["old"], "ref_per_token_logps": columns["ref"],
        "num_items_in_batch": mask.sum(), "importance_sampling_ratio": weights,
    }  # fmt: skip
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss.detach(), torch.autograd.grad(loss, l)[0]


def ours(spec, columns, mask, weights):
    """The same of ours, by the reference in float64."""
    l = columns["l"].clone().requires_grad_()
    rows = (columns[name].reshape(-1) for name in ("old", "ref", "rollout"))
    active = mask.reshape(-1) != 0
    loss = reference.loss_from_logprobs(
        l.reshape(-1), None, active, columns["A"].reshape(-1), weights.reshape(-1), *rows, spec
    ).sum()
    return loss.detach(), torch.autograd.grad(loss, l)[0]


REDUCTIONS = {
    "sequence_mean": lambda mask: 1 / mask.sum(1, keepdim=True).clamp(min=1).expand_as(mask) / len(mask),
    "token_mean": lambda mask: torch.ones_like(mask) / mask.sum(),
    "sum": lambda mask: torch.ones_like(mask) / (len(mask) * LONGEST),
}
UNBIASED = {"kl_coef": 0.3, "kl_estimator": "k3_unbiased"}
# TRL's options, ours, and the reduction of that loss_type
CASES = {
    "grpo": ({"loss_type": "grpo"}, {"loss_type": "ppo"}, "sequence_mean"),
    "bnpo": (
        {"loss_type": "bnpo", "epsilon": 0.1},
        {"loss_type": "ppo", "clip_low": 0.1, "clip_high": 0.1},
        "token_mean",
    ),
    "dr_grpo": ({"loss_type": "dr_grpo"}, {"loss_type": "ppo"}, "sum"),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, {"loss_type": "ppo", "clip_high": 0.28}, "token_mean"),
    "two-sided": ({"loss_type": "grpo", "delta": 1.5}, {"loss_type": "ppo", "dual_clip": 1.5}, "sequence_mean"),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.4}, {"loss_type": "cispo", "clip_high": 0.4}, "token_mean"),
    "sapo": ({"loss_type": "sapo"}, {"loss_type": "sapo"}, "sequence_mean"),
    "sapo, other temperatures": (
        {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.5},
        {"loss_type": "sapo", "tau_positive": 2.0, "tau_negative": 0.5},
        "sequence_mean",
    ),
    "KL, bias-corrected": ({"loss_type": "dapo", "beta": 0.3}, {"loss_type": "ppo", **UNBIASED}, "token_mean"),
    "KL of cispo": (
        {"loss_type": "cispo", "epsilon_high": 5.0, "beta": 0.3},
        {"loss_type": "cispo", "clip_high": 4.0, **UNBIASED},
        "token_mean",
    ),
    "KL, as it was": (
        {"loss_type": "grpo", "beta": 0.3, "use_bias_correction_kl": False},
        {"loss_type": "ppo", "kl_coef": 0.3, "kl_estimator": "k3"},
        "sequence_mean",
    ),
}  # fmt: skip


def close(found, expected, spec):
    """Of sapo's temperatures TRL makes float32."""
    digits = 1e-7 if spec.loss_type == "sapo" else 1e-9
    torch.testing.assert_close(found, expected, rtol=digits, atol=1e-12)


def test_the_reference_rounds_no_temperature(columns):
    spec, each = PolicyLossSpec("sapo"), torch.ones_like(MASK)
    ratio, A = (columns["l"] - columns["old"]).exp(), columns["A"]
    tau = torch.full_like(A, 1.05)
    tau[A > 0] = 1.0
    expected = (-4 / tau * torch.sigmoid(tau * (ratio - 1)) * A).sum()
    torch.testing.assert_close(ours(spec, columns, each, each)[0], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_trls(tmp_path, columns, name):
    options, numbers, reduction = CASES[name]
    args, spec = config(tmp_path, **options), PolicyLossSpec(**numbers)
    for b, t in MASK.nonzero().tolist():  # each token alone, whose loss a sum would hide
        one = {key: column[b : b + 1, t : t + 1] for key, column in columns.items()}
        args.max_completion_length = 1
        expected = hosts(args, one, torch.ones(1, 1).double())
        close(ours(spec, one, torch.ones(1, 1), torch.ones(1, 1)), expected, spec)
    args.max_completion_length = LONGEST
    expected = hosts(args, columns, MASK)
    if numbers["loss_type"] == "ppo" and "kl_coef" not in numbers:
        assert 0 < (expected[1][MASK != 0] == 0).sum() < MASK.sum(), "some are clipped"
    close(ours(spec, columns, MASK, REDUCTIONS[reduction](MASK)), expected, spec)


def trls_weights(args, columns, mask):
    """The importance weights of TRL: they have no function of their own, so the branch is cut out of its method."""
    method = ast.parse(textwrap.dedent(inspect.getsource(GRPOTrainer._generate_and_score_completions)))
    name = "vllm_importance_sampling_ratio"
    (branch,) = (
        node
        for node in ast.walk(method)
        if isinstance(node, ast.If)
        and ast.unparse(node.test) == "self.use_vllm and self.vllm_importance_sampling_correction"
        and any(isinstance(at, ast.Name) and at.id == name and isinstance(at.ctx, ast.Store) for at in ast.walk(node))
    )
    scope = {
        "self": trainer_of(args), "torch": torch, "math": math, "completion_mask": mask, "tool_mask": None,
        "old_per_token_logps": columns["old"], "sampling_per_token_logps": columns["rollout"],
    }  # fmt: skip
    exec(compile(ast.Module(branch.body, []), "<TRL>", "exec"), scope)
    return scope[name]


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize(("least", "most"), [(None, 3.0), (0.7, 1.3), (0.9, None)])
def test_importance_weights_are_trls(tmp_path, columns, mode, least, most):
    columns["rollout"][1, 1] = torch.nan  # of a token that was forced on the sampler
    bounds = {"vllm_importance_sampling_clip_min": least, "vllm_importance_sampling_clip_max": most}
    args = config(tmp_path, loss_type="dapo", beta=0.2, vllm_importance_sampling_mode=f"token_{mode}", **bounds)
    weights = trls_weights(args, columns, MASK)
    assert (weights[MASK != 0] != 1).any()
    numbers = {"importance_floor": least or 0.0, "importance_cap": most or 0.0, "importance_mode": mode}
    spec = PolicyLossSpec("ppo", nan_rollout="one", **numbers, kl_coef=0.2, kl_estimator="k3_unbiased")
    found = reference.importance_weight(columns["old"], columns["rollout"], spec)
    torch.testing.assert_close(found[MASK != 0], weights[MASK != 0], rtol=1e-12, atol=0)
    expected = hosts(args, columns, MASK, weights)
    columns["rollout"][MASK == 0] = torch.nan
    close(ours(spec, columns, MASK, REDUCTIONS["token_mean"](MASK)), expected, spec)


def test_presets_are_what_trls_users_get():
    default = {name: field.default for name, field in GRPOConfig.__dataclass_fields__.items()}
    for name in ("grpo", "dr_grpo"):
        spec = PolicyLossSpec.preset(name)
        assert (spec.loss_type, spec.clip_low, spec.clip_high) == ("ppo", default["epsilon"], default["epsilon"])
        assert (spec.dual_clip, spec.kl_coef, spec.entropy_coef) == (default["delta"] or 0, default["beta"], 0)
    dapo = PolicyLossSpec.preset("dapo")
    assert (dapo.clip_low, dapo.clip_high) == (default["epsilon"], 0.28)
    assert "`0.28`" in GRPOConfig.__dataclass_fields__["epsilon_high"].metadata["help"]
    cispo = PolicyLossSpec.preset("cispo")
    assert cispo.clip_low == 1
    assert f"`{1 + cispo.clip_high}`" in GRPOConfig.__dataclass_fields__["epsilon_high"].metadata["help"]
    sapo = PolicyLossSpec.preset("sapo")
    temperatures = default["sapo_temperature_pos"], default["sapo_temperature_neg"]
    assert (sapo.tau_positive, sapo.tau_negative) == temperatures
    reductions = {name: PRESETS[name].reduction.split(",")[0] for name in ("grpo", "dr_grpo", "dapo", "cispo", "sapo")}
    assert reductions == {name: CASES[name][2] for name in reductions}


def test_changes_of_a_preset():
    assert PolicyLossSpec.preset("dapo", kl_coef=0.1) == PolicyLossSpec("ppo", clip_high=0.28, kl_coef=0.1)
    with pytest.raises(ValueError, match="a preset must be one of grpo, dapo"):
        PolicyLossSpec.preset("gpro")
    with pytest.raises(ValueError, match="dual_clip must be left out: loss_type cispo does not use it"):
        PolicyLossSpec.preset("cispo", dual_clip=3.0)

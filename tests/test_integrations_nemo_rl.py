"""The contract of NeMo-RL, by stand-ins with its documented names: next-token alignment, global denominators."""

import math
import re
from enum import Enum
from functools import reduce
from importlib import import_module
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from host_case import (
    COUNTS,
    GROUPS,
    MASK,
    OPTIONS,
    REWARDS,
    TURN_REWARDS,
    a_batch,
    credited,
    expected_credit,
    put,
    same,
    truth,
)
from pydantic import BaseModel, Field

import ppg_fast as ppg
from ppg_fast.integrations import turns


@pytest.fixture
def batch():
    return a_batch()


class LossType(Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class LossInputType(Enum):
    LOGIT = "logit"
    LOGPROB = "logprob"


@pytest.fixture
def nemo(monkeypatch):
    put(monkeypatch, "nemo_rl.algorithms.loss.interfaces", LossType=LossType, LossInputType=LossInputType)
    return import_module("ppg_fast.integrations.nemo_rl")


@pytest.mark.parametrize("token_level", [True, False])
def test_nemo_rl_micro_batches_share_global_denominators(batch, nemo, token_level):
    spec = ppg.PolicyLossSpec("ppo", clip_low=0.1, clip_high=0.15, kl_coef=0.2, importance_cap=1.1)
    loss_fn = nemo.PPGLossFn(spec, token_level=token_level)
    assert loss_fn.loss_type == (LossType.TOKEN_LEVEL if token_level else LossType.SEQUENCE_LEVEL)
    assert loss_fn.input_type == LossInputType.LOGPROB
    sample_mask = torch.tensor([1.0, 1.0, 0.0, 1.0])
    tokens, sequences = (batch.mask * sample_mask[:, None]).sum(), sample_mask.sum()

    def loss(rows):
        fields = {
            "token_mask": token_mask,
            "advantages": batch.advantages,
            "prev_logprobs": batch.old,
            "sample_mask": sample_mask,
        }
        fields |= {
            "generation_logprobs": batch.rollout,
            "reference_policy_logprobs": batch.ref,
            "input_ids": batch.tokens,
        }
        next_token = ppg.token_logprobs(batch.logits[:, :-1], batch.tokens[:, 1:])
        data = {name: value[rows] for name, value in fields.items()}
        value, metrics = loss_fn(
            data=data, global_valid_seqs=sequences, global_valid_toks=tokens, next_token_logprobs=next_token[rows]
        )
        assert metrics["token_mult_prob_error"] > 0
        return value

    token_mask, batch.mask = batch.mask.float(), batch.mask * sample_mask[:, None].long()
    expected = truth(
        batch, spec, "token_mean" if token_level else "sequence_mean", float(tokens if token_level else sequences)
    )
    same(loss(slice(0, 3)) + loss(slice(3, None)), batch, expected)


def test_nemo_rl_estimator(nemo):
    estimator = nemo.PPGAdvantageEstimator(**OPTIONS)
    prompts = torch.tensor([[5, 6], [5, 6], [5, 6], [5, 7]])
    arguments = {
        "prompt_ids": prompts,
        "rewards": torch.ones(4),
        "mask": MASK.float(),
        "logprobs_policy": None,
        "logprobs_reference": None,
    }
    ours = estimator.compute_advantage(**arguments, repeated_batch={"turn_rewards": TURN_REWARDS})
    torch.testing.assert_close(ours, expected_credit())
    valid = torch.tensor([1.0, 0.0, 1.0, 1.0])  # a row that took part in nothing: no vote in the baseline
    left = estimator.compute_advantage(**arguments, repeated_batch={"turn_rewards": TURN_REWARDS}, valid_mask=valid)
    rewards, counts = REWARDS.clone(), COUNTS.clone()
    rewards[1], counts[1] = 0, 0
    expected = turns.spread(
        credited(rewards, counts, GROUPS, **OPTIONS), turns.turn_ids_of_mask(MASK * valid[:, None].long())
    )
    torch.testing.assert_close(left, expected)
    outcome = nemo.PPGAdvantageEstimator().compute_advantage(prompts, torch.tensor([1.0, 4.0, -2.0, 0.5]), MASK)
    first = [row[mask.bool()][0] for row, mask in zip(outcome, MASK, strict=True)]
    np.testing.assert_allclose(first, [1.0 - 1.0, 4.0 + 0.5, -2.0 - 2.5, 0.5])
    assert outcome[1, 5] == 4.0  # the only dialogue with a third turn: the reward stands there, without a baseline


# ---- the master configuration ----------------------------------------------------------------------------------------
class ClippedPGLossConfig(BaseModel, extra="allow"):  # of NeMo-RL 0.6
    disable_ppo_ratio: bool = False
    token_level_loss: bool = True
    sequence_level_importance_ratios: bool = False
    ratio_clip_min: float = 0.1
    ratio_clip_max: float = 0.15
    ratio_clip_c: float | None = None
    reference_policy_kl_penalty: float = 0.0  # NeMo-RL: 0.01
    reference_policy_kl_type: str = "k3"
    kl_input_clamp_value: float | None = 20.0
    kl_output_clamp_value: float | None = 10.0
    use_kl_in_reward: bool = False
    use_importance_sampling_correction: bool = False
    truncated_importance_sampling_type: str | None = None
    truncated_importance_sampling_ratio: float | None = None
    truncated_importance_sampling_ratio_min: float | None = None
    use_on_policy_kl_approximation: bool = False
    force_on_policy_ratio: bool = False
    use_cispo: bool = False
    positive_example_nll_weight: float = 0.0


class AdvEstimatorConfig(BaseModel, extra="allow"):
    name: str = "grpo"
    normalize_rewards: bool = True
    use_leave_one_out_baseline: bool = True
    reward_weights: list | None = None
    minus_baseline: bool = True


class Switch(BaseModel):
    enabled: bool = False


class GRPOConfig(BaseModel, extra="allow"):
    num_prompts_per_step: int = 32
    normalize_rewards: bool = True
    use_leave_one_out_baseline: bool = True
    advantage_clip_high: float | None = None
    reward_shaping: Switch = Field(default_factory=Switch)
    reward_scaling: Switch = Field(default_factory=Switch)
    adv_estimator: AdvEstimatorConfig = Field(default_factory=AdvEstimatorConfig)


def master(path=None, value=None, **loss):
    config = SimpleNamespace(loss_fn=ClippedPGLossConfig(**loss), grpo=GRPOConfig(), policy={"anything": 1})
    config.on_policy_distillation, config.reward_penalties = Switch(), SimpleNamespace()
    if path:
        *outer, last = path.split(".")
        setattr(reduce(getattr, outer, config), last, value)
    return config


REFUSED = {
    "loss": {
        "loss_fn.truncated_importance_sampling_type": "seq-mask-tis", "loss_fn.later": True,
        "on_policy_distillation.enabled": True,
    },
    "advantages": {
        "grpo.adv_estimator.name": "gdpo", "grpo.normalize_rewards": False, "grpo.use_leave_one_out_baseline": False,
        "grpo.adv_estimator.normalize_rewards": False, "grpo.adv_estimator.use_leave_one_out_baseline": False,
        "grpo.adv_estimator.minus_baseline": False, "grpo.adv_estimator.reward_weights": [1.0],
        "loss_fn.use_kl_in_reward": True, "grpo.later": 3, "grpo.adv_estimator.later": 3,
    },
    "turn rewards": {
        "grpo.reward_shaping.enabled": True, "grpo.reward_scaling.enabled": True,
        "reward_penalties.penalize_duplicated_reasoning": True, "reward_penalties.penalize_empty_final_answer": True,
        "reward_penalties.penalize_unwanted_tokens": True, "reward_penalties.penalize_malformed_think_tag": True,
    },
}  # fmt: skip


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, cases in REFUSED.items() for name in cases])
def test_nemo_rls_options_that_we_cannot_honour_are_refused(nemo, part, name):
    value = REFUSED[part][name]
    config, batch = master(name, value), (torch.arange(4), torch.ones(4), MASK)
    calls = {
        "loss": lambda: nemo.PPGLossFn(config=config),
        "advantages": lambda: nemo.PPGAdvantageEstimator(config=config),
        "turn rewards": lambda: nemo.PPGAdvantageEstimator(config=config).compute_advantage(
            *batch, repeated_batch={"turn_rewards": TURN_REWARDS}
        ),
    }
    with pytest.raises(ValueError, match=rf"^{name} .*of NeMo-RL .*must .*, got {re.escape(repr(value))}$"):
        calls[part]()
    if part == "turn rewards":  # fine for the reward of the dialogue
        nemo.PPGAdvantageEstimator(config=config).compute_advantage(*batch)


def test_every_row_that_refuses_has_a_case(nemo):
    for part, cases in REFUSED.items():
        rows = [o for o in nemo.OPTIONS if o.part == part and o.allows]
        assert {name for o in rows for name in o.names.split()} <= set(cases)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"reference_policy_kl_penalty": 0.01, "reference_policy_kl_type": "k2"},
            "loss_fn.reference_policy_kl_type of NeMo-RL must be k3 .*got 'k2'",
        ),
        (
            {"reference_policy_kl_penalty": 0.01, "kl_output_clamp_value": 30.0},
            "loss_fn.kl_output_clamp_value of NeMo-RL must be smaller than kl_input_clamp_value, .*got 30.0",
        ),
        ({"disable_ppo_ratio": True, "ratio_clip_c": 3.0}, "loss_fn.ratio_clip_c .* null for reinforce .*got 3.0"),
        ({"use_importance_sampling_correction": True}, "truncated_importance_sampling_ratio .* number .*got None"),
        (
            {"sequence_level_importance_ratios": True, "use_importance_sampling_correction": True,
             "truncated_importance_sampling_ratio": 2.0}, "use_importance_sampling_correction .*must be False",
        ),
    ],
)  # fmt: skip
def test_nemo_rls_options_that_do_not_go_together(nemo, options, words):
    with pytest.raises(ValueError, match=words):
        nemo.PPGLossFn(config=master(**options))


def test_a_spec_or_a_config(nemo):
    with pytest.raises(ValueError, match="a spec or NeMo-RL's config, not both"):
        nemo.PPGLossFn(ppg.PolicyLossSpec("ppo"), config=master())


TIS = {"truncated_importance_sampling_type": "tis", "truncated_importance_sampling_ratio": 1.1}
ICEPOP = {**TIS, "truncated_importance_sampling_type": "icepop", "truncated_importance_sampling_ratio_min": 0.9}


@pytest.mark.parametrize(
    "options",
    [
        {}, {"ratio_clip_c": 1.3}, {"disable_ppo_ratio": True}, {"use_cispo": True},
        {"sequence_level_importance_ratios": True, "token_level_loss": False}, {"token_level_loss": False},
        {"use_importance_sampling_correction": True, **TIS}, {"force_on_policy_ratio": True},
        {"force_on_policy_ratio": True, "use_importance_sampling_correction": True, **TIS},
        {"use_importance_sampling_correction": True, **TIS, "truncated_importance_sampling_ratio_min": 0.9},
        {"use_importance_sampling_correction": True, **ICEPOP}, {"reference_policy_kl_penalty": 0.3},
        {"reference_policy_kl_penalty": 0.3, "kl_output_clamp_value": 0.01, "token_level_loss": False},
        {"reference_policy_kl_penalty": 0.3, "use_on_policy_kl_approximation": True},
        {"positive_example_nll_weight": 0.7},
    ],
    ids=lambda options: "+".join(options) or "defaults",
)  # fmt: skip
def test_nemo_rls_own_loss_from_its_own_options(nemo, batch, options):
    """The formulas of its ClippedPGLossFn, written out, with one advantage a sequence as its own estimator gives."""
    loss_fn, o = nemo.PPGLossFn(config=master(**options)), ClippedPGLossConfig(**options)
    current = ppg.token_logprobs(batch.logits[:, :-1], batch.tokens[:, 1:])
    prev, generation = batch.old[:, 1:], batch.rollout[:, 1:]
    advantages = batch.advantages[:, :1].expand(-1, batch.advantages.shape[1])
    data = {
        "token_mask": batch.mask.float(), "sample_mask": torch.ones(4), "advantages": advantages,
        "prev_logprobs": torch.zeros_like(batch.old) if o.force_on_policy_ratio else batch.old,
        "generation_logprobs": batch.rollout, "reference_policy_logprobs": batch.ref,
        "rewards": torch.tensor([1.0, -1.0, 0.0, 0.5]),
    }  # fmt: skip
    tokens = batch.mask[:, 1:].sum()
    loss, _ = loss_fn(current, data, torch.tensor(4.0), tokens.float())
    mask, A = batch.mask[:, 1:].float(), advantages[:, 1:]
    if o.force_on_policy_ratio:
        prev = current.detach()
    difference = current - prev
    if o.sequence_level_importance_ratios:
        difference = ((difference * mask).sum(1) / mask.sum(1))[:, None]
    ratio = current if o.disable_ppo_ratio else difference.exp()
    clipped = ratio if o.disable_ppo_ratio else ratio.clamp(1 - o.ratio_clip_min, 1 + o.ratio_clip_max)
    term = -A * clipped.detach() * current if o.use_cispo else torch.maximum(-A * ratio, -A * clipped)
    if o.ratio_clip_c is not None:
        term = torch.where(A < 0, torch.minimum(term, -A * o.ratio_clip_c), term)
    if o.use_importance_sampling_correction:
        weight, least = (prev - generation).exp(), o.truncated_importance_sampling_ratio_min or 0.0
        masked_out = (weight < least) | (weight > 1.1)
        is_mask = o.truncated_importance_sampling_type == "icepop"
        term = term * (weight.masked_fill(masked_out, 0.0) if is_mask else weight.clamp(least, 1.1))
    if o.reference_policy_kl_penalty:
        r = (current - (generation if o.use_on_policy_kl_approximation else current.detach())).exp()
        d = (batch.ref[:, 1:] - current).clamp(-o.kl_input_clamp_value, o.kl_input_clamp_value)
        kl = (r * (d.exp() - 1 - d)).clamp(-o.kl_output_clamp_value, o.kl_output_clamp_value)
        term = term + o.reference_policy_kl_penalty * kl
    masked = term * mask
    naive = masked.sum() / tokens if o.token_level_loss else (masked.sum(1) / mask.sum(1)).mean()
    if o.positive_example_nll_weight:
        right = mask * (data["rewards"] > 0)[:, None]
        naive = naive - o.positive_example_nll_weight * (right * current).sum() / right.sum()
    torch.testing.assert_close(loss, naive, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(value, batch.logits, retain_graph=True)[0] for value in (loss, naive)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_log_probs_that_nemo_rl_left_out_are_named(nemo, batch):
    current = ppg.token_logprobs(batch.logits[:, :-1], batch.tokens[:, 1:])
    data = {
        "token_mask": batch.mask.float(), "sample_mask": torch.ones(4), "advantages": batch.advantages,
        "prev_logprobs": torch.zeros_like(batch.old), "generation_logprobs": batch.rollout,
        "reference_policy_logprobs": batch.ref,
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"prev_logprobs are zeros, as under loss_fn.force_on_policy_ratio"):
        nemo.PPGLossFn()(current, data, torch.tensor(4.0), torch.tensor(9.0))
    data |= {"prev_logprobs": batch.old, "curr_logprobs_unfiltered": current}
    with pytest.raises(ValueError, match=r"a KL term \(kl_coef\) needs sampling without top-k and top-p"):
        nemo.PPGLossFn(ppg.PolicyLossSpec("ppo", kl_coef=0.1))(current, data, torch.tensor(4.0), torch.tensor(9.0))


def test_a_log_prob_that_no_policy_has_leaves_nemo_rls_metric_a_number(nemo):
    mask = torch.tensor([[0.0, 1.0, 1.0]])
    data = {
        "token_mask": mask, "sample_mask": torch.ones(1), "advantages": torch.ones(1, 3),
        "prev_logprobs": torch.tensor([[0.0, -1.0, -1.0]]), "generation_logprobs": torch.tensor([[0.0, -9999.0, -1.5]]),
    }  # fmt: skip
    current = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    metrics = nemo.PPGLossFn()(current, data, torch.tensor(1.0), torch.tensor(2.0))[1]
    assert metrics["token_mult_prob_error"] == pytest.approx((math.exp(20) + math.exp(0.5)) / 2)

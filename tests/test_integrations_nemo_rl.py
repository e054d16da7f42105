"""The contract of NeMo-RL, by stand-ins with its documented names: next-token alignment, global denominators."""

from enum import Enum
from importlib import import_module

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

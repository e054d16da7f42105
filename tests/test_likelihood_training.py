"""The likelihood of good turns beside the policy loss (`nll_coef`): its gradient, over passes and where a turn has no
advantage."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from test_trainer import gradients, some_samples, tiny

from ppg_fast.config import TrainConfig
from ppg_fast.dialogues.packing import pack
from ppg_fast.jobs.policy import objective_of
from ppg_fast.policy_classes import Greedy
from ppg_fast.spec import PolicyLossSpec
from ppg_fast.training.objective import Objective, likelihood


def good_and_bad():
    """Rewards of both signs and 0; in the second group all of them alike, so that no turn there has an advantage."""
    signs = [1.0, -1.0, 0.0, 1.0]
    rows = [[signs[(i + t) % 4] for t in range(len(s.rewards))] for i, s in enumerate(some_samples())]
    return [
        replace(sample, rewards=row if sample.group_id == 0 else [1.0] * len(row))
        for sample, row in zip(some_samples(), rows, strict=True)
    ]


def mean_nll(model, samples):
    """Of the tokens of turns whose own reward is positive, by plain logits."""
    model.set_attn_implementation("eager")
    terms = []
    for sample in samples:
        logp = model(torch.tensor([sample.tokens]), use_cache=False).logits[0].log_softmax(-1)
        for i, turn in enumerate(sample.turn_ids):
            if turn >= 0 and sample.rewards[turn] > 0:
                terms.append(-logp[i - 1, sample.tokens[i]])
    return torch.stack(terms).mean()


@pytest.mark.parametrize("max_tokens", [10_000, 13])
@pytest.mark.parametrize("spec", [PolicyLossSpec(), PolicyLossSpec("ppo"), PolicyLossSpec("gspo")])
def test_the_gradient_gains_that_of_the_likelihood(spec, max_tokens):
    samples, model = good_and_bad(), tiny()
    plain = Objective(Greedy(), spec=spec)
    metrics, without = gradients(model, samples, plain, 10_000)
    both_metrics, both = gradients(model, samples, replace(plain, nll_coef=0.7), max_tokens)
    model.zero_grad()
    nll = mean_nll(model, samples)
    (0.7 * nll).backward()
    own = torch.cat([p.grad.flatten() for p in model.parameters()])
    torch.testing.assert_close(both, without + own, rtol=1e-4, atol=1e-5)
    assert both_metrics["loss"] == pytest.approx(metrics["loss"] + 0.7 * nll.item(), abs=1e-5)
    for name in ("perf/tokens_read", "rows/full_share", "perf/active_row_share"):
        assert both_metrics[name] > metrics[name]  # turns without an advantage are read for their likelihood


def test_the_weights_are_those_of_turns_with_a_positive_return():
    batch = pack(good_and_bad())
    assert likelihood(batch, batch.rewards, Objective(Greedy())) is None
    weights = likelihood(batch, batch.rewards, Objective(Greedy(), nll_coef=2.0))
    assert torch.equal(weights > 0, (batch.rewards > 0) & batch.turn_mask)
    assert (weights * batch.sum_of_turns(torch.ones(len(batch.tokens)))).sum().item() == pytest.approx(2.0)


def test_the_setting():
    assert objective_of(TrainConfig(nll_coef=0.1)).nll_coef == 0.1
    with pytest.raises(ValueError, match=r"^nll_coef must be a finite number >= 0.0, got -1"):
        TrainConfig(nll_coef=-1.0)
    with pytest.raises(ValueError, match=r"^nll_coef must be 0.0 with loss_type turn_regression, .*got 0.1$"):
        TrainConfig(loss_type="turn_regression", nll_coef=0.1, baseline="none")

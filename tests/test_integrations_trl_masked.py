"""What GRPOTrainer hands on behind the mask, by which it multiplies afterwards: no NaN of it reaches a loss."""

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")
from trl import GRPOTrainer
from trl_case import RecordedPPG, ScriptedRollouts, make_model, make_trainer

from ppg_fast.integrations.trl import trainer as ours

NAMES = (*ours.LOGPROBS, "importance_sampling_ratio")


def test_values_of_tokens_of_the_environment_are_replaced(tmp_path, monkeypatch):
    """As GRPOTrainer would compute them from a sampler's NaN for tokens that it was forced to take."""
    generate, whole = GRPOTrainer._generate_and_score_completions, {}

    def with_nan(self, inputs):
        output = generate(self, inputs)
        mask = output["completion_mask"] * output["tool_mask"]
        for name in NAMES:
            whole[name] = torch.rand(mask.shape)
            output[name] = whole[name].masked_fill(mask == 0, torch.nan)
        return output

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", with_nan)
    trainer = make_trainer(tmp_path, RecordedPPG, make_model(), ScriptedRollouts(4))
    output = trainer._generate_and_score_completions([{"prompt": "w1 w2"} for _ in range(4)])
    mask = output["completion_mask"] * output["tool_mask"]
    assert 0 < mask.sum() < mask.numel()
    for name in NAMES:
        neutral = 1.0 if name == "importance_sampling_ratio" else 0.0
        assert torch.equal(output[name], torch.where(mask != 0, whole[name], neutral)), name
    per_sequence = torch.rand(4, 1)  # a weight of whole rollouts is GRPOTrainer's own
    monkeypatch.setattr(
        GRPOTrainer, "_generate_and_score_completions",
        lambda self, inputs: {**with_nan(self, inputs), "importance_sampling_ratio": per_sequence},
    )  # fmt: skip
    assert (
        trainer._generate_and_score_completions([{"prompt": "w1 w2"} for _ in range(4)])["importance_sampling_ratio"]
        is per_sequence
    )

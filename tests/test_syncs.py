"""The micro-batches of a step never ask the GPU for a number: everything a pass needs was known when it was packed.

On tensors without values, where a host that reads one raises; attention is the one of GPUs.
"""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException

pytest.importorskip("transformers")

from transformers import AttentionInterface

from ppg_fast.dialogues.packing import NOTHING, PackedBatch, Sample, pack
from ppg_fast.distributed import Ranks
from ppg_fast.models import varlen_attention
from ppg_fast.models.causal_lm import PolicyModule, make_model, prepare
from ppg_fast.policy_classes import Greedy
from ppg_fast.spec import PolicyLossSpec
from ppg_fast.training.metrics import TokenMeans
from ppg_fast.training.objective import Objective
from ppg_fast.training.passes import Pass
from ppg_fast.training.trainer import backward
from ppg_fast.training.turn_scores import TurnScores

SAMPLES = [
    Sample([1, 2, 3, 4, 5, 6], [-1, 0, 0, -1, 1, 1], [1.0, 0.5], 0, [-1.0] * 6, starts=[0, 3]),
    Sample([1, 2, 3, 4], [-1, 0, 0, 0], [1.0], 0, [-1.0] * 4),
]


@pytest.fixture
def module(monkeypatch):
    model = prepare(make_model(64, width=32, layers=1)).to(torch.bfloat16)

    def of_gpus(module, q, k, v, mask, scaling=None, cu_seq_lens_q=None, max_length_q=None, **_):
        assert isinstance(max_length_q, int)
        return varlen_attention._fused(q, k, v, scaling, None, None, cu_seq_lens_q, max_length_q), None

    monkeypatch.setitem(AttentionInterface._global_mapping, varlen_attention.NAME, of_gpus)
    return PolicyModule(model)


def without_values(batch, mode):
    values = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in vars(batch).items()}
    return PackedBatch(**values)


@pytest.mark.parametrize("spec", [PolicyLossSpec(), PolicyLossSpec("cispo", kl_coef=0.1, importance_cap=2.0)])
def test_micro_batches_wait_for_no_number(module, spec, monkeypatch):
    monkeypatch.setattr(TokenMeans, "read", lambda means: means)  # once a step
    objective, mode = Objective(Greedy(), spec=spec), FakeTensorMode(allow_non_fake_inputs=True)
    batches = [pack(SAMPLES), pack(SAMPLES[1:]), pack([NOTHING])]
    with mode:
        passes = []
        for batch in batches:
            columns = [torch.zeros(len(batch.tokens)) for _ in range(2)] if spec.kl_coef else [None, None]
            advantages = torch.zeros(batch.rewards.shape)
            passes.append(Pass([0], without_values(batch, mode), advantages, *columns))
        scores = TurnScores(batches[0])
        means = backward(module, passes, objective, 9.0, Ranks(), scores, lambda: None)
    assert len(means.unread) == len(scores.gradients) == len(passes)
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_a_read_number_is_seen():
    """What the test above would say of a host that asks."""
    mode = FakeTensorMode()
    with mode, pytest.raises(DataDependentOutputException):
        int(torch.diff(mode.from_tensor(pack(SAMPLES).part_seqlens)).max())

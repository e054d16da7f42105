"""verl's optimal token baselines over our fused head: `calculate_sum_pi_squared`, which verl refuses with any other, as
verl itself computes it from the logits: `make test-verl`."""

from types import SimpleNamespace

import pytest
import torch

verl = pytest.importorskip("verl", reason="verl is not installed here; make test-verl builds its environment")

import numpy as np
from tensordict import TensorDict
from transformers import Qwen3Config, Qwen3ForCausalLM
from verl.models.transformers.monkey_patch import patch_forward_with_backends
from verl.trainer.ppo import core_algos
from verl.utils import tensordict_utils
from verl.utils.torch_functional import calculate_sum_pi_squared_from_logits
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

import ppg_fast as ppg

LENGTHS, PROMPT = (9, 12, 7, 10), 3
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def engine(model, **options):
    """verl's engine around a model that is loaded, without processes, devices and optimizer."""
    made = object.__new__(FSDPEngineWithLMHead)
    made.module, made.pad_to_length, made.use_ulysses_sp = model, None, False
    made.ulysses_sequence_parallel_size = 1
    made.model_config = SimpleNamespace(fused_kernel_options=options)
    made.engine_config = SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False)
    made.compute_entropy_from_logits = lambda logits: -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    return made


def outputs(engine, fused, packed, **asked):
    """What the engine makes of one micro-batch: jagged log-probs, entropy, sums."""
    torch.manual_seed(7)
    ids = torch.nested.as_nested_tensor([torch.randint(97, (n,)) for n in LENGTHS], layout=torch.jagged)
    places = torch.nested.as_nested_tensor([torch.arange(n) for n in LENGTHS], layout=torch.jagged)
    batch = TensorDict({"input_ids": ids, "position_ids": places}, batch_size=len(LENGTHS))
    flags = {"use_remove_padding": packed, "use_fused_kernels": fused, "temperature": 0.8, **asked}
    tensordict_utils.assign_non_tensor(batch, **flags)
    of_model, of_outputs = engine.prepare_model_inputs(micro_batch=batch)
    with torch.no_grad():
        out = engine.module(**of_model, use_cache=False)
    return engine.prepare_model_outputs(
        output=out, output_args=of_outputs, micro_batch=batch, logits_processor_func=None
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = Qwen3ForCausalLM(Qwen3Config(vocab_size=97, num_hidden_layers=1, **SIZES)).eval()
    made.lm_head.weight.data *= 40  # some tokens are nearly certain
    return made


@pytest.fixture(scope="module", params=[True, False], ids=["packed", "padded"])
def results(request, model):
    """From logits, as verl does; from our head; from our head without the option."""
    asked = {"calculate_entropy": True, "calculate_sum_pi_squared": True}
    theirs = outputs(engine(model), False, request.param, **asked)
    original = type(model).forward
    try:
        patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="ppg")
        patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="ppg")  # wraps no engine twice
        ours = outputs(engine(model, impl_backend="ppg"), True, request.param, **asked)
        without = outputs(engine(model, impl_backend="ppg"), True, request.param, calculate_entropy=True)
        with pytest.raises(NotImplementedError, match="calculate_sum_pi_squared"):
            outputs(engine(model, impl_backend="torch"), True, request.param, **asked)
    finally:
        type(model).forward = original
    return theirs, ours, without


def test_the_sum_is_verls(results):
    theirs, ours, without = results
    assert set(ours) == set(theirs) == {*without, "sum_pi_squared"}
    for name, values in theirs.items():
        assert torch.equal(ours[name].offsets(), values.offsets())
        inside = torch.cat([torch.arange(n) < n - 1 for n in LENGTHS])  # a last token predicts whatever comes next
        mine, right = (jagged.values()[inside] for jagged in (ours[name], values))
        torch.testing.assert_close(mine, right, rtol=1e-5, atol=5e-6)
    for name, values in without.items():
        assert torch.equal(ours[name].values(), values.values()), "the option changes nothing else"
    assert theirs["sum_pi_squared"].values().max() > 0.9


def of_responses(jagged):
    """Each token of the responses, whose value stands with the token before it."""
    rows = [row[PROMPT - 1 : -1] for row in jagged.values().split(LENGTHS)]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@pytest.mark.parametrize(
    "estimator", ["compute_optimal_token_baseline_advantage", "compute_multi_turn_optimal_token_baseline_advantage"]
)
def test_the_advantages_are_verls(results, estimator):
    torch.manual_seed(5)
    longest = max(LENGTHS) - PROMPT
    mask = (torch.arange(longest) < torch.tensor(LENGTHS)[:, None] - PROMPT).float()
    mask[:, 3] = 0  # a tool's token between two turns
    rewards, ids = torch.randn(len(LENGTHS), longest) * mask, np.array(["a", "a", "b", "b"])
    made = []
    for result in results[:2]:
        columns = [of_responses(result[name]) for name in ("log_probs", "sum_pi_squared")]
        made.append(getattr(core_algos, estimator)(rewards, mask, ids, *columns))
    torch.testing.assert_close(made[0], made[1], rtol=1e-5, atol=1e-5)
    assert not torch.equal(*made[0]), "there is a baseline"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_score_norms_are_verls_weights(dtype):
    """1 - 2 p + sum_v p_v^2, from logits and from hidden states."""
    torch.manual_seed(1)
    hidden, weight, labels = torch.randn(3, 5, 16), torch.randn(201, 16), torch.randint(201, (3, 5))
    logits = (hidden @ weight.T).to(dtype)
    pi = logits.float().softmax(-1).gather(-1, labels[..., None])[..., 0]
    want = 1 - 2 * pi + calculate_sum_pi_squared_from_logits(logits.float())
    logprobs, norms = ppg.token_logprobs(logits, labels, score_norms=True)
    torch.testing.assert_close(norms, want, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(logprobs, pi.log(), rtol=1e-4, atol=1e-5)
    if dtype == torch.float32:
        norms = ppg.linear_token_logprobs(hidden, weight, labels, entropy=True, score_norms=True)[2]
        torch.testing.assert_close(norms, want, rtol=1e-4, atol=1e-5)

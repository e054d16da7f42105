"""transformers' causal LMs with a policy loss in place of their logits, family by family, against their own logits in
float64."""

import copy
import importlib
import inspect
import sys

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from host_case import found_is
from transformers_case import HEADS, SIZES, V, assert_equals_own_logits, make_batch, single_thread, tiny

from ppg_fast.integrations.transformers import LogitRule, logit_rule, patch

RULES = {
    "Gemma2": LogitRule(1.0, 2.5, V),
    "Granite": LogitRule(1 / 3, 0.0, V),
    "Cohere": LogitRule(0.3, 0.0, V),
    "HyperCLOVAX": LogitRule(0.7, 0.0, V),
    "NanoChat": LogitRule(1.0, 5.0, V),
}


one_thread = pytest.fixture(autouse=True, scope="module")(single_thread)
batch = pytest.fixture(make_batch)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", HEADS)
def test_values_and_gradients_equal_those_of_the_models_own_logits(family, tied, batch):
    model = tiny(family, tied)
    assert logit_rule(model) == RULES.get(family, LogitRule(1.0, 0.0, V))
    assert_equals_own_logits(model, batch)


def test_a_scale_in_front_of_the_head_is_seen(batch):
    """MiniCPM3 divides its hidden states by config.logits_scaling, where Granite divides the logits by it."""
    latent = {
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    }
    model = tiny("MiniCPM3", dim_model_base=8, **latent)
    assert model.config.logits_scaling == 3.0
    assert logit_rule(model) == LogitRule(1.0, 0.0, V)
    assert_equals_own_logits(model, batch)


class Reworked(transformers.LlamaForCausalLM):
    """A Llama whose forward does something to its logits that no config names."""

    @staticmethod
    def rework(logits):
        return logits

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = self.rework(out.logits)
        return out


def reworked(rework):
    config = transformers.LlamaConfig(**SIZES)
    torch.manual_seed(0)
    model = Reworked(config).eval()
    model.rework = rework
    return model


def test_rows_of_the_head_beyond_the_vocabulary_take_no_part(batch):
    model = reworked(lambda logits: logits[..., : V - 4])
    batch["labels"].masked_fill_(batch["labels"] >= V - 4, -100)
    assert logit_rule(model) == LogitRule(1.0, 0.0, V - 4)
    assert_equals_own_logits(model, batch)


@pytest.mark.parametrize(
    "rework",
    [
        lambda logits: 1.01 * logits,
        lambda logits: 30.0 * torch.tanh(logits / 30.0),
        lambda logits: logits - logits.mean(-1, keepdim=True),
        lambda logits: logits.where(torch.arange(V) != 7, -1e9),
    ],
    ids=["scale", "softcap", "centred", "a token forbidden"],
)
def test_logits_that_the_config_does_not_explain_are_refused(rework):
    with pytest.raises(
        ValueError, match=r"logits of Reworked must be a scale and softcap of hidden W\^T \+ b that its config names"
    ):
        patch(reworked(rework))


def test_a_model_in_training_with_dropout_is_recognised_and_left_as_it_was():
    model = tiny("Phi", resid_pdrop=0.5, embd_pdrop=0.5).train()
    state = torch.get_rng_state()
    logit_rule(model)
    assert torch.equal(state, torch.get_rng_state())
    assert all(part.training for part in model.modules())
    assert not model.lm_head._forward_pre_hooks


# ---- the logits never exist ------------------------------------------------------------------------------------------
def largest_allocation(run):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    return max(event.self_cpu_memory_usage for event in profile.events())


@pytest.mark.parametrize("with_advantages", [True, False])
def test_the_logits_never_exist(with_advantages):
    """No single allocation, forward or backward, reaches their size, and the head's own forward sees no row."""
    model, rows = tiny(vocab_size=4001), 96
    ids = torch.randint(2, 4001, (2, rows // 2))
    policy = {"advantages": torch.randn(2, rows // 2)} if with_advantages else {}
    seen = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(output.numel()))
    logits_bytes = 4 * rows * 4001
    assert largest_allocation(lambda: model(input_ids=ids, labels=ids).loss.backward()) >= logits_bytes
    with patch(model, chunk_rows=16):
        seen.clear()
        assert largest_allocation(lambda: model(input_ids=ids, labels=ids, **policy).loss.backward()) < logits_bytes / 2
    assert seen == [0]


# ---- plain calls, undo -----------------------------------------------------------------------------------------------
def test_calls_without_labels_are_the_models_own(batch):
    model = tiny("Gemma2")
    before = model(**batch["inputs"])
    generated = model.generate(batch["inputs"]["input_ids"][:, :4], max_new_tokens=5, do_sample=False)
    with patch(model):
        after = model(**batch["inputs"])
        assert type(after) is type(before)
        assert torch.equal(after.logits, before.logits)
        assert torch.equal(model(batch["inputs"]["input_ids"], batch["inputs"]["attention_mask"]).logits, before.logits)
        assert torch.equal(
            model.generate(batch["inputs"]["input_ids"][:, :4], max_new_tokens=5, do_sample=False), generated
        )
        assert model(batch["inputs"]["input_ids"], labels=batch["labels"], return_dict=False)[0].dim() == 0


def test_undo_leaves_class_and_instance_as_they_were():
    model, function = tiny(), transformers.LlamaForCausalLM.forward
    attributes, signature = set(vars(model)), inspect.signature(model.forward)
    patched = patch(model)
    assert transformers.LlamaForCausalLM.forward is function
    assert {"advantages", "turn_ids", "shift_labels"} <= set(inspect.signature(model.forward).parameters)
    patched.undo()
    assert set(vars(model)) == attributes
    assert model.forward.__func__ is function
    assert inspect.signature(model.forward) == signature
    wrapped = model.forward = lambda *args, **kwargs: function(model, *args, **kwargs)  # as accelerate's hooks do
    with patch(model):
        assert model.forward is not wrapped
    assert model.forward is wrapped


def test_undo_and_patch_keep_an_order():
    model = tiny()
    patched = patch(model)
    with pytest.raises(ValueError, match="must not be patched already, undo that first, got 'LlamaForCausalLM'"):
        patch(model)
    model.forward = lambda: None
    with pytest.raises(ValueError, match="undo what replaced the forward of the model first"):
        patched.undo()


def test_a_deep_copy_scores_with_its_own_head(batch):
    """A reference model is often a copy of the patched policy."""
    model = tiny()
    with patch(model):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            model.lm_head.weight.mul_(3.0)
        own, other = (m(**batch["inputs"], labels=batch["labels"]).loss for m in (model, twin))
    assert not torch.isclose(own, other)
    torch.testing.assert_close(other, tiny()(**batch["inputs"], labels=batch["labels"]).loss)


# ---- the host --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("found", ["4.57.1", None])
def test_a_missing_or_old_host_is_one_line(found, monkeypatch):
    found_is(monkeypatch, found)
    if found is None:
        monkeypatch.setitem(sys.modules, "transformers", None)
    needed = (
        rf"^ppg_fast\.integrations\.transformers needs transformers >= 5\.10, found {found or 'none'}: pip install "
    )
    with pytest.raises(ImportError, match=needed + "'transformers>=5.10'$"):
        importlib.import_module("ppg_fast.integrations.transformers")

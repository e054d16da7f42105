"""Heads of a patched model: plain, with adapters of peft, of a mixture of experts; and those that are refused."""

import sys

import pytest
import torch

pytest.importorskip("transformers")

from transformers_case import B, L, V, assert_equals_own_logits, make_batch, single_thread, tiny, with_lora

from ppg_fast.integrations.linear_head import linear_of
from ppg_fast.integrations.transformers import patch

one_thread = pytest.fixture(autouse=True, scope="module")(single_thread)
batch = pytest.fixture(make_batch)


class Quantized(torch.nn.Linear):
    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.round(decimals=1))


def test_heads_that_are_no_plain_linear_layer_are_refused():
    model = tiny()
    model.lm_head = Quantized(24, V, bias=False)
    with pytest.raises(
        ValueError, match=r"must be a torch\.nn\.Linear, or LoRA or modules_to_save of peft over one, got '.*Quantized'"
    ):
        patch(model)
    with pytest.raises(ValueError, match=r"must be a causal LM with an output head .*got .*LlamaModel"):
        patch(tiny().model)
    with pytest.raises(ValueError, match="patch the model after its weights are loaded"):
        patch(tiny().to("meta"))


@pytest.mark.parametrize("family", ["Llama", "Phi", "Gemma2"])
def test_lora_on_the_head_of_a_frozen_model(family, batch):
    model = with_lora(tiny(family))
    assert not model.get_base_model().lm_head.base_layer.weight.requires_grad
    assert_equals_own_logits(model, batch)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"lora_bias": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"]},
    ],
    ids=["rslora", "lora_bias", "modules_to_save", "not on the head"],
)
def test_other_adapters(changes, batch):
    model = with_lora(tiny("Phi"), **changes)
    for name, parameter in model.named_parameters():
        if "lora" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    assert_equals_own_logits(model, batch)


def test_adapters_given_after_the_patch_two_of_them_switched_off_and_merged(batch):
    call = {**batch["inputs"], "labels": batch["labels"]}
    base = tiny()
    with patch(base):
        model = with_lora(base)
        peft = sys.modules["peft"]
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
        both = model(**call).loss
        with model.disable_adapter():
            none = model(**call).loss
        model.merge_adapter()
        merged = model(**call).loss
        model.unmerge_adapter()
    torch.testing.assert_close(both, model(**call).loss)
    torch.testing.assert_close(merged, both)
    torch.testing.assert_close(none, tiny()(**call).loss)
    assert not torch.isclose(both, none)


def test_lora_dropout_on_the_head_is_that_of_peft(batch):
    """The adapter's input is dropped, never the head's: one seed, one loss."""
    model = with_lora(tiny(), target_modules=["lm_head"], lora_dropout=0.5).train()
    call = {**batch["inputs"], "labels": batch["labels"]}
    torch.manual_seed(5)
    expected = model(**call).loss
    with patch(model):
        torch.manual_seed(5)
        torch.testing.assert_close(model(**call).loss, expected)
        assert not torch.isclose(model(**call).loss, expected)


def test_a_small_lora_update_survives_half_precision():
    """A sum of a bfloat16 weight and a small update would be the weight again."""
    head = with_lora(tiny().bfloat16(), target_modules=["lm_head"]).get_base_model().lm_head
    with torch.no_grad():
        head.lora_B["default"].weight.mul_(1e-3)
    hidden = torch.randn(50, 24).bfloat16()
    x, weight, _ = linear_of(head, hidden)
    change = x.double() @ weight.double().t() - hidden.double() @ head.base_layer.weight.double().t()
    A, B = head.lora_A["default"].weight.double(), head.lora_B["default"].weight.double()
    expected = hidden.double() @ A.t() @ B.t() * head.scaling["default"]
    assert (change - expected).norm() < 0.02 * expected.norm()


def test_dora_on_the_head_is_refused():
    with pytest.raises(ValueError, match=r"must be plain LoRA, DoRA is not: .*; DoRA adapter, got 'default'"):
        patch(with_lora(tiny(), use_dora=True))


def test_the_loss_of_a_router_is_added_as_the_model_adds_it(batch):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": True}
    model = tiny("Qwen3Moe", router_aux_loss_coef=0.5, **experts)
    call = {**batch["inputs"], "labels": batch["labels"]}
    own = model(**call)
    with patch(model):
        out = model(**call)
        scored = model(**call, advantages=torch.ones(B, L))
    torch.testing.assert_close(out.aux_loss, own.aux_loss)
    for loss in (out.loss, scored.loss):
        torch.testing.assert_close(loss, own.loss)
    assert own.aux_loss > 0.1

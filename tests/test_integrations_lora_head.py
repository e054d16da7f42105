"""Heads that are no plain weight (adapters, hooks, casts, replaced forwards) in the heads that never call the module:
TRL's `add_fused_lm_head` of ours and verl's backend "ppg". In both the adapter counts, or one line says why not."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
peft = pytest.importorskip("peft", reason="peft is not installed")

from transformers_case import V, gradients, single_thread, tiny, with_lora

from ppg_fast.integrations.linear_head import linear_of

one_thread = pytest.fixture(autouse=True, scope="module")(single_thread)
ADAPTERS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "not on the head": {"target_modules": ["q_proj"]},
}
IDS = torch.randint(2, V, (2, 9), generator=torch.Generator().manual_seed(4))
LABELS = IDS.masked_fill(torch.arange(9) < 3, -100)


def adapted(family="Phi", **changes):
    model = with_lora(tiny(family), **changes)
    for name, parameter in model.named_parameters():
        if "lora" in name or "modules_to_save" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def through_logits(model):
    """Log-probs of the labels at temperature 0.7, from the model's own logits."""
    logits = model(input_ids=IDS).logits[:, :-1] / 0.7
    scores = logits.log_softmax(-1).gather(-1, LABELS[:, 1:].clamp(min=0)[..., None])[..., 0]
    return scores.masked_fill(LABELS[:, 1:] == -100, 0.0)


def through_the_head(model, outputs=("log_probs",)):
    head = pytest.importorskip("ppg_fast.integrations.trl.head", reason="trl is not installed")
    head.add_fused_lm_head(model, 0.7, outputs=outputs)
    return model(input_ids=IDS, labels=LABELS, fused_lm_head=True)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("family", ["Llama", "Phi", "Gemma2", "Granite"])
def test_an_adapter_on_the_head_counts_in_trls_fused_head(family, adapter):
    pytest.importorskip("trl", reason="trl is not installed")
    model = adapted(family, **ADAPTERS[adapter])
    exact = through_logits(copy.deepcopy(model).double())
    weights = torch.randn(exact.shape, generator=torch.Generator().manual_seed(1))
    expected = gradients((through_logits(model) * weights).sum(), model)
    out = through_the_head(model, ("entropy", "is_top1", "mean_logits"))
    torch.testing.assert_close(out.log_probs.double(), exact, rtol=1e-4, atol=1e-4)
    logits = model(input_ids=IDS).logits[:, :-1] / 0.7
    active = LABELS[:, 1:] != -100
    torch.testing.assert_close(out.mean_logits[active], logits.mean(-1)[active], rtol=1e-3, atol=1e-4)
    for name, gradient in gradients((out.log_probs * weights).sum(), model).items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4)


def test_an_adapter_given_after_the_head_was_added_switched_off_and_merged():
    pytest.importorskip("trl", reason="trl is not installed")
    base = tiny()
    through_the_head(base)
    model = with_lora(base)
    call = {"input_ids": IDS, "labels": LABELS, "fused_lm_head": True}
    torch.testing.assert_close(model(**call).log_probs, through_logits(model), rtol=1e-4, atol=1e-4)
    with model.disable_adapter():
        torch.testing.assert_close(model(**call).log_probs, through_logits(tiny()), rtol=1e-4, atol=1e-4)
    before = model(**call).log_probs
    model.merge_adapter()
    torch.testing.assert_close(model(**call).log_probs, before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("items", [0, torch.tensor(0)])
def test_a_window_without_a_label_is_a_connected_zero(items):
    pytest.importorskip("trl", reason="trl is not installed")
    model = adapted()
    through_the_head(model)
    out = model(
        input_ids=IDS, labels=torch.full_like(IDS, -100), fused_lm_head=True, num_items_in_batch=items
    )  # fmt: skip
    assert out.loss == 0
    assert all(gradient is not None and not gradient.any() for gradient in gradients(out.loss, model).values())


class Rounded(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight.round(decimals=1))


def rounded(model):
    model.lm_head = Rounded(24, V, bias=False)


def sequential(model):
    model.lm_head = nn.Sequential(model.lm_head)


def replaced(model):
    model.lm_head.forward = lambda x: nn.functional.linear(x, 2 * model.lm_head.weight)


def hooked(model):
    model.lm_head.register_forward_hook(lambda module, inputs, output: 2 * output)


def hooked_before(model):
    model.lm_head.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))


def offloaded(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to("meta"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rounded, "must be a torch.nn.Linear, or LoRA .*got '.*Rounded'"),
        (sequential, "must be a torch.nn.Linear, or LoRA .*got '.*Sequential'"),
        (replaced, "the head's forward must be that of torch.nn.Linear"),
        (hooked, r"the head must have no forward hooks, .*got \['hooked"),
        (hooked_before, r"the head must have no forward hooks, .*got \['hooked_before"),
        (offloaded, "must be whole and plain .*not offloaded, got 'on meta'"),
    ],
)
def test_what_the_product_would_leave_out_is_refused(change, words):
    pytest.importorskip("trl", reason="trl is not installed")
    model = tiny()
    change(model)
    with pytest.raises(ValueError, match=words) as caught:
        through_the_head(model)
    assert "\n" not in str(caught.value)


def test_a_parametrized_head_is_read_as_it_multiplies():
    pytest.importorskip("trl", reason="trl is not installed")
    model = tiny()
    nn.utils.parametrizations.weight_norm(model.lm_head)
    with torch.no_grad():
        model.lm_head.parametrizations.weight.original0.mul_(1.7)
    out = through_the_head(model)
    torch.testing.assert_close(out.log_probs, through_logits(model), rtol=1e-4, atol=1e-4)
    out.loss.backward()
    assert model.lm_head.parametrizations.weight.original0.grad.abs().sum() > 0


@pytest.mark.parametrize(("changes", "kind"), [({"use_dora": True}, "DoRA"), ({}, "LoRA")])
def test_dora_is_refused_by_its_name_and_merged_it_is_obeyed(changes, kind):
    model = with_lora(tiny(), **changes)
    head, hidden = model.get_base_model().lm_head, torch.randn(5, 24)
    if kind == "DoRA":
        with pytest.raises(ValueError, match=r"DoRA is not: leave the head out .*merge_adapter\(\).*got 'default'"):
            linear_of(head, hidden)
        model.merge_adapter()
    x, weight, bias = linear_of(head, hidden)
    torch.testing.assert_close(nn.functional.linear(x, weight, bias), head(hidden), rtol=1e-4, atol=1e-4)

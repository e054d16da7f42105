"""verl's backend "ppg" on models that do more than one product for their logits: bias, scale, softcap, an adapter.
verl's own heads read `lm_head.weight` alone. By stand-ins of the two functions of verl that we wrap; with verl itself,
`test_integrations_verl_losses.py`."""

import copy
import importlib
import importlib.util
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from host_case import found_is, put
from transformers_case import V, gradients, single_thread, tiny, with_lora

one_thread = pytest.fixture(autouse=True, scope="module")(single_thread)
IDS = torch.randint(2, V, (2, 9), generator=torch.Generator().manual_seed(4))
LABELS = IDS.roll(-1, 1)


@pytest.fixture
def patch_forward(monkeypatch):
    """verl's patch_forward_with_backends after ours was registered; the classes are mended afterwards."""
    if importlib.util.find_spec("verl"):
        pytest.skip("verl itself is here")
    changed = []

    class FusedLinearForPPO(torch.nn.Module):
        def __init__(self, chunk_size=512, impl_backend="torch"):
            super().__init__()

        def forward(self, hidden_states, vocab_weights, input_ids, temperature=1.0):
            scores = (hidden_states @ vocab_weights.t() / temperature).log_softmax(-1)
            return scores.gather(-1, input_ids[..., None])[..., 0], -(scores.exp() * scores).sum(-1)

    def forward_with_torch_backend(self, input_ids, temperature=1.0, **_):
        head = functions.FusedLinearForPPO(impl_backend=self._verl_fused_kernels_backend)
        hidden = self.model(input_ids=input_ids)[0]
        logprobs, entropy = head.forward(
            hidden_states=hidden, vocab_weights=self.lm_head.weight, input_ids=input_ids.roll(-1, 1),
            temperature=temperature,
        )  # fmt: skip
        return SimpleNamespace(log_probs=logprobs, entropy=entropy)

    def patch_forward_with_backends(model, use_fused_kernels=False, fused_kernels_backend=None):
        changed.append((type(model), type(model).forward))
        model._verl_fused_kernels_backend = fused_kernels_backend
        type(model).forward = forward_with_torch_backend

    functions = SimpleNamespace(FusedLinearForPPO=FusedLinearForPPO)
    patches = SimpleNamespace(patch_forward_with_backends=patch_forward_with_backends)
    registers = dict.fromkeys(("register_adv_est", "register_policy_loss"), lambda _: lambda function: function)
    put(monkeypatch, "verl.trainer.ppo.core_algos", agg_loss=print, **registers)
    put(monkeypatch, "verl.trainer.config", AlgoConfig=dict)
    put(monkeypatch, "verl.models.transformers", monkey_patch=patches)
    put(monkeypatch, "verl.utils.experimental", torch_functional=functions)
    found_is(monkeypatch, "0.9.1")
    importlib.import_module("ppg_fast.integrations.verl")
    yield patches.patch_forward_with_backends
    for kind, forward in reversed(changed):
        kind.forward = forward
    for name in [name for name in sys.modules if name.startswith("ppg_fast.integrations.verl")]:
        del sys.modules[name]


def by_logits(model, temperature=0.8):
    scores = (model(input_ids=IDS).logits / temperature).log_softmax(-1)
    return scores.gather(-1, LABELS[..., None])[..., 0], -(scores.exp() * scores).sum(-1)


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "LoRA on the head"])
@pytest.mark.parametrize("family", ["Llama", "Phi", "Gemma2", "Granite", "Cohere", "HyperCLOVAX"])
def test_log_probs_are_those_of_the_models_own_logits(patch_forward, family, adapted):
    model = with_lora(tiny(family)) if adapted else tiny(family)
    exact = by_logits(copy.deepcopy(model).double())
    weights = torch.randn(2, *IDS.shape, generator=torch.Generator().manual_seed(1))
    expected = gradients(sum((w * v).sum() for w, v in zip(weights, by_logits(model), strict=True)), model)
    base = model.get_base_model() if adapted else model
    patch_forward(base, use_fused_kernels=True, fused_kernels_backend="ppg")
    out = model(input_ids=IDS, temperature=0.8)
    for ours, right in zip((out.log_probs, out.entropy), exact, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=1e-4, atol=1e-4)
    loss = sum((w * v).sum() for w, v in zip(weights, (out.log_probs, out.entropy), strict=True))
    for name, gradient in gradients(loss, model).items():
        if expected[name] is not None:
            torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=2e-4)


def test_a_head_that_is_no_product_is_refused_and_other_backends_stay_verls(patch_forward):
    model = with_lora(tiny(), use_dora=True)
    patch_forward(model.get_base_model(), use_fused_kernels=True, fused_kernels_backend="ppg")
    with pytest.raises(ValueError, match="must be plain LoRA, DoRA is not"):
        model(input_ids=IDS)
    theirs = tiny("Llama")
    patch_forward(theirs, use_fused_kernels=True, fused_kernels_backend="torch")
    theirs.lm_head.register_forward_hook(print)  # which verl's own would leave out
    assert theirs(input_ids=IDS).log_probs.isfinite().all()

"""Adapters, frozen parts, activation checkpointing: what trains, what is kept, and that the gradient stays what it
was."""

import json
import shutil

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

pytest.importorskip("transformers")
pytest.importorskip("peft")

from ppg_fast.cli import main
from ppg_fast.dialogues.packing import Sample, pack
from ppg_fast.models import causal_lm as models
from ppg_fast.models import freed_memory
from ppg_fast.models.adaptation import (
    StartingWeights,
    add_lora,
    checkpoint_activations,
    freeze,
    frozen_digest,
    load_trainable_state,
    plain_head,
    trainable_state,
)
from ppg_fast.ops.head import Head
from ppg_fast.spec import PolicyLossSpec
from ppg_fast.training import checkpoint

V = 29


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(layers=3):
    return models.make_model(V, width=16, layers=layers).train()


def batch(lengths=(19, 11)):
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(2, V, (n,), generator=generator).tolist() for n in lengths]
    return pack([Sample(t, [-1, *[0] * (len(t) - 3), -1, -1], [1.0], 0) for t in tokens])


def gradients(model):
    model.zero_grad()
    models.policy_loss(model, batch(), torch.tensor([[0.7], [-0.4]]), PolicyLossSpec()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def names_of(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_adapters_are_all_that_trains_and_begin_at_the_model_itself():
    model, given = tiny(), batch()
    before = models.token_logprobs(model, given)
    add_lora(model, 4)
    assert torch.equal(models.token_logprobs(model, given), before)
    assert names_of(model) == {n for n, _ in model.named_parameters() if "lora_" in n}
    assert len(names_of(model)) == 3 * 7 * 2, "all linear layers of each layer, not the head"
    found = gradients(model)
    assert found.keys() == names_of(model)
    assert sum(g.abs().sum() > 0 for g in found.values()) == 3 * 7, "B has a gradient, A none while B is zero"
    scaling = model.get_decoder().layers[0].mlp.up_proj.scaling["default"]
    assert scaling == 2.0


def test_adapters_have_the_gradient_of_the_weights_they_stand_for():
    """d/dB of (W + s B A) x is s dW A^T: against the same model with its weights themselves trained."""
    whole = gradients(tiny())
    model = add_lora(tiny(), 4, alpha=12)
    found = gradients(model)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj"):
        a = model.get_submodule(name).lora_A["default"].weight
        torch.testing.assert_close(
            found[f"{name}.lora_B.default.weight"], 3.0 * whole[f"{name}.weight"] @ a.T, rtol=1e-4, atol=1e-6
        )


def test_adapters_of_a_bfloat16_model_are_float32():
    model = add_lora(tiny().bfloat16(), 2, target_modules="q_proj, v_proj")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert len(names_of(model)) == 3 * 2 * 2
    assert gradients(model)
    with torch.no_grad():
        assert models.policy_hidden(model, batch()).dtype == torch.bfloat16


def test_adapters_on_the_head_are_refused():
    with pytest.raises(
        ValueError, match=r"must not be on the head \(leave it out of lora_target_modules\), got 'Linear'"
    ):
        add_lora(tiny(), 2, target_modules="q_proj,lm_head")
    assert plain_head(tiny()).weight.shape == (V, 16)


def test_targets_that_match_nothing_are_named():
    with pytest.raises(ValueError, match="nothing"):
        add_lora(tiny(), 2, target_modules="nothing")


def test_a_frozen_head_costs_two_products(monkeypatch):
    wanted = []
    start = Head.__init__
    monkeypatch.setattr(Head, "__init__", lambda self, *a: (wanted.append(a[4]), start(self, *a))[1])
    model = tiny()
    gradients(model)
    freeze(model, "head")
    found = gradients(model)
    assert wanted == [(True, True, False), (True, False, False)]
    assert "model.embed_tokens.weight" not in found, "tied"
    assert found


def test_freeze_takes_names_and_regular_expressions():
    model = tiny()
    freeze(model, r"embeddings, layers\.[01]\., model\.norm")
    left = names_of(model)
    assert left == {n for n in left if n.startswith("model.layers.2.")}
    assert left
    with pytest.raises(ValueError, match=r"freeze must name head, embeddings or .* got 'layer7'"):
        freeze(model, "layer7")
    with pytest.raises(ValueError, match=r"must leave a weight to train, got '\.'"):
        freeze(model, ".")


def saved_bytes(model):
    """Of the tensors that a forward pass keeps for its backward pass, weights apart."""
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(note, lambda t: t):
        loss = models.policy_loss(model, batch((150, 90)), torch.ones(2, 1), PolicyLossSpec()).loss
    del loss
    return sum(s.nbytes() for s in kept.values())


@pytest.mark.parametrize("lora", [False, True])
def test_checkpointing_keeps_less_and_the_gradient_to_the_bit(lora):
    model = add_lora(tiny(), 4) if lora else tiny()
    full, bytes_kept = gradients(model), saved_bytes(model)
    checkpoint_activations(model, every_n_layers=3)
    third, bytes_of_third = gradients(model), saved_bytes(model)
    checkpoint_activations(model)
    found, bytes_of_all = gradients(model), saved_bytes(model)
    assert full.keys() == found.keys() == third.keys()
    assert all(torch.equal(full[n], found[n]) and torch.equal(full[n], third[n]) for n in full)
    assert bytes_of_all < bytes_of_third < bytes_kept
    assert bytes_of_all < bytes_kept / 3


def test_freed_memory_is_given_back_once_a_layer_in_both_passes(monkeypatch):
    model = tiny(layers=3)
    checkpoint_activations(model)
    before, trims = gradients(model), []
    monkeypatch.setattr(freed_memory, "_trim", lambda: lambda pad: trims.append(pad) or 1)
    freed_memory.give_back_freed_memory(model)
    after = gradients(model)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert trims == [0] * 6  # after each forward pass, and once the layer above has ended its backward pass
    with torch.no_grad():
        models.token_logprobs(model, batch())
    assert len(trims) == 6  # nor for a pass without a gradient, as of a rollout
    monkeypatch.setattr(freed_memory, "_trim", lambda: None)  # another allocator
    freed_memory.give_back_freed_memory(other := tiny())
    assert not any(layer._forward_hooks for layer in other.modules())


def test_options_of_checkpointing_reach_the_switch_or_are_refused():
    class Model:
        device = torch.device("cuda")

        def activation_checkpointing_enable(self, arguments, every_n_layers, offload):
            self.got = arguments, every_n_layers, offload

    model = Model()
    checkpoint_activations(model, 2, offload=True)
    assert model.got == ({"use_reentrant": False}, 2, True)

    class Older:
        device = torch.device("cuda")

        def gradient_checkpointing_enable(self, arguments):
            self.got = arguments

    older = Older()
    checkpoint_activations(older)
    assert older.got == {"use_reentrant": False}
    with pytest.raises(ValueError, match=r"activation_offload and .* need a newer transformers"):
        checkpoint_activations(older, offload=True)


def test_the_reference_is_the_start_and_the_exchange_is_exact():
    model = add_lora(tiny(), 4)
    freeze(model, "q_proj.lora_A")
    start, given = StartingWeights(model), batch()
    assert start.weights.keys() == names_of(model)
    before = models.token_logprobs(model, given)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p))
    state, versions = trainable_state(model), {n: v.clone() for n, v in trainable_state(model).items()}
    with start.in_place() as reference:
        assert torch.equal(models.token_logprobs(reference, given), before)
    assert all(torch.equal(versions[n], v) for n, v in state.items())
    assert not torch.equal(models.token_logprobs(model, given), before)


def test_a_small_state_is_the_weights_that_train():
    model, other = add_lora(tiny(), 4), add_lora(tiny(), 4)
    state = {n: torch.randn_like(v) for n, v in trainable_state(model).items()}
    assert state.keys() == names_of(model), "a tied head is no weight of its own"
    load_trainable_state(other, state)
    assert all(torch.equal(v, other.get_parameter(n)) for n, v in state.items())
    assert trainable_state(tiny()).keys() == tiny().state_dict().keys()
    with pytest.raises(ValueError, match="weights that train, and no others"):
        load_trainable_state(tiny(), state)
    assert frozen_digest(tiny()) == ""
    assert frozen_digest(model) == frozen_digest(other) != ""
    with torch.no_grad():
        other.get_decoder().norm.weight[3] += 1e-3
    assert frozen_digest(model) != frozen_digest(other)


RUN = (
    "--device cpu --no-progress --imitation-steps 1 --imitation-batch 2 --max-steps 3 --num-prompts 2 "
    "--num-generations 2 "
    "--max-new-tokens 2 --eval-dialogues 1 --save-every 2 --entropy-coef 0.1 --kl-coef 0.1"
)
LORA = "--lora-rank 2 --activation-checkpointing --bf16 --optim adafactor"


def test_a_run_with_adapters_resumes_to_the_same_bits(tmp_path, capsys):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, run, again = (str(tmp_path / name) for name in ("base", "run", "again"))
    assert main(["train", "--output-dir", base, "--width", "16", *RUN.split()]) == 0
    assert main(["train", "--output-dir", run, "--model", f"{base}/checkpoint", *LORA.split(), *RUN.split()]) == 0
    last = checkpoint.newest(tmp_path / "run/checkpoints")
    assert all("lora_" in name for name in last["training"]["model"])
    assert last["training"]["model"].keys() == last["training"]["reference"].keys()
    shutil.copytree(run, again)
    shutil.rmtree(tmp_path / "again/checkpoints/step-00000004")
    assert main(["train", "--resume", again]) == 0
    resumed = checkpoint.newest(tmp_path / "again/checkpoints")
    for name, weight in last["training"]["model"].items():
        assert torch.equal(weight, resumed["training"]["model"][name])
    assert json.loads((tmp_path / "run/summary.json").read_text())["trainable_parameters"] == sum(
        v.numel() for v in last["training"]["model"].values()
    )
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(f"{base}/checkpoint"), f"{run}/checkpoint")
    mine = {n.replace(".default", ""): v for n, v in last["training"]["model"].items()}
    theirs = {
        n.removeprefix("base_model.model.").replace(".default", ""): v
        for n, v in adapted.named_parameters()
        if "lora_" in n
    }
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[n], theirs[n]) for n in mine)
    capsys.readouterr()
    assert main(["train", "--resume", again, "--lora-rank", "3"]) == 1
    assert "settings it began with, got lora_rank 2 -> 3" in capsys.readouterr().err
    assert main(["train", "--output-dir", str(tmp_path / "x"), "--model", f"{run}/checkpoint"]) == 1
    assert "got adapters, which first want merging" in capsys.readouterr().err
    assert main(["train", "--output-dir", str(tmp_path / "x"), "--lora-rank", "2"]) == 1
    assert "lora_rank must be 0 without model" in capsys.readouterr().err


@pytest.mark.parametrize("adapt", [lambda m: freeze(m, "("), lambda m: add_lora(m, 2, target_modules="(")])
def test_what_is_no_regular_expression_is_named(adapt):
    with pytest.raises(ValueError, match=r"^(freeze|lora_target_modules) must be a regular expression, got '\('"):
        adapt(tiny())


def test_a_checkpoint_of_other_shapes_is_one_line():
    """torch's own message names every weight, a line each."""
    model, other = tiny(), tiny()
    saved = {name: torch.zeros(*value.shape, 2) for name, value in trainable_state(other).items()}
    with pytest.raises(ValueError, match=r"weights of the model's shapes; \d+ differ, got .* here'$") as error:
        load_trainable_state(model, saved)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300

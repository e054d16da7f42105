"""Optimisers by name: the one that was asked for, on the weights that train, resuming to the bit; and clear words for
the others."""

import importlib.util
import io

import pytest
import torch

pytest.importorskip("transformers")

from ppg_fast.models import causal_lm as models
from ppg_fast.models.adaptation import freeze
from ppg_fast.training.optimisers import OnCPU, Together, make_optimizer, set_learning_rate

needs = {
    name: pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")
    for name in ("torchao", "bitsandbytes")
}
NAMES = [
    "adamw_torch",
    "adamw_torch_fused",
    "sgd",
    "adagrad",
    "rmsprop",
    "adafactor",
    "muon",
    pytest.param("adamw_8bit", marks=needs["bitsandbytes"]),
    pytest.param("adamw_torch_8bit", marks=needs["torchao"]),
]


def tiny():
    return models.make_model(23, width=16, layers=2)


def steps(model, optimizer, seeds):
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        optimizer.zero_grad(set_to_none=True)
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.randn(p.shape, generator=generator)
        set_learning_rate(optimizer, 1e-2 / (1 + seed))
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_each_moves_the_weights_and_resumes_to_the_bit(name, offload):
    arguments = "momentum=0.9" if name in ("sgd", "rmsprop") else ""
    settings = {"arguments": arguments, "weight_decay": 0.01, "offload": offload}
    model = tiny()
    optimizer = make_optimizer(model, name, **settings)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    halfway = steps(model, optimizer, range(3))
    assert (halfway != before).float().mean() > 0.9
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    whole = steps(model, optimizer, range(3, 5))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = models.make_model(23, width=16, layers=2, seed=7)
    resumed = make_optimizer(other, name, **settings)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    assert torch.equal(steps(other, resumed, range(3, 5)), whole)


@pytest.mark.parametrize("offload", [False, True])
def test_the_default_is_adamw_and_where_its_state_is_changes_no_bit(offload):
    one, other = tiny(), tiny()
    plain = torch.optim.AdamW(one.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.1)
    assert torch.equal(
        steps(one, plain, range(3)), steps(other, make_optimizer(other, weight_decay=0.1, offload=offload), range(3))
    )


def test_frozen_weights_have_no_state():
    model = tiny()
    freeze(model, "embeddings")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for name in ("adamw_torch", "muon"):
        optimizer = make_optimizer(model, name)
        assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) == trained


def test_muon_takes_the_matrices_of_the_decoder():
    model = tiny()
    optimizer = make_optimizer(model, "muon", arguments="momentum=0.8,nesterov=False", betas=(0.8, 0.9))
    assert isinstance(optimizer, Together)
    muon, adam = optimizer.parts
    assert {p.ndim for g in muon.param_groups for p in g["params"]} == {2}
    assert (
        muon.param_groups[0]["momentum"],
        muon.param_groups[0]["nesterov"],
        muon.param_groups[0]["weight_decay"],
    ) == (0.8, False, 0.0)
    assert adam.param_groups[0]["betas"] == (0.8, 0.9)
    assert any(p is model.get_input_embeddings().weight for p in adam.param_groups[0]["params"])


def test_arguments_and_weight_decay_arrive():
    (group,) = make_optimizer(tiny(), "sgd", arguments="momentum=0.5,nesterov=true", weight_decay=0.3).param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.5, True, 0.3)
    assert type(make_optimizer(tiny(), "adafactor")).__name__ == "Adafactor"
    assert make_optimizer(tiny(), "adamw_torch_fused").param_groups[0]["fused"] is True


def test_a_step_on_the_cpu_takes_the_gradient_as_it_is_then():
    """Clipped, or not there at all: a weight without a gradient stays."""
    model = tiny()
    optimizer = make_optimizer(model, "sgd", offload=True)
    assert isinstance(optimizer, OnCPU)
    first, *others = model.parameters()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["lr"] = 1.0
    first.grad = torch.ones_like(first) * 5
    first.grad.mul_(0.5)
    optimizer.step()
    torch.testing.assert_close(first.detach(), start[0] - 2.5)
    optimizer.zero_grad()
    optimizer.step()
    torch.testing.assert_close(first.detach(), start[0] - 2.5)
    assert all(torch.equal(p, s) for p, s in zip(others, start[1:], strict=True))


def test_names_that_cannot_serve_say_why(monkeypatch):
    with pytest.raises(
        ValueError,
        match=r"optim must be a name that transformers knows, or muon; did you mean 'adamw_torch'\?, got 'adamw_torhc'",
    ):
        make_optimizer(tiny(), "adamw_torhc")
    for name, why in {
        "lomo": "during the backward pass",
        "galore_adamw_layerwise": "during the",
        "schedule_free_adamw": "schedule",
    }.items():
        with pytest.raises(ValueError, match=f"one step a batch .*{why}.*got '{name}'"):
            make_optimizer(tiny(), name)
    monkeypatch.setattr("transformers.trainer_optimizer.is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match=r"optim 'adamw_8bit' wants a package that is not here: .*bitsandbytes"):
        make_optimizer(tiny(), "adamw_8bit")

"""Where a step goes, by parts, on steps whose parts are known."""

from types import SimpleNamespace

import pytest
import torch
from ppg_fast.bench import step_parts
from torch import nn
from torch.nn.functional import scaled_dot_product_attention


class TwoAttention(nn.Module):
    """Keeps its three inputs, what comes out and one number a row and head."""

    def forward(self, x):
        return scaled_dot_product_attention(x, 2 * x, 3 * x)


class TinyMLP(nn.Module):
    """Keeps the sigmoid and twice of it, and the weight, which is there anyway."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return x.sigmoid().mul(2.0) @ self.weight


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = TwoAttention(), TinyMLP()

    def forward(self, x):
        return self.mlp(self.self_attn(x))


@pytest.fixture
def step():
    model, x = Model(), torch.rand(1, 2, 64, 8, requires_grad=True)
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        loss = model(x).exp().sum()
        loss.backward()
        optimizer.step()

    step()
    return step


def test_what_is_kept_stands_once_under_the_module_that_kept_it(step):
    kept = step_parts.parts(step)["kept_bytes"]
    size = 2 * 64 * 8 * 4
    assert set(kept) == {"attention", "MLP", "head and loss"}
    assert 4 * size <= kept["attention"] <= 4 * size + 2 * 64 * 4 + 64, "three inputs, the result, a sum a row and head"
    assert kept["MLP"] == 2 * size, "sigmoid's result and twice of it; the weight is there anyway"
    assert kept["head and loss"] == size, "exp's result"


@pytest.mark.parametrize("name", ["ppg_fast::policy_loss", "ppg_fast_native::policy_loss"])
def test_what_is_ours_is_not_the_rest(name):
    assert step_parts._part(SimpleNamespace(name=name, cpu_parent=None)) == "our kernels"


def test_operators_have_their_parts_and_the_optimizer_its_own(step):
    seconds = step_parts.parts(step)["seconds"]
    assert {"attention", "matrix products", "optimizer"} <= set(seconds)
    assert list(seconds.values()) == sorted(seconds.values(), reverse=True)
    assert all(value > 0 for value in seconds.values())

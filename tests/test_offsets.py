"""Log-probs, entropies and their gradients where all logits are far from 0 or the temperature is tiny: to 1e-6 of
float64 over the same input, as torch's own."""

import math

import pytest
import torch
from torch import Tensor

import ppg_fast as ppg
from ppg_fast.spec import PolicyLossSpec

NONE = -math.inf
FLOAT32_MIN = torch.finfo(torch.float32).min
DRAW = torch.randn(67, generator=torch.Generator().manual_seed(5)).mul(3).tolist()


def shifted(offset: float, step: float = 1.0) -> list[float]:
    """67 logits around ``offset``, whole multiples of ``step``."""
    return [offset + step * round(4 * x) for x in DRAW]


CASES = {
    "two at 1e4": (torch.float32, [1e4, 1e4 + 1], 1.0),
    "half's ends": (torch.float16, [65504.0, -65504.0], 1.0),
    "half's end": (torch.float16, [65504.0, 65504.0, 65472.0], 1.0),
    "four at 1e9": (torch.float32, [1e9] * 4, 1.0),
    "at 1e9": (torch.float32, [1e9, 1e9 + 64, 1e9 - 64], 1.0),
    "at -2e9": (torch.float32, [-2e9, -2e9 + 128, -2e9], 1.0),
    "at 1e30": (torch.float32, [1e30, 1e30, 1e30, 1.0], 1.0),
    "at -1e30": (torch.float32, [-1e30, -1e30], 1.0),
    "finfo.min": (torch.float32, [FLOAT32_MIN] * 5, 1.0),
    "masked by finfo.min": (torch.float32, [FLOAT32_MIN, 1.0, FLOAT32_MIN, 2.5], 1.0),
    "masked by -inf": (torch.float32, [NONE, 1e5, NONE, 1e5 + 2], 1.0),
    "wide": (torch.float32, [-1e6, 1e6, 1e6 + 0.5, 0.0], 1.0),
    "many at 3e4": (torch.float32, shifted(3e4, 0.25), 1.0),
    "many at -1e5": (torch.float32, shifted(-1e5, 0.25), 1.0),
    "many at 4e6": (torch.float32, shifted(4e6), 1.0),
    "bfloat16 at 3e4": (torch.bfloat16, shifted(3e4, 128.0), 40.0),
    "bfloat16 at 1e9": (torch.bfloat16, [1e9, 1e9, 1e9 * (1 + 2**-7)], 3e6),
    "cold": (torch.float32, [1.0, 1.0, 0.5, -3.0], 1e-8),
    "cold and apart": (torch.float32, [20.0, 20.0 + 2**-19, 20.0 - 2**-19], 1e-6),
    "colder": (torch.float32, [30.0, 30.0, -30.0], 1e-15),
    "hot": (torch.float32, [3.0, -3.0, 0.0], 1e6),
}


def truth(x: Tensor, temperature: float, d_logprob: Tensor, d_entropy: Tensor, labels: Tensor, softcap: float = 0.0):
    """Log-probs, entropies and d logits in float64."""
    z = x.double().requires_grad_()
    v = z if not softcap else softcap * torch.tanh(z / softcap)
    logp = torch.log_softmax(v / temperature, -1)
    p = logp.exp()
    l, H = logp.gather(-1, labels[:, None])[:, 0], -(p * logp.masked_fill(p == 0, 0.0)).sum(-1)
    finite = l.isfinite()
    total = (l * d_logprob)[finite].sum() + (H * d_entropy).sum()
    return l.detach(), H.detach(), torch.autograd.grad(total, z)[0]


def close(found: Tensor, expected: Tensor, dtype: torch.dtype = torch.float32, size: float = 1.0) -> None:
    """To 1e-6 of the number or, near 0, of ``size``; of a gradient in 16 bits to its rounding."""
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=1.2e-6 + rounding, atol=(1.2e-6 + rounding * 1e-3) * size)


@pytest.mark.parametrize("case", CASES)
def test_every_label(backend, device, case):
    dtype, row, temperature = CASES[case]
    x = torch.tensor(row, dtype=torch.float64).to(dtype)
    labels = torch.arange(len(row))
    if len(row) > 9:
        labels = labels[::7]
    x = x.repeat(len(labels), 1).to(device)
    labels = labels.to(device)
    d_l, d_H = (
        torch.linspace(0.5, 1.5, len(labels), device=device),
        torch.linspace(0.4, -0.3, len(labels), device=device),
    )
    l, H, gradient = truth(x, temperature, d_l, d_H, labels)

    logits = x.clone().requires_grad_()
    found, entropy = ppg.token_logprobs(logits, labels, temperature=temperature, entropy=True, backend=backend)
    close(found, l)
    close(entropy, H)
    finite = l.isfinite()
    (d,) = torch.autograd.grad(((found * d_l)[finite]).sum() + (entropy * d_H).sum(), logits)
    close(d, gradient, dtype, 1 / temperature)

    logits = x.clone().requires_grad_()
    spec = PolicyLossSpec(entropy_coef=0.1, temperature=temperature)
    out = ppg.policy_loss(logits, labels, -d_l, spec=spec, reduction="none", backend=backend)
    close(out.logprobs, l)
    close(out.entropy, H)
    (d,) = torch.autograd.grad(out.loss[finite].sum(), logits)
    expected = truth(x, temperature, d_l, torch.full_like(d_H, -0.1), labels)[2]
    close(d[finite], expected[finite], dtype, 1 / temperature)

    logits = x.clone().requires_grad_()  # without an entropy term the exponentials are kept and not read again
    spec = PolicyLossSpec(temperature=temperature)
    out = ppg.policy_loss(logits, labels, -d_l, spec=spec, reduction="none", backend=backend)
    close(out.logprobs, l)
    (d,) = torch.autograd.grad(out.loss[finite].sum(), logits)
    close(d[finite], truth(x, temperature, d_l, torch.zeros_like(d_H), labels)[2][finite], dtype, 1 / temperature)


@pytest.mark.parametrize("temperature", [1.0, 1e-3, 1e-8])
def test_a_softcap_bounds_the_logits_and_not_the_temperature(backend, device, temperature):
    x = torch.tensor([[5e4, 5e4, 1e-3, -2e-3]] * 4, device=device)
    labels, ones = torch.arange(4, device=device), torch.ones(4, device=device)
    l, H, _ = truth(x, temperature, ones, ones, labels, softcap=30.0)
    found, entropy = ppg.token_logprobs(
        x, labels, temperature=temperature, logit_softcap=30.0, entropy=True, backend=backend
    )
    close(found, l)
    close(entropy, H)


def test_temperatures_of_tokens(backend, device):
    x = torch.tensor([[7.0, 7.0, 6.0]] * 3, device=device)
    temperatures = torch.tensor([1e-8, 1.0, 1e5], device=device)
    labels = torch.tensor([0, 2, 1], device=device)
    expected = torch.log_softmax(x.double() / temperatures.double()[:, None], -1).gather(-1, labels[:, None])[:, 0]
    close(ppg.token_logprobs(x, labels, temperature=temperatures, backend=backend), expected)


@pytest.mark.parametrize("offset", [0.0, 1e4, 3e6])
def test_a_vocabulary_of_many_blocks(backend, device, offset):
    """The maximum moves from block to block, downwards and upwards."""
    V = 5003 if backend in ("cpu", "reference") else 1031
    x = 0.5 * torch.randint(-9, 9, (2, V), generator=torch.Generator().manual_seed(2)) + offset
    x[0] += torch.linspace(-40, 0, V).round()
    x[1] += torch.linspace(0, -40, V).round()
    x, labels, ones = (
        x.to(device).requires_grad_(),
        torch.tensor([V - 1, 3], device=device),
        torch.ones(2, device=device),
    )
    l, H, gradient = truth(x.detach(), 1.0, ones, ones, labels)
    found, entropy = ppg.token_logprobs(x, labels, entropy=True, backend=backend)
    close(found, l)
    close(entropy, H)
    close(torch.autograd.grad(found.sum() + entropy.sum(), x)[0], gradient)


def test_no_logit_at_all_is_nan(backend, device):
    """A row of -inf has no distribution, as in torch.log_softmax; nor has one with +inf."""
    rows = torch.tensor([[NONE] * 3, [1.0, math.inf, 0.0], [1.0, 2.0, 0.0]], device=device)
    found, entropy = ppg.token_logprobs(rows, torch.tensor([0, 0, 0], device=device), entropy=True, backend=backend)
    assert found.isnan().tolist() == [True, True, False]
    assert entropy.isnan().tolist() == [True, True, False]

"""NaN in a number that a row's loss is made of is NaN in its loss and its gradient, and in no other row, on every
backend."""

import math
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import cases
import pytest
import torch
from cases import LOSSES, TERMS, Case
from torch import Tensor

import ppg_fast as ppg
from ppg_fast import backends, reference
from ppg_fast.losses import LOSS_TYPES, WITH_ROLLOUT
from ppg_fast.spec import PolicyLossSpec

# not every NaN has the same bits: PyTorch's, the one that x86 makes, the one that CUDA makes
NANS = {"torch": 0x7FC00000, "x86": -0x400000, "cuda": 0x7FFFFFFF}
KINDS = ((torch.float32, "x86"), (torch.bfloat16, "cuda"))  # the C++ code rounds to bfloat16 itself
# which terms to try each number with
NUMBERS = {
    "logits": ("plain", "everything", "z-loss"),
    "temperatures": ("plain", "softcap"),
    "advantages": ("plain", "entropy"),
    "weights": ("plain", "entropy"),
    "old_logprobs": ("plain", "importance", "log-ratio", "k3_unbiased"),
    "ref_logprobs": ("plain", "k1", "k2", "k3", "k3_unbiased", "k3_plus", "abs"),
    "rollout_logprobs": ("plain", "importance", "importance-mask"),
    "nll_weights": ("plain", "k1"),
}
RATIOS = (0.6, 0.95, 1.05, 1.65)  # on every side of the clip
BAD, IDLE, CLEAN = (
    range(8),
    8,
    9,
)  # rows: every ratio and sign of the advantage; advantage 0; one that keeps its numbers


def nan(bits: int, device: str = "cpu") -> Tensor:
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).to(device)


def a_case(spec: PolicyLossSpec, dtype: torch.dtype, device: str, V: int = 35) -> Case:
    draw = torch.Generator().manual_seed(1)
    logits, labels = 3 * torch.randn(1, 10, V, generator=draw), torch.randint(V, (10,), generator=draw)
    temperatures = torch.linspace(0.6, 1.5, 10)
    logprobs, _ = reference.token_logprobs(logits[0].to(dtype).float(), labels, temperatures, spec.logit_softcap)
    log_ratio = torch.tensor([math.log(r) for r in (*RATIOS, *RATIOS, 1.0, 1.2)])
    old = logprobs - log_ratio
    columns = {
        "advantages": torch.tensor([1.5] * 4 + [-0.7] * 4 + [0.0, 1.0]),
        "weights": torch.linspace(0.5, 1.5, 10),
        "old_logprobs": old,
        "ref_logprobs": logprobs - log_ratio.roll(1),
        "rollout_logprobs": old - log_ratio.roll(2),
        "temperatures": temperatures,
        "nll_weights": torch.linspace(0.4, 0.1, 10) * (torch.arange(10) % 4 > 0) * (torch.arange(10) != IDLE),
    }
    moved = {name: column.to(device) for name, column in columns.items()}
    return Case(logits.to(device, dtype), labels.to(device), **moved, spec=spec)


def run(case: Case, backend: str) -> dict[str, Tensor]:
    out = cases.run(case, backend)
    return {**out, "dlogits": out["dlogits"][0]}


@cache
def clean(spec: PolicyLossSpec, dtype: torch.dtype, device: str, backend: str) -> dict[str, Tensor]:
    return run(a_case(spec, dtype, device), backend)


def reads(spec: PolicyLossSpec, number: str) -> bool:
    """Whether a loss is made of the number, from the formulas."""
    importance = spec.weighs_importance
    unbiased = spec.kl_coef != 0 and spec.kl_estimator == "k3_unbiased"
    return {
        "old_logprobs": spec.loss_type != "reinforce" or importance or spec.log_ratio_coef != 0 or unbiased,
        "rollout_logprobs": importance or spec.loss_type in WITH_ROLLOUT,
        "ref_logprobs": spec.kl_coef != 0,
    }.get(number, True)


def spare_the_interpreter(backend: str, device: str, loss: str) -> None:
    """Which is slow: of the losses whose rows differ by the scalar loss alone, test_triton_terms.py has that."""
    if backend == "triton" and device == "cpu" and loss not in ("reinforce", "ppo", "gspo", "gspo_turn", "ipo"):
        pytest.skip("interpreted: test_triton_terms.py")


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_nan_stays_in_its_row_and_stays_nan(backend, device, loss, number):
    spare_the_interpreter(backend, device, loss)
    for terms in NUMBERS[number]:
        spec = replace(LOSSES[loss], **TERMS[terms])
        for dtype, bits in KINDS if backend == "cpu" else KINDS[1:]:
            case = a_case(spec, dtype, device)
            values = case.logits[0, :, 30] if number == "logits" else getattr(case, number)
            values[:CLEAN] = nan(NANS[bits], device)
            expected, out, where = clean(spec, dtype, device, backend), run(case, backend), f"{terms}, {dtype}"
            if not reads(spec, number):
                assert all(torch.equal(out[key], expected[key]) for key in out), where
                continue
            assert out["loss"][:CLEAN].isnan().all(), where
            assert out["dlogits"][: len(BAD)].isnan().all(), where
            assert out["logprob"][:CLEAN].isnan().all() == (number in ("logits", "temperatures")), where
            assert all(torch.equal(out[key][CLEAN], expected[key][CLEAN]) for key in out), where
            if backend != "reference":  # FORWARD-ONLY unless a term needs every row
                idle = out["dlogits"][IDLE]
                full = spec.needs_every_row or number in ("advantages", "nll_weights")
                assert idle.isnan().all() if full else (idle == 0).all(), where


def packed(device: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Two sequences of 6 tokens in 2 turns: logits, labels and the numbers of each token."""
    draw = torch.Generator().manual_seed(2)
    logits, labels = torch.randn(12, 33, generator=draw), torch.randint(33, (12,), generator=draw)
    logprobs = torch.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0]
    log_ratio = torch.tensor([-0.5, -0.05, 0.05, 0.5, 0.5, -0.5] * 2)
    numbers = {
        "advantages": torch.tensor([1.0, -1.0] * 6),
        "old_logprobs": logprobs - log_ratio,
        "ref_logprobs": logprobs + 0.1,
        "rollout_logprobs": logprobs - 2 * log_ratio,
    }
    return logits.to(device), labels.to(device), {name: column.to(device) for name, column in numbers.items()}


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("number", ["advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs", "logits"])
def test_the_reduced_loss_of_a_call(backend, device, loss_type, number):
    """A token of the first sequence holds NaN: so does the loss and that token's gradient; the second sequence is what
    it was."""
    spare_the_interpreter(backend, device, loss_type)
    spec = PolicyLossSpec(loss_type, importance_cap=1.3, kl_coef=0.1, kl_estimator="k1")
    results = []
    for bits in (None, NANS["torch"]):
        logits, labels, numbers = packed(device)
        if bits is not None:
            values = logits[:, 7] if number == "logits" else numbers[number]
            values[3] = nan(bits, device)
        logits.requires_grad_()
        options = {"spec": spec, "cu_seqlens": torch.tensor([0, 6, 12], dtype=torch.int32, device=device)}
        if loss_type.endswith("_turn"):
            options["turn_ids"] = torch.arange(12, device=device) // 3 % 2
        advantages = numbers.pop("advantages")
        out = ppg.policy_loss(logits, labels, advantages, **numbers, **options, backend=backend)
        results.append((out.loss.detach(), *torch.autograd.grad(out.loss, logits)))
    (expected_loss, expected), (loss, gradient) = results
    assert expected_loss.isfinite()
    assert loss.isnan()
    assert gradient[3].isnan().all()
    assert torch.equal(gradient[6:], expected[6:])


@pytest.mark.parametrize("number", ["logits", "temperatures", "d_logprob", "d_entropy", "d_lse"])
def test_log_probs_and_their_gradient(backend, device, number):
    if backend == "reference":
        pytest.skip("reference: plain PyTorch, no row kernel")
    module = backends.load(backend)
    kinds = KINDS if backend == "cpu" else KINDS[1:]
    for (dtype, bits), softcap in ((kind, cap) for kind in kinds for cap in (0.0, 5.0)):
        case = a_case(PolicyLossSpec(logit_softcap=softcap), dtype, device)
        numbers = {"d_logprob": 1.0, "d_entropy": 0.3, "d_lse": 0.2}
        upstream = {name: torch.full((10,), value, device=device) for name, value in numbers.items()}
        bad = nan(NANS[bits], device)
        if number == "logits":
            case.logits[0, :CLEAN, 30] = bad
        else:
            (case.temperatures if number == "temperatures" else upstream[number])[:CLEAN] = bad
        logprob, entropy, lse = module.logprobs_fwd(case.logits, case.labels, case.temperatures, 1.0, softcap, True)
        dlogits = torch.empty_like(case.logits)
        rows = case.logits, case.labels, lse, entropy, *upstream.values(), case.temperatures, 1.0, softcap
        module.logprobs_bwd(*rows, dlogits)
        where = f"{dtype}, softcap {softcap}, {bits}"
        for values in (logprob, entropy, lse[:, 1]):
            assert values[:CLEAN].isnan().all() == (number in ("logits", "temperatures")), where
            assert values[CLEAN].isfinite(), where
        assert dlogits[0, :CLEAN].isnan().all(), where
        assert dlogits[0, CLEAN].isfinite().all(), where


def test_an_upstream_gradient(backend, device):
    if backend == "reference":
        pytest.skip("reference: plain PyTorch, no row kernel")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for bits in NANS.values():
            rows = torch.ones(1, 2, 515, dtype=dtype, device=device)
            scale = torch.stack((nan(bits), torch.tensor(2.0))).to(device)
            backends.load(backend).scale_rows(rows, scale, rows)
            assert rows[0, 0].isnan().all(), (dtype, hex(bits))
            assert (rows[0, 1] == 2).all()
            gradient, out = nan(bits).to(device).expand(1, 2, 515).contiguous(), torch.empty_like(rows)
            backends.load(backend).scale_rows(gradient, torch.full((1,), 0.5, device=device), out)
            assert out.isnan().all(), (dtype, hex(bits))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_ratio_beyond_float32_is_no_nan(backend, device, loss):
    """exp(90) is infinite in float32, and infinity times an advantage of 0 is NaN."""
    case = a_case(replace(LOSSES[loss], importance_cap=1.2), torch.float32, device)
    case.old_logprobs -= 90.0
    case.rollout_logprobs -= 90.0
    out, truth = run(case, backend), case.textbook(torch.float32)
    torch.testing.assert_close(out["loss"].cpu(), truth["loss"], rtol=1e-4, atol=1e-5)
    assert out["dlogits"].isfinite().all()
    assert out["loss"][IDLE] == 0


def test_the_scalar_loss_has_its_own_minimum():
    """A GPU's minimum and maximum give the other number where one is NaN, Triton's interpreter does not: no test here
    would see it."""
    root = Path(__file__).parents[1]
    for home, dropping in (
        ("kernels/triton/policy_term.py", r"tl\.(min|max)imum\(|tl\.clamp"),
        ("csrc/policy_term.h", r"fm(in|ax)f?\(|std::(min|max|clamp)"),
    ):
        assert not re.findall(dropping, (root / home).read_text())

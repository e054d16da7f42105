"""The CPU kernels on every instruction set that this processor has: each is compiled from the same source and must
agree."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cases import LOSSES, TERMS, make_case
from test_nan import NANS, nan
from test_policy_loss import DTYPES, assert_matches

from ppg_fast import backends

if reason := backends.why_not("cpu"):
    pytest.skip(reason, allow_module_level=True)

from ppg_fast import native


@pytest.fixture(params=native.ISAS)
def isa(request):
    best = native.isa()
    if native.ISAS.index(request.param) < native.ISAS.index(best):
        pytest.skip(f"{request.param}: this processor has {best}")
    native.use_isa(request.param)
    yield request.param
    native.use_isa(best)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [1, 3, 4, 17, 64, 515])
@pytest.mark.parametrize("terms", ["plain", "everything"])
def test_every_instruction_set(isa, terms, V, dtype):
    assert native.isa() == isa
    assert_matches(make_case((1, 6, V), replace(LOSSES["ppo"], **TERMS[terms]), DTYPES[dtype], per_token=True), "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [5003, 6144])  # several blocks and a tail; rows that streaming stores can write
@pytest.mark.parametrize("terms", ["plain", "entropy", "softcap"])
def test_the_running_maximum(isa, terms, V, dtype):
    """Rows whose maximum moves from block to block, begins below every number, or comes last; the same bits in place
    and apart."""
    case = make_case((1, 6, V), replace(LOSSES["ppo"], **TERMS[terms]), DTYPES[dtype], on_policy=True)
    case.logits[:] = 3 * torch.randn(6, V, generator=torch.Generator().manual_seed(V))
    case.logits[0, 0] = case.logits[0, 0].sort().values
    case.logits[0, 1] = case.logits[0, 1].sort(descending=True).values
    case.logits[0, 2, :3000] = torch.finfo(DTYPES[dtype]).min / 4
    case.logits[0, 3, : V - 1] -= 30
    case.logits[0, 4, 4000:] += 20
    case.labels[:] = torch.tensor([V - 1, 0, 3500, V - 1, 7, 11])
    case.advantages[:] = torch.tensor([1.0, -2.0, 0.5, 1.5, -0.7, 0.9])
    if dtype == "f32":
        case.labels[5] = 2600
        case.logits[0, 5, :2500] = torch.finfo(torch.float32).min  # times a temperature below 1 this is -inf
    assert_matches(case, "cpu")
    apart = torch.empty_like(case.logits)
    contract, rows = backends.load("cpu").policy_loss, (case.labels, *case.per_row)
    contract(case.logits, *rows, case.spec, True, apart)
    contract(case.logits, *rows, case.spec, True, case.logits)
    assert torch.equal(apart, case.logits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_reach_of_the_exponent(isa, dtype):
    """Rows about every number at which the kernels take another form of 2^x, with and without parts far below; one
    log-prob, whoever computes it."""
    case = make_case((1, 12, 4500), LOSSES["ppo"], DTYPES[dtype], on_policy=True)
    near = torch.randn(12, 4500, generator=torch.Generator().manual_seed(1))
    about = torch.tensor([0, -30, 33, 34.6, 35, -34.6, -36, 87, -88, 300, 0, 33])
    case.logits[0] = near + about[:, None]
    case.logits[0, 10, 100:4000] = -120
    case.logits[0, 11, ::2] = torch.finfo(DTYPES[dtype]).min
    case.labels[:] = case.logits.argmax(-1)
    assert_matches(case, "cpu")
    kernels, spec = backends.load("cpu"), case.spec
    how = case.logits, case.labels, None, spec.temperature, spec.logit_softcap
    alone, with_entropy = (kernels.logprobs_fwd(*how, entropy)[0] for entropy in (False, True))
    _, in_loss, _ = kernels.policy_loss(case.logits, case.labels, *case.per_row, spec, False, case.logits)
    assert torch.equal(alone, with_entropy)
    assert torch.equal(alone, in_loss)


def test_special_values(isa):
    """-inf gives a probability of zero, also where a row begins with it; NaN, +inf and nothing but -inf poison the
    row."""
    case = make_case((1, 6, 5000), LOSSES["ppo"])
    case.labels[:] = 2500
    case.logits[:] = torch.randn(5000)
    case.logits[0, 3, :2400] = case.logits[0, 4, 2600:] = -torch.inf
    case.logits[0, 0, 50] = -torch.inf
    case.logits[0, 1, 99] = torch.nan
    case.logits[0, 2, 1] = torch.inf
    case.logits[0, 5] = -torch.inf
    contract = backends.load("cpu").policy_loss
    loss, logprob, _ = contract(case.logits, case.labels, *case.per_row, case.spec, True, None)
    assert loss.isnan().tolist() == [False, True, True, False, False, True]
    assert logprob.isnan().tolist() == [False, True, True, False, False, True]


@pytest.mark.parametrize("bits", NANS)
def test_a_nan_of_any_bits_poisons_its_row(isa, bits):
    for column in (0, 99, 4999):  # a vector, and the tail of the row
        for spec in (LOSSES["ppo"], replace(LOSSES["ppo"], **TERMS["everything"])):
            case = make_case((1, 2, 5001), spec)
            case.labels[:] = 2500
            case.logits[0, 0, column] = nan(NANS[bits])
            dlogits = torch.empty_like(case.logits)
            loss, logprob, _ = backends.load("cpu").policy_loss(
                case.logits, case.labels, *case.per_row, spec, True, dlogits
            )
            assert loss.isnan().tolist() == logprob.isnan().tolist() == [True, False]
            assert dlogits.isnan().all(-1).tolist() == [[True, False]]


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="avx1024"):
        native.use_isa("avx1024")


@pytest.mark.parametrize(("name", "said"), [("baseline", "isa: baseline"), ("avx1024", "got 'avx1024'")])
def test_the_environment_names_the_instruction_set(name, said):
    code = "from ppg_fast import native; print('isa:', native.isa())"
    environment = {**os.environ, "PPG_FAST_ISA": name}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert said in (done.stdout + done.stderr).splitlines()[-1]

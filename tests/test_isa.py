"""The CPU kernels on every instruction set that this processor has: each is compiled from the same source and must agree."""

from dataclasses import replace

import pytest
import torch
from cases import LOSSES, TERMS, make_case
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


def test_special_values(isa):
    """-inf gives a probability of zero, NaN and +inf poison the row."""
    case = make_case((1, 6, 100), LOSSES["ppo"])
    case.labels[:] = 5
    case.logits[:] = torch.randn(100)
    case.logits[0, 0, 50] = -torch.inf
    case.logits[0, 1, 99] = torch.nan
    case.logits[0, 2, 1] = torch.inf
    contract = backends.load("cpu").policy_loss
    loss, logprob, _ = contract(case.logits, case.labels, *case.per_row, case.spec, True, None)
    assert loss.isnan().tolist() == [False, True, True, False, False, False]
    assert logprob.isnan().tolist() == [False, True, True, False, False, False]


def test_an_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="avx1024"):
        native.use_isa("avx1024")

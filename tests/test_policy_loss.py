"""The fused row kernel on every backend: numerics, zero rows, memory, independence, and the op around it."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from cases import LOSSES, PAIRS, TERMS, make_case, run
from closeness import assert_as_good_as

import ppg_fast as ppg
from ppg_fast import backends
from ppg_fast.spec import IGNORE

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# one token; less than a vector; not a multiple of any vector; a few blocks and a tail
SHAPES = {"1x1": (1, 1, 1), "one-row": (1, 1, 7), "tails": (1, 9, 1003), "batch": (2, 5, 4099)}


def assert_matches(case, backend):
    actual, plain, truth = run(case, backend), case.textbook(torch.float32), case.textbook(torch.float64)
    for name in truth:
        assert_as_good_as(actual[name], plain[name], truth[name], name)
    return actual


@pytest.mark.parametrize(("loss", "terms"), PAIRS)
def test_every_loss_and_term(backend, device, loss, terms):
    assert_matches(make_case((1, 9, 515), replace(LOSSES[loss], **TERMS[terms]), device=device), backend)


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_with_every_term(loss):
    for terms, dtype in product(TERMS, DTYPES.values()):
        spec = replace(LOSSES[loss], **TERMS[terms])
        assert_matches(make_case((1, 12, 99), spec, dtype, likelihood=True), "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["dense", "strided"])
def test_every_dtype_and_shape(backend, device, shape, dtype, layout):
    spec = replace(LOSSES["ppo"], **TERMS["everything"])
    assert_matches(
        make_case(
            SHAPES[shape], spec, DTYPES[dtype], device, strided=layout == "strided", per_token=True, likelihood=True
        ),
        backend,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_on_policy(backend, device, loss, dtype):
    case = make_case((1, 8, 777), replace(LOSSES[loss], importance_cap=1.2), DTYPES[dtype], device, on_policy=True)
    assert_matches(case, backend)


def test_a_large_vocabulary(backend, device):
    """One row beyond what any kernel keeps on chip at once."""
    assert_matches(make_case((1, 2, 151_669), LOSSES["ppo"], torch.bfloat16, device), backend)


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows_are_exactly_zero(backend, device, dtype):
    """Masked rows hold NaN and must not leak; rows of zero advantage keep their log-prob."""
    case = make_case((1, 12, 260), LOSSES["ppo"], DTYPES[dtype], device)
    out = assert_matches(case, backend)
    masked, idle = case.labels == IGNORE, case.advantages == 0
    assert (out["dlogits"][0][masked | idle] == 0).all()
    assert all((out[name][masked] == 0).all() for name in ("loss", "logprob", "entropy"))
    assert (out["logprob"][idle & ~masked] != 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_gives_the_same_bits(backend, device, dtype):
    if backend == "reference":
        pytest.skip("reference: plain PyTorch, never in place")
    case = make_case(
        (2, 6, 1003), replace(LOSSES["ppo"], entropy_coef=0.02, logit_softcap=7.0), DTYPES[dtype], device, strided=True
    )
    contract, rows = backends.load(backend).policy_loss, (case.labels, *case.per_row)
    apart = torch.empty(case.logits.shape, dtype=case.logits.dtype, device=device)
    first = contract(case.logits, *rows, case.spec, True, apart)
    second = contract(case.logits, *rows, case.spec, True, case.logits)
    assert torch.equal(apart, case.logits)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nothing_outside_the_rows_is_written(backend, device):
    if backend == "reference":
        pytest.skip("reference: plain PyTorch, writes nothing by hand")
    case = make_case((2, 3, 261), LOSSES["ppo"], torch.bfloat16, device)
    frame = torch.full((2, 4, 270), 42.0, dtype=torch.bfloat16, device=device)
    inside = frame[:, :-1, 5:266]
    backends.load(backend).policy_loss(case.logits, case.labels, *case.per_row, case.spec, False, inside)
    inside.fill_(42.0)
    assert (frame == 42).all()


def test_a_row_does_not_depend_on_its_neighbours(backend, device):
    case = make_case((1, 8, 515), replace(LOSSES["ppo"], **TERMS["everything"]), device=device)
    together = run(case, backend)
    for n in range(8):
        alone = run(case, backend, slice(n, n + 1))
        dlogits = alone.pop("dlogits")
        assert all(torch.equal(alone[name], together[name][n : n + 1]) for name in alone), n
        assert torch.equal(dlogits[0], together["dlogits"][0, n : n + 1]), n


def test_minus_infinity_is_a_probability_of_zero(backend, device):
    """Banned tokens: log 0 never meets 0 in a product, and their gradient is exactly zero."""
    case = make_case((1, 4, 300), replace(LOSSES["ppo"], entropy_coef=0.02), device=device)
    case.logits[..., 100:200] = -torch.inf
    case.labels = torch.where(case.labels == IGNORE, IGNORE, 7)
    out = assert_matches(case, backend)
    assert (out["dlogits"][..., 100:200] == 0).all()


def test_nan_logits_poison_their_own_row_only(backend, device):
    case = make_case((1, 6, 300), LOSSES["ppo"], device=device)
    clean = run(case, backend)
    case.logits[0, 1, 150] = torch.nan
    out = run(case, backend)
    assert out["loss"][1].isnan()
    assert out["logprob"][1].isnan()
    assert all(torch.equal(out["loss"][n], clean["loss"][n]) for n in range(6) if n != 1)


def test_upstream_gradients_scale_rows(backend, device):
    case = make_case((1, 9, 515), LOSSES["ppo"], device=device)
    upstream = torch.linspace(-1.0, 2.0, 9, device=device)
    upstream[4] = 1.0

    def gradient(upstream):
        x = case.logits[0].nan_to_num().requires_grad_()
        options = {"old_logprobs": case.old_logprobs, "spec": case.spec, "reduction": "none", "backend": backend}
        loss = ppg.policy_loss(x, case.labels, case.advantages, **options).loss
        return torch.autograd.grad(loss, x, upstream)[0]

    expected = gradient(torch.ones_like(upstream)) * upstream[:, None]
    assert expected.any()
    torch.testing.assert_close(gradient(upstream), expected, rtol=1e-6, atol=0)


def test_no_rows(backend, device):
    case = make_case((1, 4, 33), LOSSES["ppo"], device=device)
    out = run(case, backend, slice(0))
    assert out["loss"].shape == (0,)
    assert out["dlogits"].shape == (1, 0, 33)


def test_a_second_backward_pass_says_what_to_do(backend, device):
    if backend == "reference":
        pytest.skip("reference: plain autograd")
    x = torch.randn(1, 3, 20, device=device, requires_grad=True)
    labels, advantages = torch.tensor([[1, 2, 3]], device=device), torch.ones(1, 3, device=device)
    loss = 2 * ppg.policy_loss(x, labels, advantages, backend=backend).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated a second time"):
        loss.backward()

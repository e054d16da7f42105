"""Every loss of the table in Triton's interpreter: the scalar loss of many tokens at once against the reference in
float64, and what the kernels around it make of a likelihood's weight and of the log-sum-exp."""

import sys
from dataclasses import replace

import pytest
import torch

triton = pytest.importorskip("triton")
pytest.importorskip("ppg_fast.kernels", exc_type=ImportError)  # no device, and not interpreted

import triton.language as tl
from cases import spec_of
from ppg_fast.kernels.plan import number_or_off
from ppg_fast.kernels.policy_loss import OFF_AT_0, own_numbers
from ppg_fast.kernels.policy_term import ONE, importance_weight, policy_term

import ppg_fast as ppg
from ppg_fast import reference
from ppg_fast.losses import KL_ESTIMATORS, LOSS_TYPES, SEQUENCE_LEVEL
from ppg_fast.spec import PolicyLossSpec

TOKEN_LEVEL = [name for name in LOSS_TYPES if name not in SEQUENCE_LEVEL]
NUMBERS = {
    "clip_low": 0.15, "clip_high": 0.3, "dual_clip": 1.4, "ratio_cap": 1.6, "tau_positive": 0.8, "tau_negative": 1.3,
}  # fmt: skip
TERMS = {
    "plain": {},
    "floor": {"importance_floor": 0.8},
    "floor and cap": {"importance_floor": 0.8, "importance_cap": 1.2, "nan_rollout": "one"},
    "masked above": {"importance_cap": 1.2, "importance_mode": "mask"},
    "masked": {"importance_floor": 0.8, "importance_cap": 1.2, "importance_mode": "mask", "nan_rollout": "one"},
    **{kind: {"kl_coef": 0.7, "kl_estimator": kind} for kind in KL_ESTIMATORS},
    **{f"{kind} with a cap": {"kl_coef": 0.7, "kl_estimator": kind, "kl_cap": 0.02} for kind in KL_ESTIMATORS},
    "the rest": {"entropy_coef": 0.1, "z_coef": 0.2, "log_ratio_coef": 0.3},
}
OF_EVERY_LOSS = ("plain", "masked", "k3_unbiased", "the rest")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
N = 1024  # tokens, side by side in one block
COLUMNS = ("logprob", "entropy", "lse", "old", "ref", "rollout", "advantage")


@triton.jit
def scalar_losses(
    values, out, low, high, cap, log_ratio_coef, kl_coef, kl_cap, entropy_coef, z_coef, importance_floor,
    importance_cap, max_log_ratio,
    LOSS_TYPE: tl.constexpr, KL_ESTIMATOR: tl.constexpr, NAN_ROLLOUT: tl.constexpr, IMPORTANCE_MODE: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    """The scalar loss as the row kernels call it."""
    at = tl.arange(0, N)
    logprob, entropy, lse = tl.load(values + at), tl.load(values + N + at), tl.load(values + 2 * N + at)
    old, ref, rollout = tl.load(values + 3 * N + at), tl.load(values + 4 * N + at), tl.load(values + 5 * N + at)
    advantage = tl.load(values + 6 * N + at)
    importance = 1.0
    if importance_floor is not None or importance_cap is not None:
        importance = importance_weight(
            old, rollout, importance_floor, importance_cap, max_log_ratio, NAN_ROLLOUT, IMPORTANCE_MODE
        )
    if NAN_ROLLOUT == ONE:
        rollout = tl.where(rollout != rollout, old, rollout)
    loss, slope = policy_term(
        logprob, entropy, lse, old, ref, rollout, importance, advantage, low, high, cap, log_ratio_coef, kl_coef,
        kl_cap, entropy_coef, z_coef, max_log_ratio, LOSS_TYPE, KL_ESTIMATOR,
    )  # fmt: skip
    tl.store(out + at, loss)
    tl.store(out + N + at, slope)


def tokens_of(seed=0):
    """(7, N) float32: log ratios on every side of every bound, some beyond the largest, advantages of every sign."""
    draw = torch.Generator().manual_seed(seed)
    uniform = lambda low, high: low + (high - low) * torch.rand(N, generator=draw)  # noqa: E731
    l = -torch.exp(uniform(-6.0, 1.5))
    old, ref, rollout = (l - uniform(-0.6, 0.6) for _ in range(3))
    old[:8], ref[4:12], rollout[10:14] = l[:8] - 25.0, l[4:12] + 25.0, old[10:14] - 25.0
    A = uniform(-2.0, 2.0)
    A[::7] = 0.0
    return torch.stack((l, uniform(0.0, 2.0), uniform(-3.0, 3.0), old, ref, rollout, A))


def found(spec, tokens):
    """-> (2, N): loss and its derivative in the log-prob, by the kernels' function."""
    out = torch.empty(2, N, device=DEVICE)
    loss_type, kl_estimator, nan_rollout, mode = spec.choices
    scalar_losses[(1,)](
        tokens.to(DEVICE), out, *own_numbers(spec), *(number_or_off(getattr(spec, name)) for name in OFF_AT_0),
        float(spec.max_log_ratio),
        LOSS_TYPE=loss_type, KL_ESTIMATOR=kl_estimator, NAN_ROLLOUT=nan_rollout, IMPORTANCE_MODE=mode, N=N,
    )  # fmt: skip
    return out.double().cpu()


def truth(spec, tokens):
    """The same by the reference in float64."""
    l, H, lse, old, ref, rollout, A = tokens.double()
    l, everywhere = l.requires_grad_(), torch.ones(N, dtype=torch.bool)
    loss = reference.loss_from_logprobs(l, H, everywhere, A, None, old, ref, rollout, spec, lse=lse)
    return torch.stack((loss.detach(), *torch.autograd.grad(loss.sum(), l)))


@pytest.mark.parametrize("loss_type", TOKEN_LEVEL)
def test_a_token(loss_type):
    tokens = tokens_of()
    for name, terms in TERMS.items():
        if name not in OF_EVERY_LOSS and loss_type != "ppo":
            continue  # beside the surrogate, whatever it is
        for spec in (spec_of(loss_type, **NUMBERS, **terms), PolicyLossSpec(loss_type, **terms, max_log_ratio=0.25)):
            expected = truth(spec, tokens)
            assert expected.isfinite().all()
            torch.testing.assert_close(found(spec, tokens), expected, rtol=3e-5, atol=2e-6, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("loss_type", TOKEN_LEVEL)
def test_what_is_nan_stays_nan(loss_type):
    for terms in ("the rest", "floor and cap", "masked above", "k3_unbiased with a cap", "abs with a cap", "k3_plus"):
        spec = spec_of(loss_type, **NUMBERS, **TERMS[terms])
        tokens = tokens_of(1)
        for i in range(len(COLUMNS)):
            tokens[i, i * 100 : i * 100 + 90] = torch.nan
        expected, out = truth(spec, tokens), found(spec, tokens)
        assert torch.equal(out.isnan(), expected.isnan()), terms
        assert expected[:, :90].isnan().all()


@pytest.mark.parametrize("loss_type", ["dppo_kl", "dppo_tv"])
def test_a_gate_near_a_probability_of_one(loss_type):
    """Where 1 - p in float32 has lost its digits."""
    tokens = tokens_of(2)
    draw = torch.Generator().manual_seed(2)
    tokens[0], tokens[3] = (-torch.exp(-13 + 2 * torch.rand(N, generator=draw)) for _ in range(2))
    bound = 1e-7 if loss_type == "dppo_kl" else 1e-6
    spec = PolicyLossSpec(loss_type, clip_low=bound, clip_high=bound)
    expected, out = truth(spec, tokens), found(spec, tokens)
    closed = expected[1] == 0
    assert 0.2 < closed.double().mean() < 0.8
    assert ((out[1] == 0) != closed).sum() <= 1, "beside rounding of the bound itself"


# ---- around it -------------------------------------------------------------------------------------------------------
ROWS, V = 12, 9
MASKED, IDLE = (1, 7), (2, 3, 4)


def call(form, backend, spec, **options):
    """(loss, log-probs, gradient) of one call; three rows of no advantage, of which one has a likelihood's weight."""
    draw = torch.Generator().manual_seed(5)
    logits, labels = 2 * torch.randn(ROWS, V, generator=draw), torch.randint(V, (ROWS,), generator=draw)
    A = torch.randn(ROWS, generator=draw)
    A[list(IDLE)] = 0.0
    weights = torch.rand(ROWS, generator=draw)
    weights[[0, 2, 4, 5]] = 0.0
    l = torch.log_softmax(logits, -1).gather(1, labels[:, None])[:, 0]
    old, ref, rollout = (l - 0.4 * torch.randn(ROWS, generator=draw) for _ in range(3))
    for column in (A, weights, old, ref, rollout):
        column[list(MASKED)] = torch.nan
    mask = torch.ones(ROWS, dtype=torch.bool)
    mask[list(MASKED)] = False
    rows = {"old_logprobs": old, "ref_logprobs": ref, "rollout_logprobs": rollout, "nll_weights": weights}
    x, A, labels, mask = (t.to(DEVICE) for t in (logits, A, labels, mask))
    rows = {name: column.to(DEVICE) for name, column in rows.items()}
    options = {"spec": spec, "backend": backend, "loss_mask": mask, **rows, **options}
    x = x.requires_grad_()
    if form == "hidden":
        out = ppg.linear_policy_loss(x, torch.eye(V, device=DEVICE), labels, A, chunk_rows=5, **options)
    else:
        out = ppg.policy_loss(x, labels, A, **options)
    return out.loss.detach().cpu(), out.logprobs.cpu(), torch.autograd.grad(out.loss, x)[0].cpu()


@pytest.mark.parametrize("form", ["logits", "hidden"])
@pytest.mark.parametrize("skip", [False, True])
def test_a_weight_of_the_likelihood_makes_a_row_full(form, skip):
    spec = spec_of("ppo", **NUMBERS)
    expected, out = (call(form, b, spec, skip_zero_advantages=skip) for b in ("reference", "triton"))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    _, logprobs, gradient = out
    assert gradient[3].any(), "its advantage is 0, its weight is not"
    assert not gradient[[2, 4, *MASKED]].any()
    assert (logprobs[[2, 4]] != 0).all() == (not skip)
    assert logprobs[3] != 0


@pytest.mark.parametrize("form", ["logits", "hidden"])
@pytest.mark.parametrize("more", [{}, {"entropy_coef": 0.1, "logit_softcap": 4.0}, {"temperature": 0.7}], ids=str)
def test_z_loss(form, more):
    spec = replace(spec_of("cispo", **NUMBERS), z_coef=0.3, **more)
    options = {"reduction": "sum", "skip_zero_advantages": True}
    expected, out = (call(form, b, spec, **options) for b in ("reference", "triton"))
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert out[2][list(IDLE)].abs().sum(1).all()


def test_z_loss_of_a_row_that_is_read_again(monkeypatch):
    """In blocks, whose gradient is computed by another function."""
    spec = replace(spec_of("sapo", **NUMBERS), z_coef=0.3, log_ratio_coef=0.2, kl_coef=0.1, kl_estimator="k3_plus")
    held = call("logits", "triton", spec)
    in_blocks = {"ONE_BLOCK": False, "KEEP_EXP": False, "BLOCK_V": 4, "LANES": 2}
    module = sys.modules["ppg_fast.kernels.policy_loss"]
    monkeypatch.setattr(module, "row_shape", lambda *of, whole=module.row_shape: {**whole(*of), **in_blocks})
    torch.testing.assert_close(call("logits", "triton", spec), held, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["ipo", "icepop"])
def test_who_has_no_rollout_log_prob_is_compared_with_the_old_one(loss_type):
    spec = PolicyLossSpec(loss_type, nan_rollout="one")
    rollout = torch.full((ROWS,), torch.nan, device=DEVICE)
    expected, out = (call("logits", "triton", spec, rollout_logprobs=column) for column in (None, rollout))
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(out, call("logits", "reference", spec, rollout_logprobs=None), rtol=1e-5, atol=1e-6)

"""Every public function against `oracle`, an implementation of the contract in numpy float64 that shares no code with
the package."""

from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from contract_case import RELATIVE, Call, close, draw, upstream_of

import ppg_fast as ppg
from ppg_fast.losses import LOSS_TYPES, SEQUENCE_LEVEL
from ppg_fast.spec import BASELINES, REDUCTIONS

# the other losses differ from these in the scalar loss alone: one layout each with every reduction
SHAPES = ("reinforce", "ppo", "cispo", *SEQUENCE_LEVEL)
GRID = [
    (layout, loss, reduction)
    for i, layout in enumerate(oracle.LAYOUTS)
    for j, loss in enumerate(LOSS_TYPES)
    for k, reduction in enumerate(REDUCTIONS)
    if loss in SHAPES or i == (j + k) % len(oracle.LAYOUTS)
]


@pytest.mark.parametrize("seed", range(30))
def test_the_oracles_gradient_is_the_slope_of_its_loss(seed):
    options = {"vocabulary": 5, "linear": seed % 3 == 0, "on_policy": seed % 4 == 1}
    case = draw(seed, "packed", LOSS_TYPES[seed % 11], REDUCTIONS[seed // 5 % 4], fixed={"z_coef": 0.01}, **options)
    loss, frozen, _, dlogits = oracle.policy_loss(case.logits, case.batch)
    gradients, random = case.gradients(dlogits), np.random.default_rng(seed)
    for name in ("rows", "weight", "bias"):
        if getattr(case, name) is None:
            continue
        step = random.normal(size=getattr(case, name).shape) * 1e-5
        ends = [replace(case, **{name: getattr(case, name) + sign * step}).logits for sign in (1, -1)]
        up, down = (oracle.policy_loss(z, case.batch, frozen=frozen)[0] for z in ends)
        assert up - down == pytest.approx(2 * (gradients[name] * step).sum(), rel=1e-6, abs=1e-12)
    assert isinstance(loss, float)


CLASSES = {
    "greedy": (ppg.Greedy(), "greedy"), "full": (ppg.FullPlanning(), "full"),
    "by name": ("lookahead:2", ("lookahead", 2)),
    "lookahead": (ppg.Lookahead(3), ("lookahead", 3)), "beyond": (ppg.Lookahead(99), "full"),
    "length": (ppg.Segment(3), ("segment", 3)),
    "ids": None, "mask": None, "any mask": None,
    "lags": (ppg.LagWeights([0.75, 0, 2.5]), ("lags", (0.75, 0.0, 2.5))),
}  # fmt: skip


def turns_of(seed, name, B=6, T=7):
    """Rewards with NaN beyond ragged turns, and the policy class for the package and for the oracle."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, T + 1, B)
    counts[:2] = T, 1
    rewards = oracle._float32(np.where(np.arange(T) < counts[:, None], rng.normal(size=(B, T)), np.nan))
    ids = np.cumsum(rng.random((B, T)) < 0.4, 1) * -3 + 5
    mask = rng.random((T, T)) < 0.5
    masks = {"ids": ("segment", ids), "mask": ("mask", np.triu(mask)), "any mask": ("mask", mask)}
    if CLASSES[name]:
        return rewards, counts, *CLASSES[name]
    kind, array = masks[name]
    return rewards, counts, (ppg.Segment if kind == "segment" else ppg.RewardMask)(torch.tensor(array)), (kind, array)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("gamma", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("name", CLASSES)
def test_partial_returns(name, gamma, backend):
    if name == "any mask" and gamma == 0:
        pytest.skip("gamma^(k - t) of an earlier reward has no value")
    rewards, counts, policy_class, plain = turns_of(len(name), name)
    actual = ppg.partial_returns(
        torch.tensor(rewards).float(), policy_class, gamma, torch.tensor(counts), backend=backend
    )
    assert actual.dtype == torch.float32
    close(actual, oracle.partial_returns(rewards, plain, gamma, counts), "returns", 1e-6)
    whole = ppg.partial_returns(
        torch.tensor(rewards).nan_to_num().float().T.contiguous().T, policy_class, gamma, backend=backend
    )
    close(whole, oracle.partial_returns(np.nan_to_num(rewards), plain, gamma), "returns of all turns", 1e-6)


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("seed", range(3))
def test_turn_advantages(seed, baseline, ragged):
    returns, counts, *_ = turns_of(seed, "greedy")
    groups = np.random.default_rng(seed).integers(-1, 2, 6) * 10**12
    returns[:, 3] = np.where(np.isnan(returns[:, 3]), np.nan, 0.1)  # all equal: a standard deviation of 0
    counts = counts if ragged else None
    returns = returns if ragged else np.nan_to_num(returns)
    turn_counts = None if counts is None else torch.tensor(counts)
    actual = ppg.turn_advantages(torch.tensor(returns).float(), torch.tensor(groups), baseline, turn_counts)
    close(actual, oracle.turn_advantages(oracle._float32(returns), groups, baseline, counts), "advantages", 1e-6)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(("seed", "layout"), list(enumerate(oracle.LAYOUTS)))
def test_token_logprobs(seed, layout, linear, dtype, backend):
    call = Call(draw(seed, layout, "reinforce", linear=linear), dtype, seed)
    case, spec, (g, h, b) = (
        call.case,
        call.options["spec"],
        np.random.default_rng(seed).normal(size=(3, call.case.batch.labels.size)),
    )
    function = ppg.linear_token_logprobs if linear else ppg.token_logprobs
    options = {n: call.options[n] for n in ("loss_mask", "bias") if n in call.options} | (
        {"chunk_rows": 4} if linear else {}
    )
    options |= {"temperature": spec.temperature, "logit_softcap": spec.logit_softcap, "backend": backend}
    rows = case.batch.labels, case.batch.active
    scale = np.asarray(case.batch.spec.temperature).reshape(-1), spec.logit_softcap
    logprobs, lse, entropy = function(*call.views, call.labels, lse=True, entropy=True, **options)
    relative = RELATIVE[dtype][1] if linear else 2e-5
    truth = oracle.token_logprobs(case.logits, *rows, *scale)
    close(logprobs, truth[0].reshape(call.shape), "logprobs", relative, 4.0)
    close(entropy, truth[1].reshape(call.shape), "entropy", relative, 4.0)
    sums = oracle.log_sum_exps(case.logits, case.batch.active, *scale)
    close(lse, sums.reshape(call.shape), "lse", relative, 4.0)
    assert logprobs.dtype == entropy.dtype == lse.dtype == torch.float32
    upstream = tuple(torch.tensor(v).float().reshape(call.shape) for v in (g, b, h))
    torch.autograd.backward((logprobs, lse, entropy), upstream)
    call.check_gradients(oracle.token_logprobs_gradient(case.logits, *rows, g, h, *scale, b), RELATIVE[dtype][linear])
    for leaf, _ in call.leaves.values():
        leaf.grad = None
    alone = function(*call.views, call.labels, **options)
    (alone * torch.tensor(g).float().reshape(call.shape)).sum().backward()
    assert linear or torch.equal(alone, logprobs)
    call.check_gradients(oracle.token_logprobs_gradient(case.logits, *rows, g, 0 * h, *scale), RELATIVE[dtype][linear])


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize(("layout", "loss_type", "reduction"), GRID)
def test_policy_loss(layout, loss_type, reduction, linear):
    seed = GRID.index((layout, loss_type, reduction))
    fixed = {"z_coef": 0.01 * (seed % 2)}
    for on_policy in (False, True):
        call = Call(draw(seed, layout, loss_type, reduction, fixed, linear=linear, on_policy=on_policy), seed=seed)
        call.check(call(**({"chunk_rows": 1 + seed % 9} if linear else {})), upstream_of(call.case, seed))


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize(("seed", "loss_type"), list(enumerate(LOSS_TYPES)))
def test_policy_loss_of_every_dtype_and_backend(seed, loss_type, dtype, linear, backend):
    layout, reduction, fixed = list(oracle.LAYOUTS)[seed % 4], REDUCTIONS[-(seed % 5) - 1], {"z_coef": 0.01}
    call = Call(draw(seed, layout, loss_type, reduction, fixed, linear=linear), dtype, seed)
    call.check(call(backend=backend), upstream_of(call.case, seed))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("loss_type", SHAPES)
@pytest.mark.parametrize("name", CLASSES)
def test_partial_policy_loss(name, loss_type, linear):
    seed = list(CLASSES).index(name) * 5 + LOSS_TYPES.index(loss_type)
    layout, baseline = ("padded", "packed")[seed % 2], BASELINES[seed % 4]
    call = Call(draw(seed, layout, loss_type, REDUCTIONS[seed % 5], linear=linear), seed=seed)
    batch, rng, gamma = call.case.batch, np.random.default_rng(seed), 0.9
    rewards, counts, policy_class, plain = turns_of(seed, name, B=4)
    groups = rng.integers(0, 2, 4)
    batch.turn = np.array([rng.integers(-1, counts[s]) for s in batch.sequence])
    batch.active &= batch.turn >= 0
    advantages = oracle.turn_advantages(oracle.partial_returns(rewards, plain, gamma, counts), groups, baseline, counts)
    batch.advantages = advantages[batch.sequence, batch.turn]
    options = {
        "gamma": gamma,
        "baseline": baseline,
        "group_ids": torch.tensor(groups),
        "turn_counts": torch.tensor(counts),
    }
    options |= {n: v for n, v in call.options.items() if n != "turn_ids"}
    function = ppg.linear_partial_policy_loss if linear else ppg.partial_policy_loss
    turn_ids = call.place(batch.turn, torch.int64)
    out = function(*call.views, call.labels, torch.tensor(rewards).float(), turn_ids, policy_class, **options)
    call.check(out, upstream_of(call.case, seed))

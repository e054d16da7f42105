"""Regression on turns against its pairs written out in float64, by three doors, and as a policy gradient."""

from itertools import combinations

import pytest
import torch

import ppg_fast as ppg

B, L, V, D, T = 5, 9, 13, 8, 3
TURNS = [
    [-1, 0, 0, -1, 1, 1, 2, 2, -1],
    [0, 0, 0, 1, -1, 1, -1, -1, -1],
    [-1, -1, 0, 1, 1, 2, 2, 2, 2],
    [0, -1, 1, 1, 1, -1, 2, -1, -1],
    [0, 0, 1, -1, -1, -1, -1, -1, -1],
]
COUNTS, GROUPS = [3, 2, 3, 3, 3], [7, 7, 7, 2, 2]  # the last dialogue's turn 2 has no token
ETA, GAMMA, WINDOW = 0.7, 0.9, 2


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(B, L, D, generator=g), torch.randn(V, D, generator=g)
    return {
        "hidden": hidden,
        "weight": weight,
        "bias": torch.randn(V, generator=g),
        "labels": torch.randint(V, (B, L), generator=g),
        "rewards": torch.rand(B, T, generator=g).masked_fill(
            torch.arange(T) >= torch.tensor(COUNTS)[:, None], torch.nan
        ),
        "turn_ids": torch.tensor(TURNS),
        "old_logprobs": -2 * torch.rand(B, L, generator=g),
        "loss_mask": torch.rand(B, L, generator=g) < 0.9,
        "values": torch.rand(B, T, generator=g),
    }


def options_of(case, **more):
    shared = {name: case[name] for name in ("old_logprobs", "loss_mask")}
    sizes = {"group_ids": torch.tensor(GROUPS), "turn_counts": torch.tensor(COUNTS)}
    return {"eta": ETA, "gamma": GAMMA, **shared, **sizes, **more}


def logprobs_of(case):
    """float64, with the operands that they are differentiated in."""
    inputs = [case[name].double().requires_grad_() for name in ("hidden", "weight", "bias")]
    z = inputs[0] @ inputs[1].T + inputs[2]
    return torch.log_softmax(z, -1).gather(-1, case["labels"][..., None])[..., 0], inputs


def written_out(l, case, *, group_ids=GROUPS, old=None, values=None):
    """The loss by its formula, one pair and one turn at a time."""
    old = case["old_logprobs"].double() if old is None else old
    x = {}
    for i in range(B):
        for t in range(COUNTS[i]):
            at = [n for n in range(L) if TURNS[i][n] == t and case["loss_mask"][i, n]]
            if at:
                window = range(t, min(t + WINDOW, COUNTS[i]))
                R = sum(GAMMA ** (k - t) * float(case["rewards"][i, k]) for k in window)
                R -= 0.0 if values is None else float(values[i, t])
                x[i, t] = sum(l[i, n] - old[i, n] for n in at) / ETA - R
    if group_ids is None:
        errors = [value**2 for value in x.values()]
    else:
        pairs = [(i, j, t) for i, j in combinations(range(B), 2) for t in range(T) if group_ids[i] == group_ids[j]]
        errors = [(x[i, t] - x[j, t]) ** 2 for i, j, t in pairs if (i, t) in x and (j, t) in x]
    return sum(errors) / len(errors), len(errors)


DOORS = ["logits", "hidden", "logprobs"]


def through(door, case, options, dtype=torch.float32, backend=None):
    """Output, and gradients in hidden, weight and bias."""
    inputs = [case[name].to(dtype).requires_grad_() for name in ("hidden", "weight", "bias")]
    turns = case["rewards"], case["turn_ids"], ppg.Lookahead(WINDOW)
    logits = torch.nn.functional.linear(*inputs)
    if door == "logits":
        out = ppg.turn_regression_loss(logits, case["labels"], *turns, backend=backend, **options)
    elif door == "hidden":
        head = {"bias": inputs[2], "chunk_rows": 7, "backend": backend}
        out = ppg.linear_turn_regression_loss(*inputs[:2], case["labels"], *turns, **head, **options)
    else:
        l = ppg.token_logprobs(logits, case["labels"], backend=backend)
        out = ppg.turn_regression_loss_from_logprobs(l, *turns, **options)
    return out, torch.autograd.grad(out.loss, inputs)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("door", DOORS)
def test_all_pairs_of_a_group(case, door, backend):
    l, inputs = logprobs_of(case)
    loss, errors = written_out(l, case)
    out, gradients = through(door, case, options_of(case), backend=backend)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-6)
    for ours, truth in zip(gradients, torch.autograd.grad(loss, inputs), strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-5)
    assert errors == out.metrics["squared_errors"] == 3 + 3 + 1 + 1 + 1


@pytest.mark.parametrize("more", ["alone", "values", "normalizer"])
def test_its_variants(case, more):
    l, inputs = logprobs_of(case)
    loss, errors = written_out(
        l, case, group_ids=None if more == "alone" else GROUPS, values=case["values"] if more == "values" else None
    )
    given = {"alone": {"group_ids": None}, "values": {"values": case["values"]}, "normalizer": {"normalizer": 4.0}}
    loss = loss * errors / 4 if more == "normalizer" else loss
    out, gradients = through("hidden", case, options_of(case, **given[more]))
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients[0].double(), torch.autograd.grad(loss, inputs[0])[0], rtol=1e-4, atol=1e-5)


def test_on_policy_it_is_a_policy_gradient_with_leave_one_out_advantages(case):
    """Where all of G rollouts reach all of T turns: 4 / (eta B T) times that of the summed loss."""
    case |= {"rewards": torch.rand(4, 2), "labels": case["labels"][:4], "hidden": case["hidden"][:4]}
    case["turn_ids"] = torch.tensor([[0, 0, -1, 1, 1, 1, -1, -1, -1]] * 4)
    groups = torch.tensor([1, 1, 5, 5])
    hidden = case["hidden"].requires_grad_()
    args = case["weight"], case["labels"], case["rewards"], case["turn_ids"], "full"
    ours = ppg.linear_turn_regression_loss(hidden, *args, eta=ETA, group_ids=groups).loss
    theirs = ppg.linear_partial_policy_loss(
        hidden, *args, group_ids=groups, baseline="leave_one_out", reduction="sum", normalizer=ETA * 4 * 2 / 4
    ).loss
    torch.testing.assert_close(*[torch.autograd.grad(loss, hidden)[0] for loss in (ours, theirs)])


def test_it_is_reinforce_with_the_residuals_as_advantages(case):
    """The gradient of the squared errors is that of REINFORCE whose advantages are -2 m / (eta C) times the centred
    residual, found without a gradient: so a step over micro-batches is exact."""
    from ppg_fast.reference import sum_of_turns, turn_residuals

    l, inputs = logprobs_of(case)
    loss, _ = written_out(l, case)
    active = (case["turn_ids"] >= 0) & case["loss_mask"]
    rows = torch.arange(B)[:, None].expand(B, L)
    at = active.flatten(), case["turn_ids"].flatten(), rows.flatten(), (B, T)
    sums = sum_of_turns((l.detach() - case["old_logprobs"]).flatten(), *at)
    returns = ppg.partial_returns(case["rewards"], ppg.Lookahead(WINDOW), GAMMA, torch.tensor(COUNTS))
    there = sum_of_turns(torch.ones(B * L), *at) > 0
    advantages = turn_residuals(sums, returns, there, torch.tensor(GROUPS), ETA).advantages(ETA)
    surrogate = -sum(advantages[i, TURNS[i][n]] * l[i, n] for i in range(B) for n in range(L) if active[i, n])
    for ours, truth in zip(
        torch.autograd.grad(surrogate, inputs, retain_graph=True), torch.autograd.grad(loss, inputs), strict=True
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-6, atol=1e-6)


def test_the_optimum_is_loss_zero_and_all_explained():
    """At l = old + eta (return + what the group shares), spread over the turn's tokens."""
    rewards, turn_ids = torch.rand(3, 1), torch.zeros(3, 4, dtype=torch.int64)
    old = -torch.rand(3, 4)
    l = (old + 0.5 * (rewards + 3.0) / 4).requires_grad_()
    args = rewards, turn_ids, "greedy"
    out = ppg.turn_regression_loss_from_logprobs(l, *args, eta=0.5, old_logprobs=old, group_ids=torch.zeros(3).long())
    assert out.loss < 1e-10
    assert out.metrics["explained"] == pytest.approx(1, abs=1e-6)
    assert torch.autograd.grad(out.loss, l)[0].abs().max() < 1e-5


def test_what_has_no_partner_has_no_gradient(case):
    options = options_of(case, group_ids=torch.arange(B))
    out, gradients = through("logprobs", case, options)
    assert out.loss == 0
    assert all((g == 0).all() for g in gradients)
    assert out.metrics["squared_errors"] == out.metrics["explained"] == 0


@pytest.mark.parametrize("door", DOORS)
def test_nan_of_an_active_row_stays_and_masked_rows_may_hold_anything(case, door):
    clean, expected = through(door, case, options_of(case))
    masked = ~case["loss_mask"] | (case["turn_ids"] < 0)
    dirty = options_of(case, old_logprobs=case["old_logprobs"].masked_fill(masked, torch.nan))
    out, gradients = through(door, case | {"hidden": case["hidden"].masked_fill(masked[..., None], 7e30)}, dirty)
    assert torch.equal(out.loss, clean.loss)
    torch.testing.assert_close(gradients[2], expected[2])
    old = case["old_logprobs"].clone()
    row = int((~masked[0]).nonzero()[0])
    old[0, row] = torch.nan
    out, gradients = through(door, case, options_of(case, old_logprobs=old))
    assert out.loss.isnan()
    same_turn = ~masked & (case["turn_ids"] == TURNS[0][row]) & (torch.tensor(GROUPS) == GROUPS[0])[:, None]
    assert torch.equal(gradients[0].isnan().all(-1), same_turn)


def test_packed_equals_padded_and_same_input_same_bits(case):
    options = options_of(case)
    l = -torch.rand(B, L)
    turns = case["rewards"], case["turn_ids"], "lookahead:2"
    padded = ppg.turn_regression_loss_from_logprobs(l, *turns, **options).loss
    flat = {name: options[name].flatten() for name in ("old_logprobs", "loss_mask")}
    packed = ppg.turn_regression_loss_from_logprobs(
        l.flatten(), turns[0], turns[1].flatten(), turns[2],
        **options | flat | {"cu_seqlens": torch.arange(0, B * L + 1, L, dtype=torch.int32)},
    ).loss  # fmt: skip
    assert torch.equal(padded, packed)
    assert torch.equal(padded, ppg.turn_regression_loss_from_logprobs(l, *turns, **options).loss)


def test_float16_keeps_its_gradient(case):
    """Small coefficients do not flush to zero: the loss scale is that of the log-probs."""
    options = options_of(case, normalizer=1e6)
    (_, half), (_, full) = (through("hidden", case, options, dtype) for dtype in (torch.float16, torch.float32))
    torch.testing.assert_close(half[0].float() * 1e6, full[0] * 1e6, rtol=0.05, atol=0.1)


def test_errors_name_rule_and_value(case):
    for more, match in (
        ({"eta": 0.0}, "eta must be .*got 0"),
        ({"group_ids": torch.zeros(2).long()}, r"group_ids must be \(5,\) integers"),
        ({"values": torch.zeros(B, 2)}, r"values must be \(B, T\) = \(5, 3\)"),
        ({"turn_counts": torch.tensor([3, 1, 3, 3, 3])}, "turn_ids must be -1"),
        ({"normalizer": 0.0}, "normalizer must be"),
    ):
        with pytest.raises(ValueError, match=match):
            through("logprobs", case, options_of(case, **more))

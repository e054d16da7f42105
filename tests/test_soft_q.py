"""Soft Q-learning against its formula written out in float64, by three doors, and against soft value iteration."""

from functools import cache
from itertools import product

import pytest
import torch

import ppg_fast as ppg

B, L, V, D, T = 4, 9, 13, 8, 3
TURNS = [
    [-1, 0, 0, -1, 1, 1, 2, 2, -1],
    [0, 0, 0, 1, -1, 1, -1, -1, -1],
    [-1, -1, 0, 1, 1, 2, 2, 2, 2],
    [0, -1, -1, -1, -1, -1, -1, -1, -1],
]
COUNTS, GAMMA = [3, 2, 3, 1], 0.9
PER_TOKEN = ("ref_logprobs", "ref_lse", "target_lse")


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(3)
    numbers = {name: torch.randn(B, L, generator=g) - 1 for name in PER_TOKEN}
    return numbers | {
        "hidden": torch.randn(B, L, D, generator=g),
        "weight": torch.randn(V, D, generator=g),
        "bias": torch.randn(V, generator=g),
        "labels": torch.randint(V, (B, L), generator=g),
        "rewards": torch.rand(B, T, generator=g).masked_fill(
            torch.arange(T) >= torch.tensor(COUNTS)[:, None], torch.nan
        ),
        "turn_ids": torch.tensor(TURNS),
        "offsets": torch.rand(T, generator=g),
        "loss_mask": torch.tensor([[True] * L, [False] + [True] * (L - 1), *[[True] * L] * 2]),
    }


def options_of(case, *names, **more):
    shared = {name: case[name] for name in ("ref_logprobs", "ref_lse", "loss_mask", *names)}
    return {"gamma": GAMMA, "turn_counts": torch.tensor(COUNTS), **shared, **more}


def ends_of(window, t, count):
    return min({"greedy": t + 1, "lookahead:2": t + 2, "segment:2": (t // 2 + 1) * 2, "full": count}[window], count)


def written_out(l, lse, case, options, window):
    """The loss by its formula, one turn at a time; residuals and values by (dialogue, turn)."""
    spec = options.get("spec", ppg.SoftQSpec())
    ref_l, ref_lse = case["ref_logprobs"].double(), case["ref_lse"].double()
    aim = options.get("target_lse", lse).detach().double()
    offsets = options.get("offsets", torch.zeros(T)).double() / spec.beta
    total, residuals, values, turns = 0.0, {}, {}, 0
    for i, count in enumerate(COUNTS):
        at = [[n for n in range(L) if TURNS[i][n] == t and case["loss_mask"][i, n]] for t in range(count)]
        ratios = [sum(l[i, n] - ref_l[i, n] for n in tokens) for tokens in at]
        for t in range(count):
            end, first = ends_of(window, t, count), at[t][0]
            y = case["rewards"][i, t].double() / spec.beta
            for k in range(t + 1, end):
                y = y + GAMMA ** (k - t) * (case["rewards"][i, k].double() / spec.beta - ratios[k].detach())
            if end < count:
                u = aim[i, at[end][0]] - ref_lse[i, at[end][0]]
                y = y + GAMMA ** (end - t) * (u + offsets[end])
            worth = offsets[t] + lse[i, first] - ref_lse[i, first]
            delta = worth + ratios[t] - y
            most = spec.max_residual
            big = most and abs(delta) > most
            total = total + (most * (abs(delta) - most / 2) if big else delta**2 / 2)
            total = total - spec.cql_coef * sum(l[i, n] for n in at[t])
            residuals[i, t], values[i, t], turns = delta, spec.beta * worth, turns + 1
    return total / options.get("normalizer", turns), residuals, values


def truth_of(case, options, window, scale=1.0):
    inputs = [case[name].double().requires_grad_() for name in ("hidden", "weight", "bias")]
    z = (inputs[0] @ inputs[1].T + inputs[2]) / scale
    l = torch.log_softmax(z, -1).gather(-1, case["labels"][..., None])[..., 0]
    loss, *tables = written_out(l, z.logsumexp(-1), case, options, window)
    return loss, torch.autograd.grad(loss, inputs), *tables


DOORS = ["logits", "hidden", "logprobs"]


def through(door, case, options, window, dtype=torch.float32, backend=None, **scale):
    """Output, and gradients in hidden, weight and bias."""
    inputs = [case[name].to(dtype).requires_grad_() for name in ("hidden", "weight", "bias")]
    turns = case["rewards"], case["turn_ids"], window
    logits = torch.nn.functional.linear(*inputs)
    if door == "logits":
        out = ppg.soft_q_loss(logits, case["labels"], *turns, backend=backend, **scale, **options)
    elif door == "hidden":
        head = {"bias": inputs[2], "chunk_rows": 7, "backend": backend, **scale}
        out = ppg.linear_soft_q_loss(*inputs[:2], case["labels"], *turns, **head, **options)
    else:
        l, lse = ppg.token_logprobs(logits, case["labels"], lse=True, backend=backend, **scale)
        out = ppg.soft_q_loss_from_logprobs(l, lse, *turns, **options)
    return out, torch.autograd.grad(out.loss, inputs)


VARIANTS = {
    "greedy": (("offsets",), {}),
    "lookahead:2": (("offsets", "target_lse"), {"spec": ppg.SoftQSpec(0.3, cql_coef=0.2)}),
    "segment:2": ((), {"spec": ppg.SoftQSpec(0.2, max_residual=4.0), "normalizer": 5.0}),
    "full": (("offsets",), {"spec": ppg.SoftQSpec(1.0)}),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("window", VARIANTS)
def test_its_formula(case, window, door, backend):
    names, more = VARIANTS[window]
    options = options_of(case, *names, **more)
    loss, truth, residuals, values = truth_of(case, options, window, 0.7)
    out, gradients = through(door, case, options, window, backend=backend, temperature=0.7)
    torch.testing.assert_close(out.loss.double(), loss, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, truth, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2e-5)
    for found, table in ((out.residuals, residuals), (out.values, values)):
        expected = torch.zeros(B, T)
        for at, value in table.items():
            expected[at] = float(value.detach())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert out.metrics["turns"] == len(residuals)
    read = (case["turn_ids"] >= 0) & case["loss_mask"]
    assert ((out.lse != 0) == read).all()
    assert ((out.logprobs != 0) == read).all()


def test_at_the_reference_it_is_the_partial_policy_gradient_and_one_value_term_a_turn(case):
    """delta = -return / beta: the advantage of the turn's tokens is return / beta, and the value learns the same."""
    hidden = case["hidden"].requires_grad_()
    head = hidden, case["weight"], case["labels"]
    l, lse = ppg.linear_token_logprobs(*head, lse=True)
    options = options_of(case, ref_logprobs=l.detach(), ref_lse=lse.detach(), spec=ppg.SoftQSpec(0.5))
    turns = case["rewards"], case["turn_ids"], "full"
    out = ppg.linear_soft_q_loss(*head, *turns, **options)
    (ours,) = torch.autograd.grad(out.loss, hidden)
    shared = {name: options[name] for name in ("gamma", "turn_counts", "loss_mask")}
    rewards = case["rewards"] / 0.5
    policy = ppg.linear_partial_policy_loss(
        *head, rewards, *turns[1:], **shared, reduction="sum", normalizer=float(sum(COUNTS))
    ).loss
    returns = ppg.partial_returns(rewards, "full", GAMMA, torch.tensor(COUNTS))
    value = 0.0
    for i, t in product(range(B), range(T)):
        if t < COUNTS[i]:
            first = next(n for n in range(L) if TURNS[i][n] == t and case["loss_mask"][i, n])
            value = value - returns[i, t] / sum(COUNTS) * lse[i, first]
    (theirs,) = torch.autograd.grad(policy + value, hidden)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_first_tokens_gradient_is_its_labels_logit_alone(case):
    logits = torch.randn(B, L, V, requires_grad=True)
    turns = case["rewards"], case["turn_ids"], "greedy"
    (d,) = torch.autograd.grad(ppg.soft_q_loss(logits, case["labels"], *turns, **options_of(case)).loss, logits)
    first, label = d[0, 1], int(case["labels"][0, 1])
    assert first[label] != 0
    assert not torch.cat([first[:label], first[label + 1 :]]).any()
    assert d[0, 2].count_nonzero() == V


def test_batch_splits_and_packing_give_the_same_numbers(case):
    l, lse = (-torch.rand(B, L)).requires_grad_(), torch.randn(B, L, requires_grad=True)
    options = options_of(case, "target_lse", "offsets", normalizer=9.0)

    def loss_of(rows):
        given = {n: options[n][rows] for n in ("ref_logprobs", "ref_lse", "target_lse", "loss_mask", "turn_counts")}
        turns = case["rewards"][rows], case["turn_ids"][rows], "lookahead:2"
        return ppg.soft_q_loss_from_logprobs(l[rows], lse[rows], *turns, **options | given).loss

    whole, halves = loss_of(slice(None)), [loss_of(slice(0, 1)), loss_of(slice(1, None))]
    torch.testing.assert_close(whole, sum(halves), rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(
        torch.autograd.grad(whole, (l, lse)), torch.autograd.grad(sum(halves), (l, lse)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    flat = {n: options[n].flatten() for n in ("ref_logprobs", "ref_lse", "target_lse", "loss_mask")}
    bounds = {"cu_seqlens": torch.arange(0, B * L + 1, L, dtype=torch.int32)}
    packed = ppg.soft_q_loss_from_logprobs(
        l.flatten(), lse.flatten(), case["rewards"], case["turn_ids"].flatten(), "lookahead:2",
        **options | flat | bounds,
    ).loss  # fmt: skip
    assert torch.equal(packed, whole)
    assert torch.equal(whole, loss_of(slice(None)))


def test_nan_of_an_active_row_stays_and_masked_rows_may_hold_anything(case):
    clean, expected = through("hidden", case, options_of(case), "lookahead:2")
    masked = ~case["loss_mask"] | (case["turn_ids"] < 0)
    dirty = options_of(
        case, **{name: case[name].masked_fill(masked, torch.nan) for name in ("ref_logprobs", "ref_lse")}
    )
    hidden = case["hidden"].masked_fill(masked[..., None], 7e30)
    out, gradients = through("hidden", case | {"hidden": hidden}, dirty, "lookahead:2")
    assert torch.equal(out.loss, clean.loss)
    torch.testing.assert_close(gradients[2], expected[2])
    ref = case["ref_logprobs"].clone()
    ref[0, 4] = torch.nan
    out, _ = through("hidden", case, options_of(case, ref_logprobs=ref), "lookahead:2")
    assert out.loss.isnan()
    turns = torch.zeros(B, T, dtype=torch.bool)
    turns[0, :2] = True  # turn 1, and turn 0 whose window holds it
    assert torch.equal(out.residuals.isnan(), turns)


def test_errors_name_rule_and_value(case):
    silent = case["loss_mask"].clone()
    silent[2, 3:5] = False
    for window, more, match in (
        ("full", {"ref_lse": None}, "soft Q-learning needs ref_lse .*got None"),
        ("full", {"ref_logprobs": None}, "soft Q-learning needs ref_logprobs"),
        (ppg.RewardMask(torch.ones(T, T).bool()), {}, "must be a window of turns .*got 'mask'"),
        ("lags:1,1", {}, "must be a window of turns .*got 'lags:1,1'"),
        ("full", {"offsets": torch.zeros(2)}, r"offsets must be \(T,\) = \(3,\)"),
        ("full", {"offsets": torch.full((T,), torch.inf)}, "offsets must be finite"),
        ("greedy", {"loss_mask": silent}, "must have an active token.*got 'none in turn 1 of dialogue 2'"),
        ("full", {"turn_counts": torch.tensor([3, 1, 3, 1])}, "turn_ids must be -1"),
        ("full", {"turn_counts": None}, "rewards must be finite, got nan for dialogue 1, turn 2"),
        ("full", {"spec": ppg.PolicyLossSpec()}, "spec must be a SoftQSpec"),
    ):
        with pytest.raises(ValueError, match=match):
            through("logprobs", case, options_of(case, **more), window)
    for given, match in (
        ({"beta": 0.0}, "beta must be .*> 0.*got 0"),
        ({"cql_coef": -1.0}, "cql_coef must be"),
        ({"max_residual": torch.nan}, "max_residual must be"),
        ({"ema": 1.0}, "ema must be < 1"),
    ):
        with pytest.raises(ValueError, match=match):
            ppg.SoftQSpec(**given)


def test_a_reward_that_beta_makes_too_large_is_named_as_it_was_given(case):
    rewards = case["rewards"].clone()
    rewards[1, 0] = -1e38
    with pytest.raises(
        ValueError, match=r"at most 3.4e\+37 .* beta 0.1 divides .* got -1e\+38 for dialogue 1, turn 0$"
    ):
        through("logits", {**case, "rewards": rewards}, options_of(case), "lookahead:2")
    rewards[1] = -1e38  # the second turn is not there
    through("logits", {**case, "rewards": rewards}, options_of(case, spec=ppg.SoftQSpec(1.0)), "greedy")


# ---- a tree of dialogues: 3 turns of 2 tokens from a vocabulary of 2, a reply to each --------------------------------
BETA, STATES = 0.5, 8
TOKENS = torch.tensor(list(product(range(2), repeat=9))).view(-1, 3, 3)  # (512, turn, (token, token, reply))
PLACE = 8 ** torch.arange(2, -1, -1)


@cache
def tree(replies):
    """Logits of the reference, rewards (512, 3), and the state that each turn of each dialogue begins in; with one
    reply the other half of the dialogues are copies."""
    g = torch.Generator().manual_seed(0)
    tokens = TOKENS.clone()
    step = (tokens * torch.tensor([4, 2, 1])).sum(-1)
    if replies == 1:
        step = step // 2 * 2
    offset = torch.tensor([0, 1, 9])  # of the 73 states
    states = torch.stack([torch.zeros(512).long(), step[:, 0], step[:, 0] * 8 + step[:, 1]], 1) + offset
    reward = torch.randn(73, 8, generator=g, dtype=torch.float64) * 1.5
    ref = torch.randn(73, 6, generator=g, dtype=torch.float64)  # 2 logits of the first token, 2 x 2 of the second
    return ref, reward[states, step], states, reward


def of_dialogues(table, states):
    """Log-probs and log-sum-exps of the two tokens of each turn, (512, 3, 2)."""
    first, second = TOKENS[..., 0], TOKENS[..., 1]
    at = table[states]  # (512, 3, 6)
    later = at[..., 2:].unflatten(-1, (2, 2)).gather(-2, first[..., None, None].expand(-1, -1, 1, 2)).squeeze(-2)
    z = torch.stack([at[..., :2], later], 2)
    lse = z.logsumexp(-1)
    return z.gather(-1, torch.stack([first, second], 2)[..., None]).squeeze(-1) - lse, lse


def policy_of(table):
    """Log-probs of the four actions of each of the 73 states."""
    return (
        torch.log_softmax(table[:, :2], -1)[:, :, None] + torch.log_softmax(table[:, 2:].view(-1, 2, 2), -1)
    ).flatten(1)


def soft_value_iteration(replies):
    ref, _, _, reward = tree(replies)
    prior, value, found = policy_of(ref), torch.zeros(512, dtype=torch.float64), torch.zeros(73, 4, dtype=torch.float64)
    for start, states in ((9, 64), (1, 8), (0, 1)):
        q = (reward[start : start + states].flatten() + value).view(states, 4, 2)
        q = q[..., 0] if replies == 1 else q.mean(-1)
        z = prior[start : start + states] + q / BETA
        value, found[start : start + states] = BETA * z.logsumexp(-1), torch.log_softmax(z, -1)
    return found.exp(), value


def descend(loss_of, steps=400, rate=0.7):
    """Gradient descent from the reference; each state's step is by the share of the dialogues that pass it."""
    table = tree(2)[0].clone().requires_grad_()
    share = tree(2)[2].flatten().bincount(minlength=73)[:, None] / 512
    for _ in range(steps):
        (d,) = torch.autograd.grad(loss_of(table), table)
        table.data -= rate / share * d
    return policy_of(table.detach()).exp()


def visited(replies):
    return tree(replies)[2].flatten().bincount(minlength=73) > 0


def full_gradient_loss(table, replies, K):
    """The same residuals, independently, without a stop of the gradient at the target."""
    ref, rewards, states, _ = tree(replies)
    (l, lse), (ref_l, ref_lse) = of_dialogues(table, states), of_dialogues(ref, states)
    rho, u = rewards / BETA - (l - ref_l).sum(-1), torch.nn.functional.pad((lse - ref_lse)[..., 0], (0, 1))
    left = [u[:, t] - rho[:, t : min(t + K, 3)].sum(1) - u[:, min(t + K, 3)] for t in range(3)]
    return sum((d**2).sum() for d in left) / 2 / 512


@pytest.mark.parametrize("window", ["greedy", "lookahead:2", "full"])
def test_the_fixed_point_is_soft_value_iteration_with_random_replies(window):
    ref, rewards, states, _ = tree(2)
    known = {"ref_logprobs": of_dialogues(ref, states)[0], "ref_lse": of_dialogues(ref, states)[1]}
    known = {name: value.flatten(1).float() for name, value in known.items()}
    ids = torch.tensor([[0, 0, 1, 1, 2, 2]]).expand(512, -1)
    options = {**known, "spec": ppg.SoftQSpec(BETA), "normalizer": 512.0, "offsets": torch.tensor([0.3, -0.2, 0.1])}
    options["offsets"] = None if window == "full" else options["offsets"]

    def loss_of(table):
        l, lse = (values.flatten(1) for values in of_dialogues(table, states))
        return ppg.soft_q_loss_from_logprobs(l, lse, rewards.float(), ids, window, **options).loss

    found, (best, _) = descend(loss_of), soft_value_iteration(2)
    assert (found - best).abs().max() < 1e-6


def test_a_gradient_through_the_target_is_biased_by_random_replies_alone():
    for replies, check in ((2, lambda off: off > 0.05), (1, lambda off: off < 1e-4)):
        table = tree(replies)[0].clone().requires_grad_()
        minimum = torch.optim.LBFGS([table], max_iter=400, tolerance_grad=1e-12, tolerance_change=0.0)

        def closure(table=table, replies=replies, minimum=minimum):
            minimum.zero_grad()
            loss = full_gradient_loss(table, replies, 2)
            loss.backward()
            return loss

        minimum.step(closure)
        found = policy_of(table.detach()).exp()
        off = (found - soft_value_iteration(replies)[0])[visited(replies)].abs().max()
        assert check(off), (replies, off)

"""Losses of a token that need its whole sequence or turn: ratios by sum, gmpo, vespo, dropped sequences. Against their
formulas in float64."""

import math

import pytest
import torch

import ppg_fast as ppg

B, L, V, D = 4, 8, 11, 6
TURN_IDS = torch.tensor([[0, 0, 0, 1, 1, -1, 2, 2]] * B)
MASK = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1], [1, 1, 1, 1, 1, 0, 1, 1], [0] * 8, [1, 0, 0, 1, 0, 0, 0, 1]])


@pytest.fixture
def case():
    g = torch.Generator().manual_seed(11)
    logits = torch.randn(B, L, V, generator=g, dtype=torch.float64)
    labels = torch.randint(V, (B, L), generator=g)
    l = torch.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]
    gaps = 0.5 * torch.randn(B, L, generator=g)
    return logits, labels, torch.randn(B, generator=g), {"old_logprobs": (l - gaps).float(), "loss_mask": MASK}


def logprobs_of(logits, labels):
    return torch.log_softmax(logits, -1).gather(-1, labels[..., None])[..., 0]


def groups_of(by_turn):
    """Active tokens (row, columns) of each sequence or turn that has one."""
    names = sorted({(b, int(TURN_IDS[b, n]) if by_turn else 0) for b in range(B) for n in range(L) if MASK[b, n]})
    of = lambda b, t: [n for n in range(L) if MASK[b, n] and (not by_turn or TURN_IDS[b, n] == t)]  # noqa: E731
    return [(b, of(b, t)) for b, t in names]


def clipped_loss(ratio, advantage, low=0.2, high=0.2):
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def check(loss, expected, case, gradient_only=False, **options):
    """``loss(l)`` in float64 against `policy_loss` from logits and log-probs."""
    logits, labels, advantages, shared = case
    logits.requires_grad_()
    truth = expected(logprobs_of(logits, labels))
    (wanted,) = torch.autograd.grad(truth, logits)
    narrow = logits.detach().float().requires_grad_()
    args = {**shared, "turn_ids": TURN_IDS, "spec": loss, **options}
    for out in (
        ppg.policy_loss(narrow, labels, advantages, **args),
        ppg.policy_loss_from_logprobs(logprobs_of(narrow, labels), advantages, **args),
        ppg.linear_policy_loss(narrow, torch.eye(V), labels, advantages, chunk_rows=5, **args),
    ):
        if not gradient_only:
            torch.testing.assert_close(out.loss.double(), truth, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(torch.autograd.grad(out.loss, narrow)[0].double(), wanted, rtol=1e-4, atol=1e-6)
    assert wanted.abs().max() > 1e-3
    return out


@pytest.mark.parametrize("by_turn", [False, True])
def test_the_ratio_by_sum_is_that_of_the_whole(case, by_turn):
    """Summed over tokens and divided by the number of turns (sequences), the gradient is that of the mean over them of
    the clipped loss of one action each."""
    old, advantages, groups = case[3]["old_logprobs"].double(), case[2].double(), groups_of(by_turn)

    def expected(l):
        ratios = [torch.exp((l - old)[b, at].sum()) for b, at in groups]
        each = [clipped_loss(r, advantages[b]) for r, (b, _) in zip(ratios, groups, strict=True)]
        return sum(each) / len(groups)

    spec = ppg.PolicyLossSpec("gspo_turn" if by_turn else "gspo", ratio_reduction="sum")
    out = check(spec, expected, case, True, reduction="sum", normalizer=float(len(groups)))
    values = ppg.policy_loss_from_logprobs(
        logprobs_of(*case[:2]).float(), case[2], turn_ids=TURN_IDS, spec=spec, reduction="none", **case[3]
    ).loss
    for b, at in groups:
        own = clipped_loss(torch.exp((logprobs_of(*case[:2]) - old)[b, at].sum()), advantages[b])
        torch.testing.assert_close(values[b, at].double(), own.expand(len(at)), rtol=1e-5, atol=1e-6)
    assert not by_turn or out.metrics["clip_fraction"] > 0


def test_a_sum_of_log_ratios_is_bounded():
    l = torch.zeros(1, 30, requires_grad=True)
    spec = ppg.PolicyLossSpec("gspo", ratio_reduction="sum", max_log_ratio=10.0)
    options = {"old_logprobs": -torch.ones(1, 30), "spec": spec, "reduction": "sequence_mean"}
    loss = ppg.policy_loss_from_logprobs(l, -torch.ones(1), **options).loss
    assert loss.item() == pytest.approx(math.exp(10.0))
    assert torch.equal(torch.autograd.grad(loss, l)[0], torch.zeros(1, 30))


@pytest.mark.parametrize("by_turn", [False, True])
def test_gmpo_is_the_geometric_mean_of_clipped_ratios(case, by_turn):
    """With one advantage a sequence and `sequence_mean`, verl's geo_mean: the mean over sequences of -A r."""
    old, advantages, groups = case[3]["old_logprobs"].double(), case[2].double(), groups_of(by_turn)
    low, high = 0.25, 0.35

    def kept(x, A):
        return A.sign() * torch.minimum(A.sign() * x, A.sign() * x.clamp(-low, high))

    def expected(l):
        each = [(-advantages[b] * torch.exp(kept((l - old)[b, at], advantages[b]).mean()), len(at)) for b, at in groups]
        return sum(loss * n for loss, n in each) / sum(n for _, n in each)

    def of_sequences(l):
        return sum(-advantages[b] * torch.exp(kept((l - old)[b, at], advantages[b]).mean()) for b, at in groups) / 3

    spec = ppg.PolicyLossSpec("gmpo_turn" if by_turn else "gmpo", clip_low=low, clip_high=high)
    out = check(spec, expected, case, reduction="token_mean")
    assert out.metrics["clip_fraction_low"] > 0
    assert out.metrics["clip_fraction_high"] > 0
    if not by_turn:
        check(spec, of_sequences, case, reduction="sequence_mean")


@pytest.mark.parametrize("with_rollout", [False, True])
def test_vespo_weighs_a_sequence_by_its_whole_ratio(case, with_rollout):
    """phi = exp(lambda (1 - w) + k log w), detached; the sampler's truncated weights enter w and nowhere else."""
    advantages, old = case[2], case[3]["old_logprobs"].double()
    rollout = old + 0.3 * torch.sin(torch.arange(B * L)).view(B, L).double()
    numbers = {"k_positive": 1.5, "lambda_positive": 2.5, "k_negative": 2.0, "lambda_negative": 1.0}

    def expected(l):
        total = 0.0
        for b, at in groups_of(False):
            log_w = (l - old)[b, at].detach().sum()
            if with_rollout:
                log_w = log_w + torch.exp(old - rollout)[b, at].clamp(max=1.2).log().sum()
            k, scale = (1.5, 2.5) if advantages[b] >= 0 else (2.0, 1.0)
            phi = torch.exp(scale * (1 - log_w.exp()) + k * log_w)
            total = total - phi * advantages[b] * l[b, at].sum()
        return total / float(MASK.sum())

    spec = ppg.PolicyLossSpec("vespo", importance_cap=1.2 if with_rollout else 0.0, **numbers)
    check(spec, expected, case, **({"rollout_logprobs": rollout.float()} if with_rollout else {}))


@pytest.mark.parametrize("loss_type", ["reinforce", "ppo", "gspo_turn", "gmpo", "vespo"])
def test_sequences_far_from_the_policy_that_acted_are_dropped_where_they_were_bad(case, loss_type):
    """TRL's and slime's mask: the surrogate alone, on the active tokens of a sequence whose mean b - l is above."""
    logits, labels, _, shared = case
    l = logprobs_of(logits, labels).float()
    means = torch.tensor([0.3, 0.3, 0.9, 0.05])  # the last but one has no active token
    rollout = l + means[:, None] + 0.1 * torch.tensor([1.0, -1.0] * 4)
    rollout = torch.where(
        MASK == 1,
        rollout - ((rollout - l) * MASK).sum(1, True) / MASK.sum(1, True).clamp(min=1) + means[:, None],
        torch.nan,
    )
    advantages = torch.tensor([-1.0, 1.0, -1.0, -1.0])
    options = {
        **shared,
        "turn_ids": TURN_IDS,
        "reduction": "none",
        "ref_logprobs": l - 0.2,
        "rollout_logprobs": rollout,
    }
    spec = {"loss_type": loss_type, "kl_coef": 0.1}
    plain = ppg.policy_loss_from_logprobs(l, advantages, spec=ppg.PolicyLossSpec(**spec), **options)
    only_kl = ppg.policy_loss_from_logprobs(l, 0 * advantages, spec=ppg.PolicyLossSpec(**spec), **options)
    ours = ppg.policy_loss_from_logprobs(l, advantages, spec=ppg.PolicyLossSpec(**spec, opsm_delta=0.2), **options)
    assert torch.equal(ours.loss[0], only_kl.loss[0])
    assert torch.equal(ours.loss[1:], plain.loss[1:])
    assert not torch.equal(plain.loss[0], only_kl.loss[0])
    assert ours.metrics["off_policy_dropped"] == pytest.approx(6 / float(MASK.sum()))
    # without rollout log-probs the old ones are compared
    options["rollout_logprobs"], options["old_logprobs"] = None, rollout
    spec = ppg.PolicyLossSpec(loss_type, opsm_delta=0.2)
    ours = ppg.policy_loss_from_logprobs(l, advantages, spec=spec, **options)
    assert torch.equal(ours.loss[0], torch.zeros(L))
    assert (ours.loss[3] != 0).any()


@pytest.mark.parametrize("door", ["logits", "hidden"])
def test_dropped_sequences_have_no_gradient_and_cost_no_others(case, door):
    logits, labels, _, shared = case
    z = logits.float().requires_grad_()
    spec = ppg.PolicyLossSpec("ppo", opsm_delta=0.05)
    # a token of advantage zero is still evidence
    advantages = torch.tensor([[-1.0] * 6 + [0.0, 0.0], [1.0] * 8, [1.0] * 8, [-1.0] * 8])
    old = logprobs_of(logits, labels).float() + torch.tensor([[0.0] * 6 + [0.6, 0.6], [0.6] * 8, [0.6] * 8, [0.0] * 8])
    options = {**shared, "old_logprobs": old, "spec": spec, "reduction": "sum"}
    for skip in (False, True):
        call = ppg.policy_loss if door == "logits" else ppg.linear_policy_loss
        head = (z,) if door == "logits" else (z, torch.eye(V))
        gradient = torch.autograd.grad(call(*head, labels, advantages, skip_zero_advantages=skip, **options).loss, z)[0]
        assert (gradient[0] == 0).all()
        assert (gradient[1][MASK[1] == 1] != 0).any()
        assert (gradient[3][MASK[3] == 1] != 0).any()


@pytest.mark.parametrize(("nan_rollout", "kept"), [("one", True), ("drop", True), ("keep", False)])
def test_a_rollout_logprob_that_is_not_known(case, nan_rollout, kept):
    """ "one" and "drop": no evidence; "keep": NaN, on the tokens that it could have dropped."""
    logits, labels, _, shared = case
    l = logprobs_of(logits, labels).float().requires_grad_()
    rollout = l.detach() + 0.01
    rollout[0, 1] = torch.nan
    spec = ppg.PolicyLossSpec("ppo", opsm_delta=0.05, nan_rollout=nan_rollout)
    options = {**shared, "rollout_logprobs": rollout, "spec": spec, "reduction": "none"}
    loss = ppg.policy_loss_from_logprobs(l, torch.tensor([-1.0, -1.0, -1.0, 1.0]), **options).loss
    gradient = torch.autograd.grad(loss.sum(), l)[0]
    active = MASK[0] == 1
    assert loss[0][active].isnan().all() != kept
    assert gradient[0][active].isnan().all() != kept
    assert not loss[1:].isnan().any()


REFUSED = {
    'ratio_reduction must be "mean" for loss_type ppo': {"loss_type": "ppo", "ratio_reduction": "sum"},
    'ratio_reduction must be "mean" for loss_type gmpo': {"loss_type": "gmpo", "ratio_reduction": "sum"},
    "ratio_reduction must be one of": {"loss_type": "gspo", "ratio_reduction": "max"},
    "opsm_delta must be": {"opsm_delta": -0.1},
    "dual_clip must be left out": {"loss_type": "gmpo", "dual_clip": 3.0},
}


@pytest.mark.parametrize("message", REFUSED)
def test_numbers_that_do_not_fit_are_refused(message):
    with pytest.raises(ValueError, match=message):
        ppg.PolicyLossSpec(**REFUSED[message])


def test_what_needs_a_turn_says_so(case):
    logits, labels, advantages, shared = case
    with pytest.raises(ValueError, match='loss_type "gmpo_turn" needs turn_ids'):
        ppg.policy_loss(logits.float(), labels, advantages, **shared, spec=ppg.PolicyLossSpec("gmpo_turn"))

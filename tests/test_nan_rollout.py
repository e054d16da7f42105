"""nan_rollout: what a NaN among the rollout log-probs of active tokens is, in every loss and on every backend."""

import math
from typing import Any

import pytest
import torch
from contract_case import by_turns
from torch import Tensor

import ppg_fast as ppg
from ppg_fast.losses import LOSS_TYPES
from ppg_fast.spec import NAN_ROLLOUT, PolicyLossSpec

V, N = 5, 6
MASKED, FORCED = 4, (1, 3)  # rows: one that takes no part and holds NaN as well; those without a rollout log-prob
A = [1.5, -0.5, 0.0, 2.0, 1.0, -1.0]


def numbers(device: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits (N, V) and what each token brings along."""
    draw = torch.Generator().manual_seed(3)
    logits, labels = torch.randn(N, V, generator=draw), torch.randint(V, (N,), generator=draw)
    l = torch.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0]
    rollout = l - 0.1 * torch.arange(1, N + 1)
    rollout[[*FORCED, MASKED]] = math.nan
    mask = torch.ones(N, dtype=torch.bool)
    mask[MASKED] = False
    columns = {
        "labels": labels,
        "advantages": torch.tensor(A),
        "loss_mask": mask,
        "old_logprobs": l - torch.tensor([0.05, -0.05, 0.02, 0.04, 0.3, -0.04]),
        "ref_logprobs": l + 0.2,
        "rollout_logprobs": rollout,
        "turn_ids": torch.tensor([0, 0, 0, 1, 1, 1]),
    }
    return logits.to(device), {name: column.to(device) for name, column in columns.items()}


def loss_of(
    way: str, backend: str, device: str, spec: PolicyLossSpec, changed: dict[str, Any] | None = None, **how: Any
):
    """-> output of the loss, gradient in the logits."""
    logits, columns = numbers(device)
    columns |= changed or {}
    logits.requires_grad_()
    labels, advantages = columns.pop("labels"), columns.pop("advantages")
    if not spec.loss_type.endswith("_turn"):
        columns.pop("turn_ids")
    if way == "logits":
        out = ppg.policy_loss(logits, labels, advantages, **columns, spec=spec, backend=backend, **how)
    elif way == "hidden":
        eye = torch.eye(V, device=device)
        out = ppg.linear_policy_loss(logits, eye, labels, advantages, **columns, spec=spec, backend=backend, **how)
    else:
        l = torch.log_softmax(logits, -1).gather(-1, labels[:, None])[:, 0]
        out = ppg.policy_loss_from_logprobs(l, advantages, **columns, spec=spec, **how)
    return out, torch.autograd.grad(out.loss.sum(), logits)[0]


WAYS = ("logits", "hidden", "logprobs")


def same(found, expected) -> None:
    (out, gradient), (wanted, of) = found, expected
    assert out.loss.isfinite().all()
    torch.testing.assert_close(out.loss, wanted.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, of, rtol=1e-5, atol=1e-6)
    for name, value in wanted.metrics.items():
        torch.testing.assert_close(out.metrics[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_one_is_a_weight_of_one(backend, device, way, loss_type):
    """As a rollout log-prob equal to the old one, with which min(exp(0), cap) is 1."""
    spec = PolicyLossSpec(loss_type, importance_cap=1.3, kl_coef=0.1, nan_rollout="one")
    _, columns = numbers(device)
    rollout, old = columns["rollout_logprobs"], columns["old_logprobs"]
    known = {"rollout_logprobs": torch.where(rollout.isnan(), old, rollout)}
    same(loss_of(way, backend, device, spec), loss_of(way, backend, device, spec, known))


def test_one_is_a_weight_of_one_under_a_cap_below_one_and_on_policy(backend, device):
    spec = PolicyLossSpec(importance_cap=0.8, nan_rollout="one")
    out, _ = loss_of("logits", backend, device, spec, {"old_logprobs": None}, reduction="none")
    l, A_ = out.logprobs.detach(), torch.tensor(A, device=device)
    weight = torch.full((N,), 0.8, device=device)  # exp(l - rollout) > 1 everywhere
    weight[list(FORCED)] = 1.0
    expected = (-A_ * l * weight).index_fill(0, torch.tensor([MASKED], device=device), 0.0)
    torch.testing.assert_close(out.loss.detach(), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_drop_masks_the_token(backend, device, way, loss_type):
    spec = PolicyLossSpec(loss_type, importance_cap=1.3, kl_coef=0.1, nan_rollout="drop")
    mask = torch.ones(N, dtype=torch.bool, device=device)
    mask[[*FORCED, MASKED]] = False
    reductions = ["token_mean", "sequence_mean", "sum"]
    for reduction in by_turns(reductions, LOSS_TYPES.index(loss_type) + WAYS.index(way), 3, backend, device):
        found = loss_of(way, backend, device, spec, reduction=reduction)
        same(found, loss_of(way, backend, device, spec, {"loss_mask": mask}, reduction=reduction))
        assert (found[1][list(FORCED)] == 0).all()
        assert found[0].metrics["active_tokens"] == 3


@pytest.mark.parametrize("way", WAYS)
def test_drop_leaves_a_given_normalizer(backend, device, way):
    spec = PolicyLossSpec(importance_cap=1.3, nan_rollout="drop")
    of_sum, of_ten = (loss_of(way, backend, device, spec, reduction="sum", normalizer=n)[0].loss for n in (None, 10.0))
    torch.testing.assert_close(of_sum / 10, of_ten)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss_type", ["ppo", "gspo"])
def test_error_counts_and_names_the_first(backend, device, way, loss_type):
    spec = PolicyLossSpec(loss_type, importance_cap=1.3, nan_rollout="error")
    with pytest.raises(ValueError, match=r"nan_rollout=.*got 2 NaN of 5 active tokens, the first at row 1$"):
        loss_of(way, backend, device, spec)
    _, columns = numbers(device)
    known = columns["rollout_logprobs"].nan_to_num(-1.0)
    known[MASKED] = math.nan  # of a token that takes no part
    out, _ = loss_of(way, backend, device, spec, {"rollout_logprobs": known})
    assert out.loss.isfinite()


@pytest.mark.parametrize("way", WAYS)
def test_the_default_keeps_it(backend, device, way):
    out, gradient = loss_of(way, backend, device, PolicyLossSpec(importance_cap=1.3), reduction="none")
    assert out.loss.isnan().nonzero().flatten().tolist() == list(FORCED)
    assert gradient.isnan().any(1).nonzero().flatten().tolist() == list(FORCED)


@pytest.mark.parametrize("rule", ["one", "drop", "error"])
def test_partial_policy_loss_knows_context(backend, device, rule):
    """A NaN at a context token (turn id -1) is nobody's business."""
    logits, columns = numbers(device)
    rollout = columns["rollout_logprobs"].nan_to_num(-1.0)
    rollout[2] = math.nan
    spec = PolicyLossSpec(importance_cap=1.3, nan_rollout=rule)
    given = torch.tensor([[0.5, 1.0]], device=device), torch.tensor([0, 0, -1, 1, 1, 1], device=device), "greedy"
    options = {"rollout_logprobs": rollout, "old_logprobs": columns["old_logprobs"], "spec": spec, "backend": backend}
    losses = [ppg.partial_policy_loss(logits, columns["labels"], *given, **options).loss]
    losses += [
        ppg.linear_partial_policy_loss(logits, torch.eye(V, device=device), columns["labels"], *given, **options).loss
    ]
    options["rollout_logprobs"] = rollout.nan_to_num(-2.0)
    expected = ppg.partial_policy_loss(logits, columns["labels"], *given, **options).loss
    for loss in losses:
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    rollout[3] = math.nan
    if rule == "error":
        with pytest.raises(ValueError, match="got 1 NaN of 5 active tokens, the first at row 3"):
            ppg.partial_policy_loss(logits, columns["labels"], *given, **{**options, "rollout_logprobs": rollout})


@pytest.mark.parametrize("rule", NAN_ROLLOUT)
def test_under_torch_compile(rule):
    spec = PolicyLossSpec("ppo", importance_cap=1.3, nan_rollout=rule)

    def loss(logits, labels, advantages, loss_mask, old, rollout):
        options = {"loss_mask": loss_mask, "old_logprobs": old, "rollout_logprobs": rollout, "spec": spec}
        return ppg.policy_loss(logits, labels, advantages, **options).loss

    logits, c = numbers("cpu")
    args = logits, *(c[n] for n in ("labels", "advantages", "loss_mask", "old_logprobs", "rollout_logprobs"))
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    if rule == "error":
        with pytest.raises(ValueError, match="got 2 NaN of 5 active tokens, the first at row 1"):
            compiled(*args)
    else:
        torch.testing.assert_close(compiled(*args), loss(*args), equal_nan=True)


def test_no_other_word():
    with pytest.raises(ValueError, match="nan_rollout must be one of keep, error, one, drop, got 'ignore'"):
        PolicyLossSpec(nan_rollout="ignore")

"""A teacher beside a policy loss: the sum of the two in one pass, whole for tracers."""

import pytest
import torch
from distillation_case import N, inputs, teacher_of

import ppg_fast as ppg
from ppg_fast import backends, ops
from ppg_fast.contract import Chunks, PerRow, RowArguments, TeacherRows


@pytest.fixture(params=("reference", "cpu"))
def backend(request):
    """What is around the row kernel is the same on every backend."""
    if request.param != "reference" and (reason := backends.why_not(request.param)):
        pytest.skip(reason)
    return request.param


def policy_arguments(labels):
    advantages = torch.randn(N).where(torch.arange(N) % 4 != 2, torch.tensor(0.0)).to(labels.device)
    old = -5 + torch.randn(N).to(labels.device)
    return advantages, {"old_logprobs": old, "spec": ppg.PolicyLossSpec("ppo", temperature=0.8, logit_softcap=9.0)}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("case", ["forward_kl", "jsd", "top_k", "gspo", "none"])
def test_beside_a_policy_loss_it_is_the_sum_of_the_two(backend, device, case, skip):
    """A third of the tokens have no teacher, a quarter no advantage."""
    student, taught, labels = inputs(device=device)
    advantages, options = policy_arguments(labels)
    weights = torch.rand(N, device=device).where(
        torch.arange(N, device=device) % 3 != 1, torch.tensor(0.0, device=device)
    )
    teacher = teacher_of(taught, "jsd" if case == "jsd" else "forward_kl", weights=weights, coef=0.4,
                         top_k=3 if case == "top_k" else 0)  # fmt: skip
    if case == "gspo":
        options["spec"] = ppg.PolicyLossSpec("gspo", temperature=0.8, logit_softcap=9.0)
    scale = {"temperature": 0.8, "logit_softcap": 9.0}
    common = {"reduction": "none" if case == "none" else "token_mean", "backend": backend, "chunk_rows": 5}
    leaves = [t.detach().requires_grad_() for t in student]
    hidden, weight, bias = leaves
    skipped = {"skip_zero_advantages": skip, **options, **common}
    both = ppg.linear_policy_loss(hidden, weight, labels, advantages, bias=bias, teacher=teacher, **skipped)
    alone = ppg.linear_policy_loss(hidden, weight, labels, advantages, bias=bias, **skipped)
    apart = ppg.linear_distillation_loss(hidden, weight, labels, teacher, bias=bias, **scale, **common)
    torch.testing.assert_close(both.loss, alone.loss + apart.loss)
    torch.testing.assert_close(both.metrics["divergences"], apart.divergences, rtol=0, atol=0)
    read = torch.where(both.logprobs != 0, alone.logprobs, 0.0)
    torch.testing.assert_close(torch.where(alone.logprobs != 0, both.logprobs, 0.0), read, rtol=0, atol=0)
    upstream = torch.randn(both.loss.shape, device=device)
    actual = torch.autograd.grad(both.loss, leaves, upstream)
    expected = torch.autograd.grad(alone.loss + apart.loss, leaves, upstream)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-6)


def test_the_partial_policy_gradient_takes_a_teacher():
    (hidden, weight, bias), taught, labels = inputs()
    turn_ids = torch.arange(N) // 6
    arguments = torch.randn(1, 4), turn_ids[None], "lookahead:2"
    teacher = ppg.Teacher(taught[0][None], *taught[1:], turn_weights=torch.rand(1, 4))
    both, alone = (
        ppg.linear_partial_policy_loss(
            hidden[None], weight, labels[None], *arguments, bias=bias, teacher=t, backend="cpu"
        )
        for t in (teacher, None)
    )
    apart = ppg.linear_distillation_loss(
        hidden[None], weight, labels[None], teacher, bias=bias, turn_ids=turn_ids[None], backend="cpu"
    )
    torch.testing.assert_close(both.loss, alone.loss + apart.loss)


def test_only_rows_with_a_teacher_reach_its_head(monkeypatch):
    seen = []
    logits = ops.head.Head.logits
    monkeypatch.setattr(ops.head.Head, "logits", lambda self, rows: seen.append(rows.numel()) or logits(self, rows))
    (hidden, weight, bias), taught, labels = inputs()
    weights = (torch.arange(N) % 5 == 0).float()
    advantages, options = policy_arguments(labels)
    ppg.linear_policy_loss(
        hidden.requires_grad_(), weight, labels, advantages, bias=bias, backend="cpu", chunk_rows=4, **options,
        teacher=teacher_of(taught, "forward_kl", weights=weights),
    )  # fmt: skip
    assert sum(seen) == int(((labels >= 0) & (weights > 0)).sum())


@pytest.mark.parametrize("op", ["linear_distillation_op", "linear_divergences_op"])
def test_ops_are_well_formed(op):
    student, taught, labels = inputs()
    head = [t.nan_to_num().requires_grad_() for t in student]
    teacher = TeacherRows(taught[0].nan_to_num(), *taught[1:], None, None, torch.rand(N), 0.3, 0.0, 0)
    rows = RowArguments(labels, PerRow(torch.randn(N), *[None] * 5), ppg.PolicyLossSpec())
    (tensors, few, top_k), (others, numbers, choices) = teacher.pack(), rows.pack()
    flags = [True, False, True, False]
    flags += [True, True, True, True] if op == "linear_distillation_op" else []
    given = *head, tensors, others, [*few, *numbers], [top_k, *choices], flags, Chunks(8, None).pack(), "cpu"
    checks = "test_schema", "test_faketensor", "test_autograd_registration"
    torch.library.opcheck(getattr(ops, op), given, test_utils=checks)


def test_compiled(backend, device):
    if backend == "reference":
        pytest.skip("reference: plain PyTorch, no op")
    (hidden, weight, bias), taught, labels = inputs(device=device)
    advantages, options = policy_arguments(labels)
    hidden, taught = hidden.nan_to_num().requires_grad_(), (taught[0].nan_to_num(), *taught[1:])

    def loss(hidden):
        teacher, found = ppg.Teacher(*taught, divergence="jsd"), []
        for reduction in ("sum", "none"):
            common = {"bias": bias, "backend": backend, "reduction": reduction}
            mixed = ppg.linear_policy_loss(hidden, weight, labels, advantages, teacher=teacher, **common, **options)
            found += [mixed.loss, ppg.linear_distillation_loss(hidden, weight, labels, teacher, **common).loss]
        return sum(each.sum() for each in found)

    found, plain = torch.compile(loss, backend="eager", fullgraph=True)(hidden), loss(hidden)
    torch.testing.assert_close(found, plain)
    actual, expected = (torch.autograd.grad(value, hidden)[0] for value in (found, plain))
    torch.testing.assert_close(actual, expected)

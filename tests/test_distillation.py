"""Distillation from hidden states: every divergence against its formula in float64, alone and beside a policy loss."""

import math

import pytest
import torch
from closeness import assert_as_good_as

import ppg_fast as ppg
from ppg_fast import backends, ops
from ppg_fast.contract import Chunks, PerRow, RowArguments, TeacherRows

N, D, E, V = 23, 16, 12, 209
KINDS = {"forward_kl": ("forward_kl", None), "reverse_kl": ("reverse_kl", None), "jsd": ("jsd", 0.3)}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=("reference", "cpu"))
def backend(request):
    """What is around the row kernel is the same on every backend."""
    if request.param != "reference" and (reason := backends.why_not(request.param)):
        pytest.skip(reason)
    return request.param


def inputs(dtype=torch.float32, device="cpu"):
    """Both heads and labels, NaN in masked rows: (hidden, weight, bias), the teacher's, labels."""
    labels, rows = torch.randint(V, (N,)), torch.arange(N)
    labels[rows % 4 == 3] = -100
    heads = []
    for width in (D, E):
        hidden = torch.randn(N, width)
        hidden[rows % 4 == 3] = torch.nan
        head = hidden, torch.randn(V, width) * 3 / math.sqrt(width), torch.randn(V)
        heads.append(tuple(t.to(device, dtype) for t in head))
    return *heads, labels.to(device)


def capped(z, softcap):
    return softcap * torch.tanh(z / softcap) if softcap else z


def formula(logits, teacher_logits, divergence, beta, k=0):
    """D(q, p) of each row, written out; ``k``: of the teacher's k likeliest tokens and the rest as one."""
    p, q = logits.softmax(-1), teacher_logits.softmax(-1)
    if k:
        ids = q.topk(k).indices
        p, q = (torch.cat([x.gather(-1, ids), 1 - x.gather(-1, ids).sum(-1, keepdim=True)], -1) for x in (p, q))
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    if divergence == "forward_kl":
        return kl(q, p)
    if divergence == "reverse_kl":
        return kl(p, q)
    m = beta * q + (1 - beta) * p
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def textbook(student, taught, labels, dtype, kind, weights=1.0, temperature=1.0, caps=(0.0, 0.0), k=0):
    """Loss, divergences and gradients of sum of weights D over the active rows in ``dtype``."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in student]
    active = (labels != -100).nonzero().squeeze(1)
    z = torch.nn.functional.linear(leaves[0][active], *leaves[1:])
    y = torch.nn.functional.linear(taught[0][active].to(dtype), *(t.to(dtype) for t in taught[1:]))
    t = temperature[active, None].to(dtype) if isinstance(temperature, torch.Tensor) else temperature
    found = formula(capped(z, caps[0]) / t, capped(y, caps[1]) / t, *KINDS[kind], k)
    w = weights[active].to(dtype) if isinstance(weights, torch.Tensor) else weights
    each = torch.zeros(N, dtype=dtype, device=labels.device).index_put((active,), found)
    loss = (w * found).sum()
    grads = torch.autograd.grad(loss, leaves)
    named = {"loss": loss, "divergences": each, "d_hidden": grads[0], "d_weight": grads[1], "d_bias": grads[2]}
    return {name: value.detach().cpu() for name, value in named.items()}


def ours(student, teacher, labels, **options):
    hidden, weight, bias = (t.detach().requires_grad_() for t in student)
    out = ppg.linear_distillation_loss(hidden, weight, labels, teacher, bias=bias, **options)
    grads = torch.autograd.grad(out.loss, (hidden, weight, bias))
    return {"loss": out.loss, "divergences": out.divergences} | dict(
        zip(("d_hidden", "d_weight", "d_bias"), grads, strict=True)
    )


def teacher_of(taught, kind, **options):
    divergence, beta = KINDS[kind]
    return ppg.Teacher(*taught, divergence=divergence, beta=beta, **options)


@pytest.mark.parametrize("chunk_rows", [5, 1000])
@kinds
def test_matches_the_formula(backend, device, kind, chunk_rows):
    student, taught, labels = inputs(device=device)
    weights, temperature = torch.rand(N, device=device) + 0.5, torch.linspace(0.6, 1.5, N, device=device)
    teacher = teacher_of(taught, kind, weights=weights, coef=0.7, logit_softcap=6.0)
    options = {"temperature": temperature, "logit_softcap": 5.0, "reduction": "sum", "chunk_rows": chunk_rows}
    actual = ours(student, teacher, labels, backend=backend, **options)
    plain, truth = (
        textbook(student, taught, labels, dtype, kind, 0.7 * weights, temperature, (5.0, 6.0))
        for dtype in (torch.float32, torch.float64)
    )
    for name in truth:
        assert_as_good_as(actual[name], plain[name], truth[name], name)
    assert (actual["d_hidden"][labels == -100] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@kinds
def test_low_precision(backend, device, kind, dtype):
    """Gradients of 16-bit inputs against the formula over the logits of the same 16-bit GEMM, in float32."""
    student, taught, labels = inputs(dtype, device)
    actual = ours(student, teacher_of(taught, kind), labels, chunk_rows=7, backend=backend)
    active = (labels != -100).nonzero().squeeze(1)
    leaves = [t.detach().requires_grad_() for t in student]
    z = torch.nn.functional.linear(leaves[0][active], *leaves[1:]).float()
    y = torch.nn.functional.linear(taught[0][active], *taught[1:]).float()
    loss = formula(z, y, *KINDS[kind]).mean()
    torch.testing.assert_close(actual["loss"], loss, rtol=2e-3, atol=2e-3)
    for name, grad in zip(("d_hidden", "d_weight", "d_bias"), torch.autograd.grad(loss, leaves), strict=True):
        difference = (actual[name].float() - grad.float()).norm() / grad.float().norm()
        assert difference < 8 * torch.finfo(dtype).eps, (name, difference)
        assert actual[name].dtype == dtype


@pytest.mark.parametrize("k", [1, 7])
@kinds
def test_top_k_counts_the_rest_as_one(backend, device, kind, k):
    """A teacher here and one served elsewhere, whose ids are padded and in another order, are one."""
    student, taught, labels = inputs(device=device)
    options = {"reduction": "sum", "chunk_rows": 5, "backend": backend, "logit_softcap": 5.0, "temperature": 0.8}
    truth = textbook(student, taught, labels, torch.float64, kind, 1.0, 0.8, (5.0, 0.0), k)
    plain = textbook(student, taught, labels, torch.float32, kind, 1.0, 0.8, (5.0, 0.0), k)
    y = torch.nn.functional.linear(taught[0].double(), *(t.double() for t in taught[1:])) / 0.8
    logprobs, ids = y.log_softmax(-1).flip(-1).topk(k)
    ids = torch.nn.functional.pad(V - 1 - ids.flip(-1), (1, 0), value=-1)
    logprobs = torch.nn.functional.pad(logprobs.flip(-1).float(), (1, 0), value=-math.inf)
    ids[labels == -100], logprobs[labels == -100] = V + 5, torch.nan
    divergence, beta = KINDS[kind]
    for teacher in (
        teacher_of(taught, kind, top_k=k),
        ppg.TopKTeacher(ids, logprobs, divergence=divergence, beta=beta),
    ):
        actual = ours(student, teacher, labels, **options)
        for name in truth:
            assert_as_good_as(actual[name], plain[name], truth[name], f"{type(teacher).__name__} {name}")


@kinds
def test_all_of_the_vocabulary_is_the_whole(backend, device, kind):
    student, taught, labels = inputs(device=device)
    whole, named = (ours(student, teacher_of(taught, kind, top_k=k), labels, backend=backend) for k in (0, V + 1))
    for name in whole:
        torch.testing.assert_close(named[name], whole[name], rtol=1e-4, atol=2e-6)


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


def test_weights_of_turns_are_those_of_their_tokens(backend, device):
    student, taught, labels = inputs(device=device)
    turn_ids, cu = torch.arange(N, device=device) // 3 % 4 - 1, torch.tensor([0, 9, 9, N], device=device)
    turn_weights = torch.tensor([[0.0, 1.0, 2.0], [5.0, 5.0, 5.0], [0.5, 0.0, 3.0]], device=device)
    sequence = (torch.arange(N, device=device) >= 9).long() * 2
    weights = torch.where(turn_ids < 0, 0.0, turn_weights[sequence, turn_ids.clamp(min=0)])
    common = {"backend": backend, "cu_seqlens": cu.int(), "reduction": "sequence_mean"}
    by_turn = ours(
        student, teacher_of(taught, "forward_kl", turn_weights=turn_weights), labels, turn_ids=turn_ids, **common
    )
    by_token = ours(student, teacher_of(taught, "forward_kl", weights=weights), labels, **common)
    for name in by_turn:
        assert torch.equal(by_turn[name], by_token[name]), name
    assert (by_token["divergences"][weights == 0] == 0).all()


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


@pytest.mark.parametrize("where", ["student", "teacher", "weight", "named"])
@kinds
def test_nan_stays_in_its_row(backend, device, kind, where):
    student, taught, labels = inputs(device=device)
    labels[2] = 5
    weights, divergence = torch.ones(N, device=device), KINDS[kind]
    if where in ("student", "teacher"):
        (student if where == "student" else taught)[0][2, 3] = torch.nan
    if where == "weight":
        weights[2] = torch.nan
    teacher = teacher_of(taught, kind, weights=weights)
    if where == "named":
        ids, logprobs = torch.arange(3, device=device).expand(N, 3), torch.full((N, 3), -2.0, device=device)
        logprobs[2, 1] = torch.nan
        teacher = ppg.TopKTeacher(ids, logprobs, divergence=divergence[0], beta=divergence[1])
    actual = ours(student, teacher, labels, backend=backend)
    assert actual["loss"].isnan()
    assert actual["d_hidden"][2].isnan().all()
    assert actual["d_weight"].isnan().all()
    others = torch.arange(N, device=device) != 2
    assert actual["d_hidden"][others].isfinite().all()
    assert actual["divergences"][others].isfinite().all()
    assert actual["divergences"][2].isnan() == (where != "weight")


@kinds
def test_a_token_that_both_exclude_adds_nothing(backend, device, kind):
    """-inf in both biases, as of a padded vocabulary; in one of them it is a large number."""
    student, taught, labels = inputs(device=device)
    student[2][7:], taught[2][7:] = -math.inf, -math.inf
    actual = ours(student, teacher_of(taught, kind), labels, backend=backend)
    few = [tuple(t[:7] if t.shape[0] == V else t for t in head) for head in (student, taught)]
    expected = ours(few[0], teacher_of(few[1], kind), labels.clamp(max=6), backend=backend)
    torch.testing.assert_close(actual["loss"], expected["loss"])
    torch.testing.assert_close(actual["d_hidden"], expected["d_hidden"], rtol=1e-4, atol=1e-6)
    assert (actual["d_weight"][7:] == 0).all()
    student[2][:7] = -math.inf  # and now all that the teacher has
    student[2][7:] = 0.0
    large = ours(student, teacher_of(taught, kind), labels, backend=backend)["loss"]
    assert large.isfinite()
    assert large > (0.5 if kind == "jsd" else 5e3)


def test_nothing_to_learn(backend, device):
    """No active row, no row, a weight of 0, a teacher that is the student."""
    student, taught, labels = inputs(device=device)
    for teacher, mask in (
        (teacher_of(taught, "jsd"), torch.zeros(N, device=device)),
        (teacher_of(taught, "jsd", coef=0.0), None),
        (teacher_of(student, "reverse_kl"), None),
    ):
        actual = ours(student, teacher, labels, loss_mask=mask, backend=backend)
        assert all((value.abs() < 1e-6).all() for value in actual.values())
    empty = [(head[0][:0], *head[1:]) for head in (student, taught)]
    actual = ours(empty[0], teacher_of(empty[1], "jsd"), labels[:0], backend=backend)
    assert actual["loss"] == 0
    assert actual["d_weight"].abs().max() == 0


def test_a_bound_on_the_rows(backend, device):
    student, taught, labels = inputs(device=device)
    active = int((labels >= 0).sum())
    free = ours(student, teacher_of(taught, "jsd"), labels, backend=backend)
    bound = ours(student, teacher_of(taught, "jsd"), labels, backend=backend, max_active_rows=active)
    for name in free:
        torch.testing.assert_close(free[name], bound[name])
    with pytest.raises(ValueError, match="max_active_rows must be at least"):
        ours(student, teacher_of(taught, "jsd"), labels, backend=backend, max_active_rows=3, validate=True)


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


@kinds
def test_the_bits_do_not_depend_on_the_threads(kind):
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        x, y = torch.randn(1, 40, 1003), torch.randn(1, 40, 1003)
        out = torch.empty_like(x)
        beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.3}[kind]
        given = torch.zeros(40, dtype=torch.int64), None, None, 0.7, 0.0, 0.0, beta
        results.append((backends.load("cpu").distillation(x, y, *given, out), out))
        without = backends.load("cpu").distillation(x, y, *given, None)
        assert torch.equal(without, results[-1][0])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_teachers_of_the_wrong_shape():
    (hidden, weight, _), taught, labels = inputs()
    ids, logprobs = torch.zeros(N, 2, dtype=torch.int64), torch.full((N, 2), -2.0)
    for teacher, rule in (
        (lambda: ppg.Teacher(taught[0], taught[1][:-1]), "one vocabulary"),
        (lambda: ppg.Teacher(taught[0][:-1], taught[1]), "the teacher's hidden must be"),
        (lambda: ppg.Teacher(*(t.bfloat16() for t in taught)), "must be torch.float32 on cpu"),
        (lambda: ppg.Teacher(*taught, divergence="kl"), "divergence must be one of"),
        (lambda: ppg.Teacher(*taught, beta=0.5), 'beta goes with divergence "jsd"'),
        (lambda: ppg.Teacher(*taught, divergence="jsd", beta=1.0), "beta must be < 1"),
        (lambda: ppg.Teacher(*taught, turn_weights=torch.ones(1, 2)), "need turn_ids"),
        (lambda: ppg.TopKTeacher(ids, logprobs), "each once, or negative, got"),
        (lambda: ppg.TopKTeacher(ids + torch.tensor([0, V]), logprobs), "ids of the teacher must be in"),
        (lambda: ppg.TopKTeacher(ids, logprobs[:, :1]), "of one shape"),
        (lambda: None, "must be a Teacher or a TopKTeacher"),
    ):
        with pytest.raises(ValueError, match=rule):
            ppg.linear_distillation_loss(hidden, weight, labels, teacher(), backend="cpu")


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

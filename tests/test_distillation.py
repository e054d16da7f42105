"""Distillation from hidden states: every divergence against its formula in float64."""

import math

import pytest
import torch
from closeness import assert_as_good_as
from distillation_case import KINDS, N, V, formula, inputs, ours, teacher_of, textbook

import ppg_fast as ppg
from ppg_fast import backends

kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(params=("reference", "cpu"))
def backend(request):
    """What is around the row kernel is the same on every backend."""
    if request.param != "reference" and (reason := backends.why_not(request.param)):
        pytest.skip(reason)
    return request.param


@pytest.mark.parametrize("chunk_rows", [5, 1000])
@kinds
def test_matches_the_formula(backend, device, kind, chunk_rows):
    student, taught, labels = inputs(device=device)
    weights, temperature = torch.rand(N, device=device) + 0.5, torch.linspace(0.6, 1.5, N, device=device)
    weights[labels == -100] = torch.nan
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


@kinds
def test_float32_logits_of_16_bits(backend, device, kind):
    """No logit of either side is rounded: the divergences are those of the same numbers in float32."""
    student, taught, labels = inputs(torch.bfloat16, device)
    exact = [tuple(t.float() for t in head) for head in (student, taught)]
    options = {"chunk_rows": 7, "backend": backend}
    actual = ours(student, teacher_of(taught, kind), labels, logits_dtype="float32", **options)
    expected = ours(exact[0], teacher_of(exact[1], kind), labels, **options)
    torch.testing.assert_close(actual["divergences"], expected["divergences"], rtol=1e-5, atol=1e-6)
    for name in ("d_hidden", "d_weight", "d_bias"):
        difference = (actual[name].float() - expected[name]).norm() / expected[name].norm()
        assert difference < 4 * torch.finfo(torch.bfloat16).eps, (name, difference)


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

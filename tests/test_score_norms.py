"""The score norm |d log p / d z|^2 = sum p^2 - 2 p_label + 1 of a token: right on every backend, in the same sweep,
free unasked."""

import itertools
import math
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from cases import LOSSES, TERMS, make_case, run
from closeness import assert_as_good_as
from contract_case import Call, by_turns, close, draw
from test_isa import isa  # noqa: F401

import ppg_fast as ppg
from ppg_fast import backends, ops, reference
from ppg_fast.contract import Chunks, Columns, FusedArguments, Reduction, RowArguments, Wanted
from ppg_fast.losses import LOSS_TYPES, SEQUENCE_LEVEL
from ppg_fast.spec import IGNORE, REDUCTIONS

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SCALES = {"plain": ({}, False), "softcap": ({"logit_softcap": 5.0}, False), "per token": ({"logit_softcap": 6.0}, True)}


def truth_of(case, dtype=torch.float64):
    """From the gradient of the log-prob by autograd: no formula of ours."""
    scale = case.spec.temperature if case.temperatures is None else case.temperatures[:, None].to(dtype)
    x = case.logits.flatten(0, 1).to(dtype).nan_to_num()
    z = x if not case.spec.logit_softcap else case.spec.logit_softcap * torch.tanh(x / case.spec.logit_softcap)
    z = (z / scale).requires_grad_()
    logprob = torch.log_softmax(z, -1).gather(-1, case.labels.clamp(min=0)[:, None])
    norms = torch.autograd.grad(logprob.sum(), z)[0].square().sum(-1)
    return torch.where(case.labels == IGNORE, 0.0, norms)


def all_outputs(case, backend, score_norms):
    """Every output of the row kernels, and the gradient."""
    norms = torch.empty_like(case.advantages) if score_norms else case.advantages.new_empty(0)
    outputs = run(case, backend, norm=norms if score_norms else None)
    temperature = case.spec.temperature if case.temperatures is None else 1.0
    scale = case.labels, case.temperatures, temperature, case.spec.logit_softcap
    wanted = Wanted(entropy=True, score_norms=score_norms, gradient=False, validate=False)
    logprob, entropy, alone, _ = ops.token_logprobs(case.logits.detach(), *scale, wanted, backend)
    return outputs | {"logprob alone": logprob, "entropy alone": entropy}, norms, alone


def check(case, backend):
    outputs, norms, alone = all_outputs(case, backend, True)
    others, none, neither = all_outputs(case, backend, False)
    assert none.shape == neither.shape == (0,)
    assert not norms.requires_grad
    assert norms.dtype == torch.float32
    for name, value in outputs.items():
        assert torch.equal(value.detach().view(torch.uint8), others[name].detach().view(torch.uint8)), name
    assert torch.equal(norms, alone)
    truth, plain = truth_of(case).cpu(), reference.score_norms(
        case.logits.flatten(0, 1).float(), case.labels,
        case.spec.temperature if case.temperatures is None else case.temperatures,
        case.spec.logit_softcap,
    )  # fmt: skip
    assert_as_good_as(norms, plain.cpu(), truth, "score norms")
    # with AVX2 torch's own log_softmax sums 70,000 exponentials in float32 to 5.5e-6 only
    assert (norms.cpu().double() - truth).abs().max() < (1e-5 if backend == "reference" else 5e-6)
    assert (norms[case.labels == IGNORE] == 0).all()
    assert (norms >= 0).all()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 1003), (2, 4, 5003)], ids=str)
def test_the_norm_and_the_bits_of_everything_else(backend, device, shape, dtype, scale):
    terms, per_token = SCALES[scale]
    check(
        make_case(shape, replace(LOSSES["ppo"], **terms), DTYPES[dtype], device, strided=True, per_token=per_token),
        backend,
    )


@pytest.mark.parametrize("terms", ["plain", "entropy", "everything"])
def test_a_large_vocabulary(backend, device, terms):
    check(make_case((1, 3, 70_000), replace(LOSSES["cispo"], **TERMS[terms]), torch.bfloat16, device), backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [3, 17, 515, 5003])
def test_every_instruction_set(isa, V, dtype):  # noqa: F811
    for terms in ("plain", "everything"):
        check(make_case((1, 6, V), replace(LOSSES["ppo"], **TERMS[terms]), DTYPES[dtype], per_token=True), "cpu")
    check(certain_case(V, DTYPES[dtype], "cpu"), "cpu")


def certain_case(V, dtype, device):
    """Labels of growing certainty, one beside which another token is certain, one that is impossible."""
    case = make_case((1, 6, V), LOSSES["ppo"], dtype, device)
    case.labels[:] = 1
    case.logits[:] = -1.0
    case.logits[0, :4, 1] = torch.tensor([4.0, 12.0, 30.0, 200.0], device=device).to(dtype)
    case.logits[0, 4, 0] = 90.0
    case.logits[0, 5, 1] = -torch.inf
    return case


@pytest.mark.parametrize("V", [2, 300, 9001])
def test_a_certain_token_has_no_norm_and_an_impossible_one_the_largest(backend, device, V):
    """(1 - p)^2 + what the others have: about 0 at p = 1, never below it; 2 where one other token is certain."""
    case = certain_case(V, torch.float32, device)
    check(case, backend)
    norms = all_outputs(case, backend, True)[1]
    assert norms[3] == 0
    assert norms[4] == 2
    assert norms[5] > 1


def test_not_a_number_stays_in_its_row(backend, device):
    case = make_case((1, 4, 300), LOSSES["ppo"], device=device)
    case.labels[:] = 7
    case.logits[:] = 0.5
    case.logits[0, 1, 150] = torch.nan
    assert all_outputs(case, backend, True)[1].isnan().tolist() == [False, True, False, False]


# ---- the public functions --------------------------------------------------------------------------------------------
def expected(call, skipped):
    """Of the oracle's probabilities, in the layout of the call."""
    batch = call.case.batch
    temperature = np.broadcast_to(np.asarray(batch.spec.temperature, np.float64).reshape(-1), batch.labels.shape)
    norms = np.zeros(batch.labels.size)
    for i in np.flatnonzero(batch.active & ~skipped):
        p = oracle.row_statistics(call.case.logits[i], batch.labels[i], temperature[i], batch.spec.logit_softcap)[
            2
        ].copy()
        p[batch.labels[i]] -= 1
        norms[i] = math.fsum(p * p)
    return norms.reshape(call.shape)


EVERYWHERE = list(itertools.product(oracle.LAYOUTS, REDUCTIONS))


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_among_the_metrics_of_every_loss(loss_type, linear, backend, device):
    if device != "cpu":
        pytest.skip("the calls of the oracle are on the CPU")
    turn = 2 * LOSS_TYPES.index(loss_type) + linear
    for layout, reduction in by_turns(EVERYWHERE, turn, len(EVERYWHERE), backend, device):
        seed = REDUCTIONS.index(reduction) * 4 + LOSS_TYPES.index(loss_type)
        call = Call(draw(seed, layout, loss_type, reduction, linear=linear), seed=seed)
        skip, more = seed % 2 == 0, {"chunk_rows": 5} if linear else {}
        batch = call.case.batch
        skipped = skip & ~batch.live & (not batch.spec.needs_every_row)
        plain = call(skip_zero_advantages=skip, backend=backend, **more)
        out = call(skip_zero_advantages=skip, backend=backend, score_norms=True, **more)
        assert all(torch.equal(a, b) for a, b in zip(out[:3], plain[:3], strict=True))
        assert "score_norms" not in plain.metrics
        assert sorted(out.metrics) == sorted([*plain.metrics, "score_norms"])
        assert not out.metrics["score_norms"].requires_grad
        close(out.metrics["score_norms"], expected(call, skipped), "score norms", 2e-5, 1.0)
        call.check(out, 1.0 if reduction != "none" else np.ones(batch.labels.size), skipped)


@pytest.mark.parametrize("linear", [False, True])
def test_from_rewards(linear, backend, device):
    hidden, weight = torch.randn(2, 6, 8, device=device), torch.randn(30, 8, device=device)
    labels = torch.randint(30, (2, 6), device=device)
    turns = torch.tensor([[-1, 0, 0, 1, 1, -1], [0, 0, -1, 1, 2, 2]], device=device)
    arguments = labels, torch.randn(2, 3, device=device), turns, "greedy"
    function, rows = (
        (ppg.linear_partial_policy_loss, (hidden, weight))
        if linear
        else (ppg.partial_policy_loss, (hidden @ weight.T,))
    )
    norms = function(*rows, *arguments, score_norms=True, backend=backend).metrics["score_norms"]
    p = (hidden @ weight.T).double().softmax(-1)
    p.scatter_add_(-1, labels[..., None], -torch.ones_like(p))
    torch.testing.assert_close(norms, torch.where(turns < 0, 0.0, p.square().sum(-1)).float(), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("linear", [False, True])
def test_beside_log_probs(linear, backend, device):
    """The last of the tuple, with the bits of a loss, no gradient, and changing none of the others."""
    hidden, weight = torch.randn(2, 6, 8, device=device), torch.randn(300, 8, device=device)
    logits, labels = hidden @ weight.T, torch.randint(300, (2, 6), device=device)
    mask = torch.tensor([[1, 1, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1]], device=device)
    rows = (hidden.requires_grad_(), weight) if linear else (logits.requires_grad_(),)
    function = ppg.linear_token_logprobs if linear else ppg.token_logprobs
    options = {"loss_mask": mask, "temperature": 0.7, "backend": backend}
    logprobs, entropy, norms = function(*rows, labels, entropy=True, score_norms=True, **options)
    pair = function(*rows, labels, score_norms=True, **options)
    assert torch.equal(pair[0], logprobs)
    assert torch.equal(pair[1], norms)
    assert torch.equal(function(*rows, labels, entropy=True, **options)[1], entropy)
    assert not norms.requires_grad
    assert logprobs.requires_grad
    spec = ppg.PolicyLossSpec("reinforce", temperature=0.7)
    loss = (ppg.linear_policy_loss if linear else ppg.policy_loss)(
        *rows, labels, torch.ones(2, 6, device=device), spec=spec, loss_mask=mask, score_norms=True, backend=backend
    )
    assert torch.equal(norms, loss.metrics["score_norms"])
    want = reference.score_norms(logits.flatten(0, 1).double(), labels.masked_fill(mask == 0, -1).flatten(), 0.7)
    torch.testing.assert_close(norms.flatten().double(), want, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("loss_type", ["ppo", "gspo"])
@pytest.mark.parametrize("linear", [False, True])
def test_compiles_whole(linear, loss_type, backend, device):
    if backend == "reference":
        pytest.skip("reference: plain PyTorch, compiled in pieces")
    torch._dynamo.reset()
    hidden, weight = torch.randn(2, 5, 8, device=device, requires_grad=True), torch.randn(33, 8, device=device)
    labels, advantages = torch.randint(33, (2, 5), device=device), torch.randn(2, 5, device=device)
    old, spec = torch.randn(2, 5, device=device) - 3, ppg.PolicyLossSpec(loss_type)
    options = {"old_logprobs": old, "spec": spec, "score_norms": True, "backend": backend}

    def loss(hidden):
        rows = (hidden, weight) if linear else (hidden @ weight.T,)
        out = (ppg.linear_policy_loss if linear else ppg.policy_loss)(*rows, labels, advantages, **options)
        return out.loss, out.metrics["score_norms"]

    results = [function(hidden) for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager"))]
    for actual, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(actual, want, rtol=2e-5, atol=1e-6)
    gradients = [torch.autograd.grad(out[0], hidden)[0] for out in results]
    torch.testing.assert_close(*gradients, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("with_grad", [True, False])
def test_opcheck(with_grad, backend, device):
    if backend == "reference":
        pytest.skip("reference: plain PyTorch, no op")
    case = make_case((2, 3, 60), replace(LOSSES["ppo"], **TERMS["everything"]), device=device)
    x = case.logits.nan_to_num().requires_grad_(with_grad)
    # no entropy asked for: the norm brings it along
    flags = list(Wanted(entropy=False, score_norms=True, gradient=with_grad, validate=False))
    advantages, _, *others = case.per_row
    columns = (None if c is None else c.view(2, 3) for c in (case.labels, None, None, advantages, *others))
    columns = Columns(*columns)
    fused = FusedArguments(columns, None, Reduction("token_mean", None, 2, None), case.spec, False)
    torch.library.opcheck(ops.policy_loss_op, (x, *fused.pack(), flags, backend))
    torch.library.opcheck(ops.token_logprobs_op, (x, case.labels, None, [0.8, 0.0], flags, backend))
    hidden, weight = (torch.randn(n, 4, device=device, requires_grad=with_grad) for n in (6, 60))
    head, rows = (hidden, weight, None), RowArguments(case.labels, case.per_row, case.spec)
    gradients, chunks = [with_grad, with_grad, False], Chunks(4, None).pack()
    torch.library.opcheck(ops.linear_policy_loss_op, (*head, *rows.pack(), flags, gradients, chunks, backend))
    scored = *head, case.labels, None, [0.8, 0.0], flags, chunks, backend
    torch.library.opcheck(ops.linear_token_logprobs_op, scored)


def test_log_probs_alone_do_not_tell():
    with pytest.raises(ValueError, match="score_norms are made of logits"):
        ppg.policy_loss_from_logprobs(torch.zeros(3), torch.ones(3), score_norms=True)


@pytest.mark.parametrize("loss_type", [loss for loss in LOSS_TYPES if loss not in SEQUENCE_LEVEL])
def test_they_are_there_before_any_metric_is_computed(loss_type, backend, device):
    """On a backend that fuses: read after the arguments are gone, where other metrics say so."""
    if not backends.fuses(backend):
        pytest.skip(f"{backend} does not fuse")
    logits, labels = torch.randn(3, 4, 21, device=device), torch.randint(21, (3, 4), device=device)
    options = {"spec": ppg.PolicyLossSpec(loss_type), "backend": backend}
    plain = ppg.policy_loss(logits, labels, torch.ones(3, 4, device=device), **options)
    out = ppg.policy_loss(logits, labels, torch.ones(3, 4, device=device), score_norms=True, **options)
    want = reference.score_norms(logits.flatten(0, 1), labels.flatten()).view(3, 4)
    assert dict(out.metrics).keys() == {*plain.metrics, "score_norms"}
    late = ppg.policy_loss(logits, labels, torch.ones(3, 4, device=device), score_norms=True, **options)
    labels.zero_()
    torch.testing.assert_close(late.metrics["score_norms"], want, rtol=0, atol=2e-6)
    with pytest.raises(RuntimeError, match="labels was modified in place"):
        late.metrics["entropy"]


@pytest.mark.parametrize("linear", [False, True])
def test_a_skipped_row_that_is_read_for_its_group_has_none(linear, backend, device):
    hidden, weight = torch.randn(1, 4, 8, device=device), torch.randn(21, 8, device=device)
    rows = (hidden, weight) if linear else (hidden @ weight.T,)
    labels, advantages = (
        torch.tensor([[3, 4, 5, 6]], device=device),
        torch.tensor([[1.0, 0.0, -2.0, 0.0]], device=device),
    )
    options = {
        "spec": ppg.PolicyLossSpec("gspo"),
        "old_logprobs": torch.full((1, 4), -3.0, device=device),
        "backend": backend,
    }
    function = ppg.linear_policy_loss if linear else ppg.policy_loss
    for skip in (False, True):
        out = function(*rows, labels, advantages, **options, skip_zero_advantages=skip, score_norms=True)
        assert (out.metrics["score_norms"] != 0).tolist() == [[True, not skip, True, not skip]]

"""The losses over kept sets: those of logits in which every other token is -inf, without reading its row."""

import importlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from cases import LOSSES, TERMS
from closeness import assert_as_good_as

import ppg_fast as ppg
from ppg_fast import reference
from ppg_fast.functional.loss import LossRows

kept_ops = importlib.import_module("ppg_fast.ops.kept_logits")  # `ops` has a function of that name

N, D, V = 23, 16, 57
SEQUENCE_LEVEL = {name: replace(LOSSES["ppo"], loss_type=name) for name in ("gspo", "gspo_turn")}
BEYOND = {"old_logprobs": 0.3, "ref_logprobs": 0.4, "rollout_logprobs": 0.2}


def inputs(dtype=torch.float32, device="cpu", most=9):
    """Sets of 1 to ``most`` tokens around the labels, every fourth row masked, with NaN in it and no set."""
    hidden, weight, bias = torch.randn(N, D), torch.randn(V, D), torch.randn(V)
    labels, rows = torch.randint(V, (N,)), torch.arange(N)
    labels[rows % 4 == 3] = -100
    hidden[rows % 4 == 3] = torch.nan
    sets = []
    for row in range(N):
        others = torch.randperm(V)[: row % most]
        sets.append([] if row % 4 == 3 else [*others[others != labels[row]].tolist(), int(labels[row])])
    advantages = torch.randn(N).where(rows % 4 != 2, torch.tensor(0.0))
    head = [t.to(device, dtype) for t in (hidden, weight, bias)]
    return head, labels.to(device), advantages.to(device), sets


def kept_of(sets, device="cpu", flip=False):
    """CSR of lists of ids, each backwards where ``flip``."""
    ids = [i for ids in sets for i in (ids[::-1] if flip else ids)]
    ends = torch.tensor([0, *(len(ids) for ids in sets)]).cumsum(0)
    return ppg.Kept(torch.tensor(ids, dtype=torch.int32, device=device), ends.to(device))


def textbook(head, labels, advantages, sets, arguments, dtype, **options):
    """Loss, log-probs, entropies and gradients in ``dtype``, row by row from the formulas."""
    hidden, weight, bias = (t.detach().to(dtype).requires_grad_() for t in head)
    spec = options["spec"]
    l, H, Z = (torch.zeros(N, dtype=dtype, device=labels.device) for _ in range(3))
    for row in (labels >= 0).nonzero()[:, 0].tolist():
        ids = torch.tensor(sets[row], device=labels.device)
        z = weight[ids] @ hidden[row] + bias[ids]
        z = spec.logit_softcap * torch.tanh(z / spec.logit_softcap) if spec.logit_softcap else z
        logp = (z / spec.temperature).log_softmax(0)
        at = torch.tensor(row, device=labels.device)
        l = l.index_put((at,), logp[(ids == labels[row]).nonzero()[0, 0]])
        H, Z = H.index_put((at,), -(logp.exp() * logp).sum()), Z.index_put((at,), (z / spec.temperature).logsumexp(0))
    rows = LossRows.of(labels, advantages, labels.device, **arguments, **options)
    *per_row, _, nll = (None if t is None else t.to(dtype) for t in rows.per_row)
    loss = reference.loss_from_logprobs(l, H, labels >= 0, *per_row, rows.spec, rows.groups, nll, Z).sum()
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    named = dict(zip(("d_hidden", "d_weight", "d_bias"), grads, strict=True))
    return {k: v.detach().cpu() for k, v in {"loss": loss, "logprob": l, "entropy": H, **named}.items()}


def ours(head, labels, advantages, kept, arguments, **options):
    leaves = [t.detach().requires_grad_() for t in head]
    hidden, weight, bias = leaves
    out = ppg.linear_policy_loss(hidden, weight, labels, advantages, bias=bias, kept=kept, **arguments, **options)
    grads = torch.autograd.grad(out.loss, leaves)
    named = dict(zip(("d_hidden", "d_weight", "d_bias"), grads, strict=True))
    return {"loss": out.loss, "logprob": out.logprobs, "entropy": out.entropy, **named}


def arguments_of(labels):
    old = -torch.rand(N, device=labels.device) - 0.1
    return {name: old + size * torch.randn(N, device=labels.device) for name, size in BEYOND.items()}


@pytest.mark.parametrize("loss", [*LOSSES, *SEQUENCE_LEVEL])
def test_every_loss_is_that_of_the_formulas(backend, device, loss):
    spec = {**LOSSES, **SEQUENCE_LEVEL}[loss]
    terms = TERMS["everything" if loss in SEQUENCE_LEVEL else "all-new"]
    spec = replace(spec, **(terms | {"logit_softcap": 5.0}))
    head, labels, advantages, sets = inputs(device=device)
    arguments = arguments_of(labels) | {"turn_ids": torch.arange(N, device=device) // 5}
    options = {"spec": spec, "reduction": "token_mean"}
    kept = kept_of(sets, device)
    actual = ours(head, labels, advantages, kept, arguments, **options, backend=backend)
    dtypes = torch.float32, torch.float64
    plain, truth = (textbook(head, labels, advantages, sets, arguments, dtype, **options) for dtype in dtypes)
    for name in truth:
        assert_as_good_as(actual[name], plain[name], truth[name], name)
    assert (actual["d_hidden"][labels == -100] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(backend, device, dtype, monkeypatch):
    """In pieces of a few rows, whose products are float32's on a CPU: each gradient is rounded once."""
    monkeypatch.setattr(kept_ops, "PIECE_BYTES", 4 * D * 11)
    head, labels, advantages, sets = inputs(dtype, device)
    options = {"spec": LOSSES["ppo"], "reduction": "sum"}
    kept, arguments = kept_of(sets, device), arguments_of(labels)
    actual = ours(head, labels, advantages, kept, arguments, logits_dtype="float32", backend=backend, **options)
    dtypes = torch.float32, torch.float64
    plain, truth = (textbook(head, labels, advantages, sets, arguments, dtype, **options) for dtype in dtypes)
    for name in truth:
        expected = head[0].dtype if name.startswith("d_") else torch.float32
        assert actual[name].dtype == expected, name
        assert_as_good_as(actual[name], plain[name], truth[name], name)


def test_the_whole_vocabulary_is_the_full_head(backend, device):
    head, labels, advantages, _ = inputs(device=device)
    sets = [torch.randperm(V).tolist() for _ in range(N)]
    options = {"spec": replace(LOSSES["ppo"], **TERMS["everything"]), "reduction": "sum"}
    arguments = arguments_of(labels)
    few = ours(head, labels, advantages, kept_of(sets, device), arguments, backend=backend, **options)
    full = ours(head, labels, advantages, None, arguments, backend=backend, **options)
    truth = textbook(head, labels, advantages, sets, arguments, torch.float64, **options)
    for name in truth:
        assert_as_good_as(few[name], full[name], truth[name], name)


def test_the_order_of_ids_changes_no_bit(backend, device):
    head, labels, advantages, sets = inputs(device=device)
    options = {"spec": replace(LOSSES["ppo"], entropy_coef=0.1), "backend": backend}
    one, other = (
        ours(head, labels, advantages, kept_of(sets, device, flip), arguments_of(labels) and {}, **options)
        for flip in (False, True)
    )
    for name in one:
        assert torch.equal(one[name], other[name]), name


def test_logprobs_entropies_and_regression(backend, device):
    """The differentiable pair, and a table with holes in place of lists."""
    head, labels, _, sets = inputs(device=device)
    table = torch.tensor([ids + [-1] * (9 - len(ids)) for ids in sets], device=device)
    options = {"bias": head[2], "backend": backend, "temperature": 0.7}
    hidden = head[0].nan_to_num().requires_grad_()
    l, H, norms = ppg.linear_token_logprobs(
        hidden, head[1], labels, kept=ppg.Kept.of_table(table), entropy=True, score_norms=True, **options
    )
    z = torch.nn.functional.linear(hidden, head[1], head[2])
    mask = torch.zeros_like(z, dtype=torch.bool)
    for row, ids in enumerate(sets):
        mask[row, ids] = True
    mask[labels < 0] = True
    z = z.masked_fill(~mask, -torch.inf)
    expected = ppg.token_logprobs(z, labels, temperature=0.7, entropy=True, score_norms=True, backend="reference")
    for a, b in zip((l, H, norms), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad((a + 0.3 * b).sum(), hidden)[0] for a, b in ((l, H), expected[:2])]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)
    turns = torch.zeros(N, dtype=torch.int64, device=device)
    of_turns = labels, torch.ones(1, 1, device=device), turns, "full"
    out = ppg.linear_turn_regression_loss(hidden, head[1], *of_turns, kept=ppg.Kept.of_table(table), **options)
    torch.testing.assert_close(out.logprobs, l.detach(), rtol=1e-5, atol=1e-5)


def test_what_servers_say_of_answers_is_placed_on_labels():
    drawn = torch.tensor([[False, True, True, False], [True, False, False, True]])
    masks = [SimpleNamespace(token_ids=[[5, 7], [2]]), [[1], [4]]]  # an object of vLLM's and a field of its server's
    kept = ppg.Kept.of_answers(masks, drawn)
    assert kept.ids.tolist() == [5, 7, 2, 1, 4]
    assert kept.offsets.tolist() == [0, 0, 2, 3, 3, 4, 4, 4, 5]
    with pytest.raises(ValueError, match="must be of as many tokens as were drawn, 4, got 2"):
        ppg.Kept.of_answers(masks[:1], drawn)
    with pytest.raises(ValueError, match="a sampling mask must be a list of ids for each token, got 1"):
        ppg.Kept.of_answers([[1, 4]], drawn)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sets, y: sets[1].remove(y), r"a label must be in its kept set, got id {y} at row 1"),
        (lambda sets, y: sets[1].append(y), r"ids of kept must be in a set once, got id {y} at row 1"),
        (lambda sets, y: sets[1].append(V), rf"ids of kept must be in \[0, {V}\), got id {V} at row 1"),
        (lambda sets, y: sets[1].append(-1), rf"ids of kept must be in \[0, {V}\), got id -1 at row 1"),
        (lambda sets, y: sets.pop(), r"offsets of kept must be \(N \+ 1,\) = \(24,\), got \(23,\)"),
    ],
    ids=["label", "twice", "beyond", "negative", "offsets"],
)
def test_a_wrong_set_is_named(device, change, message):
    head, labels, advantages, sets = inputs(device=device)
    y = int(labels[1])
    change(sets, y)
    with pytest.raises(ValueError, match=f"^{message.format(y=y)}$"):
        ours(head, labels, advantages, kept_of(sets, device), {})


def test_what_does_not_go_with_kept_sets(device):
    head, labels, advantages, sets = inputs(device=device)
    kept = kept_of(sets, device)
    for wrong, message in (
        (ppg.Kept(kept.ids, kept.offsets.flip(0)), "offsets of kept must rise from 0 to the number of ids"),
        (sets, "kept must be a Kept, got 'list'"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(head, labels, advantages, wrong, {})
    with pytest.raises(ValueError, match="ids of kept must be integers"):
        ppg.Kept(kept.ids.float(), kept.offsets)
    with pytest.raises(ValueError, match="max_active_rows must be at least the number of active rows"):
        ours(head, labels, advantages, kept, {}, max_active_rows=2)
    teacher = ppg.Teacher(head[0], head[1])
    with pytest.raises(ValueError, match="kept sets go without a teacher"):
        ours(head, labels, advantages, kept, {}, teacher=teacher)


def test_no_active_row(device):
    head, labels, advantages, _ = inputs(device=device)
    out = ours(head, torch.full_like(labels, -100), advantages, kept_of([[]] * N, device), {})
    assert out["loss"] == 0
    assert all((out[name] == 0).all() for name in ("d_hidden", "d_weight", "d_bias"))

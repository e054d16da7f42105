"""The meanings of the contract, one by one: zero rows, empty batches, the same bits, one graph; values against
`oracle`."""

import numpy as np
import oracle
import pytest
import torch
from contract_case import RELATIVE, Call, close, draw

import ppg_fast as ppg
from ppg_fast.losses import LOSS_TYPES, SEQUENCE_LEVEL
from ppg_fast.spec import REDUCTIONS

# no term that gives a row of zero advantage a gradient
PLAIN = {
    "kl_coef": 0.0,
    "kl_cap": 0.0,
    "entropy_coef": 0.0,
    "log_ratio_coef": 0.0,
}
both_forms = pytest.mark.parametrize("linear", [False, True])


def gradients_of(call, loss):
    leaves = [leaf for leaf, _ in call.leaves.values()]
    return torch.autograd.grad(loss, leaves)


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@both_forms
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_skip_zero_advantages(loss_type, layout, linear):
    """The same loss and gradients; the rows read 0, and where no shared ratio needs them they are not read at all."""
    call = Call(draw(7, layout, loss_type, fixed=PLAIN, linear=linear), seed=7)
    idle = call.case.batch.active & (call.case.batch.advantages == 0)
    assert idle.any()
    if loss_type not in SEQUENCE_LEVEL:
        rows, view = call.leaves["rows"]
        with torch.no_grad():
            view(rows)[torch.tensor(idle).reshape(call.shape)] = torch.nan
    call.check(call(skip_zero_advantages=True), skipped=idle)


def test_skip_zero_advantages_skips_nothing_that_has_a_gradient():
    call = Call(draw(8, "flat", "ppo", fixed={"kl_coef": 0.1, "entropy_coef": 0.02}), seed=8)
    call.check(call(skip_zero_advantages=True))


@both_forms
def test_one_advantage_per_sequence(linear):
    call = Call(draw(9, "padded", "ppo", linear=linear), seed=9)
    per_sequence = np.array([0.5, -1.25, 0.0, 2.0])
    call.case.batch.advantages = per_sequence[call.case.batch.sequence]
    call.check(call(torch.tensor(per_sequence).float()))


@pytest.mark.parametrize("dtype", RELATIVE)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_inplace_gives_the_same_gradient(loss_type, dtype):
    for upstream in (1.0, -0.5):
        plain, other = (Call(draw(10, "padded", loss_type), dtype, 10) for _ in range(2))
        expected = gradients_of(plain, upstream * plain().loss)
        base = other.leaves["rows"][0]
        scratch = base * 1  # as the model's logits: not a leaf
        other.views = [scratch[:, :-1]]
        out = other(inplace=True)
        assert_same(torch.autograd.grad(upstream * out.loss, [base]), expected)


@both_forms
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_active_row_is_a_connected_zero(reduction, loss_type, linear):
    case = draw(11, "padded", loss_type, reduction, linear=linear)
    case.batch.active[:] = False
    call = Call(case, seed=11)
    out = call(normalizer=None)
    assert out.loss.requires_grad
    assert not out.loss.detach().any()
    assert all(value.isfinite() for value in out.metrics.values())
    call.check(out)
    assert not any(leaf.grad.any() for leaf, _ in call.leaves.values())


@both_forms
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_an_empty_batch_is_a_connected_zero(shape, linear, backend):
    leaves = [torch.zeros(*shape, 8, requires_grad=True)] + [torch.randn(11, 8, requires_grad=True)] * linear
    labels, advantages = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape)
    rewards = torch.zeros(shape[0] if len(shape) == 2 else 1, 4)
    losses = (
        [ppg.policy_loss, ppg.linear_policy_loss][linear],
        [ppg.partial_policy_loss, ppg.linear_partial_policy_loss][linear],
    )
    for function, rest in zip(losses, ((advantages,), (rewards, labels, "full")), strict=True):
        for spec in (None, ppg.PolicyLossSpec("gspo")):
            out = function(*leaves, labels, *rest, spec=spec, old_logprobs=advantages, backend=backend)
            assert out.loss == 0
            assert out.logprobs.shape == out.entropy.shape == shape
            assert not any(g.any() for g in torch.autograd.grad(out.loss, leaves))
    logprobs = [ppg.token_logprobs, ppg.linear_token_logprobs][linear](*leaves, labels, backend=backend)
    assert logprobs.shape == shape
    assert not any(g.any() for g in torch.autograd.grad(logprobs.sum(), leaves))
    assert ppg.partial_returns(torch.zeros(0, 4), "full", backend=backend).shape == (0, 4)
    assert ppg.partial_returns(torch.zeros(3, 0), "full", backend=backend).shape == (3, 0)


@both_forms
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_under_one_normalizer_give_the_gradient_of_the_whole(loss_type, linear):
    call = Call(draw(13, "padded", loss_type, fixed={"temperature": 0.8}, linear=linear), seed=13)
    call.options["normalizer"] = torch.tensor(int(call.case.batch.active.sum()))
    (x, *head), options = call.views, call.options
    for half in (slice(0, 2), slice(2, 4)):
        here = {n: v[half] if isinstance(v, torch.Tensor) and v.dim() == 2 else v for n, v in options.items()}
        function = ppg.linear_policy_loss if linear else ppg.policy_loss
        function(x[half], *head, call.labels[half], call.advantages[half], **here).loss.backward()
    call.check_gradients(oracle.policy_loss(call.case.logits, call.case.batch)[3], 2e-5)


def gemms_keep_their_bits(N, V, D, dtype):
    """Whether the library's own products of these shapes do: on some processors MKL splits a long float32 sum among
    its threads."""
    x, w, d = torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype), torch.randn(N, V).to(dtype)
    found = []
    for count in (1, 2):
        torch.set_num_threads(count)
        found.append((d @ w, *(torch.mm(part.t(), x[: len(part)]) for part in (d, d[: N // 2], d[: N // 3]))))
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@both_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "V"), [(3000, 1009), (5, 130)])  # many blocks; fewer rows than a GEMM gives each thread
def test_the_same_bits_for_any_number_of_threads(N, V, dtype, linear):
    g = torch.Generator().manual_seed(1)
    leaves = [torch.randn(N, 8 if linear else V, generator=g), *[torch.randn(V, 8, generator=g)] * linear]
    leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    labels, advantages = torch.randint(V, (N,), generator=g), torch.randn(N, generator=g)
    runs, threads = [], torch.get_num_threads()
    for count in (1, 2, 2):
        torch.set_num_threads(count)
        for loss_type in ("ppo", "gspo"):
            spec = ppg.PolicyLossSpec(loss_type, entropy_coef=0.02)
            out = [ppg.policy_loss, ppg.linear_policy_loss][linear](
                *leaves, labels, advantages, old_logprobs=advantages - 5, spec=spec
            )
            runs.append((*out[:3], *out.metrics.values(), *torch.autograd.grad(3 * out.loss, leaves)))
    exact = not linear or gemms_keep_their_bits(N, V, 8, dtype)
    torch.set_num_threads(threads)
    for again, first in ((2, 0), (3, 1), (4, 0), (5, 1)):
        results, expected = (run if exact else run[: -len(leaves)] for run in (runs[again], runs[first]))
        assert_same(results, expected)
        for gradient, other in zip(runs[again][-len(leaves) :], runs[first][-len(leaves) :], strict=True):
            torch.testing.assert_close(gradient, other, rtol=1e-5, atol=1e-6)
    assert_same(runs[4], runs[2])  # as many threads: the same bits whatever the library does


@both_forms
@pytest.mark.parametrize("dtype", RELATIVE)
def test_a_row_does_not_depend_on_its_neighbours(dtype, linear):
    g = torch.Generator().manual_seed(2)
    N, V = 9, 1009
    x, weight = (
        torch.randn(N, 64 if linear else V, generator=g).to(dtype),
        [torch.randn(V, 64, generator=g).to(dtype)] * linear,
    )
    labels, function = torch.randint(V, (N,), generator=g), [ppg.token_logprobs, ppg.linear_token_logprobs][linear]
    together = function(x, *weight, labels)
    assert_same([function(x[n : n + 1], *weight, labels[n : n + 1])[0] for n in range(N)], together)


@pytest.mark.parametrize("trained", ["rows", "weight", "bias"])
@pytest.mark.parametrize("loss_type", ["ppo", "gspo"])
def test_only_what_requires_a_gradient_gets_one(loss_type, trained):
    call = Call(draw(17, "packed", loss_type, linear=True), seed=17)
    for name, (leaf, _) in call.leaves.items():
        leaf.requires_grad_(name == trained)
    call().loss.mul(-0.5).backward()
    expected = call.case.gradients(oracle.policy_loss(call.case.logits, call.case.batch, -0.5)[3])
    for name, (leaf, _) in call.leaves.items():
        assert (leaf.grad is not None) == (name == trained)
    close(call.leaves[trained][0].grad, expected[trained], f"d_{trained}")


@both_forms
def test_without_gradients_the_values_are_the_same(linear):
    call = Call(draw(18, "padded", "cispo", linear=linear), seed=18)
    expected = call()
    with torch.no_grad():
        out = call()
    assert not out.loss.requires_grad
    assert_same(out[:3], expected[:3])


def test_banned_tokens_have_probability_zero():
    case = draw(13, "flat", "ppo", fixed={"logit_softcap": 0.0, "entropy_coef": 0.03}, vocabulary=17)
    banned = np.random.default_rng(13).random(case.rows.shape) < 0.3
    banned[np.arange(len(banned)), case.batch.labels] = False
    case.rows = np.where(banned, -np.inf, case.rows)
    call = Call(case, seed=13)
    call.check(call())


COMPILED = [("ppo", False, "inductor"), ("gspo_turn", False, "aot_eager"), ("cispo", True, "aot_eager")]


@pytest.mark.parametrize(("loss_type", "linear", "compiler"), COMPILED)
def test_compiled_whole_equals_eager(loss_type, linear, compiler):
    torch._dynamo.reset()
    call = Call(draw(14, "padded", loss_type, "sequence_mean", linear=linear), seed=14)
    call.check(torch.compile(call.__call__, fullgraph=True, backend=compiler)(), -1.75)


def test_compiled_partial_policy_loss_and_logprobs_equal_eager():
    torch._dynamo.reset()
    call = Call(draw(15, "padded", "ppo"), seed=15)
    turn_ids, rewards = call.place(np.arange(24) % 6 - 1, torch.int64), torch.randn(4, 5)

    def both(x, labels, rewards, turn_ids):
        out = ppg.partial_policy_loss(
            x, labels, rewards, turn_ids, ppg.Lookahead(2), baseline="leave_one_out", group_ids=groups, **options
        )
        return out.loss, out.logprobs, *ppg.token_logprobs(x, labels, loss_mask=options["loss_mask"], entropy=True)

    groups, options = torch.tensor([0, 0, 1, 1]), {n: v for n, v in call.options.items() if n != "turn_ids"}
    compiled, results = torch.compile(both, fullgraph=True, backend="aot_eager"), []
    for function in (both, compiled):
        out = function(*call.views, call.labels, rewards, turn_ids)
        results.append((*out, *gradients_of(call, out[0] + out[2].sum() - 0.5 * out[3].sum())))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-6)
    with pytest.raises(IndexError, match="labels must be in"):
        compiled(*call.views, call.labels.clamp(max=0) + 500, rewards, turn_ids)


def test_what_a_masked_row_holds_as_temperature_does_not_matter():
    logits, labels, advantages = torch.randn(4, 11, requires_grad=True), torch.tensor([3, -100, 5, 1]), torch.ones(4)
    temperature = torch.tensor([0.5, torch.nan, 2.0, 0.0])
    spec = ppg.PolicyLossSpec(temperature=temperature)
    out = ppg.policy_loss(logits, labels, advantages, loss_mask=torch.tensor([1, 1, 1, 0]), spec=spec)
    out.loss.backward()
    assert out.loss.isfinite()
    assert (logits.grad[[1, 3]] == 0).all()
    with pytest.raises(ValueError, match=r"temperature must be finite and > 0.*got \[0.0\]"):
        ppg.policy_loss(logits, labels, advantages, spec=spec)

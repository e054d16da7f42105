"""The fused loss on every backend that fuses: every reduction, baseline, policy class, dtype and layout against the
contract's oracle."""

import itertools
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from contract_case import Call, by_turns, draw, upstream_of
from test_contract import CLASSES, turns_of

import ppg_fast as ppg
from ppg_fast import backends, ops
from ppg_fast.contract import Columns, FusedArguments, Reduction, Turns, Wanted
from ppg_fast.losses import LOSS_TYPES, SEQUENCE_LEVEL
from ppg_fast.spec import BASELINES, REDUCTIONS

TOKEN_LEVEL = [loss for loss in LOSS_TYPES if loss not in SEQUENCE_LEVEL]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MASKS = (
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bfloat16,
    torch.float16,
    torch.float32,
    torch.float64,
)

pytestmark = pytest.mark.parametrize("backend", backends.NAMES, indirect=True)


@pytest.fixture(autouse=True)
def fuses(backend):
    if not backends.fuses(backend):
        pytest.skip(f"{backend} does not fuse")


def moved(value, device):
    if isinstance(value, ppg.PolicyLossSpec):
        return replace(value, temperature=moved(value.temperature, device))
    return value.to(device) if isinstance(value, torch.Tensor) else value


def on(device, function, *arguments, **options):
    """The call with its tensors on the device and what it returns on the CPU."""
    out = function(*(moved(a, device) for a in arguments), **{name: moved(v, device) for name, v in options.items()})
    return ppg.PolicyLossOutput(*(t.cpu() for t in out[:3]), {name: v.cpu() for name, v in out.metrics.items()})


def run(call, backend, device, **more):
    return on(
        device, ppg.policy_loss, *call.views, call.labels, call.advantages, **{**call.options, **more}, backend=backend
    )


def partial_call(seed, name, layout, loss_type, reduction, dtype=torch.float32, on_policy=False):
    """A call, its arguments and options, advantages and active rows of the oracle; ids in another integer dtype each
    time."""
    call = Call(draw(seed, layout, loss_type, reduction, on_policy=on_policy), dtype, seed)
    batch, rng, gamma = call.case.batch, np.random.default_rng(seed), (0.9, 1.0, 0.7)[seed % 3]
    rewards, counts, policy_class, plain = turns_of(seed, name, B=4)
    groups, baseline = rng.integers(0, 2, 4) * 10**9, BASELINES[seed % 4]
    batch.turn = np.array([rng.integers(-1, counts[s]) for s in batch.sequence])
    batch.active &= batch.turn >= 0
    advantages = oracle.turn_advantages(oracle.partial_returns(rewards, plain, gamma, counts), groups, baseline, counts)
    batch.advantages = advantages[batch.sequence, batch.turn]
    integers = (torch.int64, torch.int32, torch.int16)
    options = {name: v for name, v in call.options.items() if name != "turn_ids"} | {
        "gamma": gamma,
        "baseline": baseline,
    }
    options |= {
        "group_ids": torch.tensor(groups).to(integers[seed % 2]),
        "turn_counts": torch.tensor(counts).to(integers[seed // 2 % 3]),
    }
    turn_ids = call.place(batch.turn, integers[seed // 3 % 3])
    return call, (*call.views, call.labels, torch.tensor(rewards).float(), turn_ids, policy_class), options


@pytest.mark.parametrize("loss_type", TOKEN_LEVEL)
def test_from_advantages(loss_type, backend, device):
    place, everywhere = TOKEN_LEVEL.index(loss_type), list(itertools.product(oracle.LAYOUTS, REDUCTIONS, (False, True)))
    for layout, reduction, on_policy in by_turns(everywhere, place, len(TOKEN_LEVEL), backend, device):
        seed = REDUCTIONS.index(reduction) * 12 + list(oracle.LAYOUTS).index(layout) * 3 + place
        call = Call(draw(seed, layout, loss_type, reduction, on_policy=on_policy), DTYPES[seed % 3], seed)
        skip = seed % 2 == 0
        skipped = skip & ~call.case.batch.live & (not call.case.batch.spec.needs_every_row)
        call.check(run(call, backend, device, skip_zero_advantages=skip), upstream_of(call.case, seed), skipped)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", CLASSES)
def test_from_rewards(name, reduction, backend, device):
    place = list(CLASSES).index(name) * 5 + REDUCTIONS.index(reduction)
    for seed, layout in ((place, "padded"), (place + 1, "packed")):
        call, arguments, options = partial_call(
            seed, name, layout, TOKEN_LEVEL[seed % 3], reduction, DTYPES[seed % 3], seed % 5 == 0
        )
        out = on(device, ppg.partial_policy_loss, *arguments, **options, backend=backend)
        call.check(out, upstream_of(call.case, seed))


@pytest.mark.parametrize("baseline", BASELINES)
def test_equal_returns_have_no_gradient(baseline, backend, device):
    rewards, labels = torch.full((3, 7), 0.1), torch.arange(21).view(3, 7) % 5
    logits = torch.randn(3, 7, 5, device=device, requires_grad=True)
    turns, groups = torch.arange(7, device=device).expand(3, 7), torch.zeros(3, dtype=torch.int64, device=device)
    options = {
        "gamma": 0.93,
        "baseline": baseline,
        "group_ids": groups,
        "skip_zero_advantages": True,
        "backend": backend,
    }
    out = ppg.partial_policy_loss(logits, labels.to(device), rewards.to(device), turns, "full", **options)
    out.loss.backward()
    assert (out.logprobs != 0).all() == (baseline == "none")
    assert bool(logits.grad.any()) == (baseline == "none")
    assert out.metrics["active_tokens"] == 21


@pytest.mark.parametrize("dtype", MASKS, ids=str)
def test_a_mask_of_any_dtype(dtype, backend, device):
    mask = torch.tensor([1.0, 0.0, -0.0, 0.0, 1.0, 1.0]).to(dtype)
    logits, labels, advantages = torch.randn(6, 11), torch.tensor([3, 99, 5, -100, 2, 7]), torch.ones(6)
    logits[~(mask != 0)] = torch.nan
    options = {"loss_mask": mask, "backend": backend, "reduction": "sum"}
    out = on(device, ppg.policy_loss, logits, labels, advantages, **options)
    kept = [0, 4, 5]
    expected = ppg.policy_loss(logits[kept], labels[kept], advantages[kept], reduction="sum", backend="reference")
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(out.logprobs[kept], expected.logprobs)
    assert not out.logprobs[1:4].any()


@pytest.mark.parametrize("skip", [True, False])
def test_dialogues_without_turns(skip, backend, device):
    """All of it is context: a connected zero; a count of turns that are not there is refused."""
    x, labels = (
        torch.randn(2, 3, 7, device=device, requires_grad=True),
        torch.ones(2, 3, dtype=torch.int64, device=device),
    )
    rewards, context = torch.zeros(2, 0, device=device), torch.full((2, 3), -1, device=device)
    options = {"skip_zero_advantages": skip, "backend": backend}
    out = ppg.partial_policy_loss(x, labels, rewards, context, "full", **options)
    out.loss.backward()
    assert out.loss == 0
    assert not x.grad.any()
    counts = torch.tensor([0, 1], device=device)
    with pytest.raises(ValueError, match=r"turn_counts must be in \[0, 0\], got 1"):
        ppg.partial_policy_loss(x, labels, rewards, context, "full", turn_counts=counts, validate=True, **options)


def test_strided_columns_are_read_in_place(backend, device):
    """`labels[:, 1:]` beside `logits[:, :-1]`, advantages (B,): as trainers have them."""
    B, L, V = 3, 6, 13
    logits, ids = torch.randn(B, L, V, device=device), torch.randint(V, (B, L), device=device)
    mask, old = torch.rand(B, L, device=device) < 0.7, torch.randn(L, B, device=device).T - 2
    advantages = torch.tensor([1.5, 0.0, -0.7], device=device)
    spec = ppg.PolicyLossSpec("ppo", clip_low=0.3, clip_high=0.4)
    views = logits[:, :-1], ids[:, 1:], advantages
    strided = ppg.policy_loss(*views, loss_mask=mask[:, 1:], old_logprobs=old[:, 1:], spec=spec, backend=backend)
    plain = logits[:, :-1].contiguous(), ids[:, 1:].contiguous(), advantages[:, None].expand(B, L - 1).contiguous()
    options = {"loss_mask": mask[:, 1:].contiguous(), "old_logprobs": old[:, 1:].contiguous(), "spec": spec}
    assert torch.equal(strided.loss, ppg.policy_loss(*plain, **options, backend=backend).loss)
    torch.testing.assert_close(strided.loss, ppg.policy_loss(*plain, **options, backend="reference").loss)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_active_row_is_a_connected_zero(reduction, backend, device):
    case = draw(11, "packed", "ppo", reduction)
    case.batch.active[:] = False
    call = Call(case, seed=11)
    out = run(call, backend, device, normalizer=None)
    assert out.loss.requires_grad
    assert not out.loss.detach().any()
    assert all(value.isfinite() for value in out.metrics.values())
    call.check(out)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_an_empty_batch_is_a_connected_zero(shape, backend, device):
    x = torch.zeros(*shape, 8, requires_grad=True, device=device)
    labels, advantages = torch.zeros(shape, dtype=torch.int64, device=device), torch.zeros(shape, device=device)
    rewards = torch.zeros(shape[0] if len(shape) == 2 else 1, 4, device=device)
    for function, rest in ((ppg.policy_loss, (advantages,)), (ppg.partial_policy_loss, (rewards, labels, "full"))):
        out = function(x, labels, *rest, backend=backend)
        assert out.loss == 0
        assert out.logprobs.shape == out.entropy.shape == shape
        assert not torch.autograd.grad(out.loss, x)[0].any()


def test_in_place_and_twice_and_without_gradients(backend, device):
    call = Call(draw(18, "padded", "cispo"), seed=18)
    expected = run(call, backend, device)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(run(call, backend, device)[:3], expected[:3], strict=True))
    (2 * expected.loss).backward()
    leaf, _ = call.leaves["rows"]
    gradient, leaf.grad = leaf.grad, None
    call.views = [call.views[0] * 1]
    (2 * run(call, backend, device, inplace=True).loss).backward()
    assert torch.equal(leaf.grad, gradient)
    call.views = [call.leaves["rows"][1](leaf)]
    loss = run(call, backend, device).loss
    torch.autograd.grad(2 * loss, leaf, retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated a second time"):
        torch.autograd.grad(loss, leaf)


def test_metrics_are_those_of_the_cpu_and_lazy(backend, device):
    for seed in range(3):
        call = Call(draw(seed, "padded", "ppo", fixed={"importance_cap": 1.2}), seed=seed)
        expected = run(call, "reference", "cpu", skip_zero_advantages=True).metrics
        options = {**call.options, "skip_zero_advantages": True, "backend": backend}
        options = {name: moved(v, device) for name, v in options.items()}
        labels = call.labels.to(device)
        metrics = ppg.policy_loss(call.views[0].to(device), labels, call.advantages.to(device), **options).metrics
        assert list(metrics) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(metrics[name].cpu(), value, rtol=1e-5, atol=1e-6)
        labels.fill_(0)
        assert torch.equal(metrics["entropy"].cpu(), dict(metrics)["entropy"].cpu())
        late = ppg.policy_loss(
            call.views[0].detach().to(device), labels, call.advantages.nan_to_num(0, 0, 0).to(device), backend=backend
        )
        labels.fill_(1)
        with pytest.raises(RuntimeError, match="labels was modified in place"):
            late.metrics["entropy"]


def test_the_op_is_well_formed_and_compiles_whole(backend, device):
    torch._dynamo.reset()
    call, arguments, options = partial_call(5, "lookahead", "padded", "ppo", "sequence_mean")
    options = {name: moved(v, device) for name, v in options.items()} | {"backend": backend}
    arguments = [moved(a, device) for a in arguments]

    def loss(x, labels, rewards, turn_ids):
        out = ppg.partial_policy_loss(x, labels, rewards, turn_ids, arguments[-1], **options)
        return out.loss, out.logprobs, out.metrics["entropy"]

    compiled, results = torch.compile(loss, fullgraph=True, backend="aot_eager"), []
    for function in (loss, compiled):
        out = function(*arguments[:-1])
        results.append((*out, *torch.autograd.grad(-1.75 * out[0], call.leaves["rows"][0])))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-6)
    with pytest.raises(IndexError, match="labels must be in"):
        compiled(arguments[0], arguments[1].clamp(max=0) + 500, *arguments[2:-1])


def op_arguments(device, backend, reduction, with_grad):
    x, labels, turns = (
        torch.randn(2, 3, 7, device=device),
        torch.arange(6).view(2, 3) % 7,
        torch.tensor([[0, 1, -1], [1, 1, 0]]),
    )
    columns = Columns(
        labels.to(device),
        torch.rand(2, 3, device=device) < 0.8,
        turns.to(device),
        None,
        torch.randn(2, 3, device=device),
        *(None,) * 3,
    )
    groups = torch.zeros(2, dtype=torch.int64, device=device)
    rewards = torch.randn(2, 2, device=device)
    given = Turns(rewards, None, None, None, groups, 2, 0, 0.9, "leave_one_out")
    arguments = FusedArguments(columns, given, Reduction(reduction, None, 2, None), ppg.PolicyLossSpec("ppo"), False)
    wanted = Wanted(entropy=True, score_norms=False, gradient=with_grad, validate=False)
    return x.requires_grad_(with_grad), *arguments.pack(), list(wanted), backend


@pytest.mark.parametrize(("reduction", "with_grad"), [("token_mean", True), ("none", True), ("sequence_sum", False)])
def test_opcheck(reduction, with_grad, backend, device):
    torch.library.opcheck(ops.policy_loss_op, op_arguments(device, backend, reduction, with_grad))


ONES, X, LABELS = torch.ones(2, 3), torch.randn(2, 3, 5), torch.tensor([[0, 1, 2], [3, 4, 0]])
PACKED = {"cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32)}
TURNS, REWARDS = torch.tensor([[0, 1, -1], [2, 3, 3]]), torch.ones(2, 4)
ERRORS = [  # the arguments of a loss (four of them: from rewards), options, error, rule and value
    ((X, LABELS + 1, ONES), {}, IndexError, r"labels must be in \[0, 5\).*5"),
    ((X, LABELS, ONES[0]), {}, ValueError, "advantages.*shape"),
    ((X, LABELS, ONES), {"loss_mask": ONES[0]}, ValueError, "loss_mask.*shape"),
    ((X, LABELS, ONES), {"reduction": "mean"}, ValueError, "reduction.*mean"),
    ((X, LABELS, ONES), {"normalizer": 0.0}, ValueError, "normalizer.*> 0"),
    ((X, LABELS, ONES), {"normalizer": torch.tensor(-2.0)}, ValueError, "normalizer.*-2"),
    ((X, LABELS, ONES), {"spec": ppg.PolicyLossSpec(kl_coef=0.1)}, ValueError, "KL term.*ref_logprobs"),
    ((X, LABELS, ONES), {"spec": ppg.PolicyLossSpec(temperature=-ONES)}, ValueError, "temperature.*-1"),
    (
        (X[0], LABELS[0], ONES[0]),
        {"cu_seqlens": torch.tensor([0], dtype=torch.int32)},
        ValueError,
        "cu_seqlens must rise",
    ),
    ((X[0], LABELS[0], ONES[0]), PACKED, ValueError, "cu_seqlens must rise from 0.*3.*5"),
    ((X, LABELS, REWARDS, TURNS + 1), {}, ValueError, "turn_ids must be.*4 at row 4"),
    ((X, LABELS, REWARDS, TURNS - 1), {}, ValueError, "turn_ids must be.*-2"),
    (
        (X, LABELS, REWARDS, TURNS),
        {"turn_counts": torch.tensor([4, 3])},
        ValueError,
        "turn_ids must be.*3 at row 4 .* 3 turns",
    ),
    ((X, LABELS, REWARDS, TURNS.float()), {}, ValueError, "turn_ids must be integers"),
    ((X, LABELS, REWARDS[:1], TURNS), {}, ValueError, "one row per sequence.*1 rows for 2"),
    ((X, LABELS, REWARDS / 0, TURNS), {}, ValueError, "rewards must be finite"),
    ((X, LABELS, REWARDS, TURNS), {"baseline": "group_std"}, ValueError, "needs group_ids"),
]


@pytest.mark.parametrize(("arguments", "options", "error", "words"), ERRORS, ids=[words for *_, words in ERRORS])
def test_errors_name_the_rule_and_the_value(arguments, options, error, words, backend, device):
    function, rest = (ppg.partial_policy_loss, ("full",)) if len(arguments) == 4 else (ppg.policy_loss, ())
    with pytest.raises(error, match=words):
        on(device, function, *arguments, *rest, **options, validate=True, backend=backend)


def test_a_logprob_has_the_bits_of_the_pair(backend, device):
    call = Call(draw(21, "cube", "ppo", fixed={"temperature": 0.8, "entropy_coef": 0.02}), seed=21)
    out, spec = run(call, backend, device), call.options["spec"]
    options = {
        "temperature": spec.temperature,
        "logit_softcap": spec.logit_softcap,
        "backend": backend,
        "entropy": True,
    }
    mask = call.options["loss_mask"].to(device)
    logprobs, entropy = ppg.token_logprobs(call.views[0].to(device), call.labels.to(device), loss_mask=mask, **options)
    assert torch.equal(out.logprobs, logprobs.cpu())
    assert torch.equal(out.entropy, entropy.cpu())


def test_one_scale_for_all_rows(backend, device):
    x = torch.randn(2, 3, 19, dtype=torch.bfloat16, device=device)
    expected = (x.float() * -0.3).to(x.dtype)
    backends.load(backend).scale_rows(x, torch.tensor([-0.3], device=device), x)
    assert torch.equal(x, expected)


def test_in_a_cuda_graph(backend, device):
    if device != "cuda":
        pytest.skip("needs a GPU")
    calls = [partial_call(seed, "lookahead", "padded", "ppo", "sequence_mean") for seed in (5, 17)]
    options = {name: moved(v, device) for name, v in calls[0][2].items()} | {"backend": backend}
    held = [moved(a, device).detach().clone() for a in calls[0][1][:-1]]
    held[0].requires_grad_()

    def loss():
        out = ppg.partial_policy_loss(*held, "lookahead:3", **options)
        return out, *torch.autograd.grad(out.loss, held[0])

    with torch.cuda.stream(torch.cuda.Stream()):
        loss()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, gradient = loss()
    for shift in (1, 2):
        with torch.no_grad():
            held[2].copy_(torch.randn(held[2].shape) + shift)
        graph.replay()
        expected, dlogits = loss()
        assert torch.equal(out.loss, expected.loss)
        assert torch.equal(gradient, dlogits)
        assert torch.equal(out.metrics["entropy"], expected.metrics["entropy"])

"""On a GPU: every kernel, dtype and plan against float64, the public contract, graphs, launches, syncs, memory. `make
gpu` runs it."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from closeness import assert_as_good_as
from contract_case import Call, draw, upstream_of
from ppg_fast.bench.gpu import counts

import ppg_fast as ppg
from ppg_fast import backends, reference
from ppg_fast.contract import Chunks, PerRow, RowArguments, Wanted
from ppg_fast.losses import LOSS_TYPES
from ppg_fast.ops.linear_policy_loss import _loss_and_gradients
from ppg_fast.spec import REDUCTIONS

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# one CTA in two passes, clusters of 1, 2, 4 and 8, rows that are not aligned, two passes again; a step on either side
# of a change of plan
LENGTHS = (
    2,
    7,
    100,
    1000,
    4099,
    8192,
    8193,
    32000,
    50257,
    65537,
    101377,
    128256,
    151669,
    151936,
    202752,
    262144,
    330001,
    700001,
)
SPECS = (
    ppg.PolicyLossSpec("ppo", clip_low=0.17, clip_high=0.29, temperature=0.8),
    ppg.PolicyLossSpec("cispo", clip_high=0.31, entropy_coef=0.05, kl_coef=0.13, kl_estimator="k2"),
    ppg.PolicyLossSpec("reinforce", kl_coef=0.09, kl_estimator="k1", logit_softcap=12.0, temperature=1.4),
    ppg.PolicyLossSpec(
        "ppo", clip_low=0.15, clip_high=0.3, dual_clip=2.5, kl_coef=0.11, importance_cap=1.1, logit_softcap=9.0
    ),
)

PATHS = list(counts.calls("cpu", True, "reference"))


@pytest.fixture(autouse=True)
def _as_users_run():
    """No fills of fresh memory, which would be launches of their own."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=("cuda", "triton"))
def gpu_backend(request) -> str:
    if reason := backends.why_not(request.param):
        pytest.skip(reason)
    return request.param


def rows(V, dtype, N=9, seed=0, strided=False, spec=None):
    """Logits (1, N, V) with NaN in masked rows, labels, advantages with zeros, and the log-probs of three policies near
    by."""
    spec, draws = spec or ppg.PolicyLossSpec(), torch.Generator("cuda").manual_seed(seed)
    options = {"generator": draws, "device": "cuda"}
    memory = (3 * torch.randn(1, N + 1, V + 3, **options)).to(dtype)
    logits = memory[:, :-1, 1 : V + 1] if strided else memory[:, :-1, :V].contiguous()
    labels = torch.randint(V, (1, N), **options)
    at = torch.arange(N, device="cuda")
    advantages = torch.randn(1, N, **options).where(at % 4 != 2, torch.tensor(0.0, device="cuda"))
    labels = labels.where(at % 4 != 3, torch.tensor(-100, device="cuda"))
    truth = reference.token_logprobs(logits[0].double(), labels[0], spec.temperature, spec.logit_softcap)[0].float()[
        None
    ]
    shifts = torch.tensor([-0.5, -0.05, 0.05, 0.5], device="cuda")[torch.randint(4, (3, 1, N), **options)]
    logits[0, at % 4 == 3] = torch.nan
    behind = {
        name: truth - shift
        for name, shift in zip(("old_logprobs", "ref_logprobs", "rollout_logprobs"), shifts, strict=True)
    }
    return logits, labels, advantages, behind


def textbook(logits, labels, advantages, behind, spec, dtype):
    """Loss, log-prob, entropy and dlogits by plain PyTorch in ``dtype`` on the device."""
    x = logits.detach().to(dtype).requires_grad_()
    columns = (behind[name][0].to(dtype) for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs"))
    out = reference.policy_loss(x[0], labels[0], advantages[0].to(dtype), None, *columns, spec)
    grad = torch.autograd.grad(out[0].sum(), x)[0][0]
    return {"loss": out[0], "logprobs": out[1], "entropy": out[2], "dlogits": grad}


# ---- values ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", LENGTHS)
def test_every_plan_agrees_with_float64(gpu_backend, V, dtype):
    for number, spec in enumerate(SPECS if V < 70000 else SPECS[:2], LENGTHS.index(V)):
        inplace, strided = number % 2 == 0, number % 4 < 2
        logits, labels, advantages, behind = rows(V, dtype, seed=number, strided=strided, spec=spec)
        plain, truth = (textbook(logits, labels, advantages, behind, spec, d) for d in (torch.float32, torch.float64))
        x = logits.requires_grad_()
        out = ppg.policy_loss(
            x, labels, advantages, spec=spec, reduction="none", inplace=inplace, backend=gpu_backend, **behind
        )
        (grad,) = torch.autograd.grad(out.loss.sum(), x)
        masked = (labels == -100)[0]
        for name, actual in (
            ("loss", out.loss[0]),
            ("logprobs", out.logprobs[0]),
            ("entropy", out.entropy[0]),
            ("dlogits", grad[0]),
        ):
            keep = ~masked
            assert_as_good_as(
                actual[keep], plain[name][keep].cpu(), truth[name][keep].double().cpu(), f"{name} of {spec.loss_type}"
            )
        assert (grad[0][masked] == 0).all()
        assert (out.logprobs[0][masked] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [100, 32000, 151669, 262144])
def test_the_pair_agrees_with_float64(gpu_backend, V, dtype):
    logits, labels, _, _ = rows(V, dtype, strided=True)
    keep = (labels != -100)[0]
    upstream = torch.randn(2, labels.numel(), device="cuda")
    truth = logits[0].double().requires_grad_()
    expected = reference.token_logprobs(truth[keep], labels[0][keep], 0.9, 11.0)
    (d_truth,) = torch.autograd.grad((expected[0] * upstream[0, keep] + expected[1] * upstream[1, keep]).sum(), truth)
    x = logits.requires_grad_()
    actual = ppg.token_logprobs(x, labels, entropy=True, temperature=0.9, logit_softcap=11.0, backend=gpu_backend)
    (d_x,) = torch.autograd.grad((actual[0][0] * upstream[0] + actual[1][0] * upstream[1]).sum(), x)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a[0][keep].double(), e, rtol=2e-5, atol=2e-5)
    assert (d_x[0][~keep] == 0).all()
    worst = (d_x[0][keep].double() - d_truth[keep]).abs().max() / d_truth[keep].abs().max()
    assert worst < 3 * torch.finfo(dtype).eps + 1e-5


def test_offsets_beyond_32_bits(gpu_backend):
    """2^32 elements and more: the last rows are those of a small batch, bit for bit."""
    N, V = 70000, 65536
    logits = torch.empty(1, N, V, dtype=torch.bfloat16, device="cuda")
    small, labels, advantages, _ = rows(V, torch.bfloat16)
    logits[:, -small.shape[1] :] = small
    many = torch.full((1, N), -100, device="cuda")
    many[:, -small.shape[1] :] = labels
    far = torch.zeros(1, N, device="cuda")
    far[:, -small.shape[1] :] = advantages
    out = ppg.policy_loss(logits.requires_grad_(), many, far, inplace=True, backend=gpu_backend)
    (grad,) = torch.autograd.grad(out.loss, logits)
    near = ppg.policy_loss(small.requires_grad_(), labels, advantages, backend=gpu_backend)
    (expected,) = torch.autograd.grad(near.loss, small)
    assert torch.equal(out.logprobs[:, -small.shape[1] :], near.logprobs)
    assert torch.equal(grad[:, -small.shape[1] :], expected)
    assert not grad[:, : -small.shape[1] : 997].any()


@pytest.mark.parametrize("V", [1000, 32000, 128256, 262144])
def test_the_same_bits_every_time_and_in_every_batch(gpu_backend, V):
    logits, labels, advantages, behind = rows(V, torch.bfloat16, N=300, spec=SPECS[0])
    options = {"spec": SPECS[0], "backend": gpu_backend, "normalizer": 7.0}

    def call(some):
        x = logits[:, some].clone().requires_grad_()
        out = ppg.policy_loss(
            x, labels[:, some], advantages[:, some], **{k: v[:, some] for k, v in behind.items()}, **options
        )
        return out.loss.detach(), out.logprobs, torch.autograd.grad(out.loss, x)[0]

    first = call(slice(None))
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(call(slice(None)), first, strict=True))
    for n in (0, 5, 77, 299):
        alone = call(slice(n, n + 1))
        assert torch.equal(alone[1][:, 0], first[1][:, n])
        assert torch.equal(alone[2][:, 0], first[2][:, n])


def test_returns_agree_with_the_cpu(gpu_backend):
    rewards, counts = torch.randn(50, 300), torch.randint(0, 301, (50,))
    ids = torch.arange(300).div(7, rounding_mode="floor").expand(50, 300)
    for policy_class, gamma in product(("greedy", "lookahead:5", "segment:11", "full", ppg.Segment(ids)), (1.0, 0.9)):
        expected = ppg.partial_returns(rewards, policy_class, gamma, counts, backend="reference")
        on = ppg.Segment(ids.cuda()) if isinstance(policy_class, ppg.Segment) else policy_class
        actual = ppg.partial_returns(rewards.cuda(), on, gamma, counts.cuda(), backend=gpu_backend)
        torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-5)


# ---- the public contract, against the oracle -------------------------------------------------------------------------
class OnGpu(Call):
    """A call of the contract on the device. Its leaves stay where they are: gradients come back to them."""

    def __init__(self, case, backend, dtype=torch.float32, seed=0):
        super().__init__(case, dtype, seed)

        def move(value):
            return value.cuda() if isinstance(value, torch.Tensor) and value.dim() else value

        self.views = [view(leaf.cuda()) for leaf, view in self.leaves.values()]
        self.options = {name: move(value) for name, value in self.options.items()} | {"backend": backend}
        if case.bias is not None:
            self.options["bias"] = self.views.pop()
        spec = self.options["spec"]
        if isinstance(spec.temperature, torch.Tensor):
            self.options["spec"] = replace(spec, temperature=spec.temperature.cuda())
        self.labels, self.advantages = self.labels.cuda(), self.advantages.cuda()

    def __call__(self, *arguments, **more):
        out = super().__call__(*arguments, **more)
        return out._replace(loss=out.loss.cpu(), logprobs=out.logprobs.cpu(), entropy=out.entropy.cpu())


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("layout", ["flat", "packed", "padded", "cube"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_contract(gpu_backend, loss_type, layout, linear):
    for seed, (reduction, on_policy) in enumerate(product(REDUCTIONS, (False, True))):
        case = draw(seed, layout, loss_type, reduction, linear=linear, on_policy=on_policy)
        call = OnGpu(case, gpu_backend, seed=seed)
        upstream = upstream_of(case, seed)
        call.check(call(), upstream)


# ---- graphs, launches, syncs, memory ---------------------------------------------------------------------------------
@pytest.mark.parametrize("path", PATHS)
def test_a_graph_replays_with_new_numbers(gpu_backend, path):
    """Captured once, replayed after the inputs have changed in place: the values of an eager call."""
    if path == "hidden states to loss and gradients":
        pytest.skip("counts its rows on the host; the bounded call is the one to capture")
    leaves = {}
    call = counts.calls("cuda", True, gpu_backend)[path]
    for cell in call.__closure__ or ():
        found = cell.cell_contents if isinstance(cell.cell_contents, tuple) else (cell.cell_contents,)
        leaves |= {id(t): t for t in found if isinstance(t, torch.Tensor) and t.is_floating_point()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for round in range(3):
        with torch.no_grad():
            for tensor in leaves.values():
                tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(round)))
        graph.replay()
        replayed = [t.clone() for t in captured]
        for a, e in zip(replayed, call(), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("V", [1000, 32000, 128256])
def test_overlapped_launches_read_nothing_too_early(V):
    """Calls on the heels of one another, over the memory of the last one, behind the kernel that writes their logits:
    the bits of calls that wait for one another."""
    S, L, T, device = 16, 64, 5, "cuda"
    batches = []
    for seed in range(2):
        draws = torch.Generator(device).manual_seed(seed)
        logits = torch.randn(S, L, V, generator=draws, device=device).bfloat16()
        labels = torch.randint(V, (S, L), generator=draws, device=device)
        turn_ids = torch.randint(-1, T, (S, L), generator=draws, device=device)
        batches.append((logits, labels, torch.randn(S, T, generator=draws, device=device), turn_ids))
    options = {"group_ids": torch.arange(S, device=device) // 4, "baseline": "leave_one_out"}

    def call(logits, *rest):
        x = (-logits).neg_().requires_grad_()
        loss = ppg.partial_policy_loss(x, *rest, "lookahead:2", **options, backend="cuda").loss
        return loss.detach(), torch.autograd.grad(loss, x)[0]

    expected = []
    for batch in batches:
        torch.cuda.synchronize()
        expected.append(call(*batch))
    wrong = torch.zeros((), dtype=torch.int64, device=device)
    for round in range(40):
        for got, want in zip(call(*batches[round % 2]), expected[round % 2], strict=True):
            wrong += (got != want).sum()
    assert not wrong


MOST_LAUNCHES = {"rewards and logits to loss and dlogits": 2, "advantages and logits to loss and dlogits": 2}


@pytest.mark.parametrize("path", MOST_LAUNCHES)
def test_launches(path):
    """To the loss and dlogits. The backward pass has two more: autograd makes a 1, and dlogits is multiplied by it, or
    rather is not."""
    call = counts.calls("cuda", False)[path]
    call()
    names = counts.launches(lambda: call(False))
    assert len(names) <= MOST_LAUNCHES[path], names
    if torch.cuda.get_device_capability()[0] >= 9:
        assert any("onepass" in name for name in names), (
            f"clusters do not fit, or the build is none for Hopper: {names}"
        )
    assert len(counts.launches(call)) <= MOST_LAUNCHES[path] + 2


@pytest.mark.parametrize("path", PATHS)
def test_syncs(gpu_backend, path):
    call = counts.calls("cuda", True, gpu_backend)[path]
    call()
    assert counts.syncs(call) <= (1 if path == "hidden states to loss and gradients" else 0)


@pytest.mark.parametrize("V", [32000, 31987])
@pytest.mark.parametrize("chunk", [512, 2048])
def test_the_head_is_lean_and_right(V, chunk):
    """Peak memory: a chunk of logits and what comes out; d_weight also in float32, where more than one chunk adds to
    it. And 16-bit GEMMs alone."""
    from torch.utils._python_dispatch import TorchDispatchMode

    N, D = 2048, 512
    hidden = torch.randn(N, D, dtype=torch.bfloat16, device="cuda").requires_grad_()
    weight = (torch.randn(V, D, device="cuda") * 0.1).bfloat16().requires_grad_()
    labels, advantages = torch.randint(V, (N,), device="cuda"), torch.randn(N, device="cuda")

    def call():
        out = ppg.linear_policy_loss(hidden, weight, labels, advantages, chunk_rows=chunk)
        return out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, weight))

    first = call()
    del first
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, d_hidden, d_weight = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    total = 4 if chunk < N else 2  # bytes of a weight's gradient while the chunks are there
    allowed = chunk * (V + 64) * 2 + V * D * total + 2 * N * D * 2 + 6 * chunk * D * 2 + 2**22
    assert peak <= max(allowed, V * D * (total + 2) + 2 * N * D * 2 + 2**22), (peak, allowed)
    x, w = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    truth = ppg.policy_loss((x @ w.t()).float(), labels, advantages, backend="reference")
    t_hidden, t_weight = torch.autograd.grad(truth.loss, (x, w))
    assert abs(float(loss - truth.loss)) < 2e-2
    for actual, expected in ((d_hidden, t_hidden), (d_weight, t_weight)):
        assert (actual.double() - expected).norm() / expected.norm() < 2e-2

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_", "bmm"):
                seen.append([t.dtype for t in arguments[-2:] if isinstance(t, torch.Tensor)])
            return function(*arguments, **(keywords or {}))

    rows = RowArguments(labels, PerRow(advantages, *[None] * 5), ppg.PolicyLossSpec())
    flags = list(Wanted(entropy=True, score_norms=False, gradient=True, validate=False))
    plan = [True, True, False], Chunks(chunk, N).pack(), backends.default("cuda")
    with torch.no_grad(), Watch():
        _loss_and_gradients(hidden, weight, None, *rows.pack(), flags, *plan)
    assert len(seen) == 3 * N // chunk
    assert {dtype for pair in seen for dtype in pair} == {torch.bfloat16}


def test_another_stream_is_followed(gpu_backend):
    """The kernels go to torch's current stream: work queued there before them is seen, and work after them waits."""
    logits, labels, advantages, _ = rows(32000, torch.bfloat16, N=64)
    expected = ppg.policy_loss(logits, labels, advantages, backend=gpu_backend).logprobs
    side = torch.cuda.Stream()
    late = torch.zeros_like(logits)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        late.copy_(logits)
        actual = ppg.policy_loss(late, labels, advantages, backend=gpu_backend).logprobs.clone()
    side.synchronize()
    assert torch.equal(actual, expected)

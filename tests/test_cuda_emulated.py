"""The CUDA kernels and launchers under an emulator on the CPU: every plan, schedule, alignment and placement, and
faults that must show."""

import itertools
import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import LOSSES, TERMS
from emulator import build as emulator
from emulator.cases import Case, columns, run, shortest_ring, strided

from ppg_fast import reference
from ppg_fast.spec import PolicyLossSpec

if why_not := emulator.why_not():
    pytest.skip(why_not, allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ONE_PASS = [(cluster, threads) for cluster in (1, 2, 4, 8) for threads in (256, 512)]
PLANS = [(0, 128), (0, 512), *ONE_PASS]  # (cluster, threads); cluster 0: two passes
# less than a vector, a vector, a slice, a chunk; none a multiple of the next
LENGTHS = (1, 2, 7, 8, 100, 1000, 4099, 9001, 12289)
SPECS = (
    PolicyLossSpec(),
    PolicyLossSpec(
        "ppo",
        clip_low=0.17,
        clip_high=0.29,
        dual_clip=2.5,
        kl_coef=0.11,
        kl_estimator="k3",
        entropy_coef=0.07,
        temperature=1.3,
    ),
    PolicyLossSpec("ppo", clip_low=0.17, clip_high=0.29, importance_cap=1.1, temperature=0.8),
    PolicyLossSpec("cispo", clip_high=0.23, kl_coef=0.13, kl_estimator="k2", importance_cap=1.07),
    PolicyLossSpec("reinforce", kl_coef=0.09, kl_estimator="k1", logit_softcap=12.0, temperature=1.4),
    PolicyLossSpec("cispo", clip_high=0.31, entropy_coef=0.05, logit_softcap=9.0),
    PolicyLossSpec("ipo", clip_high=0.02, log_ratio_coef=0.04, importance_floor=0.9, temperature=0.9),
    PolicyLossSpec("dppo_kl", clip_high=1e-3, ratio_cap=1.1, z_coef=2e-3, logit_softcap=11.0),
    PolicyLossSpec("sapo", kl_coef=0.11, kl_estimator="k3_unbiased", kl_cap=0.3, max_log_ratio=0.15),
)


class Emulated(emulator.Control):
    def __init__(self) -> None:
        library = emulator.build()
        torch.ops.load_library(library)
        super().__init__(library)
        self.ops = torch.ops.ppg_fast_emulated


@pytest.fixture(scope="session")
def loaded():
    return Emulated()


@pytest.fixture
def emulated(loaded):
    loaded.take_stats()
    yield loaded
    loaded.set()


def force(emulated, plan, case, spare=0, **how):
    cluster, threads = plan
    slots = shortest_ring(case, cluster) + spare if cluster else 0
    emulated.set(cluster=cluster, threads=threads, slots=slots, **how)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_plan_agrees_with_the_reference(emulated, plan):
    draw = random.Random(str(plan))
    for V in (100, 1000, 4099) if plan == (8, 512) else LENGTHS * (1 if plan[0] == 8 else 2):
        for dtype in DTYPES:
            shift = draw.randrange(9)
            # that kernel does not exist
            spec = draw.choice([s for s in SPECS if not (s.logit_softcap and plan[1] == 256)])
            out = draw.choice((None, shift, draw.randrange(9)))
            holes = V > 8 and not spec.logit_softcap and draw.random() < 0.3
            case = Case(
                V, dtype, spec, shift, draw.choice((0, 3, 8)), out, on_policy=draw.random() < 0.3,
                row_temperatures=draw.random() < 0.4,
                entropy=draw.random() < 0.5, holes=holes, score_norm=draw.random() < 0.4,
                likelihood=draw.random() < 0.3,
            )  # fmt: skip
            how = {"resident": draw.randrange(1, 4), "seed": draw.randrange(1 << 20), "mode": draw.randrange(3)}
            force(emulated, plan, case, draw.randrange(3), **how)
            try:
                run(emulated.ops, case)
            except (AssertionError, RuntimeError) as error:
                raise AssertionError(f"{case}, {how}: {error}") from error
            assert emulated.take_stats().cluster == plan[0]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_and_term(emulated, loss):
    for place, terms in enumerate(TERMS):
        spec = replace(LOSSES[loss], **TERMS[terms])
        case = Case(7 + 31 * (place % 2), torch.float32, spec, likelihood=place % 3 == 0)
        force(emulated, ((0, 128), (1, 512))[place % 2], case)
        run(emulated.ops, case)


@pytest.mark.parametrize("mode", [0, 1, 2], ids=("eager", "random", "late"))
@pytest.mark.parametrize("plan", [(1, 256), (2, 512), (4, 256)], ids=str)
def test_any_delivery_order(emulated, plan, mode):
    for seed in range(4):
        case = Case(12289, shift=3 * seed % 8, out=3 * seed % 8)
        force(emulated, plan, case, spare=seed % 2, resident=1, seed=seed, mode=mode)
        run(emulated.ops, case)


def test_a_slice_of_several_chunks_in_a_cluster_of_8(emulated):
    case = Case(33001, torch.float32, shift=1, gap=2)
    force(emulated, (8, 256), case, resident=1)
    assert shortest_ring(case, 8) == 2
    run(emulated.ops, case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", [(0, 128), (0, 512), (1, 256), (2, 512), (4, 256)], ids=str)
def test_same_bits_for_any_schedule_alignment_ring_and_batch(emulated, plan, dtype):
    case = Case(5003, dtype, SPECS[1], out=0)
    force(emulated, plan, case)
    whole = run(emulated.ops, case)
    for k in range(3):
        other = replace(case, shift=(3 * k + 1) % 8, out=(None, (3 * k + 1) % 8, k)[k], gap=k)
        force(emulated, plan, other, spare=k, resident=1 + k, seed=100 + k, mode=k)
        assert run(emulated.ops, other).same_bits(whole)
    force(emulated, plan, case)
    assert run(emulated.ops, replace(case, score_norm=True)).same_bits(whole)
    alone = run(emulated.ops, replace(case, rows=(4,)))
    assert torch.equal(alone.logprob[0], whole.logprob[4])
    assert torch.equal(alone.dlogits[0], whole.dlogits[4])


@pytest.mark.parametrize(
    ("major", "V", "dtype", "softcap", "plan"),
    [
        (9, 4099, torch.bfloat16, 0.0, (0, 128)),  # a row of one chunk stays in L1
        (9, 32000, torch.bfloat16, 0.0, (1, 320)),
        (9, 32000, torch.bfloat16, 9.0, (1, 576)),
        (9, 151669, torch.bfloat16, 0.0, (2, 576)),
        (9, 262144, torch.float16, 0.0, (4, 576)),
        (9, 330000, torch.float32, 0.0, (0, 512)),  # fits no cluster
        (8, 32000, torch.float32, 0.0, (0, 512)),  # sm_80 has no clusters
    ],
)
def test_the_plan_of_a_real_device(emulated, major, V, dtype, softcap, plan):
    emulated.set(major=major, resident=1, mode=2)
    spec = PolicyLossSpec("ppo", clip_low=0.1, logit_softcap=softcap)
    run(emulated.ops, Case(V, dtype, spec, shift=V % 3, rows=(2, 1, 5), entropy=False))
    stats = emulated.take_stats()
    assert (stats.cluster, stats.block) == plan
    ends = 2 * max(1, plan[0])
    assert stats.vector_stores >= 3 * (V * dtype.itemsize // 16 - ends), "the gradient is written by 128-bit stores"


def sweep_arguments(x, labels):
    return x, labels, None, 1.0, 0.0


@pytest.mark.parametrize("plan", [(0, 128), (1, 256), (2, 512)], ids=str)
def test_masked_rows_are_not_read(emulated, plan):
    x = torch.full((1, 4, 4096), torch.nan)
    labels = torch.full((4,), -1)
    emulated.set(cluster=plan[0], threads=plan[1], slots=3)
    zeros = [torch.full(shape, torch.nan) for shape in ((4,), (4,), (4, 2))]
    emulated.ops.logprobs_fwd(*sweep_arguments(x, labels), *zeros)
    g = torch.ones(4)
    emulated.ops.logprobs_bwd(x, labels, zeros[2], zeros[1], [g, g, g], None, 1.0, 0.0, x)
    stats = emulated.take_stats()
    assert (stats.copied_bytes, stats.vector_loads) == (0, 0)
    assert not any(values.any() for values in zeros)
    assert not x.view(torch.uint8).any()


@pytest.mark.parametrize("softcap", [0.0, 9.0])
# two CTAs an SM; a cluster; one whose ring is a slot shorter with a score norm
@pytest.mark.parametrize("V", [32000, 151669, 172000])
def test_a_score_norm_changes_no_plan(emulated, V, softcap):
    """So that a log-prob has the same bits with and without one."""
    case = Case(V, torch.float32, PolicyLossSpec(logit_softcap=softcap), rows=(0, 2))
    emulated.set(resident=1)
    without, plan = run(emulated.ops, case), emulated.take_stats()
    assert run(emulated.ops, replace(case, score_norm=True)).same_bits(without)
    stats = emulated.take_stats()
    assert (stats.cluster, stats.block) == (plan.cluster, plan.block)
    assert stats.sends == 2 * plan.sends, "4 bytes more for every 16"


@pytest.mark.parametrize("plan", [(0, 128), (2, 256)], ids=str)
def test_a_logprob_has_the_same_bits_with_and_without_a_loss(emulated, plan):
    """So that the ratio of a first on-policy step is exactly 1."""
    case = Case(5003, torch.float32, out=1)
    force(emulated, plan, case)
    with_loss = run(emulated.ops, case)
    c = columns(case)
    logprob, entropy, lse = torch.empty(6), torch.empty(6), torch.empty(6, 2)
    emulated.ops.logprobs_fwd(*sweep_arguments(c["logits"].view(2, 3, -1), c["labels"]), logprob, entropy, lse)
    assert torch.equal(logprob, with_loss.logprob)
    assert torch.equal(entropy, with_loss.entropy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("placement", ["in place", "same alignment", "other alignment"])
def test_logprobs_backward(emulated, dtype, placement):
    for V, shift, softcap, with_entropy, with_lse in (
        (1, 2, 0.0, True, True),
        (100, 5, 8.0, True, False),
        (1003, 3, 0.0, False, True),
        (4099, 0, 9.0, False, False),
    ):
        out = {"in place": None, "same alignment": shift, "other alignment": shift + 1}[placement]
        case = Case(V, dtype, shift=shift, gap=3, out=out)
        generator = torch.Generator().manual_seed(V)
        x, _ = strided(case, shift)
        x.copy_(torch.randn(2, 3, V, generator=generator) * 3)
        labels = torch.randint(V, (6,), generator=generator)
        g, h, t, d_lse = (torch.rand(6, generator=generator) + 0.5 for _ in range(4))
        labels[1], g[2], h[2], d_lse[2], g[3], h[3] = -1, 0.0, 0.0, 0.0, 0.0, 0.0
        d_lse = d_lse if with_lse else None
        truth_in = x.double().flatten(0, 1).requires_grad_()
        logprob, entropy = reference.token_logprobs(truth_in, labels, t.double(), softcap)
        wanted = (logprob * g).sum() + ((entropy * h).sum() if with_entropy else 0)
        if d_lse is not None:
            wanted = wanted + (reference.log_sum_exps(truth_in, labels, t.double(), softcap) * d_lse).sum()
        (want,) = torch.autograd.grad(wanted, truth_in)
        got = [torch.empty(6), torch.empty(6), torch.empty(6, 2)]
        emulated.ops.logprobs_fwd(x, labels, t, 1.0, softcap, *got)
        dlogits = x if case.out is None else strided(case, case.out)[0]
        live_bytes = (4 if with_lse else 3) * V * dtype.itemsize
        emulated.take_stats()
        with_ent = (got[1], [g, h, d_lse]) if with_entropy else (None, [g, None, d_lse])
        emulated.ops.logprobs_bwd(x, labels, got[2], *with_ent, t, 1.0, softcap, dlogits)
        stats = emulated.take_stats()
        torch.testing.assert_close(got[0].double(), logprob.detach(), rtol=5e-6, atol=5e-6)
        torch.testing.assert_close(got[1].double(), entropy.detach(), rtol=5e-6, atol=5e-6)
        torch.testing.assert_close(dlogits.reshape(6, V).double(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
        assert not dlogits[0, 1:].any()
        if placement != "other alignment" and V > 1000:
            assert stats.vector_loads * 16 >= live_bytes - 4 * 32, "logits are read by 128-bit loads"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_scaled(emulated, dtype):
    """Each by its own number or all by one, in place or from float32, at any alignment of both sides; nothing beside
    them is touched."""
    for V, shift, out, one in itertools.chain(
        itertools.product((1, 9, 1003), (0, 3), (None, 0, 5), (False, True)),
        ((16_403, 1, 6, True), (40_001, 0, 0, True)),
    ):
        generator = torch.Generator().manual_seed(V)
        rows, memory = strided(
            Case(V, dtype if out is None else torch.float32, shift=shift, gap=0 if V > 2000 else 5), shift
        )
        rows.copy_(torch.randn(2, 3, V, generator=generator))
        scale = torch.tensor([0.3]) if one else torch.tensor([1.0, 0.0, 0.3, 1.0, -2.7, 1.0])
        want = (rows.double() * (scale if one else scale.view(2, 3, 1)).double()).to(dtype)
        into = rows
        if out is not None:
            into, memory = strided(Case(V, dtype, gap=3 if V < 2000 else 0), out)
        between = memory.clone()
        emulated.ops.scale_rows(rows, scale, into)
        assert torch.equal(into, want), (V, shift, out, one)
        between.as_strided(into.shape, into.stride(), into.storage_offset()).copy_(want)
        assert torch.equal(memory, between), (V, shift, out, one)
    emulated.take_stats()
    rows = torch.full((1, 4, 999), torch.nan, dtype=dtype)
    emulated.ops.scale_rows(rows, torch.ones(4), rows)
    stats = emulated.take_stats()
    assert (stats.vector_loads, stats.vector_stores) == (0, 0), "a scale of 1 is no work in place"


def test_a_weight_is_cast_by_wide_accesses(emulated):
    """A matrix of short rows, then a single long one."""
    for shape in ((1, 1000, 40), (1, 1, 40_000)):
        x, out = torch.randn(shape), torch.empty(shape, dtype=torch.bfloat16)
        emulated.take_stats()
        emulated.ops.scale_rows(x, torch.ones(1), out)
        stats = emulated.take_stats()
        assert torch.equal(out, x.bfloat16())
        assert (stats.vector_loads, stats.vector_stores) == (10_000, 5_000)
    for bad in (torch.empty(1, 2, 8, dtype=torch.float16), torch.empty(1, 2, 7, dtype=torch.bfloat16)):
        with pytest.raises(RuntimeError, match="out must have the"):
            emulated.ops.scale_rows(torch.empty(1, 2, 8, dtype=torch.bfloat16), torch.ones(1), bad)


@pytest.mark.parametrize("beta", [0.0, 1.0, 0.4])
def test_distillation_at_any_alignment(emulated, beta):
    """The same bits wherever rows begin and the gradient goes, by wide accesses where they are aligned; nothing beside
    the rows is touched."""
    for dtype, V in ((torch.bfloat16, 5003), (torch.float32, 9000)):
        draw = torch.Generator().manual_seed(V)
        logits, teacher = (torch.randn(2, 3, V, generator=draw).to(dtype) for _ in range(2))
        labels, bits = torch.tensor([0, -1, 2, 3, 4, 5]), []
        for shift, of_teacher, gap, out in ((0, 0, 0, 0), (0, 5, 3, 0), (3, 0, 8, 1), (1, 2, 5, None)):
            x, memory = strided(Case(V, dtype, gap=gap), shift)
            y, _ = strided(Case(V, dtype, gap=gap), of_teacher)
            x.copy_(logits), y.copy_(teacher)
            into, memory = (x, memory) if out is None else strided(Case(V, dtype, gap=gap), out)
            between, divergence = memory.clone(), torch.empty(6)
            emulated.take_stats()
            emulated.ops.distillation(x, y, labels, None, None, [0.7, 0.0, 30.0, beta], divergence, into)
            stats = emulated.take_stats()
            bits.append((divergence, into.clone()))
            between.as_strided(into.shape, into.stride(), into.storage_offset()).copy_(into)
            assert torch.equal(memory, between)
            if (shift, of_teacher, out) == (0, 0, 0) and V % 8 == 0:
                vectors = V * dtype.itemsize // 16
                sweeps = 2 if beta == 0 else 3
                assert (stats.vector_loads, stats.vector_stores) == (5 * 2 * sweeps * vectors, 6 * vectors)
        for divergence, gradient in bits[1:]:
            assert torch.equal(divergence, bits[0][0])
            assert torch.equal(gradient, bits[0][1])


def test_distillation_reads_no_row_that_does_not_count(emulated):
    x, weights = torch.full((1, 4, 4096), torch.nan), torch.tensor([0.0, 1.0, -0.0, 1.0])
    divergence, labels = torch.full((4,), torch.nan), torch.tensor([3, -1, 4, -100])
    emulated.ops.distillation(x, x.clone(), labels, weights, None, [1.0, 0.0, 0.0, 0.5], divergence, x)
    assert emulated.take_stats().vector_loads == 0
    assert not divergence.any()
    assert not x.view(torch.uint8).any()


WINDOWS = (
    (1, 1, 1, 0, False),
    (3, 7, 3, 0, False),
    (4, 9, 2**31 - 1, 4, False),
    (2, 700, 2**31 - 1, 0, True),
    (5, 40, 6, 0, True),
)


def test_partial_returns(emulated):
    draw = torch.Generator().manual_seed(3)
    for B, T, lookahead, length, by_ids in WINDOWS:
        rewards, counts = torch.randn(B, T, generator=draw), torch.randint(0, T + 1, (B,), generator=draw)
        ids = (torch.rand(B, T, generator=draw) < 0.3).long().cumsum(1) if by_ids else None
        want = reference.partial_returns(rewards.double(), ids, counts, lookahead, length, 0.93)
        rewards[torch.arange(T) >= counts[:, None]] = torch.nan
        returns = torch.empty(B, T)
        emulated.ops.partial_returns(rewards, ids, counts, lookahead, length, 0.93, returns)
        torch.testing.assert_close(returns.double(), want, rtol=2e-6, atol=2e-6)
        assert not returns[torch.arange(T) >= counts[:, None]].any()
    for shape in ((0, 3), (3, 0)):
        emulated.ops.partial_returns(torch.empty(shape), None, None, 1, 0, 1.0, torch.empty(shape))


def test_extreme_logits_stay_in_their_row(emulated):
    """A NaN or +inf logit poisons its row and no other; a -inf label has the log-prob -inf; -inf elsewhere is nothing
    special."""
    for plan in ((0, 128), (2, 256)):
        emulated.set(cluster=plan[0], threads=plan[1], slots=2)
        x = torch.linspace(-2, 3, 64).repeat(5, 1)
        x[1, 9], x[2, 9], x[3, 5], x[4, 9] = torch.nan, torch.inf, -torch.inf, -torch.inf
        labels, adv, d = torch.full((5,), 5), torch.ones(5), torch.empty(1, 5, 64)
        out = [torch.empty(5) for _ in range(3)]
        spec = PolicyLossSpec(entropy_coef=0.1)
        rows = [adv, *[None] * 6]
        emulated.ops.policy_loss(x[None], labels, rows, spec.numbers, spec.choices, *out, d, None)
        assert out[1].isnan().tolist() == [False, True, True, False, False]
        assert out[2].isnan().tolist() == [False, True, True, False, False]
        assert d[0].isnan().any(1).tolist() == [False, True, True, False, False]
        assert out[1][3] == -torch.inf
        assert d[0, 1].isnan().all()


def test_no_rows_is_no_launch(emulated):
    for shape in ((0, 3, 7), (3, 0, 7)):
        x, none = torch.empty(shape), torch.empty(0)
        emulated.ops.logprobs_fwd(*sweep_arguments(x, none.long()), none, none, none.view(0, 2))
        emulated.ops.scale_rows(x, none, x)
    assert emulated.take_stats().launches == 0


FAULTS = {  # a fault and the text it is planted in
    "the data are not waited for": ("policy_loss_onepass.cuh", "hw::bar_wait(&team.full[c.slot], c.parity);", ""),
    "a slot is refilled while in use": (
        "policy_loss_onepass.cuh",
        "hw::bar_wait(&team.empty[at.slot], at.parity ^ 1);",
        "",
    ),
    "rows are overwritten while in use": (
        "policy_loss_onepass.cuh",
        "hw::bar_wait(&team.used[i / BATCH % 2], (i / BATCH / 2 & 1) ^ 1);",
        "",
    ),
    "rows are not waited for": (
        "policy_loss_slice.cuh",
        "if (i % BATCH == 0) hw::bar_wait(&known[i / BATCH % 2], i / BATCH / 2 & 1);",
        "",
    ),
    "rows without a gradient run ahead": (
        "policy_loss_slice.cuh",
        "hw::bar_wait(&read[turn & 1], (turn >> 1 & 1) ^ 1);",
        "",
    ),
    "the first to finish sums": (
        "lookup.cuh",
        "hw::draw_ticket(a.ticket) == teams - 1",
        "hw::draw_ticket(a.ticket) == 0",
    ),
    "counts are read while they are taken": (
        "policy_loss_onepass.cuh",
        "hw::wait_for_leader();\n  count_outer(a, counted, CONSUMERS + HELPERS);",
        "count_outer(a, counted, CONSUMERS + HELPERS);\n  hw::wait_for_leader();",
    ),
    "the squares have one area": ("policy_loss_slice.cuh", "return squares + half * size * WARPS;", "return squares;"),
    "the exchange has one area": (
        "policy_loss_slice.cuh",
        "return exchange + half * size * WARPS;",
        "return exchange;",
    ),
}


def test_planted_faults_are_caught():
    """All in one library, of which each fork of one process has one: compiling takes longest, importing torch longer
    than the probes."""
    library = emulator.build(emulator.planted(list(FAULTS.values())))
    probe = subprocess.run(
        [sys.executable, "-m", "emulator.cases", str(library), str(len(FAULTS))],
        cwd=Path(__file__).with_name("helpers"), env={**os.environ, "PYTHONPATH": str(emulator.ROOT)},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert probe.returncode == 0, probe.stderr
    for fault, end in zip((None, *FAULTS), map(json.loads, probe.stdout.splitlines()), strict=True):
        said = end["said"]
        assert (end["status"] != 0) == (fault is not None), f"{fault}: {said}"
        assert fault is None or "AssertionError" in said or "emulator:" in said, f"{fault}: {said}"


def test_under_the_sanitizers(tmp_path):
    """AddressSanitizer and UBSan over all launchers: nothing outside a row is touched, no misaligned access, no
    overflow."""
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() {}")
    if subprocess.run(
        ["g++", *emulator.SANITIZE, str(probe), "-o", str(tmp_path / "probe")], capture_output=True
    ).returncode:
        pytest.skip("this g++ has no sanitizers")
    program = emulator.build_sanitized()
    environment = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0"}
    done = subprocess.run([str(program)], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]

"""The fused loss under the emulator: launches counted, every plan, the same bits on any grid, in any schedule and
slicing of the counts."""

import sys

import pytest
import torch
from emulator import build as emulator
from emulator.cases import fused_case, run_fused

import ppg_fast as ppg
from ppg_fast import backends
from ppg_fast.contract import Reduction
from ppg_fast.spec import BASELINES, REDUCTIONS

if why_not := emulator.why_not() or backends.why_not("cpu"):
    pytest.skip(why_not, allow_module_level=True)
if torch.cuda.is_available():
    pytest.skip("a GPU is here: the kernels run on it in test_fused_policy_loss.py", allow_module_level=True)

EMULATOR_ERROR, DOES_NOT_FIT = 2, 3  # tests/helpers/emulator/cuda_emu.h
PLANS = [(0, 128), (0, 512), (1, 256), (1, 512), (2, 256), (4, 256)]


@pytest.fixture
def control(emulated_cuda):
    control = emulator.Control(emulator.build())
    control.take_stats()
    torch.use_deterministic_algorithms(True)  # fresh memory is poisoned: what is read too early shows
    yield control
    torch.use_deterministic_algorithms(False)
    control.set()


def assert_close(actual, expected):
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def counted(control, *case, **changed):
    """`run_fused`, and the counts of its forward pass."""
    control.take_stats()
    stats = []
    return run_fused(*case, forward_ended=lambda: stats.append(control.take_stats()), **changed), stats[0]


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_from_rewards_in_two_launches(reduction, baseline, control):
    arguments, options = fused_case(3)
    arguments[0].requires_grad_()
    options |= {"reduction": reduction, "baseline": baseline}
    for more in (
        {},
        {"normalizer": 7.5},
        {"normalizer": torch.tensor(7.5)},
        {"skip_zero_advantages": True},
        {"old_logprobs": None},
    ):
        out = ppg.partial_policy_loss(*arguments, "full", **(options | more), backend="cuda")
        assert control.take_stats().launches == 2
        expected = ppg.partial_policy_loss(*arguments, "full", **(options | more), backend="cpu")
        assert_close((out.loss, out.logprobs, out.entropy), (expected.loss, expected.logprobs, expected.entropy))
        assert control.take_stats().launches == 0
        assert_close(out.metrics.values(), expected.metrics.values())
        assert control.take_stats().launches == 1, "metrics read: the returns once more"


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_from_advantages_in_two_launches_at_most(reduction, control):
    (logits, labels, *_), options = fused_case(4)
    options = {name: options[name] for name in ("loss_mask", "cu_seqlens", "old_logprobs", "spec")} | {
        "reduction": reduction
    }
    for more in ({}, {"normalizer": 7.5}):
        x = logits.clone().requires_grad_()
        out = ppg.policy_loss(x, labels, torch.linspace(-1, 1, 50), **(options | more), backend="cuda")
        assert control.take_stats().launches == (1 if reduction == "none" else 2)
        expected = ppg.policy_loss(logits, labels, torch.linspace(-1, 1, 50), **(options | more), backend="cpu")
        assert_close(out[:3], expected[:3])
        (out.loss.sum() * 0.5).backward()
        assert control.take_stats().launches == 1, "one to scale the gradient"


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_same_bits_on_any_grid_and_in_any_schedule(plan, control):
    first = None
    for resident, seed, mode in ((1, 1, 0), (1, 2, 2), (3, 3, 1), (7, 4, 2), (64, 5, 1)):
        control.set(cluster=plan[0], threads=plan[1], slots=2, resident=resident, seed=seed, mode=mode)
        results, stats = counted(control, 5, skip_zero_advantages=True)
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True)), (resident, seed, mode)
        assert stats.cluster == plan[0]
    assert_close(first, run_fused(5, "reference", skip_zero_advantages=True))


@pytest.mark.parametrize("reduction", REDUCTIONS[:3])
def test_any_slicing_of_the_counts(reduction, control, monkeypatch):
    expected = run_fused(6, reduction=reduction)
    for slices in (1, 2, 5, 40):
        counted = 1 if reduction == "token_mean" else 3
        monkeypatch.setattr(
            sys.modules["ppg_fast_emulated"], "_counts", lambda *_, counted=counted, slices=slices: (counted, slices)
        )
        assert all(torch.equal(a, b) for a, b in zip(run_fused(6, reduction=reduction), expected, strict=True)), slices


@pytest.mark.parametrize("rows", [1000, 4096, 131072])
def test_a_slice_is_what_a_cta_loads_at_once(rows, control):
    counts = sys.modules["ppg_fast_emulated"]._counts
    for kind in REDUCTIONS:
        for normalizer in (None, 2.0):
            for sequences in (1, 8, rows):
                counted, slices = counts(rows, Reduction(kind, normalizer, sequences, None))
                needed = kind == "sequence_mean" or (normalizer is None and kind in ("token_mean", "sequence_sum"))
                assert counted == (0 if not needed else 1 if kind == "token_mean" else sequences)
                assert slices == 1 or rows / counted / slices >= 512
                assert not counted or rows / counted / slices < 1024 or slices in (16, 256)


@pytest.mark.parametrize("plan", [(1, 256), (4, 256)], ids=str)
def test_the_first_row_is_on_its_way_while_turns_are_credited(plan, control):
    control.set(cluster=plan[0], threads=plan[1], slots=2, mode=2)
    assert_close(run_fused(4), run_fused(4, "reference"))
    assert control.take_stats().copies_ahead > 0
    assert_close(run_fused(4, skip_zero_advantages=True), run_fused(4, "reference", skip_zero_advantages=True))
    assert control.take_stats().copies_ahead == 0, "only the advantages tell whether the row is read"


def test_nothing_overlaps_before_hopper(control):
    control.set(major=8, mode=2)
    results, stats = counted(control, 4)
    assert_close(results, run_fused(4, "reference"))
    assert (stats.launches, stats.cluster, stats.copies_ahead) == (2, 0, 0)


def test_two_passes_where_clusters_do_not_fit(control):
    plan = {"cluster": 2, "threads": 256, "slots": 2}
    control.set(cluster=0, threads=512)
    two_passes = run_fused(5)
    control.take_stats()
    control.set(resident=101, query_error=DOES_NOT_FIT, **plan)  # another number is another device
    for queries, more in ((1, {}), (0, {}), (0, {"score_norms": True})):
        results, stats = counted(control, 5, **more)
        assert all(torch.equal(a, b) for a, b in zip(results, two_passes, strict=True))
        assert (stats.cluster, stats.block, stats.launches, stats.queries) == (0, 512, 2, queries)


def test_no_other_error_is_taken_for_one_of_size(control):
    plan = {"resident": 102, "cluster": 2, "threads": 256, "slots": 2}
    control.set(query_error=EMULATOR_ERROR, **plan)
    with pytest.raises(RuntimeError, match="kernel launch failed"):
        run_fused(5)
    control.set(**plan)
    assert counted(control, 5)[1].cluster == 2, "found out by the first answer, not by the first error"
    control.set(query_error=DOES_NOT_FIT, **plan)
    with pytest.raises(RuntimeError, match="does not fit"):  # else its log-probs would not be those without a norm
        run_fused(5, score_norms=True)


def test_many_dialogues_of_one_group(control):
    """More than the threads of a CTA, so that members come in tiles."""
    S, T = 300, 2
    draw = torch.Generator().manual_seed(1)
    labels, turns = torch.randint(3, (S, T), generator=draw), torch.arange(T).expand(S, T)
    x, rewards = torch.randn(S, T, 3, generator=draw), torch.randn(S, T, generator=draw)
    options = {"group_ids": torch.arange(S) % 7 // 3, "turn_counts": None, "baseline": "group_std"}
    results = []
    for backend in ("cuda", "cpu"):
        leaf = x.clone().requires_grad_()
        out = ppg.partial_policy_loss(leaf, labels, rewards, turns, "full", **options, backend=backend)
        results.append((out.loss, out.logprobs, *torch.autograd.grad(out.loss, leaf)))
    assert_close(*results)


def test_what_is_skipped_is_not_read(control):
    control.set(cluster=1, threads=256, slots=2)
    arguments, options = fused_case(7)
    arguments[0].fill_(torch.nan)
    arguments[2].zero_()
    out = ppg.partial_policy_loss(*arguments, "full", **options, skip_zero_advantages=True, backend="cuda")
    assert out.loss == 0
    assert not out.logprobs.any()
    assert control.take_stats().copied_bytes == 0

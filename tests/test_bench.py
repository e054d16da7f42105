"""The harness: it runs, its peers compute our loss, and it sees what is wrong."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ppg_fast.bench import core_clock, harness, instructions, machine, peers, render, timing, worker
from ppg_fast.bench.problem import Case, make_problem, make_truth
from ppg_fast.bench.providers import Provider, Unavailable

ROOT = Path(__file__).parents[1]
STATS = {"min", "max", "mean", "stddev", "rounds", "median", "p20", "p80", "q1", "q3", "iqr", "ops", "total", "data"}
TINY = {op: module.cases("quick", "cpu") for op, module in harness.OPS.items()}


def entries_of(op, index=0, **changes):
    pytest.importorskip("transformers" if op == "training_step" else "torch")
    return harness.measure(replace(TINY[op][index], **changes), harness.PACES["quick"], compilers=False)


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    """Emptying the caches between calls is what takes the time here, and nothing here depends on it."""
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 2**16)


# ---- what is measured is right ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("op", harness.OPS)
def test_every_provider_computes_the_same(op):
    """The checks against float64 of loss and gradients that decide whether a speed-up may be shown."""
    for index in range(len(TINY[op])):
        entries, missing = entries_of(op, index)
        computed = [e for e in entries if e["extra_info"]["kind"] != "ceiling"]
        assert any(e["extra_info"]["kind"] == "ours" for e in computed)
        assert op == "critic" or any(e["extra_info"]["kind"] == "peer" for e in computed)  # two steps of our own
        assert {e["param"]: e["extra_info"]["error"] for e in computed if not e["extra_info"]["correct"]} == {}
        assert [reason for reason in missing.values() if reason.startswith("failed")] == []


@pytest.mark.parametrize("op", ["policy_loss", "logprobs", "linear"])
def test_compilers_compute_the_same(op):
    found, _ = harness.OPS[op].participants(TINY[op][0])
    problem = make_problem(TINY[op][0])
    check = harness.OPS[op].checker(problem, TINY[op][0])
    for provider in found:
        if provider.compiles:
            assert max(check(provider.run(problem)).values()) < harness.FLOOR["float32"], provider.name


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the benchmark itself where there is a GPU")
def test_liger_triton_is_an_oracle_under_the_interpreter():
    case = Case("policy_loss", 16, 67, active=0.5)
    try:
        provider = peers.liger_triton(case, interpreted=True)
    except Unavailable as reason:
        pytest.skip(str(reason))
    problem = make_problem(case)
    truth = make_truth(problem)
    assert max(truth.errors(*provider.run(problem)).values()) < harness.FLOOR["float32"]


def test_the_check_sees_a_wrong_gradient():
    """A gradient wrong in one of the rows or columns that are looked at, or a wrong loss, is not called right."""
    case = TINY["linear"][0]
    problem = make_problem(case)
    truth = make_truth(problem)
    loss, (d_hidden, d_weight) = next(p for p in harness.OPS["linear"].participants(case)[0] if p.kind == "ours").run(
        problem
    )
    assert max(truth.errors(loss, (d_hidden, d_weight)).values()) < harness.FLOOR["float32"]
    assert truth.errors(loss * 1.01, (d_hidden, d_weight))["loss"] > harness.FLOOR["float32"]
    for index, (name, row) in enumerate((("d_hidden", truth.rows[0]), ("d_weight", truth.columns[0]))):
        wrong = [d_hidden.clone(), d_weight.clone()]
        wrong[index][row] *= 1.5
        assert truth.errors(loss, tuple(wrong))[name] > harness.FLOOR["float32"]
    assert truth.errors(loss, (d_hidden * torch.nan, d_weight))["d_hidden"] == float("inf")


def test_inputs_are_as_described():
    """Shares of active and worthless rows, the same count in every dialogue, no zeros in the data, ratios on both sides
    of the clip."""
    case = Case("linear", 2048, 97, 16, active=0.25, zero=0.5)
    problem = make_problem(case)
    mask = problem.mask.view(problem.sequences, -1)
    assert mask.sum(1).tolist() == [128] * problem.sequences
    assert (problem.advantages[problem.mask] == 0).float().mean() == 0.5
    assert int((problem.leaves[0] == 0).sum()) == 0
    logprobs = make_truth(problem).logprobs[problem.mask]
    ratios = (logprobs - problem.old_logprobs[problem.mask]).exp()
    assert ((ratios > 1.2).any(), (ratios < 0.8).any(), ((ratios - 1).abs() < 0.1).any()) == (True, True, True)
    compact = problem.compacted()
    assert compact.labels.min() >= 0
    assert compact.leaves[0].shape == (512, 16)


# ---- how it is measured ----------------------------------------------------------------------------------------------
def test_rounds_are_interleaved_and_slow_ones_leave_early():
    order = []
    clock = iter(range(10**6))

    def contestant(name, restores=False):
        before = (lambda: order.append(f"before {name}")) if restores else None
        return timing.Contestant(name, "peer", lambda: (order.append(name), next(clock)), before)

    three = [contestant("a"), contestant("b", restores=True), contestant("c")]
    seconds = timing.interleave(three, timing.Pace(rounds=3, budget=1e9), "cpu")
    assert order == ["a", "before b", "b", "c", "c", "before b", "b", "a", "a", "before b", "b", "c"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    few = timing.interleave(three, timing.Pace(rounds=9, budget=0.0, least=2), "cpu")
    assert {len(values) for values in few.values()} == {2}
    once = timing.interleave(three, timing.Pace(rounds=9, budget=1e9, slow=0.0), "cpu")
    assert {len(values) for values in once.values()} == {1}


def test_ours_and_the_ceilings_wait_for_undisturbed_cores(monkeypatch):
    """Of the speeds before and after a call the lower counts; 0.9 of what one call in twenty exceeds is undisturbed."""
    speeds = iter([100.0, 50.0, 100.0, 100.0, 95.0, 120.0, 120.0, 110.0, 89.0, 120.0, *40 * [120.0]])
    monkeypatch.setattr(timing.Cores, "gflops", lambda self: next(speeds))
    one = timing.Contestant("a", "ours", list)
    pace = timing.Pace(rounds=20, budget=0.0, alone=3)
    assert len(timing.interleave([one], pace, "cpu")["a"]) == 7
    assert one.facts["core_gflops"] == [50.0, 100.0, 95.0, 110.0, 89.0, 120.0, 120.0]
    peer = timing.Contestant("b", "peer", list)
    assert len(timing.interleave([peer], pace, "cpu")["b"]) == pace.least
    restless = (50.0 * 2**n for n in range(100))
    monkeypatch.setattr(timing.Cores, "gflops", lambda self: next(restless))
    assert len(timing.interleave([one], pace, "cpu")["a"]) == pace.rounds, "no longer than that"
    assert len(timing.interleave([one], replace(pace, slow=0.0), "cpu")["a"]) == 1, "a slow one is measured once"


def test_the_speed_of_the_cores_is_that_of_a_product_a_thread(monkeypatch):
    cores, threads = timing.Cores(), torch.get_num_threads()
    clock = iter([10.0, 10.5])
    monkeypatch.setattr(core_clock.time, "perf_counter", lambda: next(clock))
    assert cores.gflops() == pytest.approx(2e-9 * threads * 8 * 128**3 / 0.5)
    torch.testing.assert_close(cores.product[-1], cores.left[-1] @ cores.right[-1])


@pytest.mark.parametrize(("dtype", "rows"), [("float32", [58, 256]), ("bfloat16", [512])])
def test_the_bare_products_are_measured_in_chunks_too(dtype, rows, monkeypatch):
    """58 rows of 50,000 words and d_weight are 60 MiB less 0.1. Only where all rows have a gradient."""
    linear = harness.OPS["linear"]
    assert linear.chunks_of(Case("linear", 2048, 50000, 256, dtype=dtype)) == rows
    monkeypatch.setattr(linear, "chunks_of", lambda case: [24])
    case = Case("linear", 64, 512, 32, dtype=dtype)
    found = [linear.ceilings(make_problem(c), c) for c in (case, replace(case, active=0.5), replace(case, zero=0.5))]
    whole = "three bare GEMMs"
    names = [[limit.name for limit in limits] for limits in found]
    assert names == [[whole, f"{whole}, 24 rows at a time"], [whole], [whole]]
    for limit in found[0]:
        limit.call()


def test_a_slow_peer_is_not_measured_at_every_share():
    pace = replace(harness.PACES["quick"], slow=1.0)
    all_active, masked, _ = TINY["linear"]
    known = [(all_active, {"TRL head": 3.0, "eager PyTorch": 0.5})]
    for case, there in ((all_active, True), (masked, False)):
        entries, missing = harness.measure(case, pace, compilers=False, known=known)
        assert ("TRL head" in [e["param"] for e in entries]) == there
        assert ("TRL head" in missing) != there
        assert "eager PyTorch" in [e["param"] for e in entries]


def test_a_peer_that_would_take_minutes_is_left_out():
    smaller = replace(TINY["linear"][0], V=TINY["linear"][0].V // 100)
    known = [(smaller, {"TRL head": 3.0, "eager PyTorch": 0.1})]
    entries, missing = harness.measure(TINY["linear"][0], harness.PACES["quick"], compilers=False, known=known)
    assert "eager PyTorch" in [e["param"] for e in entries]
    assert missing["TRL head"].startswith("not measured at N 64, V 512: about 307 s a call")


def test_a_peer_whose_caller_compacts_is_expected_to_take_its_share():
    provider = Provider("a peer, caller compacts", lambda problem: problem, compacted=True)
    small = Case("linear", 64, 512, 32, active=0.5)
    known = [(small, {provider.name: 1.0})]
    pace = harness.PACES["default"]
    assert harness._too_late(provider, replace(small, N=64 * 100, active=0.1), pace, known) is None  # 20 s, not more
    assert "about 40 s a call" in harness._too_late(provider, replace(small, N=64 * 200, active=0.1), pace, known)


def test_statistics():
    stats = timing.stats([5.0, 1.0, 2.0, 4.0, 3.0, 100.0])
    assert set(stats) >= STATS
    assert (stats["min"], stats["max"], stats["median"], stats["rounds"]) == (1.0, 100.0, 3.5, 6)
    assert (stats["p20"], stats["p80"]) == (2.0, 5.0)
    assert stats["iqr_outliers"] == 1


def test_destroyed_logits_come_back():
    problem = make_problem(TINY["policy_loss"][0])
    found, _ = harness.OPS["policy_loss"].participants(TINY["policy_loss"][0])
    inplace = next(p for p in found if p.destroys)
    before = problem.logits.detach().clone()
    problem.keep()
    inplace.run(problem)
    assert not torch.equal(problem.logits, before)
    problem.restore()
    assert torch.equal(problem.logits, before)


def test_memory_sees_what_a_call_allocates():
    """In a process of its own: this one has used its thread pools, which a fork does not survive."""
    program = (
        "import torch\nfrom ppg_fast.bench import memory\n"
        "make = lambda: ((lambda: torch.ones(256 * 2**18).sum()), (lambda: torch.ones(64 * 2**18).sum()))\n"
        "print(memory.cpu_peak(make, False))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    if run.stdout.strip() == "None":
        pytest.skip("the system does not tell")
    # the system may take back pages of libraries meanwhile, and they come again
    assert 63 * 2**20 <= int(run.stdout) < 128 * 2**20


@pytest.mark.parametrize("grid", harness.PACES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_grid_is_planned(grid, device):
    for op in harness.OPS:
        plan = {"grid": grid, "device": device, "threads": 1, "allocator": "default", "dialogues": "file.json"}
        cases = worker.planned(plan, op)
        assert cases
        assert {case.device for case in cases} == {device}
        assert {case.variant for case in cases} == {"file.json"} or op != "training_step"
        assert all(name in machine.ALLOCATORS for _, name in harness.settings_of(op, device, (1, 2)))


# ---- instructions ----------------------------------------------------------------------------------------------------
@pytest.mark.skipif(instructions.why_not() is not None, reason=str(instructions.why_not()))
def test_the_row_kernel_needs_no_more_instructions_than_when_it_was_measured(tmp_path, monkeypatch):
    results = render.load(ROOT / render.FOLDER)
    stored = next(file["instructions"] for name, file in results.items() if name.startswith("instructions.cpu"))
    case = {"kernel": "policy_loss", "dtype": "bfloat16", "isa": "avx2"}
    before = next(c["per_element"] for c in stored if c.items() >= case.items())
    program = instructions.build(tmp_path, case["dtype"], case["isa"])
    assert instructions.per_element(program, case["kernel"]) < 1.1 * before
    monkeypatch.setattr(instructions, "TIMED", (512, 8192))
    taken = instructions.times(program, case["kernel"])
    assert list(taken) == [*instructions.FIELDS, "cycles"]
    assert 0.5 < taken["cycles"] / taken["one_row"] < 8, "GHz"
    assert taken["one_row"] > taken["read"] > 0  # exponentials of a row in the cache, and a sum of all rows
    with pytest.raises(ValueError, match="exit status 3"):
        instructions.count(program, "no kernel", 1, 8)

"""The harness: it runs, its peers compute our loss, its files have their fields, and the documents say what the files
say."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ppg_fast.bench import (
    command,
    harness,
    instructions,
    learning_curve,
    machine,
    peers,
    render,
    result_file,
    timing,
    worker,
)
from ppg_fast.bench.problem import Case, make_problem, make_truth
from ppg_fast.bench.providers import Provider, Unavailable

ROOT = Path(__file__).parents[1]
STATS = {"min", "max", "mean", "stddev", "rounds", "median", "p20", "p80", "q1", "q3", "iqr", "ops", "total", "data"}
TINY = {op: module.cases("quick", "cpu") for op, module in harness.OPS.items()}


def entries_of(op, index=0, **changes):
    pytest.importorskip("transformers" if op == "training_step" else "torch")
    return harness.measure(replace(TINY[op][index], **changes), harness.PACES["quick"], compilers=False)


@pytest.fixture(scope="module")
def policy_loss_results(tmp_path_factory):
    """A folder of results as the command writes them, measured without subprocesses."""
    folder = tmp_path_factory.mktemp("root")
    for op in ("policy_loss", "linear"):
        entries, missing = entries_of(op)
        peak = {"case": entries[0]["params"], "bytes": {entries[0]["param"]: 3 * 2**20}}
        merged = command._merged(
            op, machine.header("test", "cpu"), [{"entries": entries, "missing": {op: missing}, "peaks": [peak]}]
        )
        result_file.write(folder / render.FOLDER, f"{op}.cpu", merged)
    return folder


# ---- what is measured is right ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("op", harness.OPS)
def test_every_provider_computes_the_same(op):
    """The checks against float64 of loss and gradients that decide whether a speed-up may be shown."""
    for index in range(len(TINY[op])):
        entries, missing = entries_of(op, index)
        computed = [e for e in entries if e["extra_info"]["kind"] != "ceiling"]
        assert any(e["extra_info"]["kind"] == "ours" for e in computed)
        assert any(e["extra_info"]["kind"] == "peer" for e in computed)
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
    for op, module in harness.OPS.items():
        plan = {"grid": grid, "device": device, "threads": 1, "allocator": "default", "dialogues": "file.json"}
        cases = worker.planned(plan, op)
        assert cases
        assert {case.device for case in cases} == {device}
        assert {case.variant for case in cases} == {"file.json"} or op != "training_step"
        assert all(name in machine.ALLOCATORS for _, name in module.settings(device, (1, 2)))


# ---- files and documents ---------------------------------------------------------------------------------------------
def assert_schema(file):
    assert set(file) >= {"machine_info", "commit_info", "datetime", "version", "benchmarks", "ppg_fast"}
    assert set(file["ppg_fast"]) >= {"command", "versions", "load_before", "missing"}
    assert file["machine_info"]["cpu"]["count"] >= 1
    assert "node" not in file["machine_info"]
    for entry in file["benchmarks"]:
        assert set(entry) >= {"group", "name", "fullname", "param", "params", "extra_info", "stats"}
        assert set(entry["stats"]) >= STATS
        assert len(entry["stats"]["data"]) == entry["stats"]["rounds"]
        assert set(entry["params"]) >= {
            "op",
            "N",
            "V",
            "D",
            "dtype",
            "active",
            "zero",
            "device",
            "threads",
            "allocator",
            "provider",
        }
        if entry["extra_info"]["kind"] != "ceiling":
            assert set(entry["extra_info"]) >= {"error", "correct", "compacted"}


@pytest.mark.parametrize("rows", [1, 10_000])
def test_a_result_file_is_read_as_it_was_written(tmp_path, rows):
    """Small ones as text, one line a list of numbers, large ones compressed; the same content has the same bytes."""
    file = {"a": [0.1 + n for n in range(rows)], "b": [{"text": '[1,\n  2] {"', "none": None}] * rows, "c": {}}
    path = result_file.write(tmp_path, "some.cpu", file)
    assert path.suffix == (".json" if rows == 1 else ".gz")
    first = path.read_bytes()
    assert result_file.write(tmp_path, "some.cpu", file).read_bytes() == first
    assert render.load(tmp_path) == {"some.cpu": file}
    result_file.write(tmp_path, "some.cpu", {"a": [1] * (10_001 - rows) * 10})  # small to large, and large to small
    assert render.load(tmp_path) == {"some.cpu": {"a": [1] * (10_001 - rows) * 10}}
    assert len(list(tmp_path.iterdir())) == 1


def test_one_header_with_and_without_torch():
    """What a GPU run knows before torch is imported, and what every other result file says, have the same fields."""
    without, with_torch = result_file.header("some command", commit="abc"), machine.header("some command", "cpu")
    assert_schema(without)
    assert_schema(with_torch)
    assert without["commit_info"]["id"] == "abc"
    assert set(with_torch["machine_info"]) - set(without["machine_info"]) <= {"torch_cpu_capability", "ppg_fast_isa"}
    assert with_torch["ppg_fast"]["versions"]["torch"] == torch.__version__


def test_results_have_their_fields(policy_loss_results):
    for file in render.load(policy_loss_results / render.FOLDER).values():
        assert_schema(file)
        first = file["benchmarks"][0]
        assert first["extra_info"]["peak_extra_bytes"] == 3 * 2**20
        assert first["extra_info"]["share_of_ceiling"] > 0


def test_pytest_benchmark_reads_them(policy_loss_results):
    pytest.importorskip("pytest_benchmark")
    file = policy_loss_results / render.FOLDER / "policy_loss.cpu.json"
    run = subprocess.run(
        [sys.executable, "-m", "pytest_benchmark", "compare", str(file)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "eager PyTorch" in run.stdout


def test_committed_results_and_documents_agree():
    """docs/benchmarks.md, the README and the charts are what `--render` makes of bench/results; else run it."""
    for file in render.load(ROOT / render.FOLDER).values():
        assert_schema(file)
    large = [p for p in (ROOT / render.FOLDER).glob("*.json") if p.stat().st_size > result_file.LARGE]
    assert large == [], "larger files are kept compressed: result_file.write"
    for path, text in render.expected(ROOT).items():
        assert path.exists(), path
        assert path.read_text() == text, (
            f"{path.relative_to(ROOT)} is not what bench/results says: python -m ppg_fast.bench --render"
        )
    marked = [name for path in render.DOCUMENTS for _, name, _, _ in render.MARKED.findall((ROOT / path).read_text())]
    assert sorted(marked) == sorted(render.SECTIONS)  # each has one place


def test_render_replaces_what_stood_there(policy_loss_results):
    root = policy_loss_results
    (root / "docs").mkdir(exist_ok=True)
    page = (
        "before\n<!-- bench:policy_loss -->\n12.3 ms, made up\n<!-- /bench -->\nafter <!-- bench:logprobs "
        "-->\n<!-- /bench -->\n"
    )
    (root / "docs/benchmarks.md").write_text(page)
    assert root / "docs/benchmarks.md" in render.write(root)
    text = (root / "docs/benchmarks.md").read_text()
    assert text.startswith("before\n")
    assert "made up" not in text
    assert "ppg_fast cpu, in place" in text
    assert render.NOT_MEASURED in text
    assert (root / render.FOLDER / "policy_loss.cpu.512.float32.svg").read_text().startswith("<svg")
    assert render.write(root) == []
    (root / "docs/benchmarks.md").write_text(text.replace("ppg_fast cpu, in place", "ppg_fast cpu, in haste"))
    assert render.write(root) == [root / "docs/benchmarks.md"]
    with pytest.raises(ValueError, match="got 'policy'"):
        render.fill("<!-- bench:policy -->\n<!-- /bench -->", {})


@pytest.mark.parametrize("wrong", ["ours", "peer"])
def test_no_speedup_for_a_wrong_result(policy_loss_results, wrong):
    file = render.load(policy_loss_results / render.FOLDER)["policy_loss.cpu"]
    entries = file["benchmarks"]
    assert " x |" in render.group_table(entries)
    for entry in entries:
        if entry["extra_info"]["kind"] == wrong:
            entry["extra_info"]["correct"] = False
    text = render.group_table(entries)
    assert " x |" not in text
    assert "(wrong)" in text


def test_durations_have_three_digits():
    assert [render.duration(s) for s in (1.5e-6, 3.14159e-4, 0.00832, 0.0832, 0.832, 8.32, 83.2)] == [
        "1.5 µs", "314 µs", "8.32 ms", "83.2 ms", "832 ms", "8,320 ms", "83.2 s",
    ]  # fmt: skip


def test_command(tmp_path, capsys):
    assert command.main(["--quick", "--ops", "partial_returns", "--output", str(tmp_path), "--no-memory"]) == 0
    assert_schema(json.loads((tmp_path / "partial_returns.cpu.json").read_text()))
    assert "ppg_fast cpu" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        command.main(["--ops", "unknown"])
    if not torch.cuda.is_available():
        assert command.main(["--device", "cuda"]) == 1


def test_learning_curves_become_a_table(tmp_path):
    for seed in (1, 0):
        run = tmp_path / f"run{seed}"
        run.mkdir()
        summary = dict.fromkeys(learning_curve.KEPT, 1) | {
            "seed": seed,
            "policy_class": "lookahead:3",
            "device": "cpu",
            "seconds": 12.3,
        }
        (run / "summary.json").write_text(json.dumps(summary))
        points = [
            {"phase": "eval", "step": step, "eval/reward": 2.0 + step / 8, "eval/reward_share": 0.4 + step / 20}
            for step in (0, 8)
        ]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*points, {"phase": "train", "step": 1}])))
    learning_curve.main([str(tmp_path / "run1"), str(tmp_path / "run0"), "--output", str(tmp_path)])
    text = render.SECTIONS["learning_curve"](render.load(tmp_path))
    assert "| seed 0 | 40% | 80% | 2.00 | 3.00 | 12.3 s |" in text
    assert text.index("seed 0") < text.index("seed 1")


# ---- instructions ----------------------------------------------------------------------------------------------------
@pytest.mark.skipif(instructions.why_not() is not None, reason=str(instructions.why_not()))
def test_the_row_kernel_needs_no_more_instructions_than_when_it_was_measured(tmp_path):
    stored = render.load(ROOT / render.FOLDER)["instructions.cpu"]["instructions"]
    case = {"kernel": "policy_loss", "dtype": "bfloat16", "isa": "avx2"}
    before = next(c["per_element"] for c in stored if c.items() >= case.items())
    program = instructions.build(tmp_path)
    assert instructions.per_element(program, **case) < 1.1 * before
    with pytest.raises(ValueError, match="exit status 3"):
        instructions.count(program, "policy_loss", "float32", "avx1024", 1, 8)

"""The model of the kernels on a GPU: its limits, the table that it was made for, and that the file of its predictions
fits the code."""

import re
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from ppg_fast.bench import render, result_file
from ppg_fast.bench.gpu import build, model, predicted, sass, slots
from ppg_fast.bench.gpu import predict as command
from ppg_fast.bench.gpu.devices import DEVICES, named
from ppg_fast.bench.gpu.model import Case, Counts, Launches, Plan, Unknowns, chosen, predict
from ppg_fast.bench.tables import NOT_MEASURED
from test_bench_gpu_documents import entry, synthetic

from ppg_fast import native

ROOT = Path(__file__).parents[1]
H200 = named("H200")
REVIEWED = Counts(8.6, 7.6, 0, 0, 17 / 16)  # the rest of a row is in the exchange's 2,000 cycles
FREE = Unknowns(1e9, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
PLANS = {32000: Plan(1, 256, 6, 2), 128256: Plan(2, 512, 13), 151936: Plan(2, 512, 13), 262144: Plan(4, 512, 13)}


@pytest.fixture(scope="module")
def stored():
    return result_file.read(ROOT / result_file.FOLDER / f"{command.NAME}.json")


# ---- the model -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("V", "low", "high"), [(32000, 84, 86), (128256, 91, 92), (151936, 91, 92), (262144, 91, 93)])
def test_it_gives_the_reviews_table_within_a_point(V, low, high):
    share = 100 * predict(H200, Case(V, 2, PLANS[V], REVIEWED)).share
    assert low - 1 <= share <= high + 1


@pytest.mark.parametrize(("V", "plan"), PLANS.items())
def test_with_nothing_else_in_the_way_it_is_the_memorys_time(V, plan):
    found = predict(H200, Case(V, 2, plan, REVIEWED), FREE)
    assert 0.98 < found.share <= 1.001
    assert found.bound == "memory"
    fixed = predict(H200, Case(V, 2, plan, REVIEWED), replace(FREE, start=1e-5, end=2e-5))
    assert fixed.seconds == pytest.approx(found.seconds + 3e-5)


def test_with_free_memory_it_is_the_issue_slots_time():
    """A CTA an SM: sweeps, the rest of a row by four warps of each scheduler; the exponential unit, where slower."""
    plan, free = Plan(1, 512, 5), replace(FREE, issue=0.5)
    for counts, an_element in ((Counts(10, 9, 300, 0), 19), (Counts(4, 9, 300, 0), 17)):  # 16 exponentials a cycle
        found = predict(replace(H200, copy=1e18), Case(32000, 2, plan, counts, N=132 * 40), free)
        cycles = 40 * (32000 * an_element / 128 + 300 * 4) / 0.5
        assert found.seconds * H200.clock == pytest.approx(cycles, rel=0.02)
        assert found.bound == "issue slots"


@pytest.mark.parametrize("V", PLANS)
@pytest.mark.parametrize(
    ("name", "worse"), [("issue", 0.5), ("evenness", 0.8), ("latency", 8000), ("exchange", 9000), ("start", 2e-5)]
)
def test_worse_hardware_is_slower(V, name, worse):
    case = Case(V, 2, PLANS[V], REVIEWED)
    middle = replace(Unknowns(), **{name: (getattr(Unknowns(), name) + worse) / 2})
    shares = [predict(H200, case, u).share for u in (Unknowns(), middle, replace(Unknowns(), **{name: worse}))]
    assert shares[0] > shares[1] - 0.005 > shares[2] - 0.01


def test_fewer_slots_of_the_ring_and_more_instructions_are_slower():
    whole = Case(128256, 2, PLANS[128256], REVIEWED)
    tight = replace(whole, plan=Plan(2, 512, 8))  # a row and nothing ahead of it
    busy = replace(whole, counts=replace(REVIEWED, first=14, second=13))
    reading = replace(whole, read_only=True)
    slow = Unknowns(latency=8000)
    assert predict(H200, tight, slow).share < predict(H200, whole, slow).share - 0.02
    assert predict(H200, busy).share < predict(H200, whole).share - 0.1
    assert predict(H200, busy).bound == "issue slots"
    free = replace(reading, counts=replace(REVIEWED, waits=False))
    assert predict(H200, free).share > predict(H200, reading).share


def test_a_chunk_at_a_time_from_memory_and_from_l2_waits_for_both():
    one = Case(128256, 2, Plan(0, 512, 1, kept=False, ahead=False), REVIEWED)
    several = replace(one, plan=replace(one.plan, slots=4))
    assert predict(H200, one).bound == "latency"
    assert (
        predict(H200, one).share < predict(H200, several).share < predict(H200, replace(one, plan=PLANS[128256])).share
    )


def test_rows_without_a_gradient_are_written_and_not_read():
    case = Case(32000, 2, PLANS[32000], REVIEWED, N=6400, full=25)
    assert case.moved() == 6400 * 32000 * 2 * 1.25
    assert predict(H200, replace(case, full=0), FREE).share == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("full", [100, 25])
def test_the_simulated_part_stands_for_the_whole(full, monkeypatch):
    case = Case(32000, 2, PLANS[32000], REVIEWED, full=full)
    part = predict(H200, case).share
    monkeypatch.setattr(model, "SAMPLE", 1)
    assert part == pytest.approx(predict(H200, case).share, abs=0.01)


def test_the_same_input_has_the_same_bits():
    case = Case(151936, 2, PLANS[151936], REVIEWED)
    assert predict(H200, case) == predict(H200, case)


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_plans_are_those_of_the_launchers(tmp_path):
    vocabularies = (8000, 8193, 32000, 50257, 65536, 100000, 128256, 151936, 262144, 500000, 1000000)
    calls = "".join(f"show({V}, {size});" for V in vocabularies for size in (2, 4))
    (tmp_path / "plans.cpp").write_text(
        f'#include "{ROOT}/csrc/cuda/plan.h"\n#include <cstdio>\nusing namespace ppg;\n'
        "void show(long V, int size) { Plan p = plan_row(V, size, true, 2, 232448, 233472, 16);\n"
        '  std::printf("%d %d %d\\n", p.cluster, p.threads, p.slots); }\n'
        f"int main() {{ {calls} }}\n"
    )
    subprocess.run(["g++", "-std=c++17", tmp_path / "plans.cpp", "-o", tmp_path / "plans"], check=True)
    said = subprocess.run([tmp_path / "plans"], capture_output=True, text=True, check=True).stdout.splitlines()
    ours = [chosen(V, size) for V in vocabularies for size in (2, 4)]
    assert said == [f"{p.cluster} {p.threads} {p.slots if p.cluster else 0}" for p in ours]


# ---- the machine code ------------------------------------------------------------------------------------------------
def a_kernel():
    """Two loops of two vectors of float32, with a slow path, an exchange between them and another row behind them."""
    sum_up = ["LDS.128 R1, [R0]", "LDS.128 R5, [R0+0x10]", *["MUFU.EX2 R1, R1"] * 9, "@!P0 BRA 0x20"]
    store = ["LDS.128 R1, [R0]", "LDS.128 R5, [R0+0x10]", *["MUFU.EX2 R1, R1"] * 8, "@P1 BRA 0x1f0"]
    lines = [
        "NOP", "NOP",  # 0
        "SYNCS.PHASECHK R1", "@!P3 BRA 0x310", *sum_up,  # 20: the first sweep
        "STAS.128 [R2], R4", "SYNCS.PHASECHK R1", "SHFL.BFLY R1, R1",  # 100
        *store, "FADD R1, R1, R2", "FADD R1, R1, R2",  # 130: the second; the label is in few vectors
        "STG.E.EF.128 [R2], R4", "STG.E.EF.128 [R2], R4",  # 200
        "@P4 BRA 0x230", "SYNCS.ARRIVE R1", "@!P0 BRA 0x130", "@!P2 BRA 0x20", "EXIT",  # 220: not all rows release
    ]  # fmt: skip
    lines += ["NOP"] * (0x31 - len(lines)) + ["SYNCS.PHASECHK R1", "@!P3 BRA 0x310", "BRA 0x40"]  # out of line
    return sass.Kernel("policy_loss_onepass<F32, false, 0, 512>", [(16 * i, text) for i, text in enumerate(lines)])


def test_slots_are_counted_along_the_shortest_way():
    kernel = a_kernel()
    assert kernel.code[0x20][1].startswith("STG")
    counts = slots.of(kernel)
    assert (counts.exp_first, counts.exp_second) == (9 / 8, 1)
    assert counts.first == 14 / 8  # the wait, its branch, the block; not the test out of line
    assert counts.second == 17 / 8  # one FADD is jumped over, the release is not
    assert counts.row == 4  # three of the exchange and the branch to the next row
    assert counts.forward == 4 + 17  # nothing here jumps over the second sweep
    assert counts.waits  # without a gradient too
    assert len(kernel.way(0xF0, 0x40, slots.WAIT, 2)) == 5
    once = slots._without_retries(kernel)
    assert len(once.way(0xF0, 0x40, slots.WAIT, 2)) == 2 + 12 + 2  # trying again is no second wait: round once more
    kernel.code = [(a, text.replace("SHFL", "NOP")) for a, text in kernel.code]
    assert not slots.of(sass.Kernel(kernel.name, kernel.code)).waits


def test_code_that_is_built_otherwise_is_refused():
    kernel = a_kernel()
    kernel.code = [(a, text.replace("STG.E.EF.128", "STG.E.EF.64")) for a, text in kernel.code]
    with pytest.raises(ValueError, match=r"onepass<F32, false, 0, 512>: no block stores whole chunks"):
        slots.of(kernel)
    with pytest.raises(ValueError, match="no way leads from 0x180 to 0x0"):
        kernel.way(0x180, 0)
    with pytest.raises(ValueError, match="no way leads"):
        kernel.way(0x180, 0x20, "HMMA", 1)


def test_the_stored_counts_are_those_of_the_extension(stored):
    """Two kernels, where the extension was built from today's sources."""
    extension, today = next(Path(native.__file__).parent.glob("_C*.so")), build.sources(ROOT)
    if (tool := sass.cuobjdump()) is None or today.misfit(extension) or "sm_90a" not in today.built(extension).gpus:
        pytest.skip("needs cuobjdump and an extension of today's sources for sm_90a")
    wanted = "policy_loss_onepass<BF16, false, 0, 512>", "policy_loss_onepass<BF16, false, 1, 256>"
    for kernel in sass.kernels(extension, tool, "sm_90a", wanted.__contains__):
        assert asdict(slots.of(kernel)) == pytest.approx(stored["counts"]["sm_90a"][kernel.name], rel=0.02), (
            f"{kernel.name} has changed: run python -m ppg_fast.bench.gpu.predict and python -m ppg_fast.bench --render"
        )


# ---- the file and its tables -----------------------------------------------------------------------------------------
def test_the_stored_predictions_are_the_models(stored):
    found = {arch: {name: Counts(**c) for name, c in of.items()} for arch, of in stored["counts"].items()}
    around = Launches(**stored["launches"])
    calls = stored["calls"]
    assert len(calls) == 3 * 2 * 4 * 3
    for row, again in zip(calls[:4], command.calls(found, around), strict=False):
        assert again == row
    assert stored["launches"] == asdict(command.launches())
    assert next(row["after"] for row in stored["heads"] if row["built"]) == command.scaled()
    assert stored["unknowns"] == asdict(Unknowns())
    assert [d["name"] for d in stored["devices"]] == [d.name for d in DEVICES]
    assert list(command.heads(found, next(r["after"] for r in stored["heads"] if r["built"]))) == stored["heads"]


def test_every_way_that_is_measured_is_predicted():
    text = (ROOT / "bench/gpu/plans.cu").read_text()
    for V, ways in re.findall(r"\{(\d+), \{own, (.*?)\}\},?\n", text):
        measured = {tuple(map(int, way)) for way in re.findall(r"\{(\d+), (\d+), (\d+), 0\}", ways)}
        assert int(V) not in command.CANDIDATES or measured <= set(command.CANDIDATES[int(V)])


def test_without_a_disassembler_the_command_says_what_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sass, "cuobjdump", lambda: None)
    assert command.main(["--output", str(tmp_path)]) == 1
    assert "needs cuobjdump, which comes with" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_measured_shares_stand_beside_the_predicted_ones(stored):
    """Of the GPU that was measured; before that their column is empty."""
    assert predicted.prediction_section({}) == NOT_MEASURED
    before = predicted.prediction_section({command.NAME: stored})
    assert re.search(r"share of a copy, V 128,256 \| 93% \| [\d.]+% \| \S+ \|  \|", before)
    file = synthetic(
        "2027-01-01T00:00:00+00:00", "c" * 40,
        bench=[],
        plans=[{"plan": {"cluster": 4, "threads": 256, "slots": 5}, "N": 8192, "V": 128256, "full": 100,
                "launched": True, "ms": 1.1, "copy_ms": 1.0, "share_of_copy": 0.77}],
    )  # fmt: skip
    file["machine_info"]["gpu"] = {"name": "NVIDIA H200"}
    file["benchmarks"] = [
        entry("policy_loss", "copy", 0.97e-3, "ceiling"), entry("policy_loss", "ppg_fast cuda, in place", 1e-3, "ours")
    ]  # fmt: skip
    after = predicted.prediction_section({command.NAME: stored, "gpu.cuda": file})
    assert re.search(r"share of a copy, V 128,256 \| 93% \| [\d.]+% \| \S+ \| 97% \|", after)
    assert re.search(r"cluster 4, 256 threads, 5 slots, 2 an SM \| 128,256 \| [\d.]+% \| 77% \|", after)
    file["machine_info"]["gpu"] = {"name": "NVIDIA H20"}
    assert "| 97% |" not in predicted.prediction_section({command.NAME: stored, "gpu.cuda": file})


def test_the_documents_have_the_section():
    assert "gpu_prediction" in render.SECTIONS
    assert "<!-- bench:gpu_prediction -->" in (ROOT / "docs/benchmarks.md").read_text()

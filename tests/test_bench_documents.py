"""Result files have their fields, and the documents say what the files say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ppg_fast.bench import command, harness, learning_curve, machine, render, result_file
from ppg_fast.bench.tables import of

ROOT = Path(__file__).parents[1]
NAME = result_file.name_of("{}", "cpu", result_file.host())  # of the files measured here
STATS = {"min", "max", "mean", "stddev", "rounds", "median", "p20", "p80", "q1", "q3", "iqr", "ops", "total", "data"}


@pytest.fixture(scope="module")
def policy_loss_results(tmp_path_factory):
    """A folder of results as the command writes them, measured without subprocesses."""
    folder = tmp_path_factory.mktemp("root")
    for op, module in ((op, harness.OPS[op]) for op in ("policy_loss", "linear")):
        entries, missing = harness.measure(module.cases("quick", "cpu")[0], harness.PACES["quick"], compilers=False)
        peak = {"case": entries[0]["params"], "bytes": {entries[0]["param"]: [3 * 2**20]}}
        merged = command._merged(
            op, machine.header("test", "cpu"), [{"entries": entries, "missing": {op: missing}, "peaks": [peak]}]
        )
        result_file.write(folder / render.FOLDER, NAME.format(op), merged)
    return folder


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
    file = policy_loss_results / render.FOLDER / f"{NAME.format('policy_loss')}.json"
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


def test_the_front_page_shows_six_rows_and_not_the_prettiest():
    """With another allocator or, for the head, another dtype we gain more, where that was measured too."""
    results = render.load(ROOT / render.FOLDER)
    text = render.SECTIONS["summary"](results)
    shown = [line.removesuffix(" |").split(" | ") for line in text.splitlines()[2:]]
    assert [line[0].split("`")[1] for line in shown] == [wanted["op"] for wanted in render.FRONT_PAGE]
    assert len(shown) == 6
    for line, wanted in zip(shown, render.FRONT_PAGE, strict=True):
        free = {"allocator"} if wanted["op"] != "linear" else {"dtype"}
        case = {k: v for k, v in wanted.items() if k not in free} | {"active": 1.0, "zero": 0.0, "threads": 2}
        gains = {}
        for e in (e for where, file in of(results, wanted["op"]) if where == line[6] for e in file["benchmarks"]):
            if case.items() <= e["params"].items() and e["extra_info"].get("correct"):
                kind = gains.setdefault((e["params"]["dtype"], e["params"]["allocator"]), {"ours": [], "peer": []})
                kind[e["extra_info"]["kind"]].append(e["stats"]["median"])
        least = min(min(kind["peer"]) / min(kind["ours"]) for kind in gains.values())
        assert line[3].split(" (")[0] == f"{least:.2f} x", (line, gains)


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
    assert (root / render.FOLDER / f"{NAME.format('policy_loss')}.512.float32.svg").read_text().startswith("<svg")
    assert render.write(root) == []
    (root / "docs/benchmarks.md").write_text(text.replace("ppg_fast cpu, in place", "ppg_fast cpu, in haste"))
    assert render.write(root) == [root / "docs/benchmarks.md"]
    with pytest.raises(ValueError, match="got 'policy'"):
        render.fill("<!-- bench:policy -->\n<!-- /bench -->", {})


@pytest.mark.parametrize("wrong", ["ours", "peer"])
def test_no_speedup_for_a_wrong_result(policy_loss_results, wrong):
    file = render.load(policy_loss_results / render.FOLDER)[NAME.format("policy_loss")]
    entries = file["benchmarks"]
    assert " x (no interval) |" in render.group_table(entries)
    for entry in entries:
        if entry["extra_info"]["kind"] == wrong:
            entry["extra_info"]["correct"] = False
    text = render.group_table(entries)
    assert " x " not in text
    assert "(wrong)" in text


def test_durations_have_three_digits():
    assert [render.duration(s) for s in (1.5e-6, 3.14159e-4, 0.00832, 0.0832, 0.832, 8.32, 83.2)] == [
        "1.5 µs", "314 µs", "8.32 ms", "83.2 ms", "832 ms", "8,320 ms", "83.2 s",
    ]  # fmt: skip


def test_command(tmp_path, capsys):
    assert command.main(["--quick", "--ops", "partial_returns", "--output", str(tmp_path), "--no-memory"]) == 0
    assert_schema(json.loads((tmp_path / f"{NAME.format('partial_returns')}.json").read_text()))
    assert "ppg_fast cpu" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        command.main(["--ops", "unknown"])
    if not torch.cuda.is_available():
        assert command.main(["--device", "cuda"]) == 1


def test_learning_curves_become_a_table(tmp_path):
    arms = [("lookahead:3", 1), ("full", 0), ("lookahead:3", 0)]
    for name, seed in arms:
        run = tmp_path / f"{name}{seed}"
        run.mkdir()
        summary = dict.fromkeys(learning_curve.KEPT, 1) | {
            "seed": seed,
            "policy_class": name,
            "device": "cpu",
            "seconds": 12.3,
        }
        (run / "summary.json").write_text(json.dumps(summary))
        points = [
            {
                "phase": "eval",
                "step": step,
                "eval/reward": 2.0 + step / 8 + 0.3 * seed * (step > 0),
                "eval/reward_share": 0.4 + step / 20 + 0.05 * (name != "full"),
            }
            for step in (0, 8)
        ]
        (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, [*points, {"phase": "train", "step": 1}])))
    learning_curve.main([*(str(tmp_path / f"{name}{seed}") for name, seed in arms), "--output", str(tmp_path)])
    text = render.SECTIONS["learning_curve"](render.load(tmp_path))
    # by hand: the mean share of a seed is that of its two ends, and seed 1 has no full planning beside it
    assert "| full, 1 seed | 40% | 80% | 3.00 |  | 12.3 s |" in text
    assert "| lookahead:3, 2 seeds | 45% | 85% | 3.15 ± 0.21 | +5.0 (one seed) | 12.3 s |" in text
    assert learning_curve._points([0.05, -0.01, 0.02]) == "+2.0 ± 1.7"

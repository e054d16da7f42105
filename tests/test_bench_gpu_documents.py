"""What a GPU run has found becomes bars and sections of the documents: from made-up files in temporary folders."""

from pathlib import Path

import pytest
from ppg_fast.bench import render, result_file
from gpu_results import measured, synthetic
from ppg_fast.bench.gpu import bars, schedule, sections
from ppg_fast.bench.tables import NOT_MEASURED

ROOT = Path(__file__).parents[1]


def test_bars_are_met_or_not():
    found = {bar[0]: (bar[3], bars.met(bar)) for bar in bars.bars(measured())}
    assert found["V 128,256: DRAM bytes of the fused kernel / (one read + one write)"] == (1.025, "met")
    assert found["V 128,256: share of the rate of a device copy"] == (pytest.approx(1 / 1.1), "met")
    assert found["V 128,256: time of torch.compile / ours"] == (pytest.approx(2.0), "met")
    assert found["V 128,256: time of quack's cross-entropy / ours"] == (pytest.approx(1.05 / 1.1), "**not met**")
    assert found["V 128,256: log-prob and entropy alone, share of the read rate"] == (
        pytest.approx(5 / 6),
        "**not met**",
    )
    assert found["from hidden states, V 128,256, D 4,096: share of three bare GEMMs"] == (pytest.approx(11 / 12), "met")
    assert found["its peak memory / (a chunk of logits + float32 d_weight + d_hidden)"][1] == "met"
    assert found["25% of the rows active: time / that of all"] == (pytest.approx(0.275), "met")
    assert found["rewards and logits to loss and dlogits: launches"] == (3.0, "**not met**")
    assert found["V 262,144: share of the rate of a device copy"] == (None, "not measured")


def test_a_wrong_result_meets_no_bar():
    file = measured()
    for e in file["benchmarks"]:
        e["extra_info"]["correct"] = e["extra_info"]["kind"] != "ours"
    assert {bars.met(bar) for bar in bars.bars(file) if "DRAM" not in bar[0] and "launches" not in bar[0]} == {
        "not measured",
        "met",
    }
    assert [bar[0] for bar in bars.bars(file) if bars.met(bar) == "met" and "DRAM" not in bar[0]] == [
        "rewards and logits to loss and dlogits: syncs"
    ]


def test_a_results_file_becomes_sections(tmp_path):
    """From a file that is made up and lives in a temporary folder: the documents of the repository know no such
    figures."""
    results = tmp_path / render.FOLDER
    page = (
        "<!-- bench:gpu -->\n<!-- /bench -->\n<!-- bench:gpu_summary -->\n<!-- /bench -->\n<!-- bench:machine "
        "-->\n<!-- /bench -->\n"
    )
    (tmp_path / "README.md").write_text(page)
    render.write(tmp_path)
    assert (tmp_path / "README.md").read_text().count(NOT_MEASURED) == 2
    result_file.write(results, "gpu.cuda", measured())
    render.write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert text.count("| V 128,256: share of the rate of a device copy | >= 90% | 91% | met |") == 2
    assert (
        "| Qwen3-8B, 262,144 tokens, checkpoints on the host | ppg_fast cuda | 60.0 s | 4,369 | 5% | 64.0 GiB |" in text
    )
    assert "| Qwen3-8B, 32,768 tokens | eager PyTorch | does not fit |" in text
    assert "| 128,256 | 100% | cluster 4, 256 threads, 5 slots | 1.100 ms | 91% | 1.0e-06 |" in text
    assert "| 4,096 | 35.0 ms | 94% |" in text
    assert "`gpu.cuda`" in text
    later = synthetic(
        "2026-01-02T00:00:00+00:00",
        "d" * 40,
        counts=[{"path": "rewards and logits to loss and dlogits", "launches": ["a"], "syncs": 0}],
    )
    later["parts"]["dram"] = {"status": "missing", "reason": "ncu is not on PATH"}
    result_file.write(results, "gpu-counts.cuda", later)
    render.write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert (
        "| rewards and logits to loss and dlogits: launches | <= 2 | 1 | met |" in text
    )  # the newer part beside the others of the older run
    assert "| V 128,256: DRAM bytes of the fused kernel / (one read + one write) | <= 1.05 | 1.02 | met |" in text


def test_without_a_results_file_no_figure_is_claimed():
    if list((ROOT / render.FOLDER).glob("gpu*.cuda.json")):
        pytest.skip("there is one")
    assert sections.gpu_section(render.load(ROOT / render.FOLDER)) == NOT_MEASURED
    assert sections.summary_section({}) == ""  # the front page says nothing, docs/benchmarks.md that it is not measured


def test_the_page_says_the_parts_and_their_limits():
    page = (ROOT / "docs/benchmarks.md").read_text()
    rows = [line.split("|")[1:3] for line in page.splitlines() if line.startswith("| `")]
    said = [(name.strip(" `"), limit.strip()) for name, limit in rows if limit.strip().endswith(" s")]
    assert said == [(name, f"{slot.limit} s") for name, slot in schedule.SLOTS.items()]

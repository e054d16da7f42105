"""What a GPU run has found becomes bars and sections of the documents: from made-up files in temporary folders."""

from pathlib import Path

import pytest
from ppg_fast.bench import render, result_file
from ppg_fast.bench.gpu import bars, schedule, sections, store
from ppg_fast.bench.tables import NOT_MEASURED

ROOT = Path(__file__).parents[1]


def entry(op, provider, median, kind="peer", **params):
    case = {
        "op": op,
        "N": 8192,
        "V": 128256,
        "D": 0,
        "dtype": "bfloat16",
        "active": 1.0,
        "zero": 0.0,
        "variant": "",
        "device": "cuda",
    }
    case |= {"threads": 1, "allocator": "default", "provider": provider, **params}
    stats = {"median": median, "p20": median, "p80": median, "min": median, "rounds": 5}
    group = f"{op} {case['V']} {case['active']}"
    return {
        "group": group,
        "param": provider,
        "params": case,
        "part": "bench",
        "stats": stats,
        "extra_info": {"kind": kind, "correct": True},
    }


def synthetic(when, commit, **parts):
    file = store.header("make gpu", commit)
    file["datetime"] = when
    file["parts"] = {name: {"status": "passed", "seconds": 1.0, "results": results} for name, results in parts.items()}
    return file


def measured():
    """A run made up of round numbers."""
    bare = entry("linear", "three bare GEMMs", 0.033, "ceiling", D=4096)
    head = entry("linear", "ppg_fast cuda", 0.036, "ours", D=4096)
    head["extra_info"] |= {"peak_extra_bytes": 4.0e9, "chunk_bytes": 8192 * 128256 * 2}
    file = synthetic(
        "2026-01-01T00:00:00+00:00",
        "c" * 40,
        dram=[
            {
                "op": "policy_loss",
                "N": 8192,
                "V": 128256,
                "read": 2e9,
                "write": 2e9,
                "bytes": 4.1e9,
                "over_least": 1.025,
            }
        ],
        counts=[{"path": "rewards and logits to loss and dlogits", "launches": ["a", "b", "c"], "syncs": 0}],
        bench=[{"chunk_rows": 4096, "stats": {"median": 0.035}, "share_of_bare_gemms": 0.94}],
        steps=[
            {
                "model": "Qwen3-8B",
                "tokens": 262144,
                "offload": True,
                "provider": "ppg_fast cuda",
                "fits": True,
                "seconds": 60.0,
                "loss_seconds": 3.0,
                "peak_bytes": 2**36,
            },
            {
                "model": "Qwen3-8B",
                "tokens": 32768,
                "offload": False,
                "provider": "eager PyTorch",
                "fits": False,
                "reason": "out of memory",
            },
        ],
        plans=[
            {
                "plan": {"cluster": 4, "threads": 256, "slots": 5},
                "N": 8192,
                "V": 128256,
                "full": 100,
                "launched": True,
                "ms": 1.1,
                "copy_ms": 1.0,
                "share_of_copy": 0.91,
                "difference": 1e-6,
            }
        ],
    )
    file["benchmarks"] = [
        entry("policy_loss", "copy", 0.0010, "ceiling"),
        entry("policy_loss", "ppg_fast cuda, in place", 0.0011, "ours"),
        entry("policy_loss", "torch.compile", 0.0022), entry("policy_loss", "quack cross-entropy", 0.00105), bare, head,
        entry("linear", "ppg_fast cuda", 0.0099, "ours", D=4096, active=0.25),
        entry("logprobs", "read (sum)", 0.00050, "ceiling"),
        entry("logprobs", "ppg_fast cuda, with entropy", 0.00060, "ours"),
    ]  # fmt: skip
    copy, ours = (file["benchmarks"][n]["extra_info"] for n in (0, 1))
    copy |= {"host_bound": False, "host_seconds": 12e-6, "graph_seconds": 0.0010}
    ours |= {"host_bound": False, "host_seconds": 0.000450, "graph_seconds": 0.00105}
    ours |= {"ceiling": "copy", "share_of_ceiling": 1 / 1.1, "graph_share_of_ceiling": 1 / 1.05}
    after = {
        "sm_mhz": 1755,
        "watts": 699.6,
        "slowed_by": ["power cap", "idle"],
        "missing": {"celsius": "Not Supported"},
    }
    copy |= {"gpu_before": {"sm_mhz": 1980, "memory_mhz": 3201, "watts": 80, "celsius": 41}, "gpu_after": after}
    head["extra_info"] |= {"host_bound": True, "not_captured": "the call waits for the GPU"}
    return file


def test_bars_are_met_or_not():
    found = {bar[0]: (bar[3], bars.met(bar)) for bar in bars.bars(measured())}
    assert found["V 128,256: DRAM bytes of the fused kernel / (one read + one write)"] == (1.025, "met")
    assert found["V 128,256: share of the rate of a device copy"] == (pytest.approx(1 / 1.1), "met")
    assert found["V 128,256: share of the rate of a device copy, as CUDA graphs"] == (pytest.approx(1 / 1.05), "met")
    assert found["V 128,256: host time of a call / the GPU's"] == (pytest.approx(0.45 / 1.1), "met")
    assert found["V 32,000: host time of a call / the GPU's"] == (None, "not measured")
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
    assert "| time / ours | share of the ceiling | peak extra memory | error | as a CUDA graph | host, a call |" in text
    (ours,) = [line for line in text.splitlines() if line.startswith("| ppg_fast cuda, in place | 1.1 ms |")]
    assert ours.endswith("| 91% of copy |  |  | 1.05 ms (95%) | 450 µs |")
    assert (
        "The GPU before: 1,980 MHz, 3,201 MHz of memory, 80 W, 41 °C; after: 1,755 MHz, 700 W, slowed by power cap and "
        "idle, no celsius (Not Supported).\n"
    ) in text
    assert " the call waits for the GPU | the GPU waits |" in text
    assert "| torch.compile | 2.2 ms | 2.2 ms to 2.2 ms | 2.2 ms | 5 | 2.00 x (no interval) |  |  |  |  |  |" in text
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

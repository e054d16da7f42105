"""Whole trainers side by side: the same dialogue, the same loss and gradient, and the longest dialogue that fits."""

import json
import math
import time
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")

from ppg_fast.bench import bench_training_step, byte_dialogue, harness, longest, render, step_tables, whole_step

QUICK = next(c for c in bench_training_step.cases("quick", "cpu") if c.shape)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ---- the dialogue ----------------------------------------------------------------------------------------------------
def test_a_dialogue_has_the_length_asked_for_a_token_a_byte():
    lines = [("user", "hé", 0.0), ("assistant", "ok", 1.0), ("user", "x", 0.0), ("assistant", "no", 0.5)]
    sample = byte_dialogue.byte_sample(lines, 21)
    assert len(sample.tokens) == len(sample.turn_ids) == 21
    assert bytes(t - byte_dialogue.CONTROL for t in sample.tokens[1:4]).decode() == "hé"
    assert sample.turn_ids == [-1] * 6 + [0, 0, 0] + [-1] * 4 + [1, 1, 1] + [-1] * 5, (
        "role tokens and users are context, ends are not"
    )
    assert sample.rewards == [1.0, 0.5]
    assert len(byte_dialogue.byte_sample(lines, 1000).tokens) == 1000, "the lines begin again"
    with pytest.raises(byte_dialogue.Unavailable, match="within the first 3 tokens"):
        byte_dialogue.byte_sample(lines, 3)


def test_lines_come_from_a_file_with_their_rewards(tmp_path):
    messages = [{"role": "user", "content": "who ?"}, {"role": "assistant", "content": "anna"}]
    record = {"id": "a", "group_id": "g", "messages": messages, "turn_rewards": [0.25]}
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps({**record, "id": name}) for name in "ab"))
    assert (
        byte_dialogue.lines_of(str(tmp_path / "log.jsonl")) == [("user", "who ?", 0.0), ("assistant", "anna", 0.25)] * 2
    )
    synthetic = byte_dialogue.lines_of("")
    assert len(synthetic) == byte_dialogue.LINES
    assert {line[2] for line in synthetic if line[0] == "user"} == {0.0}


# ---- the steps -------------------------------------------------------------------------------------------------------
def test_both_trainers_take_the_same_step():
    """Against float64 on plain logits; and what decides that would see a step that is wrong."""
    entries, missing = harness.measure(QUICK, harness.PACES["quick"])
    if "TRL GRPO" in missing:
        pytest.skip(missing["TRL GRPO"])
    assert {e["param"] for e in entries} == set(whole_step.STEPS)
    for entry in entries:
        info = entry["extra_info"]
        assert info["correct"], info["error"]
        assert set(info["error"]) >= {"loss", "d_embedding"}
        assert info["tokens"] == QUICK.N
        assert 0 < info["active_tokens"] < QUICK.N
    assert "agreement" in entries[-1]["extra_info"]["error"]
    text = step_tables.step_table("cpu", entries)
    assert "whole trainers: one dialogue of 512 tokens" in text
    assert "longest" not in text
    json.dumps(entries)


def test_a_step_with_other_advantages_is_called_wrong(monkeypatch):
    inputs = whole_step._grpo_inputs
    monkeypatch.setattr(
        whole_step, "_grpo_inputs", lambda p: {**inputs(p), "advantages": inputs(p)["advantages"] * 1.01}
    )
    pytest.importorskip("trl")
    problem = whole_step.make(QUICK)
    check = whole_step.checker(problem, QUICK)
    found, _ = whole_step.participants(QUICK)
    errors = {p.name: check(p.run(problem)) for p in found}
    assert max(errors["ppg_fast"].values()) < harness.FLOOR["float32"]
    assert min(errors["TRL GRPO"].values()) > harness.FLOOR["float32"]


# ---- the longest -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "bytes_of", [lambda t: 1000 * t, lambda t: 5e6 + 800 * t + t * t / 50], ids=["linear", "quadratic"]
)
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_the_longest_dialogue_is_bracketed(bytes_of, noise):
    draw = torch.Generator().manual_seed(0)

    def peak(tokens):
        return bytes_of(tokens) * (1 + noise * (2 * float(torch.rand((), generator=draw)) - 1))

    for budget in (3e6, 2e7, 7.7e8):
        true = max(
            (t for t in (2**k * m // 64 for k in range(10, 22) for m in range(64, 128)) if bytes_of(t) <= budget),
            default=0,
        )
        found = longest.longest_that_fits(peak, budget)
        assert found.measured
        assert len(found.probes) < 25
        assert found.tokens == pytest.approx(true, rel=2 * longest.TOLERANCE + noise, abs=2)


def test_running_out_of_memory_is_too_long():
    found = longest.longest_that_fits(lambda tokens: math.inf if tokens > 50_000 else 1.0 + tokens * 1e-9, 2.0)
    assert found.measured
    assert 50_000 / (1 + longest.TOLERANCE) <= found.tokens <= 50_000


def test_nothing_is_begun_that_would_pass_the_time():
    now = [0.0]

    def peak(tokens):
        now[0] += (tokens / 1024) ** 2
        return 1000.0 * tokens

    clock, time.monotonic = time.monotonic, lambda: now[0]
    try:
        found = longest.longest_that_fits(peak, 1e8, seconds=30)
    finally:
        time.monotonic = clock
    assert not found.measured
    assert now[0] <= 30
    assert found.tokens == pytest.approx(100_000, rel=0.01)
    whole = longest.longest_that_fits(lambda tokens: 1.0, 2.0, most=5000)
    assert (whole.tokens, whole.measured) == (5000, True)


def test_the_search_runs_in_a_process_of_its_own():
    facts = longest.longest_facts(QUICK, "ppg_fast", budget=12 * 2**20, seconds=20)
    if not facts:
        pytest.skip("the system does not tell")
    found = facts["longest"]
    assert facts["memory_budget_bytes"] == 12 * 2**20
    assert found["tokens"] >= 256
    assert found["probes"][0][0] == longest.FIRST
    assert longest.longest_facts(QUICK, "ppg_fast") == {}, "no budget is set for the smallest shape"


def test_the_table_says_what_was_foreseen():
    stats = {"median": 2.0, "min": 2.0}
    info = {
        "kind": "ours",
        "correct": True,
        "error": {"loss": 1e-7},
        "tokens": 40_000,
        "active_tokens": 20_000,
        "tokens_per_second": 2e4,
    }
    info |= {"longest": {"tokens": 16_000, "measured": True, "probes": []}, "memory_budget_bytes": 512 * 2**20}
    other = {**info, "kind": "peer", "longest": {"tokens": 9_000, "measured": False, "probes": []}}
    params = {**vars(replace(QUICK)), "provider": ""}
    entries = [{"param": "ppg_fast", "stats": stats, "extra_info": info, "params": params, "group": "g"}]
    entries += [
        {"param": "TRL GRPO", "stats": {"median": 3.0, "min": 3.0}, "extra_info": other, "params": params, "group": "g"}
    ]
    file = {"benchmarks": entries, "ppg_fast": {"missing": {}}}
    text = render.SECTIONS["training_step"]({"training_step.cpu": file})
    assert "smallest model" in text
    assert "longest that fits 512 MiB" in text
    assert "| 16,000 |" in text
    assert "| 1.50 x (no interval) |  | 9,000 (foreseen) |" in text

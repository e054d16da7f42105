"""The study of `--token-share` at a tiny size: its runs, what is stored of them, the head, what is said of both."""

import json

import pytest

pytest.importorskip("transformers")

from ppg_fast.bench import render, token_share
from ppg_fast.bench.timing import stats

from ppg_fast.cli import main as ppg_fast

TINY = {"steps": 1, "imitation_steps": 1, "width": 16, "eval_dialogues": 2}
FLAGS = [part for name, value in TINY.items() for part in (f"--{name.replace('_', '-')}", str(value))]


def test_a_run_for_each_seed_and_share_and_none_twice(tmp_path):
    flags, said = [*FLAGS, "--folder", str(tmp_path / "runs"), "--output", str(tmp_path)], []

    def run(arguments):
        said.append(arguments)
        assert ppg_fast(arguments) == 0

    assert token_share.main([*flags, "--seeds", "1"], run) == 0
    assert [arguments[arguments.index("--token-share") + 1] for arguments in said[1:]] == ["1.0", "0.5", "0.2"]
    again = []
    token_share.main([*flags, "--seeds", "1"], again.append)
    assert again == []
    with pytest.raises(ValueError, match="must be of the same settings"):
        token_share.main([*flags, "--steps", "2"], again.append)
    whole, half, fifth = json.loads((tmp_path / "token_share.cpu.json").read_text())["curves"]
    rows = [json.loads(line) for line in (tmp_path / "runs/share-0.2-0/metrics.jsonl").read_text().splitlines()]
    assert fifth["points"] == [
        [r["step"], pytest.approx(r["eval/reward"], abs=1e-4)] for r in rows if "eval/reward" in r
    ]
    assert whole["points"][0] == half["points"][0] == fifth["points"][0]  # the same policy on the same personas
    assert fifth["trained"] < half["trained"] < whole["trained"] <= 1


def test_the_head_reads_the_chosen_rows():
    found = token_share.measure_head(dialogues=1, vocabulary=50, width=8, rounds=2)
    assert found["size"] == [512, 50, 8]
    assert [row["active"] for row in found["rows"]] == [256, 128, 8 * 7]
    assert all(row["stats"]["rounds"] == 2 for row in found["rows"])


def test_what_is_said_of_the_curves():
    ends = {1.0: (3.0, 5.0), 0.5: (3.5, 5.5), 0.2: (2.0, 3.0)}
    curves = [
        {"share": share, "seed": seed, "trained": share, "points": [[0, 2.0], [30, last]]}
        for share, both in ends.items()
        for seed, last in enumerate(both)
    ]
    text = render.SECTIONS["token_share"]({"token_share.cpu": {"curves": curves}})
    assert "of 2 seeds" in text
    assert "| 1 | 100% | 2.00 ± 0.00 | 4.00 ± 1.00 |  |" in text
    assert "| 0.5 | 50% | 2.00 ± 0.00 | 4.50 ± 1.00 | +0.50 ± 0.00 |" in text
    assert "| 0.2 | 20% | 2.00 ± 0.00 | 2.50 ± 0.50 | -1.50 ± 0.50 |" in text
    assert render.SECTIONS["token_share"]({}) == render.NOT_MEASURED


@pytest.mark.parametrize(("ratio", "said"), [(0.34, "met"), (0.36, "missed")])
def test_what_is_said_of_the_head(ratio, said):
    rows = [
        {"share": share, "active": active, "stats": stats([seconds] * 9)}
        for share, active, seconds in ((1.0, 1000, 1.0), (0.2, 200, ratio))
    ]
    file = {
        "size": [2000, 50, 8],
        "rows": rows,
        "ppg_fast": {"threads": 1},
        "machine_info": {"cpu": {"brand_raw": "X"}},
    }
    text = render.SECTIONS["token_share_head"]({"token_share_head.cpu.x": file})
    assert f"at share 0.2 at most 0.35 of the time at share 1: **{said}**" in text
    assert f"| 0.2 | 200 | {1000 * ratio:.0f} ms | {ratio:.2f} ({ratio:.2f} to {ratio:.2f}) |" in text
    assert render.SECTIONS["token_share_head"]({}) == render.NOT_MEASURED

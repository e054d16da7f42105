"""`ppg-fast train --top-p --top-k`: what is sampled from a kept set is trained over it."""

import json

import pytest

pytest.importorskip("transformers")

from kill_case import TINY, flags
from test_usage import said

from ppg_fast.cli import main

SHORT = flags(
    "--imitation-steps 2 --imitation-batch 2 --max-steps 2 --num-prompts 2 --num-generations 2 --kl-coef 0.1 "
    "--entropy-coef 0.01 --loss-type ppo --num-iterations 2"
)


def test_the_samplers_log_probs_are_the_trainers(tmp_path):
    """With a KL term, an entropy term and two updates a step; over the whole vocabulary they would be a nat apart."""
    folder = tmp_path / "run"
    assert main(["train", *TINY, *SHORT, *flags("--top-p 0.7 --top-k 6 --output-dir"), str(folder)]) == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "sampling/sampling_logp_difference/max" in row]
    assert len(rows) == 2
    for row in rows:
        assert row["sampling/sampling_logp_difference/max"] < 1e-4
        assert row["entropy"] < 1.8, "log of 6, at most"
        assert abs(row["kl"]) < 1.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--top-p 0", "top_p must be a finite number > 0.0 and <= 1.0, got 0.0"),
        ("--top-p 1.5", "top_p must be a finite number > 0.0 and <= 1.0, got 1.5"),
        ("--top-k -1", "top_k must be an integer >= 0, got -1"),
        (
            "--top-k 5 --data log.jsonl",
            "top_p must be 1 and top_k 0 with data (kept sets come with new answers, and logged ones have none)",
        ),
    ],
)
def test_wrong_settings_are_one_line(capsys, words, message):
    _, line = said(capsys, "train", *flags(words))
    assert message in line

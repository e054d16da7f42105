"""Noise like that of real verdicts: the covariances of logged rewards by hand, and problems that have them."""

import json

import numpy as np
import pytest

from ppg_fast.cli import main
from ppg_fast.compare.tabular import TabularProblem
from ppg_fast.compare.verdict_noise import LAGS, covariances, with_noise_like
from ppg_fast.rollouts.problems import PROBLEMS


def log(path, *rewards):
    line = lambda i, r: {  # noqa: E731
        "id": f"d{i}",
        "group_id": "g",
        "messages": [m for _ in r for m in ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})],
        "turn_rewards": r,
    }
    path.write_text("".join(json.dumps(line(i, r)) + "\n" for i, r in enumerate(rewards)))
    return str(path)


def test_covariances_by_hand(tmp_path):
    """Turn 0: 0, 1, 1; turn 1: 1, 1, 0; turn 2 of two dialogues alone: 1, 0. Products of what each has beyond its
    turn's mean over the dialogues that have both, (n - 1) below; then the mean over pairs of turns, by dialogues."""
    file = log(tmp_path / "a.jsonl", [0, 1, 1], [1, 1], [1, 0, 0])
    lag0 = [(3, 1 / 3), (3, 1 / 3), (2, 1 / 2)]  # dialogues, covariance
    lag1 = [(3, -1 / 6), (2, 1 / 2)]
    lag2 = [(2, -1 / 2)]
    expected = [sum(n * c for n, c in lag) / sum(n for n, _ in lag) for lag in (lag0, lag1, lag2)]
    found = covariances([file])
    assert found[:3] == pytest.approx(expected, abs=1e-5)
    assert found[3:] == (0.0,) * (LAGS - 3)
    more = log(tmp_path / "b.jsonl", [0], [1])  # one turn, covariance 1/2
    assert covariances([file, more])[0] == pytest.approx((8 * expected[0] + 2 * 0.5) / 10, abs=1e-5)


def test_problems_have_the_covariances():
    by_lag = (0.25, 0.1, 0.05, 0.02)
    of = with_noise_like(PROBLEMS["mood"], by_lag)
    factor = np.array(of.noise)
    expected = np.zeros((12, 12))
    for t in range(12):
        for k in range(12):
            expected[t, k] = by_lag[abs(t - k)] if abs(t - k) < 4 else 0.0
    assert np.linalg.eigvalsh(expected).min() > 0
    assert factor @ factor.T == pytest.approx(expected)
    assert of.honest_pays == PROBLEMS["mood"].honest_pays
    assert np.isfinite(TabularProblem(of).moments(TabularProblem(of).start(), "full", 8).group_variance)
    impossible = np.array(with_noise_like(of, (1.0, 1.0)).noise)  # each like the next, and not like the one after
    assert np.linalg.eigvalsh(impossible @ impossible.T).min() > -1e-9


def test_compare_takes_it_and_says_from_which_files(tmp_path, capsys):
    file = log(tmp_path / "verdicts.jsonl", [0, 1, 1], [1, 1, 0])
    flags = ["--version", "tabular", "--problem", "plan", "--policy-classes", "full", "--max-steps", "2"]
    flags += ["--noise-of", file, "--seeds", "1", "--output-dir", str(tmp_path / "out")]
    assert main(["compare", *flags]) == 0
    saved = json.loads((tmp_path / "out/compare.json").read_text())
    assert saved["settings"]["noise_of"][:3] == pytest.approx(covariances([file])[:3])
    assert "--noise-of verdicts.jsonl" in saved["command"]
    capsys.readouterr()
    assert main(["compare", *flags[:-4], "--noise-of", str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl" in capsys.readouterr().err
    one = log(tmp_path / "one.jsonl", [1.0])
    assert main(["compare", *flags, "--noise-of", one, "--overwrite"]) == 1
    assert "noise_of must be files with a turn that two dialogues have scores of" in capsys.readouterr().err
    assert main(["compare", "--data", file, "--noise-of", file, "--output-dir", str(tmp_path / "d")]) == 1
    assert "noise_of must be left out with data: it is of the built-in problems" in capsys.readouterr().err

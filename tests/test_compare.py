"""`ppg-fast compare`: results that are kept, numbers that are what they are called, a report that stands alone."""

import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from ppg_fast import cli
from ppg_fast.compare import results, summary
from ppg_fast.compare.command import main
from ppg_fast.compare.results import Run

TABULAR = ["--problem", "plan", "--version", "tabular", "--policy-classes", "greedy,full,auto", "--max-steps", "6"]


def files(folder):
    return {p.name: p.stat().st_mtime_ns for p in (folder / results.RESULTS).iterdir()}


def test_a_comparison_resumes_result_by_result_and_reports(tmp_path, capsys):
    flags = [*TABULAR, "--output-dir", str(tmp_path)]
    assert cli.main(["compare", *flags, "--seeds", "2"]) == 0
    first = json.loads((tmp_path / "compare.json").read_text())
    before = files(tmp_path)
    assert len(before) == 7  # two seeds of three classes, and the gradients
    gone = next(p for p in (tmp_path / results.RESULTS).iterdir() if "auto-1" in p.name)
    gone.unlink()
    assert main([*flags, "--seeds", "3"]) == 0
    after = files(tmp_path)
    assert len(after) == 10
    # what was there was not computed again
    assert all(after[name] == time for name, time in before.items() if name != gone.name)
    second = json.loads((tmp_path / "compare.json").read_text())
    for name, c in second["problems"][0]["classes"].items():
        assert c["seeds"] == [0, 1, 2]
        # same run, same numbers
        assert c["final"]["each"][:2] == first["problems"][0]["classes"][name]["final"]["each"]
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert page.count("data:image/svg+xml;base64,") == 2
    assert "http" not in page.split("</style>")[1].replace("data:image", "")
    assert "as it should be: mean return over training: full" in page
    assert "auto: mean return over training" in capsys.readouterr().out


def test_a_comparison_that_is_killed_goes_on_to_the_same_numbers(tmp_path):
    """kill -9 as soon as it has some results; what was half written does not count."""
    flags = [
        "--version",
        "tabular",
        "--problem",
        "plan",
        "--policy-classes",
        "full,auto",
        "--max-steps",
        "12",
        "--seeds",
        "8",
    ]
    assert main([*flags, "--output-dir", str(tmp_path / "whole")]) == 0
    folder = tmp_path / "killed"
    call = "import sys; from ppg_fast.cli import main; sys.exit(main(['compare', *sys.argv[1:]]))"
    process = subprocess.Popen(
        [sys.executable, "-c", call, *flags, "--output-dir", str(folder)], stdout=subprocess.DEVNULL
    )
    while process.poll() is None and len(list(folder.glob("results/*.json"))) < 3:
        time.sleep(0.001)
    process.kill()
    process.wait()
    (folder / results.RESULTS / "half.1.new").write_text('{"returns": [')
    assert 3 <= len(list(folder.glob("results/*.json"))) < 17
    assert main([*flags, "--output-dir", str(folder)]) == 0
    one, other = (json.loads((f / "compare.json").read_text())["problems"] for f in (tmp_path / "whole", folder))
    for name, c in one[0]["classes"].items():
        same = {k: v for k, v in c.items() if k != "seconds"}
        assert same == {k: v for k, v in other[0]["classes"][name].items() if k != "seconds"}
    assert one[0]["gradient"] == other[0]["gradient"]


def test_results_of_other_settings_are_not_mixed(tmp_path):
    flags = [*TABULAR, "--seeds", "1", "--output-dir", str(tmp_path)]
    assert main(flags) == 0
    with pytest.raises(ValueError, match=r"holds a comparison with other settings .* got 'max_steps 6 -> 7'"):
        main([*flags, "--max-steps", "7"])
    assert main([*flags, "--max-steps", "7", "--overwrite"]) == 0
    assert json.loads((tmp_path / "compare.json").read_text())["problems"][0]["classes"]["full"]["steps"][-1] == 7


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--problem", "moody"], "problem must be one of"),
        (["--version", "spoken"], "version must be one of tabular, language, both, got 'spoken'"),
        (["--policy-classes", "greedy,imitation"], 'a policy class is "greedy"'),
        (["--seeds", "0"], "seeds must be at least 1, got 0"),
        (["--first-seed", "-1"], "first_seed must be at least 0, got -1"),
        (["--max-dialogue-tokens", "-1"], "max_dialogue_tokens must be at least 0, got -1"),
        (["--batches", "2"], "batches must be at least 3, got 2"),
        (["--decompose", "telescoping"], "decompose needs data"),
        (
            ["--data", "x", "--decompose", "halves"],
            "decompose must be one of telescoping, prefix_maximum, got 'halves'",
        ),
        (["--data", "x", "--policy-classes", "auto"], 'a policy class is "greedy"'),
        (["--data", "x", "--policy-classes", "discount:0.9"], "no policy class must be left out .* got 'discount:0.9'"),
        (["--loss-type", "soft_q", "--policy-classes", "gae:0.9"], "no policy class must be left out .* got 'gae:0.9'"),
        (["--policy-classes", "discount:x"], "discount needs its gamma behind a colon, a number, got 'discount:x'"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(flags, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        main([*flags, "--output-dir", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


def failing(part):
    if any(run.seed == 1 for run in part):
        raise ValueError("this run cannot be")
    return [{"value": run.seed} for run in part]


def test_a_run_that_fails_leaves_the_others(tmp_path):
    wanted = [Run("tabular", "plan", "full", s) for s in range(4)]
    done = []
    with pytest.raises(ValueError, match="this run cannot be"):
        done.extend(
            r["value"] for _, r in results.compute(tmp_path, [wanted[:1], wanted[1:2], wanted[2:]], failing, jobs=2)
        )
    assert sorted(done) == [0, 2, 3]
    assert [results.read(tmp_path, c) is not None for c in wanted] == [True, False, True, True]
    with pytest.raises(ValueError, match="this run cannot be"):
        list(results.compute(tmp_path, [wanted], failing, jobs=1))


# ---- numbers ---------------------------------------------------------------------------------------------------------
def a_run(seed, returns, seconds=1.0):
    return {
        "seed": seed,
        "steps": [0, 10, 20],
        "returns": returns,
        "changes": [],
        "dialogues_per_step": 4,
        "seconds": seconds,
    }


def test_samples_to_a_level_are_on_the_straight_line_between_evaluations():
    assert summary.samples_to(6.0, [0, 10, 20], [2.0, 4.0, 8.0], 4) == pytest.approx(60.0)
    assert summary.samples_to(9.0, [0, 10, 20], [2.0, 4.0, 8.0], 4) is None
    assert summary.samples_to(2.0, [0, 10, 20], [2.0, 4.0, 8.0], 4) == 0.0


def test_a_class_is_summed_up_over_its_seeds():
    c = summary.of_class([a_run(0, [0.0, 4.0, 8.0]), a_run(1, [0.0, 8.0, 10.0]), a_run(2, [0.0, 1.0, 2.0])], 10.0)
    assert c["level"] == 8.0
    assert c["level_reached"] == 2
    assert c["level_samples"] == pytest.approx(60.0)
    assert c["area"]["each"] == pytest.approx([4.0, 6.5, 1.0])
    assert c["final"]["mean"] == pytest.approx(20 / 3)
    assert c["low"][2] < 20 / 3 < c["high"][2]
    assert c["low"][0] == c["high"][0] == 0.0
    few = summary.of_class([a_run(0, [0.0, 8.0, 9.0]), a_run(1, [0.0, 1.0, 2.0])], 10.0)
    assert few["level_samples"] is None  # half of the seeds is not most


def test_bands_hold_the_mean_as_often_as_they_say():
    rng = np.random.default_rng(3)
    held = [low < 0 < high for low, high in (summary.band(rng.normal(size=20)) for _ in range(200))]
    assert 0.87 <= np.mean(held) <= 0.99


@pytest.mark.parametrize(
    ("others", "word"),
    [([3.0, 3.2, 2.9], "as it should be"), ([9.0, 9.1, 9.3], "NOT as"), ([7.0, 3.0, 5.0], "no clear")],
)
def test_verdicts_say_when_a_class_does_not_win(others, word):
    runs = {
        "full": [a_run(s, [0.0, 5.0, x]) for s, x in enumerate([5.0, 5.1, 4.9])],
        "greedy": [a_run(s, [0.0, 5.0, x]) for s, x in enumerate(others)],
    }
    p = summary.of_problem("plan", "tabular", runs, None)
    assert all(v.startswith(word) for v in p["verdict"])
    ahead = [a_run(s, [0.0, 20.0, 20.0 + s]) for s in range(3)]
    beside = summary.of_problem("plan", "tabular", {**runs, "gae:0.95": ahead, "discount:0.9": ahead}, None)
    assert beside["verdict"] == p["verdict"], "of windows: what is none does not count"
    alone = summary.of_problem("plan", "tabular", {"greedy": runs["greedy"]}, None)
    assert "no verdict" in alone["verdict"][0]


def test_many_problems_together_say_what_a_class_is_worth_without_knowing_which(tmp_path, capsys):
    flags = [
        "--version",
        "tabular",
        "--problem",
        "plan,immediate,drawn:0..2",
        "--policy-classes",
        "greedy,full,auto",
        "--max-steps",
        "8",
    ]
    assert main([*flags, "--seeds", "2", "--first-seed", "7", "--output-dir", str(tmp_path)]) == 0
    saved = json.loads((tmp_path / "compare.json").read_text())
    made, drawn = saved["across"]
    assert (made["drawn"], drawn["drawn"], drawn["problems"]) == (False, True, ["drawn:0", "drawn:1", "drawn:2"])
    shares = {c: [] for c in ("greedy", "full", "auto")}
    for p in saved["problems"][:2]:
        for c, seen in p["classes"].items():
            assert seen["seeds"] == [7, 8]
            shares[c].append((seen["area"]["mean"] - seen["mean"][0]) / (p["best_return"] - seen["mean"][0]))
    for c, x in shares.items():
        assert made["classes"][c]["each"] == pytest.approx(x)
        assert made["classes"][c]["worst"] == pytest.approx(min(x))
        behind = np.mean(np.max(list(shares.values()), 0) - x)
        assert made["classes"][c]["behind_best"] == pytest.approx(behind)
    assert made["classes"]["full"]["minus_full"] is None
    assert made["classes"]["auto"]["minus_full"]["mean"] == pytest.approx(
        np.mean(shares["auto"]) - np.mean(shares["full"])
    )
    by_seed = {c: [np.array(p["classes"][c]["area"]["each"]) for p in saved["problems"][:2]] for c in shares}
    gains = [
        ((auto - full) / (p["best_return"] - p["classes"]["full"]["mean"][0])).mean()
        for auto, full, p in zip(by_seed["auto"], by_seed["full"], saved["problems"], strict=False)
    ]
    least = made["classes"]["auto"]["least_minus_full"]
    assert (least["mean"], least["problem"]) == (pytest.approx(min(gains)), ("plan", "immediate")[np.argmin(gains)])
    assert made["classes"]["full"]["least_minus_full"] is None
    apart = np.subtract(drawn["classes"]["greedy"]["each"], drawn["classes"]["full"]["each"])
    assert drawn["classes"]["greedy"]["minus_full"] == pytest.approx(
        {"mean": apart.mean(), "error": apart.std(ddof=1) / 3**0.5}
    )
    assert [p["verdict"] for p in saved["problems"][2:]] == [[]] * 3  # nobody made them for a class
    page, said = (tmp_path / "report.html").read_text(), capsys.readouterr().out
    assert "3 drawn problems, tabular, seeds: 2" in page
    assert page.count("<h2>") == 2 + 2 + 1  # two kinds, two problems that were made, how to read it
    assert "2 made problems, tabular, seeds: 2" in said


# ---- the language version --------------------------------------------------------------------------------------------
def test_the_language_version_trains_and_measures(tmp_path):
    pytest.importorskip("transformers")
    flags = [
        "--problem",
        "plan",
        "--version",
        "language",
        "--policy-classes",
        "greedy,full,auto",
        "--seeds",
        "1",
        "--max-steps",
        "2",
    ]
    assert main([*flags, "--batches", "3", "--output-dir", str(tmp_path)]) == 0
    p = json.loads((tmp_path / "compare.json").read_text())["problems"][0]
    assert {c: len(v["mean"]) for c, v in p["classes"].items()} == {"greedy": 2, "full": 2, "auto": 2}
    starts = {c: v["mean"][0] for c, v in p["classes"].items()}
    assert len(set(starts.values())) == 1  # one warm start for all
    assert list(tmp_path.glob("warm-plan-0.pt"))
    g = p["gradient"]
    assert g["full"]["bias"] == 0.0
    assert g["greedy"]["variance"] < g["full"]["variance"]
    assert all(math.isfinite(x) for row in g.values() for x in row.values())


def test_gradient_statistics_are_unbiased():
    """Batch gradients of known mean and covariance: variance, bias and cosine come out, where plain averages would
    not."""
    from ppg_fast.compare.language import _statistics

    generator = torch.Generator().manual_seed(0)
    mean = torch.zeros(2, 40, dtype=torch.float64)
    mean[0, 0], mean[1, 0], mean[1, 1] = 1.0, 1.0, 1.0  # greedy and full: bias 1, cosine 1/sqrt(2)
    drawn = mean + 0.5 * torch.randn(800, 5, 2, 40, dtype=torch.float64, generator=generator)
    # of five batches each
    variance = [_statistics(batches, ["greedy", "full"], 1)["greedy"]["variance"] for batches in drawn]
    assert np.mean(variance) == pytest.approx(10.0, rel=0.02)
    out = _statistics(drawn.flatten(0, 1), ["greedy", "full"], 1)["greedy"]
    assert out["bias"] == pytest.approx(1.0, rel=0.05)
    assert out["cosine"] == pytest.approx(0.5**0.5, rel=0.05)
    assert out["alignment"] == pytest.approx(1 / 2**0.5 / 11**0.5, rel=0.05)
    held = [_statistics(batches, ["greedy", "full"], 1)["greedy"] for batches in drawn.reshape(200, 20, 2, 40)]
    assert 0.9 <= np.mean([g["bias_low"] <= 1.0 <= g["bias_high"] for g in held]) < 1.0  # two standard errors
    drawn[:, :, 0] += mean[1] - mean[0]  # no bias left
    held = [_statistics(batches, ["greedy", "full"], 1)["greedy"] for batches in drawn.reshape(200, 20, 2, 40)]
    assert np.mean([g["bias_low"] == 0.0 for g in held]) > 0.93


def test_the_standard_error_of_a_squared_length_is_the_jackknife_s():
    """Each of five draws left out in turn, by the definition of the estimate itself."""
    from ppg_fast.compare.language import _squared_length

    drawn = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    without = torch.tensor(
        [_squared_length(torch.cat([drawn[:i], drawn[i + 1 :]]))[0] for i in range(5)], dtype=torch.float64
    )
    value, error = _squared_length(drawn)
    assert value == pytest.approx(float(without.mean()))  # a U-statistic is the mean of those of all but one
    assert error == pytest.approx(float((4 / 5 * (without - without.mean()).square().sum()).sqrt()))

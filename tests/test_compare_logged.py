"""`ppg-fast compare --data`: what classes credit of logged dialogues, training on them, and running scores as
rewards."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from test_compare import files

from ppg_fast.compare.columns import credit_table, score_table
from ppg_fast.compare.command import main
from ppg_fast.compare.page import table as page_table
from ppg_fast.compare.results import Run
from ppg_fast.compare.study import Study
from ppg_fast.rewards.decomposition import prefix_maximum_rewards, telescoping_rewards


def log_file(path, scores=None):
    lines = []
    for d in range(10):
        messages = [{"role": "system", "content": "you are calm"}]
        for t in range(3 + d % 2):
            messages += [
                {"role": "user", "content": f"word {t}"},
                {"role": "assistant", "content": "yes" if (d + t) % 2 else "no no"},
            ]
        rewards = scores[d] if scores else [float((d + t) % 2) for t in range(3 + d % 2)]
        lines.append(json.dumps({"id": f"d{d}", "group_id": f"d{d}", "messages": messages, "turn_rewards": rewards}))
    path.write_text("\n".join(lines))
    return path


def test_logged_dialogues_are_credited_and_trained_on(tmp_path):
    pytest.importorskip("transformers")
    path = log_file(tmp_path / "log.jsonl")
    flags = [
        "--data",
        str(path),
        "--policy-classes",
        "greedy,lookahead:2,full,imitation",
        "--seeds",
        "1",
        "--max-steps",
        "12",
    ]
    assert main([*flags, "--output-dir", str(tmp_path / "out")]) == 0
    log = json.loads((tmp_path / "out/compare.json").read_text())["log"]
    credits = log["credits"]
    assert (credits["dialogues"], credits["turns"]) == (10, 35)
    by_turn = {name: c["by_turn"] for name, c in credits["classes"].items()}
    own = np.array([[float((d + t) % 2) if t < 3 + d % 2 else np.nan for t in range(4)] for d in range(10)])
    assert by_turn["greedy"] == pytest.approx(np.nanmean(own, 0).tolist())
    full = np.where(np.isnan(own), np.nan, np.nancumsum(own[:, ::-1], 1)[:, ::-1])
    assert by_turn["full"] == pytest.approx(np.nanmean(full, 0).tolist())
    assert credits["classes"]["greedy"]["credited"] == pytest.approx(float(np.nanmean(own)))
    # of weights 0 and 1
    assert credits["classes"]["greedy"]["effective"] == pytest.approx(credits["classes"]["greedy"]["credited"])
    for c in log["classes"].values():
        assert c["curves"]["plain"][-1] > c["curves"]["plain"][0]
    assert (
        log["classes"]["greedy"]["final"]["contrast"]["mean"] > log["classes"]["imitation"]["final"]["contrast"]["mean"]
    )
    page, numbers = ((tmp_path / "out" / name).read_text() for name in ("report.html", "compare.json"))
    assert "log.jsonl" in page
    assert str(tmp_path) not in page + numbers
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / path.name)
    flags[1] = str(moved)
    before = files(tmp_path / "out")
    assert main([*flags, "--output-dir", str(tmp_path / "out")]) == 0  # the same dialogues, wherever they lie
    assert files(tmp_path / "out") == before


def test_training_reads_up_to_a_bound_and_credits_are_whole(tmp_path):
    pytest.importorskip("transformers")
    path = log_file(tmp_path / "log.jsonl")
    looked = {}
    for bound in (0, 12):
        study = Study(str(tmp_path), ("full",), max_steps=1, data=str(path), max_dialogue_tokens=bound)
        looked[bound] = (
            study([Run("logged", "", "gradient", 0)])[0]["credits"],
            study([Run("logged", "", "full", 0)])[0]["scores"]["plain"][0],
        )
    assert looked[0][0] == looked[12][0]
    assert looked[0][1] != looked[12][1]  # of the held-out turns that were read


def test_a_running_score_is_decomposed_with_its_warning(tmp_path):
    pytest.importorskip("transformers")
    scores = [[0.2, 0.6, 0.4, 0.9][: 3 + d % 2] for d in range(10)]
    path = log_file(tmp_path / "log.jsonl", scores)
    flags = ["--data", str(path), "--policy-classes", "greedy,full", "--seeds", "1", "--max-steps", "1"]
    with pytest.raises(ValueError, match=r"offline rewards must be >= 0 .* got -0.2"):
        main([*flags, "--decompose", "telescoping", "--output-dir", str(tmp_path / "a")])
    assert main([*flags, "--decompose", "prefix_maximum", "--output-dir", str(tmp_path / "b")]) == 0
    log = json.loads((tmp_path / "b/compare.json").read_text())["log"]
    assert log["credits"]["classes"]["greedy"]["by_turn"] == pytest.approx([0.2, 0.4, 0.0, 0.3])
    assert any("in 5 of 10 dialogues the best score is not the last one" in w for w in log["warnings"])
    page = (tmp_path / "b/report.html").read_text()
    assert "<p>10 dialogues, 35 turns, mean reward 0.214 a turn; rewards decomposed: prefix_maximum.</p>" in page
    for given in (credit_table(log), score_table(log)):
        assert page_table(given) in page
    assert credit_table(log).rows[0] == ("greedy", "71%", "66%", "0.20", "0.40", "0.30")  # turns 1, 2, 4


# ---- decompositions --------------------------------------------------------------------------------------------------
SCORES = torch.tensor([[0.5, 0.25, 1.0, 9.0], [0.0, 0.5, 0.75, 1.0], [2.0, 1.0, 1.5, 0.5]])
COUNTS = torch.tensor([3, 4, 4])


def test_telescoping_sums_to_the_last_score_and_warns_of_negative_rewards():
    with pytest.warns(UserWarning, match="3 of 11 telescoping rewards are negative: offline"):
        rewards = telescoping_rewards(SCORES, COUNTS)
    assert rewards.tolist() == [[0.5, -0.25, 0.75, 0.0], [0.0, 0.5, 0.25, 0.25], [2.0, -1.0, 0.5, -1.0]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert telescoping_rewards(SCORES[1:2], start=-1.0).sum() == 2.0


def test_prefix_maxima_sum_to_the_best_score_and_warn_where_it_is_not_the_last():
    with pytest.warns(UserWarning, match="in 1 of 3 dialogues the best score is not the last one"):
        rewards = prefix_maximum_rewards(SCORES, COUNTS)
    assert rewards.tolist() == [[0.5, 0.0, 0.5, 0.0], [0.0, 0.5, 0.25, 0.25], [2.0, 0.0, 0.0, 0.0]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # equal where the score never falls
        assert torch.equal(prefix_maximum_rewards(SCORES[1:2]), telescoping_rewards(SCORES[1:2]))
    with pytest.raises(ValueError, match="scores must be finite"):
        telescoping_rewards(torch.tensor([[math.nan]]))

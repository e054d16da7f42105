"""`ppg-fast compare --loss-type`: soft Q-learning beside the policy gradient, on their own or on logged dialogues."""

import json

import numpy as np
import pytest
import torch

from ppg_fast.compare import results, summary, tabular_runs
from ppg_fast.compare.command import main
from ppg_fast.compare.study import BY, Study, class_and_loss
from ppg_fast.compare.tabular import TabularProblem, soft_q_gradient
from ppg_fast.policy_classes import FullPlanning, Lookahead
from ppg_fast.rollouts.problems import problem

BETA = 0.4
ENDS = {"soft_optimum", "soft_optimum_of_log"}
FLAGS = ["--problem", "commitments", "--version", "tabular", "--policy-classes", "greedy,lookahead:3"]
FLAGS += ["--loss-type", "soft_q,reinforce", "--max-steps", "6", "--seeds", "2"]


def expected_gradient(tabular, logits, policy_class):
    """The mean over all courses, each as often as the coin tosses it: once."""
    c = tabular.rewards.flip(1).cumsum(1).flip(1).mean(0).tolist()
    return soft_q_gradient(logits, tabular.start(), policy_class, tabular.actions, tabular.rewards, BETA, c)


def test_its_fixed_point_is_the_softmax_of_what_a_turn_is_worth():
    """An answer's worth does not depend on the others': the optimum is softmax(Q / beta), and the value is its
    log-sum-exp; a window that holds all of it finds the same without what lies behind."""
    tabular = TabularProblem(problem("commitments"))
    of, found = tabular.problem, []
    worth = torch.stack([torch.tensor(of.honest_pays).sum(1), torch.tensor(of.tempting_pays)], 1).double()
    for policy_class in (Lookahead(3), FullPlanning()):
        logits = tabular.start()
        for _ in range(300):
            logits -= 1.5 * len(logits) * expected_gradient(tabular, logits, policy_class)
        found.append(logits)
        optimum = tabular.soft_optimum(tabular.window(policy_class), BETA)
        torch.testing.assert_close(optimum.softmax(-1), logits.softmax(-1), rtol=1e-4, atol=1e-4)
    for logits in found:
        torch.testing.assert_close(logits.softmax(-1), (worth / BETA).softmax(-1), rtol=1e-4, atol=1e-4)
    # what is worth more than the toss of a coin is in the log-sum-exp
    values = BETA * (found[1].logsumexp(-1) - tabular.start().logsumexp(-1))
    more = BETA * (worth / BETA).logsumexp(-1) - BETA * torch.tensor(2.0).log() - worth.mean(1)
    torch.testing.assert_close(values, more.flip(0).cumsum(0).flip(0), rtol=1e-3, atol=1e-3)


def test_where_it_ends_is_known_exactly_and_of_its_log():
    """Where every course is in the log as often as the coin tosses it the two are one; a log of few has noise."""
    tabular, window = TabularProblem(problem("commitments")), Lookahead(3)
    rows = tabular.window(window)
    exact = tabular.soft_optimum(rows, BETA)
    torch.testing.assert_close(tabular.soft_optimum(rows, BETA, tabular.actions, tabular.rewards), exact)
    few, many = (tabular_runs.soft_optima(tabular, window, 0.1, count, 3) for count in (64, 40_000))
    honest, last = (1 / (1 + np.exp(-more / 0.1)) for more in (0.6, 1.0))  # what honesty earns within the window
    assert few["soft_optimum"] == pytest.approx(10 * (0.4 + 0.6 * honest) + 2 * last)
    assert few["soft_optimum_of_log"] < many["soft_optimum_of_log"] - 0.1
    assert many["soft_optimum_of_log"] == pytest.approx(few["soft_optimum"], abs=0.05)
    run = tabular_runs.train(
        tabular, tabular_runs.SoftQ(window, 0.1, tabular.start(), 1), [3], offline=64, max_steps=600
    )
    assert run[0]["returns"][-1] == pytest.approx(few["soft_optimum_of_log"], abs=0.3)


def test_logged_dialogues_are_of_the_start_and_are_drawn_again():
    tabular, window = TabularProblem(problem("commitments").with_noise(0.0)), Lookahead(3)
    soft_q = [tabular_runs.SoftQ(window, 0.1, tabular.start(), 1) for _ in range(2)]
    learners = [tabular_runs.PolicyGradient(window, group_size=tabular_runs.COUNT), *soft_q]
    runs = [tabular_runs.train(tabular, learner, [0], max_steps=20, offline=64)[0] for learner in learners]
    assert runs[1] == runs[2]
    assert runs[0]["returns"] != runs[1]["returns"]
    assert all(run["returns"][-1] > run["returns"][0] + 1 for run in runs)
    assert Study("", ("greedy",)).settings().keys() == Study("", ("greedy",), loss_types=("soft_q",)).settings().keys()


def test_both_losses_stand_side_by_side(tmp_path, capsys):
    assert main([*FLAGS, "--offline", "64", "--output-dir", str(tmp_path)]) == 0
    (p,) = json.loads((tmp_path / "compare.json").read_text())["problems"]
    assert list(p["classes"]) == ["greedy by soft_q", "greedy", "lookahead:3 by soft_q", "lookahead:3"]
    assert len(p["verdict"]) == 2
    assert p["verdict"][1].startswith("lookahead:3 by soft_q: last return ")
    assert p["verdict"][1] in capsys.readouterr().out
    assert all(p["classes"][c].keys() - p["classes"]["greedy"].keys() == ENDS for c in p["classes"] if BY in c)
    assert len(list((tmp_path / results.RESULTS).iterdir())) == 9
    with pytest.raises(ValueError, match=r"other settings .* got 'offline 64 -> 0'"):
        main([*FLAGS, "--output-dir", str(tmp_path)])


def test_a_fall_is_the_largest_between_two_evaluations():
    runs = [
        {"seed": s, "steps": [0, 1, 2, 3], "returns": r, "dialogues_per_step": 1, "changes": [], "seconds": 0.0}
        for s, r in enumerate(([1.0, 4.0, 3.5, 1.0], [1.0, 2.0, 3.0, 4.0]))
    ]
    assert summary.of_class(runs, 5.0)["drop"]["each"] == [2.5, 0.0]
    both = {"full by soft_q": summary.of_class(runs, 5.0), "full": summary.of_class(runs[::-1], 5.0)}
    both["full"]["seeds"] = both["full by soft_q"]["seeds"]
    (said,) = summary.of_losses(both)
    assert said == (
        "full by soft_q: last return 2.50, no clear difference to the policy gradient's 2.50, +0.00 ± 3.00 within "
        "seeds; largest falls 2.50, 2.50."
    )


def test_noise_is_scaled():
    quiet = problem("mood").with_noise(0.5)
    np.testing.assert_allclose(np.array(quiet.noise) * 2, np.array(problem("mood").noise))
    assert class_and_loss("lookahead:3 by soft_q") == ("lookahead:3", "soft_q")
    assert class_and_loss("full") == ("full", "reinforce")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--loss-type", "ppo"], "loss_type must be one of reinforce, soft_q, got 'ppo'"),
        (["--loss-type", "soft_q", "--beta", "0"], "beta must be a finite number > 0"),
        (["--beta", "0.3"], "beta needs loss_type soft_q, got 0.3"),
        (["--offline", "31"], "offline must be 0 or at least 32, got 31"),
        (["--noise", "-1"], "noise must be a finite number >= 0"),
        (["--offline", "64", "--policy-classes", "full,auto"], "auto must be left out"),
        (["--data", "x", "--loss-type", "soft_q"], "loss_types must be left out with data"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(flags, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        main([*flags, "--output-dir", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()

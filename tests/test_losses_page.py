"""docs/losses.md: what the code has and the renderer does not write is on the page, and its plot is the reference's."""

import math
import re
from pathlib import Path

import pytest
from ppg_fast.bench import losses

from ppg_fast.losses import KL_ESTIMATORS, LossType
from ppg_fast.spec import IMPORTANCE_MODES

PAGE = (Path(__file__).parents[1] / "docs/losses.md").read_text()


def test_every_estimator_and_mode_has_a_row():
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert set(KL_ESTIMATORS) <= set(rows)
    assert set(IMPORTANCE_MODES) <= set(rows)


@pytest.mark.parametrize(
    ("name", "advantage", "old", "expected"),  # at the ratios 0.25, 0.75, 1.5, 2.5, where p = old r
    [
        ("reinforce", 1.0, 0.3, [1, 1, 1, 1]),
        ("ppo", 1.0, 0.3, [0.25, 0.75, 0, 0]),
        ("ppo", -1.0, 0.3, [0, 0, 1.5, 2.5]),
        ("cispo", -1.0, 0.3, [0.25, 0.75, 1.2, 1.2]),
        ("ipo", 1.0, 0.3, [0, 0.75, 0, 0]),
        ("ipo", 1.0, 0.02, [0.25, 0.75, 1.5, 2.5]),
        ("icepop", -1.0, 0.3, [0, 0.75, 1.5, 2.5]),
        ("dppo_tv", 1.0, 0.3, [0.25, 0.75, 1.5, 0]),
        ("dppo_tv", -1.0, 0.3, [0, 0.75, 1.5, 2.5]),
        ("gmpo", 1.0, 0.3, [0.25, 0.75, 0, 0]),
        ("gmpo", -1.0, 0.3, [0, 0.75, 1.5, 2.5]),
        ("vespo", 1.0, 0.3, [math.exp(3 - 3 * w) * w**2 for w in (0.25, 0.75, 1.5, 2.5)]),
        ("topr", -1.0, 0.5, [0.25, 0.75, 1, math.nan]),
    ],
)
def test_the_weights_that_are_drawn(name, advantage, old, expected):
    drawn = losses.weights(LossType[name.upper()], [0.25, 0.75, 1.5, 2.5], advantage, old)
    assert drawn == pytest.approx(expected, nan_ok=True)
    assert f">{name}</text>" in losses.chart()

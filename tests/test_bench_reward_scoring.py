"""The benchmark of a reward model on long dialogues, at a tiny size, and what is said of it."""

import pytest

pytest.importorskip("transformers")

from ppg_fast.bench import render, reward_scoring


def test_both_read_the_same_tokens():
    short, long = reward_scoring.measure((2, 6), width=16, layers=1)
    assert (short["turns"], long["turns"]) == (2, 6)
    assert 2.5 * short["tokens"] < long["tokens"] < 3.5 * short["tokens"]
    assert min(row[name] for row in (short, long) for name in ("scored", "forward")) > 0


@pytest.mark.parametrize(("scored", "verdict"), [(2.9, "met"), (3.1, "missed")])
def test_the_aim_is_of_the_longest(scored, verdict):
    rows = [{"turns": t, "tokens": 20 * t, "scored": s, "forward": 1.0} for t, s in ((30, 9.0), (300, scored))]
    text = render.SECTIONS["reward_scoring"]({"reward_scoring.cpu": {"size": [512, 8], "rows": rows}})
    assert f"300 turns in under 3 x the forward pass: **{verdict}**" in text
    assert f"| 300 | 6,000 | {1000 * scored:,.0f} ms | 1,000 ms | {scored:.2f} x |" in text
    assert render.SECTIONS["reward_scoring"]({}) == render.NOT_MEASURED

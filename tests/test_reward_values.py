"""What a reward function may return: read exactly, or refused in one line with function, dialogue and turn."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("httpx2")

from hypothesis import given, settings
from hypothesis import strategies as st

from ppg_fast.dialogues.dialogue import Message
from ppg_fast.rewards import PythonReward, Ratings, Reward, Transcript, make_rewards, score
from ppg_fast.rewards.values import number_of

LARGEST = float(torch.finfo(torch.float32).max)


def transcript(name="d7", turns=2):
    return Transcript(name, tuple(Message(role, "x") for _ in range(turns) for role in ("user", "assistant")))


def given_by(function, scope="turn"):
    return Reward("mine", PythonReward(function, "mine.py:f"), scope).turns([transcript()])


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (3, 3.0),
        (True, 1.0),
        (np.float32(0.1), 0.10000000149011612),
        (np.float16(-2.5), -2.5),
        (np.int64(2**53), 2.0**53),
        (np.bool_(False), 0.0),
        (np.longdouble(1.5), 1.5),
        (np.array(4), 4.0),
        (torch.tensor(0.5, dtype=torch.bfloat16, requires_grad=True), 0.5),
        (torch.tensor(True), 1.0),
        (Decimal("0.1"), 0.1),
        (Fraction(1, 3), 1 / 3),
        (LARGEST, LARGEST),
        (None, None),
        (np.ma.masked, None),
    ],
)
@pytest.mark.parametrize("scope", ["turn", "dialogue"])
def test_a_number_of_any_library_is_what_it_is(value, number, scope):
    expected = [[number, number]] if scope == "turn" or number is None else [[0.0, number]]
    assert given_by(lambda messages: value, scope) == expected


class Hostile(float):
    def __repr__(self):
        raise RuntimeError

    def __float__(self):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "value",
    [
        "1",
        b"1",
        10**400,
        -(10**5000),
        1e39,
        math.nan,
        -math.inf,
        1j,
        np.complex64(2),
        torch.tensor(1j),
        Decimal("sNaN"),
        Decimal("1e500"),
        Fraction(10**400),
        {0: 1.0, 1: 2.0},
        {1.0, 2.0},
        np.array("1"),
        torch.tensor(1.0, device="meta"),
        object(),
        Hostile(1.0),
        torch.ones(2, 2),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("scope", ["turn", "dialogue"])
def test_anything_else_is_one_line_with_function_dialogue_and_turn(value, scope):
    with pytest.raises(
        ValueError, match=r"reward mine at dialogue 'd7',? (at )?turn [01],? must be a finite"
    ) as caught:
        given_by(lambda messages: value, scope)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_an_async_function_is_refused_without_a_warning_of_python(recwarn):
    async def late(messages):
        return 1.0

    with pytest.raises(
        ValueError, match="failed at dialogue 'd7', turn 0: TypeError: a reward must be no async function"
    ):
        given_by(late)
    assert not list(recwarn)


@pytest.mark.parametrize(
    "row",
    [[1, None], (1.0, None), range(2), np.array([0, 1]), torch.tensor([0.0, 1.0]), np.ma.array([1.0, 2], mask=[0, 1])],
)
def test_a_row_of_a_dialogue_is_one_number_a_turn(row):
    expected = [None if v is np.ma.masked or v is None else float(v) for v in row]
    assert given_by(lambda messages: row, "dialogue") == [expected]
    assert given_by(lambda messages: iter(row), "dialogue") == [expected]
    with pytest.raises(ValueError, match=r"turn 0, .*\(one per turn wants @dialogue\)"):
        given_by(lambda messages: row)


def endless(messages):
    while True:
        yield 1.0


def broken(messages):
    yield 1.0
    raise SystemExit(3)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda messages: [1.0], "dialogue 'd7' must give one number or one per turn, 2, got 1 numbers"),
        (lambda messages: [1.0] * 5, "2, got 5 numbers"),
        (endless, "2, got 3 numbers"),
        (broken, r"mine.py:f failed at dialogue 'd7', turn 1: SystemExit: 3 \(test_reward_values.py, line \d+: raise"),
        (lambda messages: [1.0, "x"], "dialogue 'd7' at turn 1 must be a finite number.*got 'x'"),
    ],
)
def test_rows_that_do_not_fit_are_named(function, message):
    with pytest.raises(ValueError, match=message):
        given_by(function, "dialogue")


def test_weights_and_their_sum_stay_numbers_and_metrics_of_large_ones_do_not_raise(tmp_path):
    (tmp_path / "big.py").write_text("def f(messages): return 3e38\n")
    rewards = make_rewards(f"{tmp_path}/big.py:f")
    scores = score(rewards, [transcript()])
    assert scores.describe() == {"rewards/f/mean": 3e38, "rewards/f/std": 0.0, "rewards/unscored": 0}
    with pytest.raises(
        ValueError, match=r"weighted sum of rewards at dialogue 'd7', turn 0 must be a finite .*got 6e\+38"
    ):
        score(make_rewards(f"2*{tmp_path}/big.py:f"), [transcript()])
    with pytest.raises(ValueError, match="the weight of reward f must be a finite number"):
        make_rewards(f"1e999*{tmp_path}/big.py:f")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "d7", "turn": 0, "rating": 4, "rater": ["a"]}', "line 2: a rater must be a string or an integer"),
        ('{"id": "d7", "turn": 0, "rating": 4, "rater": {"a": 1}}', "line 2: a rater must be"),
        ('{"id": "d7", "turn": 0, "rating": 1' + "0" * 400 + "}", "line 2: a rating must be a finite number"),
        ('{"id": "d7", "turn": 0, "rating": 1' + "0" * 5000 + "}", "line 2 is no JSON that can be read"),
        ('{"id": "d7", "rating": ' + "[" * 100_000, "line 2 is no JSON that can be read"),
        ('{"id": "d7", "turn": 0, "rating": 1, "rating": 5}', "line 2 .*key 'rating' stands twice"),
        (
            '{"id": "d7", "turn_index": 0, "rating": 1}',
            "line 2: the keys are id, turn, rating, rater, got 'turn_index'",
        ),
        ('{"id": "d7", "turn": 0, "rating": "4"}', "line 2: a rating must be a finite number, got '4'"),
        ('{"id": "d7", "turn": 0, "rating": null}', "line 2: a rating must be a finite number, got None"),
        ('{"id": "d7", "turn": 1' + "0" * 400 + ', "rating": 1}', "rates turn 10*... of dialogue 'd7', which has 2"),
    ],
)
def test_a_bad_line_of_ratings_is_named(line, message, tmp_path):
    path = tmp_path / "ratings.jsonl"
    path.write_text('{"id": "other", "rating": 1}\n' + line + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Ratings(str(path))([transcript()])


def test_ratings_end_at_line_feeds_only_and_bad_bytes_have_a_line(tmp_path):
    path = tmp_path / "ratings.jsonl"
    rows = [f'{{"id": "d7", "turn": 0, "rating": {n}, "rater": "a{c}b"}}' for n, c in enumerate("\u2028\u2029\x85")]
    path.write_bytes(("\ufeff" + "\r\n".join(rows)).encode())
    assert Ratings(str(path))([transcript()]) == [[1.0, None]]
    path.write_bytes(b'{"id": "d7", "rating": 1}\n{"id": "\xff", "rating": 1}\n')
    with pytest.raises(ValueError, match="line 2 is no JSON that can be read: 'utf-8' codec"):
        Ratings(str(path))


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**420), 10**420)
    | st.floats()
    | st.complex_numbers()
    | st.text()
    | st.binary()
    | st.decimals()
    | st.fractions(),
    lambda inner: st.lists(inner) | st.tuples(inner) | st.sets(st.integers()) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(ANYTHING, st.sampled_from(["turn", "dialogue"]))
def test_whatever_is_returned_is_finite_numbers_or_one_line(value, scope):
    try:
        (row,), said = given_by(lambda messages: value, scope), None
    except ValueError as error:
        row, said = None, str(error)
    if row is None:
        assert "reward mine at dialogue 'd7'" in said
        assert "\n" not in said
        return
    assert len(row) == 2
    assert all(v is None or abs(v) <= LARGEST for v in row)
    if isinstance(value, (int, float, Decimal, Fraction)):
        assert row[-1] == float(value) == number_of(value)

"""What a judge may reply: read where it can be read in one way only, else unscored, counted and shown."""

import warnings

import pytest

pytest.importorskip("transformers")
pytest.importorskip("httpx2")

from hypothesis import given, settings
from hypothesis import strategies as st
from openai_server import Raw, said, serve

from ppg_fast import stopping
from ppg_fast.config import make_config
from ppg_fast.dialogues.dialogue import Message
from ppg_fast.endpoint import Endpoint
from ppg_fast.jobs.endpoints import rewards_of
from ppg_fast.rewards import Judge, Reward, Transcript, make_rewards
from ppg_fast.rewards.judge import parse_range, parse_score

T = Transcript("d7", (Message("user", "q"), Message("assistant", "a")))


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(stopping, "sleep", lambda seconds: None)


@pytest.mark.parametrize("minus", "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63\uff0d")
@pytest.mark.parametrize("number", [3.0, 0.5, 5.0])
def test_every_dash_is_a_minus(minus, number):
    for text in (f"SCORE: {minus}{number:g}", f"**Score:** **{minus}{number}**.", f"{minus}{number:g}"):
        assert parse_score(text, -5, 5) == -number
        assert parse_score(text, 0, 10) is None


@pytest.mark.parametrize(
    ("reply", "low", "high", "value"),
    [
        ("Score (-5 to 5): 2", -5, 5, 2.0),
        ("Score (\u22125 to 5): \u22124", -5, 5, -4.0),
        ("Score (\u22125\u20135): 1.5", -5, 5, 1.5),
        ("Score (0 to 10): 7", 0, 10, 7.0),
        ("Good.\nscore [0-10]: 7.", 0, 10, 7.0),
        ("Score (out of 10): 7", 0, 10, 7.0),
        ("Score (from 1 to 7): 6", 1, 7, 6.0),
        ("Score: 7 out of 10", 0, 10, 7.0),
        ("SCORE: 70/100", 0, 100, 70.0),
        ("SCORE: 7 (out of 10).", 0, 10, 7.0),
        ("**Score:** 7", 0, 10, 7.0),
        ("__SCORE__ = `7`", 0, 10, 7.0),
        ("## Final score: 7.5.", 0, 10, 7.5),
        ("- OVERALL SCORE: +.5", 0, 10, 0.5),
        ("SCORE\uff1a7", 0, 10, 7.0),
        ("7/10", 0, 10, 7.0),
        ("**7**", 0, 10, 7.0),
        ("It may be between 3 and 4, or a score of 9.\n\nSCORE: 3", 0, 10, 3.0),
        ("SCORE: 3\n\nSCORE: 3.0\nThat is my score.", 0, 10, 3.0),
        ("<think>SCORE: 1</think>\nSCORE: 9", 0, 10, 9.0),
        ("maybe SCORE: 1\nSCORE: 2\n</think>\nSCORE: 9", 0, 10, 9.0),
        ("<THINKING>SCORE: 1</THINKING>SCORE: 9", 0, 10, 9.0),
        ('```json\n{\n  "reason": "a 3, or a 4",\n  "score": 4\n}\n```', 0, 10, 4.0),
        ('{"score": "-4", "reason": "none"}', -5, 5, -4.0),
    ],
)
def test_one_way_to_read_it(reply, low, high, value):
    assert parse_score(reply, low, high) == value


@pytest.mark.parametrize(
    "reply",
    [
        "Score (out of 100): 7",
        "Score (1 to 5): 4",
        "Score (-5 to 5): 2",
        "Score (sic): 2",
        "SCORE: 7/100",
        "SCORE: 7 out of 5",
        "SCORE: between 3 and 4",
        "between 3 and 4",
        "SCORE: 3 or 4",
        "SCORE: 3-4",
        "SCORE: 3\u20134",
        "SCORE: ~7",
        "SCORE: <7",
        "SCORE: >= 7",
        "SCORE: 7,5",
        "SCORE: 7\u00bd",
        "SCORE: 7e0",
        "SCORE: 7%",
        "SCORE: 1_0",
        "SCORE: \u0667",
        "SCORE: - 3",
        "SCORE: 12",
        "SCORE: -1",
        "SCORE: " + "9" * 5000,
        "SCORE: nan",
        "SCORE: seven",
        "SCORE:",
        "SCORE: 3\nSCORE: 8",
        "SCORE: 8\nSCORE: hm",
        "SCORE: 12\nSCORE: 8",
        "SCORE: 8\nNo, make that 3.",
        "SCORE: 8\nNo, make that \u2462.",
        '{"score": 3, "score": 8}',
        '{"score": 3, "of": 5}',
        "I would not give it a score: 9.",
        "The underscore: 9",
        "Subscore: 9",
        "Rating: 9",
        "<think>SCORE: 9",
        "7\n8",
        "",
        "\u2028",
    ],
)
def test_two_ways_or_none_is_unscored(reply):
    assert parse_score(reply, 0, 10) is None


PIECES = st.sampled_from(
    [
        "SCORE: 7",
        "score",
        ":",
        "7",
        "-",
        "\u2212",
        "3",
        "/10",
        "out of",
        "(0 to 10)",
        "\n",
        "<think>",
        "</think>",
        "{",
        "}",
        '"',
    ]
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(PIECES | st.text(max_size=4), max_size=12).map("".join) | st.text())
def test_whatever_is_replied_is_a_score_in_range_whose_digits_stand_there_or_none(reply):
    value = parse_score(reply, -2, 10)
    assert value is None or (-2 <= value <= 10 and f"{abs(value):g}".strip("0.") in reply)


@pytest.mark.parametrize(
    "text", ["0:inf", "-inf:0", "nan:1", "0:nan", "5:1", "3:3", "-1e308:1e308", "1", "1:2:3", "a:b", ""]
)
def test_a_range_is_finite_and_rises(text):
    with pytest.raises(ValueError, match=r"judge_range must be LOW:HIGH.*got"):
        parse_range(text)
    with pytest.raises(ValueError, match=r"judge_range must be LOW:HIGH.*got"):
        make_rewards("builtins:len", judge_range=text)


def test_a_judge_is_told_its_range_to_the_last_digit():
    with serve(lambda *_: said("SCORE: 1234567")) as server:
        (reward,) = make_rewards("judge", lambda: Endpoint(server.url, "m"), judge_range="-0.125:1234567")
        assert reward.turns([T]) == [[1.0]]
    assert "a number from -0.125 to 1234567>" in server.requests[0][1]["messages"][1]["content"]


def judged(answer, **settings):
    """Values, warnings and requests of a judge whose server answers so."""
    with serve(answer) as server, warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        judge = Judge(Endpoint(server.url, "m"), retries=1, **settings)
        values = [Reward("judge", judge).turns([T, T]) for _ in range(2)]
    return values, [str(w.message) for w in seen], server.requests, judge


def test_what_is_unscored_is_counted_and_shown_once():
    values, seen, requests, judge = judged(lambda *_: said("hm,\nlet me see"))
    assert values == [[[None], [None]]] * 2
    assert (judge.unparsable, len(requests)) == (4, 8)
    (warning,) = seen
    for part in (
        judge.endpoint.url,
        "'d7', turn 0, stays unscored after 2 replies",
        "from 0 to 10",
        r"'hm,\nlet me see'",
    ):
        assert part in warning


@pytest.mark.parametrize(
    "choice",
    [
        {"message": {"content": "Good. SCORE: 1"}, "finish_reason": "length"},
        {"message": {"content": None, "reasoning_content": "SCORE: 4"}, "finish_reason": "length"},
        {"message": {"reasoning": "SCORE: 4"}, "finish_reason": "length"},
        {"message": {"content": "SCORE: 10"}, "finish_reason": "max_tokens"},
    ],
)
def test_a_reply_that_was_cut_is_unscored_and_says_which_setting_to_raise(choice):
    values, seen, requests, _ = judged(lambda *_: {"choices": [choice]}, max_tokens=77)
    assert values == [[[None], [None]]] * 2
    (warning,) = seen
    assert "cut at 77 tokens, raise --judge-tokens" in warning
    assert {payload["max_tokens"] for _, payload in requests} == {77}


def test_reasoning_is_no_answer():
    choice = {"message": {"content": None, "reasoning_content": "SCORE: 4"}, "finish_reason": "stop"}
    values, seen, _, _ = judged(lambda *_: {"choices": [choice]})
    assert values == [[[None], [None]]] * 2
    assert "in None" in seen[0]


def test_the_limit_is_a_setting_and_thoughts_do_not_count():
    with serve(lambda *_: said("<think>SCORE: 3</think>SCORE: 5")) as server:
        config = make_config({"judge": server.url, "judge_model": "m", "judge_tokens": "9000"})
        assert rewards_of(config, "cpu")[0].turns([T]) == [[0.5]]
    assert server.requests[0][1]["max_tokens"] == 9000
    with pytest.raises(ValueError, match="judge_tokens must be an integer >= 1, got 0"):
        make_config({"judge_tokens": 0})


def test_a_judge_that_takes_no_temperature_judges_at_its_own_and_says_so():
    def reasoning(path, payload):
        for name, instead in (("max_tokens", "Use 'max_completion_tokens'"), ("temperature", "Only the default (1)")):
            if payload.get(name) is not None and payload.get(name) != 1:
                return Raw(400, f'{{"error": {{"message": "Unsupported: \'{name}\'. {instead}"}}}}'.encode())
        return said("SCORE: 5")

    values, seen, requests, judge = judged(reasoning)
    assert values == [[[0.5], [0.5]]] * 2
    assert [text.endswith("the server takes no temperature, so it judges at its own") for text in seen] == [True]
    assert judge.endpoint.refused == {"max_tokens", "temperature"}
    assert all("max_completion_tokens" in payload and "temperature" not in payload for _, payload in requests[-2:])


def test_a_rubric_that_is_no_text_is_named(tmp_path):
    (tmp_path / "rubric.txt").write_bytes(b"kind\xff")
    with pytest.raises(ValueError, match=r"rubric .*rubric.txt must be UTF-8 text"):
        make_rewards(f"judge:{tmp_path}/rubric.txt", lambda: Endpoint("http://h/v1"))

"""What others hand us is anything: rewards, replies of judges and partners, answers of servers, contents of chats. It
is read exactly, or refused in one line that names where it came from."""

import json
import math
import re

import numpy as np
import pytest
import torch
from fuzz import as_json, assert_one_line, fuzz, numbers, outcome, texts, values
from hypothesis import given
from hypothesis import strategies as st
from openai_server import Raw, said, serve

from ppg_fast.dialogues import Dialogue, encode_dialogue
from ppg_fast.dialogues.chat_format import make_byte_tokenizer
from ppg_fast.dialogues.dialogue import Message
from ppg_fast.endpoint import Endpoint, EndpointError
from ppg_fast.rewards import Judge, PythonReward, Reward, Transcript
from ppg_fast.rewards.judge import parse_score
from ppg_fast.rollouts.generation.answers import Request
from ppg_fast.rollouts.generation.remote import EndpointSampler

SPOKEN = (Message("user", "hi"), Message("assistant", "a"), Message("user", "so"), Message("assistant", "b"))
DIALOGUE = Transcript("d7", SPOKEN)

returned = st.one_of(
    values,
    st.floats(width=32).map(np.float32),
    st.floats().map(torch.tensor),
    st.lists(st.floats(0, 1), max_size=3).map(torch.tensor),
    st.lists(st.floats(0, 1), max_size=3).map(np.array),
    st.lists(numbers, max_size=3).map(tuple),
    st.lists(numbers, max_size=3).map(lambda found: (x for x in found)),
    st.sampled_from([b"1", 1j, {1, 2}, range(2), object(), ValueError("x"), np.bool_(True), torch.zeros(2, 2), float]),
)


@pytest.mark.parametrize("scope", ["turn", "dialogue"])
def test_what_a_reward_returns(scope):
    @fuzz(300)
    @given(value=returned)
    def check(value):
        reward = Reward("mine", PythonReward(lambda messages: value, "mine"), scope)
        rows, error, _ = outcome(lambda: reward.turns([DIALOGUE]), ValueError)
        if error:
            assert_one_line(error, "'d7'")
            assert "mine" in error
        else:
            assert [len(row) for row in rows] == [2]
            assert all(v is None or (type(v) is float and math.isfinite(v)) for v in rows[0])
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                assert rows[0][-1] == float(value)

    check()


reply = st.lists(
    st.one_of(
        st.sampled_from(
            ["SCORE: ", "score", "Score (0-10): ", "\n", " ", "**", "<think>", "</think>", "/10", "/5", "-", "%"]
        ),
        st.integers(-2, 12).map(str),
        st.floats(0, 11).map(lambda x: f"{x:.1f}"),
        texts,
    ),
    max_size=6,
).map("".join)


@fuzz(400)
@given(text=reply)
def test_a_score_is_in_the_reply_or_there_is_none(text):
    score = parse_score(text, 0.0, 10.0)
    if score is not None:
        assert 0 <= score <= 10
        assert (
            score in {abs(float(n)) for n in re.findall(r"[0-9]*\.?[0-9]+", text.replace("\uff0e", "."))} or score == 0
        )


@fuzz(100)
@given(
    score=st.integers(0, 100),
    before=texts.filter(lambda t: not any(c.isnumeric() for c in t) and "score" not in t.lower()),
)
def test_a_score_that_is_said_plainly_is_read(score, before):
    clean = before.replace("<", "").replace("\n", " ")
    for line in "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029\r{}`":
        clean = clean.replace(line, " ")
    assert parse_score(f"{clean}\nSCORE: {score / 10}", 0.0, 10.0) == score / 10


answers = st.one_of(
    values,
    st.fixed_dictionaries({"choices": values}),
    st.fixed_dictionaries({"choices": st.lists(st.fixed_dictionaries({"message": values}), max_size=2)}),
    reply.map(said),
    st.builds(
        lambda ids, logs, end, stop: {
            "choices": [
                {"token_ids": ids, "logprobs": {"token_logprobs": logs}, "finish_reason": end, "stop_reason": stop}
            ]
        },
        st.lists(st.integers(0, 9), max_size=3) | values,
        st.lists(st.floats(-9, 0), max_size=3) | values,
        st.sampled_from(["stop", "length", None]) | values,
        st.sampled_from([8, 9, 7, None]) | values,
    ),
)
raw = st.one_of(
    answers.map(lambda v: Raw(body=as_json(v).encode("utf-8", "surrogatepass"))),
    st.builds(
        lambda status, body: Raw(status, body), st.sampled_from([200, 400, 401, 404, 500]), st.binary(max_size=9)
    ),
    st.builds(lambda body: Raw(body=body), st.binary(max_size=12)),
    st.just(Raw(body=b"[" * 5000)),
)


@pytest.mark.parametrize("what", ["partner", "judge", "sampler"])
def test_what_a_server_answers(what):
    now = {}
    with serve(lambda path, payload: now["reply"]) as server:
        endpoint = Endpoint(server.url, model="tiny", retries=0)
        sampler = EndpointSampler(endpoint, [9, 8], 10)

        def ask():
            if what == "partner":
                return endpoint.chat([{"role": "user", "content": "hi"}])
            if what == "judge":
                return Judge(endpoint, retries=0)([DIALOGUE])
            return sampler.answer([Request(0, [1, 2], 3, torch.Generator())])

        @fuzz(150)
        @given(reply=raw)
        def check(reply):
            now["reply"] = reply
            value, error, caught = outcome(ask, EndpointError)
            for line in caught:
                assert_one_line(line, server.url)
            if error:
                assert_one_line(error, server.url)
            elif what == "partner":
                content = json.loads(reply.body)["choices"][0]["message"]["content"] or ""
                said = content.encode("utf-8", "replace").decode()
                if "think>" in said:  # thoughts are not said
                    assert "<think>" not in value
                    assert value in said
                else:
                    assert value == said
            elif what == "judge":
                assert value == [None] or 0 <= value[0] <= 1
            else:
                tokens, logprobs = value[0].tokens, value[0].logprobs
                given = json.loads(reply.body)["choices"][0]
                assert logprobs == given["logprobs"]["token_logprobs"]
                assert tokens == given["token_ids"] or (
                    tokens == [*given["token_ids"], given["stop_reason"]] and tokens[-1] in (8, 9)
                )
                assert len(tokens) == len(logprobs) > 0

        check()


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("transformers")
    return make_byte_tokenizer(["hello there"], 270)


def test_what_a_chat_says(tokenizer):
    """Every answer is trained on as it was written, its end included, or the dialogue is refused by name."""

    @fuzz(200)
    @given(contents=st.lists(texts, min_size=2, max_size=4))
    def check(contents):
        def build():
            roles = ["user", "assistant"] * 2
            spoken = tuple(Message(r, c) for r, c in zip(roles, contents, strict=False))
            turns = sum(m.role == "assistant" for m in spoken)
            return encode_dialogue(tokenizer, Dialogue("d7", "g", spoken, (1.0,) * turns))

        sample, error, _ = outcome(build, ValueError)
        if error:
            assert_one_line(error, "message", "content")
            return
        for turn, content in enumerate(contents[1::2]):
            tokens = [t for t, at in zip(sample.tokens, sample.turn_ids, strict=True) if at == turn]
            assert tokenizer.decode(tokens) == content + "<end>"

    check()

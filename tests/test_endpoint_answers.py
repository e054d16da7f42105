"""What a server may answer: each is used, tried again, or one line with the address, what was asked and what came."""

import json
import os
import signal
import threading
import time

import pytest
import torch

pytest.importorskip("httpx2")
pytest.importorskip("transformers")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai_server import Raw, said, serve

from ppg_fast import stopping
from ppg_fast.dialogues.dialogue import Message
from ppg_fast.dialogues.prompts import Prompt
from ppg_fast.endpoint import Endpoint, EndpointError
from ppg_fast.rollouts.generation import EndpointSampler, Request
from ppg_fast.rollouts.partner import Conversation, EndpointPartner

ASK = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The waits between attempts, not waited."""
    seconds = []
    monkeypatch.setattr(stopping, "sleep", seconds.append)
    return seconds


def error(code, **more):
    return {"error": {"message": "upstream", "code": code, **more}}


PASSING = {
    "502 in the body": error(502),
    "429 as text": error("429"),
    "no code": {"error": "overloaded"},
    "a word as code": error("server_error", type="overloaded"),
    "status": {"error": {"status": 503}},
    "SGLang's": {"object": "error", "message": "busy", "code": 503},
    "in the choice": {"choices": [{**error(502), "message": {"content": ""}}]},
    "finished by an error": {"choices": [{"finish_reason": "error", "message": {"content": "half an ans"}}]},
    "cut JSON": Raw(200, b'{"choices": [{"mess'),
    "HTML": Raw(200, b"<html><body>Bad gateway</body></html>", {"content-type": "text/html"}),
    "deep JSON": Raw(200, b'{"choices": ' + b"[" * 100_000),
    "a long integer": Raw(200, b'{"choices": ' + b"9" * 5000 + b"}"),
    "no gzip": Raw(200, b"junk", {"content-encoding": "gzip"}),
    "no UTF-8": Raw(200, b'{"choices": "\xff\xfe"}'),
    "a list": [said("no")],
}


@pytest.mark.parametrize("reply", PASSING.values(), ids=PASSING)
def test_what_may_pass_is_tried_again_and_named_where_it_does_not(reply, waits):
    replies = [reply, reply, said("now")]
    with serve(lambda *_: replies.pop(0)) as server:
        assert Endpoint(server.url, "m").chat(ASK) == "now"
        assert [0.5 <= waits[0] <= 0.625, 1.0 <= waits[1] <= 1.25] == [True, True]
        replies[:] = [reply] * 2
        with pytest.raises(
            EndpointError, match=r"after 2 attempts; asked POST, 1 messages, model m, max_tokens 4$"
        ) as caught:
            Endpoint(server.url, "m", retries=1).chat(ASK, max_tokens=4)
    assert str(caught.value).startswith(f"{server.url}/chat/completions: ")
    assert "\n" not in str(caught.value)


def test_retry_after_holds_for_an_error_in_the_body_too(waits):
    replies = [Raw(200, json.dumps(error(429)).encode(), {"retry-after": "7"}), said("now")]
    with serve(lambda *_: replies.pop(0)) as server:
        assert Endpoint(server.url, "m").chat(ASK) == "now"
    assert waits == [7.0]


FINAL = {
    "400 in the body": (error(400), "status 400"),
    "404 as text": (error("404"), "status 404"),
    "no choices": ({"id": "x"}, "must answer choices"),
    "empty choices": ({"choices": []}, "must answer choices"),
    "choices no list": ({"choices": {"0": 1}}, "must answer choices"),
    "choice no object": ({"choices": [None]}, "must answer choices"),
    "no message": ({"choices": [{}]}, "must hold choices"),
    "message no object": ({"choices": [{"message": "hi"}]}, "must hold choices"),
    "no content": ({"choices": [{"message": {"role": "assistant"}}]}, "must hold choices"),
    "content a number": (said(3), "must hold choices"),
    "content a list": (said([{"type": "text", "text": "hi"}]), "must hold choices"),
}


@pytest.mark.parametrize(("reply", "rule"), FINAL.values(), ids=FINAL)
def test_what_holds_no_answer_is_one_line_at_once(reply, rule, waits):
    with serve(lambda *_: reply) as server, pytest.raises(EndpointError, match=rule) as caught:
        Endpoint(server.url, "m").chat(ASK, seed=3)
    text = str(caught.value)
    assert text.startswith(f"{server.url}/chat/completions: ")
    assert text.endswith("; asked POST, 1 messages, model m, seed 3")
    assert json.dumps(reply)[:200] in text
    assert (len(server.requests), waits) == (1, [])


REFUSED = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."


@pytest.mark.parametrize("status", [400, 422, 200])
def test_a_refused_limit_goes_by_its_other_name_once_and_is_remembered(status):
    def modern(path, payload):
        body = {"error": {"message": REFUSED, "code": 400 if status == 200 else "unsupported_parameter"}}
        return (
            Raw(status, json.dumps(body).encode())
            if "max_tokens" in payload
            else said(payload["max_completion_tokens"])
        )

    with serve(lambda *a: modern(*a) if "max_tokens" in a[1] else said("ok")) as server:
        client = Endpoint(server.url, "m")
        assert [client.chat(ASK, max_tokens=4) for _ in range(3)] == ["ok"] * 3
    names = [[name for name in payload if name.startswith("max")] for _, payload in server.requests]
    assert names == [["max_tokens"], ["max_completion_tokens"], ["max_completion_tokens"], ["max_completion_tokens"]]


@pytest.mark.parametrize(
    "message",
    ["'max_tokens' or 'max_completion_tokens' is too large: 512", "max_tokens must be at most 100 of the context"],
)
def test_a_limit_refused_by_both_names_is_the_first_refusal_and_nothing_is_remembered(message):
    def small(path, payload):
        known = message if "max_tokens" in payload else "unknown field max_completion_tokens"
        return Raw(400, json.dumps({"error": known}).encode())

    with serve(small) as server:
        client = Endpoint(server.url, "m")
        with pytest.raises(EndpointError, match="status 400.*" + message):
            client.chat(ASK, max_tokens=512)
        assert (len(server.requests), client.refused) == (2, set())
        with pytest.raises(EndpointError, match=message):
            client.chat(ASK, max_tokens=512)


def test_what_would_steer_a_terminal_is_spelled_out():
    body = "\x00 \x1b[2Jé日\u202e".encode()
    with serve(lambda *_: Raw(body=body)) as server, pytest.raises(EndpointError) as caught:
        Endpoint(server.url, "m", retries=0).chat(ASK)
    assert r"\x00 \x1b[2Jé日\u202e" in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("url", ["http://h:99999/v1", "http://h:abc/v1", "http://[::1/v1", "http:///v1", "ftp://h"])
def test_an_address_that_is_none_is_refused_before_anything_is_asked(url):
    with pytest.raises(ValueError, match=r"an endpoint must be http\(s\)://host"):
        Endpoint(url, "m")


def partnered(choice, recwarn):
    with serve(lambda *_: {"choices": [choice]}) as server:
        partner = EndpointPartner(Endpoint(server.url, "m"), max_tokens=9)
        some = [Conversation([Prompt("p0", (Message("user", "hi"),))], partner, 4) for _ in range(3)]
        for conversation in some:
            conversation.reset(0)
        return partner.replies(some) and partner.replies(some), [
            str(w.message) for w in recwarn if "partner" in str(w.message)
        ]


def test_a_partners_thoughts_are_not_said_and_silence_ends_the_dialogue_with_one_warning(recwarn):
    replies, seen = partnered({"message": {"content": "<think>they lie</think>\n\nAnd then?"}}, recwarn)
    assert (replies, seen) == ([Message("user", "And then?")] * 3, [])
    replies, seen = partnered({"message": {"content": None}, "finish_reason": "content_filter"}, recwarn)
    assert replies == [None] * 3
    assert [
        text.endswith("in prompt 'p0' it said nothing, so the dialogue ends there (shown once)") for text in seen
    ] == [True]
    with pytest.raises(
        EndpointError, match=r"'p0', 3 messages: the partner's reply was cut at 9 tokens .*--partner-tokens"
    ):
        partnered({"message": {"content": "<think>they l"}, "finish_reason": "length"}, recwarn)


def test_nothing_is_waited_for_once_the_run_ends(monkeypatch):
    monkeypatch.undo()  # waits are waited
    with serve(lambda *_: Raw(503, b"busy", {"retry-after": "60"})) as server:
        client, start = Endpoint(server.url, "m"), time.monotonic()
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        with pytest.raises(stopping.Stopped, match="SIGTERM"), stopping.on_signals(at_once=False):
            client.map(lambda n: client.chat(ASK), range(5))
    assert time.monotonic() - start < 10
    assert len(server.requests) == 5


@pytest.mark.usefixtures("signals_are_heard")
def test_ctrl_c_waits_for_no_answer():
    slow = threading.Event()
    with serve(lambda *_: said(str(slow.wait(20)))) as server:
        client, start = Endpoint(server.url, "m"), time.monotonic()
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            client.map(lambda n: client.chat(ASK), range(5))
        assert time.monotonic() - start < 10
        slow.set()


KEYS = ["choices", "message", "content", "finish_reason", "error", "code", "token_ids", "logprobs", "sampling_mask"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=8,
)


class Answering:
    """An HTTP client that always gets ``body``."""

    def request(self, method, url, json):
        import httpx2

        return httpx2.Response(200, content=self.body.encode("utf-8", "replace"))


@pytest.fixture(scope="module")
def answering():
    client = Endpoint("http://h/v1", "m", retries=0)
    client._client = Answering()
    samplers = []
    for truncation in (None, {"top_k": 2}):
        sampler = EndpointSampler.__new__(EndpointSampler)  # without asking for the models
        sampler.endpoint, sampler.end_ids, sampler.vocab_size, sampler.native = client, [1], 10, False
        sampler.unknown, sampler.truncation = False, truncation
        samplers.append(sampler)
    return client, samplers


SETS = st.fixed_dictionaries(
    {"token_ids": st.just([4]), "logprobs": st.just({"content": [{"logprob": -1.0}]}), "sampling_mask": JSON}
).map(lambda choice: {"choices": [{"finish_reason": "length", **choice}]})


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(reply=st.one_of(JSON, JSON.map(lambda choice: {"choices": [choice]}), JSON.map(said), SETS))
def test_whatever_is_answered_is_text_or_one_line(reply, answering):
    client, samplers = answering
    client._client.body = json.dumps(reply)
    requests = [Request(0, [4], 4, torch.Generator())]
    for ask in (client.answer, *(sampler.answer for sampler in samplers)):
        try:
            ask(ASK if ask == client.answer else requests)
        except EndpointError as failure:
            text = str(failure)
        else:
            continue
        assert text.startswith(("http://h/v1/", "http://h/inference/v1/"))
        assert "\n" not in text

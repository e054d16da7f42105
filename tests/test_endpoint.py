"""The client against a real HTTP server on loopback, and token-in token-out with the fields of each server."""

import math
import socket
import threading

import pytest
import torch

pytest.importorskip("httpx2")
pytest.importorskip("transformers")

from openai_server import Raw, said, serve
from test_rollout import Ragged, make, one_thread  # noqa: F401

from ppg_fast import stopping
from ppg_fast.dialogues.packing import pack
from ppg_fast.endpoint import Endpoint, EndpointError
from ppg_fast.models import causal_lm as models
from ppg_fast.rollouts.generation import EndpointSampler, LocalSampler, Request
from ppg_fast.rollouts.rollout import collect_groups

ASK = [{"role": "user", "content": "hi"}]


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """The waits between attempts, not waited."""
    seconds = []
    monkeypatch.setattr(stopping, "sleep", seconds.append)
    return seconds


def test_a_chat_carries_model_settings_and_key(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    (tmp_path / "key").write_text("sk-other\n")
    with serve(lambda path, payload: said(f"heard {payload['messages'][0]['content']}")) as server:
        assert Endpoint(server.url, key="env:SOME_KEY").chat(ASK, max_tokens=3) == "heard hi"
        assert Endpoint(server.url + "/", "large", key=f"file:{tmp_path / 'key'}").chat(ASK) == "heard hi"
        assert Endpoint(server.url).chat(ASK) == "heard hi"
    assert server.requests[0] == ("/v1/chat/completions", {"model": "tiny", "messages": ASK, "max_tokens": 3})
    assert server.requests[1][1]["model"] == "large"
    assert [h.get("authorization") for h in server.headers] == ["Bearer sk-secret", "Bearer sk-other", None]


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529])
def test_some_statuses_are_tried_again(status, waits):
    replies = [Raw(status, b"busy"), Raw(status, b"busy"), said("now")]
    with serve(lambda *_: replies.pop(0)) as server:
        client = Endpoint(server.url)
        assert client.chat(ASK) == "now"
    assert (client.usage.requests, client.usage.retries) == (4, 2)  # one asked for the models
    assert [0.5 <= waits[0] <= 0.625, 1.0 <= waits[1] <= 1.25] == [True, True]


@pytest.mark.parametrize(("header", "seconds"), [("7", 7.0), ("3600", 60.0), ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0)])
def test_retry_after_is_kept_to(header, seconds, waits):
    replies = [Raw(429, b"busy", {"retry-after": header}), said("now")]
    with serve(lambda *_: replies.pop(0)) as server:
        assert Endpoint(server.url, "m").chat(ASK) == "now"
    assert waits == [seconds]


def test_other_statuses_and_a_refused_key_are_an_error_at_once_that_hides_the_key(monkeypatch, waits):
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    refused = Raw(401, b'{"error": "Incorrect API key provided: sk-secret"}')
    with (
        serve(lambda *_: refused) as server,
        pytest.raises(EndpointError, match=r"status 401.*provided: \*\*\*") as caught,
    ):
        Endpoint(server.url, "m", "env:SOME_KEY").chat(ASK)
    assert "sk-secret" not in str(caught.value)
    assert (len(server.requests), waits) == (1, [])


def test_what_stays_broken_is_an_error_with_the_number_of_attempts(waits):
    with (
        serve(lambda *_: Raw(503, b"overloaded")) as server,
        pytest.raises(EndpointError, match="status 503: overloaded, after 3 attempts"),
    ):
        Endpoint(server.url, "m", retries=2).chat(ASK)
    assert len(server.requests) == 3
    assert len(waits) == 2


@pytest.mark.parametrize("body", [b"{", b"<html>", b"[1]", b""])
def test_malformed_json_is_tried_again(body):
    replies = [Raw(200, body), said("now")]
    with serve(lambda *_: replies.pop(0)) as server:
        assert Endpoint(server.url, "m").chat(ASK) == "now"
        replies[:] = [Raw(200, body)] * 2
        with pytest.raises(EndpointError, match=r"JSON.*after 2 attempts"):
            Endpoint(server.url, "m", retries=1).chat(ASK)


def test_json_without_the_answer_is_an_error_and_no_text_is_empty():
    replies = [{"choices": []}, said(None)]
    with serve(lambda *_: replies.pop(0)) as server:
        client = Endpoint(server.url, "m")
        with pytest.raises(EndpointError, match="must answer choices"):
            client.chat(ASK)
        assert client.chat(ASK) == ""


def test_a_refused_connection_and_a_silent_server_are_tried_again_and_named(waits):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(EndpointError, match=r"ConnectError.*after 3 attempts"):
        Endpoint(address, "m", retries=2).chat(ASK)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(EndpointError, match=r"no answer within 0.1 s \(ReadTimeout\), after 2 attempts"):
            Endpoint(f"http://127.0.0.1:{silent.getsockname()[1]}/v1", "m", timeout=0.1, retries=1).chat(ASK)
    assert len(waits) == 3


def test_requests_run_side_by_side_up_to_the_limit_and_come_back_in_order():
    gate = threading.Barrier(3, timeout=20)  # opens only if three requests are under way at once

    def slow(path, payload):
        gate.wait()
        return said(payload["messages"][0]["content"])

    with serve(slow) as server:
        client = Endpoint(server.url, "m", concurrency=3)
        texts = client.map(lambda n: client.chat([{"role": "user", "content": str(n)}]), list(range(12)))
    assert texts == [str(n) for n in range(12)]
    assert server.most == 3


def test_the_first_error_of_many_ends_them():
    with serve(lambda *_: Raw(400, b"bad")) as server:
        client = Endpoint(server.url, "m", concurrency=2)
        with pytest.raises(EndpointError, match="status 400"):
            client.map(lambda n: client.chat(ASK), list(range(50)))
    assert len(server.requests) < 50


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": "localhost:8000"}, "must be http"),
        ({"url": "http://user:sk-secret@host/v1"}, "without a user"),
        ({"key": "sk-secret"}, "env:NAME or file:PATH"),
        ({"key": "env:NOT_SET_ANYWHERE"}, "env:NOT_SET_ANYWHERE must hold one API key, got '0 characters'"),
        ({"key": "file:nowhere"}, "no API key at file:nowhere"),
        ({"timeout": 0}, "timeout must be"),
        ({"retries": -1}, "retries must be >= 0"),
        ({"concurrency": 0}, "concurrency must be >= 1"),
    ],
)
def test_bad_settings_are_named_and_no_key_is_shown(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        Endpoint(**{"url": "http://host/v1", **arguments})
    assert "sk-secret" not in str(caught.value)


def test_a_server_must_list_models():
    with serve(lambda *_: {}, models=[]) as server, pytest.raises(EndpointError, match="must list models"):
        _ = Endpoint(server.url).model


class Engine:
    """A policy behind HTTP: a local model answers token ids, in the fields of vLLM and SGLang or of llama.cpp."""

    def __init__(self, leave_out_the_end=False):
        self.model, self.chat = make()
        self.model.eval()
        self.leave_out_the_end, self.lock = leave_out_the_end, threading.Lock()

    def sample(self, tokens, limit, seed):
        stream = torch.Generator().manual_seed(seed)
        with self.lock, torch.no_grad():
            return LocalSampler(self.model, self.chat.end_id, [], 1.0).answer([Request(0, tokens, limit, stream)])[0]

    def __call__(self, path, payload):
        if path == "/completion":
            answer = self.sample(payload["prompt"], payload["n_predict"], payload["seed"])
            probs = [{"id": t, "logprob": p} for t, p in zip(answer.tokens, answer.logprobs, strict=True)]
            return {
                "tokens": answer.tokens,
                "completion_probabilities": probs,
                "stop_type": "eos" if answer.ended else "limit",
            }
        assert path == "/v1/completions"
        assert payload["stop_token_ids"] == [self.chat.end_id]
        answer = self.sample(payload["prompt"], payload["max_tokens"], payload["seed"])
        shown = answer.tokens[:-1] if self.leave_out_the_end and answer.ended else answer.tokens
        choice = {
            "token_ids": shown,
            "prompt_token_ids": payload["prompt"],
            "finish_reason": "stop" if answer.ended else "length",
        }
        return {"choices": [{**choice, "logprobs": {"token_logprobs": answer.logprobs}}]}


@pytest.mark.parametrize("kind", ["vllm", "end left out", "llama.cpp"])
def test_tokens_go_in_and_out_and_the_log_probs_are_the_policys(kind):
    engine = Engine(kind == "end left out")
    listed = [{"id": "m", "owned_by": "llamacpp" if kind == "llama.cpp" else "vllm"}]
    with serve(engine, listed) as server:
        sampler = EndpointSampler(Endpoint(server.url, concurrency=2), engine.chat.end_id)
        rollouts, again = (
            collect_groups(
                sampler, engine.chat, Ragged, range(3), 4, generator=torch.Generator().manual_seed(1), max_new_tokens=6
            )
            for _ in range(2)
        )
    assert [r.sample for r in rollouts] == [r.sample for r in again]
    batch = pack([r.sample for r in rollouts])
    torch.testing.assert_close(batch.rollout_logprobs, models.token_logprobs(engine.model, batch), rtol=1e-4, atol=2e-5)
    assert {cut for r in rollouts for cut in r.cut_off} == {True, False}
    path = "/completion" if kind == "llama.cpp" else "/v1/completions"
    assert {p for p, _ in server.requests} == {path}
    payload = server.requests[0][1]
    assert payload["temperature"] == 1.0
    if kind == "llama.cpp":
        assert payload["samplers"] == ["temperature"]
    else:
        assert (payload["top_p"], payload["top_k"], payload["min_p"], payload["repetition_penalty"]) == (
            1.0,
            -1,
            0.0,
            1.0,
        )


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"text": "hello"}, "can be a partner or a judge but no sampler"),
        ({"token_ids": [4, 5], "logprobs": {"token_logprobs": [-1.0]}}, "one log-prob a token, got 1 for 2"),
        ({"token_ids": [4], "logprobs": {"token_logprobs": [None]}}, "gives no token ids with log-probs"),
        ({"token_ids": [4], "logprobs": {"token_logprobs": [-math.inf]}}, "one finite log-prob"),
        (
            {"token_ids": [4], "prompt_token_ids": [1, 4, 5], "logprobs": {"token_logprobs": [-1.0]}},
            "the tokens it is given, 2, but read 3",
        ),
    ],
)
def test_a_server_that_does_not_speak_in_tokens_is_no_sampler(choice, message):
    with serve(lambda *_: {"choices": [choice]}) as server:
        sampler = EndpointSampler(Endpoint(server.url), 1)
        with pytest.raises(EndpointError, match=message):
            sampler.answer([Request(0, [4, 5], 3, torch.Generator())])

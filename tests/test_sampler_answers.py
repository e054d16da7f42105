"""What a server that samples may answer: tokens that the policy could have said, or one line with address, question and
answer."""

import math

import pytest
import torch

pytest.importorskip("httpx2")
pytest.importorskip("transformers")

from openai_server import serve

from ppg_fast.endpoint import Endpoint, EndpointError
from ppg_fast.rollouts.generation import Answer, EndpointSampler, Request


def token_server(ends=1, unknown=False, **choice):
    """A sampler of 10 tokens, asked for 4, whose server answers so."""
    given = {"token_ids": [4], "logprobs": {"token_logprobs": [-1.0]}, "finish_reason": "length", **choice}
    with serve(lambda *_: {"choices": [given]}) as server:
        sampler = EndpointSampler(Endpoint(server.url), ends, 10, unknown=unknown)
        return sampler.answer([Request(0, [4, 5], 4, torch.Generator())])[0]


def logprobs(*values):
    return {"token_logprobs": list(values)}


def test_answers_at_the_edge_of_what_is_right_are_used():
    assert token_server() == Answer([4], [-1.0], False)
    assert token_server(token_ids=[0, 9, 9, 1], logprobs=logprobs(0, -0.0, -103, 1e-7), finish_reason="stop").ended
    assert token_server(token_ids=[], logprobs=logprobs(-2.0), finish_reason="stop") == Answer([1], [-2.0], True)
    assert token_server(finish_reason=None, prompt_token_ids=[4, 5]) == Answer([4], [-1.0], False)


def test_a_log_prob_that_a_server_does_not_tell_may_be_unknown():
    for none in (None, -9999.0):
        answer = token_server(token_ids=[4, 5], logprobs=logprobs(-1.0, none), unknown=True)
        assert answer.logprobs[0] == -1.0
        assert math.isnan(answer.logprobs[1])
    with pytest.raises(EndpointError, match="got -inf"):
        token_server(logprobs=logprobs(-math.inf), unknown=True)
    with pytest.raises(EndpointError, match="no token ids with log-probs"):
        token_server(logprobs=logprobs(None))


SAMPLED = {
    "beyond the vocabulary": ({"token_ids": [10]}, "from 0 to 9, got 10: does the server serve this model"),
    "far beyond": ({"token_ids": [10**400]}, "from 0 to 9, got a number beyond"),
    "negative": ({"token_ids": [-1]}, "from 0 to 9, got -1"),
    "40 for 4": ({"token_ids": [4] * 40, "logprobs": logprobs(*[-1.0] * 40)}, "at most the 4 tokens .* got 40"),
    "5 with the end": (
        {"token_ids": [4] * 4, "logprobs": logprobs(*[-1.0] * 5), "finish_reason": "stop"},
        "at most the 4 tokens .* got 5",
    ),
    "+3": ({"logprobs": logprobs(3.0)}, "one finite log-prob <= 0 a token, got 3.0"),
    "+0.001": ({"logprobs": logprobs(0.001)}, "got 0.001"),
    "NaN": ({"logprobs": logprobs(math.nan)}, "got nan"),
    "-inf": ({"logprobs": logprobs(-math.inf)}, "got -inf"),
    "vLLM's none": ({"logprobs": logprobs(-9999.0)}, "got -9999.0"),
    "-10**400": ({"logprobs": logprobs(-(10**400))}, "got a number beyond"),
    "two for one": ({"logprobs": logprobs(-1.0, -1.0)}, "one log-prob a token, got 2 for 1"),
    "none at all": ({"token_ids": [], "logprobs": logprobs()}, "one log-prob a token, got 0 for 0"),
    "no ids": ({"token_ids": None}, "no token ids with log-probs"),
    "true": ({"token_ids": [True]}, "no token ids with log-probs"),
    "floats": ({"token_ids": [4.0]}, "no token ids with log-probs"),
    "text": ({"token_ids": ["4"]}, "no token ids with log-probs"),
    "log-probs a list": ({"logprobs": [-1.0]}, "no token ids with log-probs"),
    "log-probs of text": ({"logprobs": logprobs("-1")}, "no token ids with log-probs"),
    "prompt a number": ({"prompt_token_ids": 3}, "read the tokens it is given, 2, but read int"),
    "another prompt": ({"prompt_token_ids": [4, 6]}, "read the tokens it is given"),
    "aborted": ({"finish_reason": "abort"}, "end by itself .* got 'abort'"),
    "finished by a list": ({"finish_reason": ["stop"]}, "end by itself"),
}


@pytest.mark.parametrize(("choice", "message"), SAMPLED.values(), ids=SAMPLED)
def test_what_the_policy_could_not_have_said_is_refused(choice, message):
    with pytest.raises(EndpointError, match=message) as caught:
        token_server(**choice)
    for part in ("/v1/completions: ", "; asked POST, 2 tokens, model tiny, max_tokens 4", '{"choices": [{"token_ids"'):
        assert part in str(caught.value)


@pytest.mark.parametrize("fault", [{"tokens": [10]}, {"tokens": [4] * 5}, {"stop_type": "word"}, {"truncated": True}])
def test_llama_cpp_is_checked_alike(fault):
    tokens = fault.get("tokens", [4])
    probs = [{"id": token, "logprob": -1.0} for token in tokens]
    reply = {"tokens": tokens, "completion_probabilities": probs, "stop_type": "limit", **fault}
    with serve(lambda *_: reply, [{"id": "m", "owned_by": "llamacpp"}]) as server:
        sampler = EndpointSampler(Endpoint(server.url), 1, 10)
        with pytest.raises(
            EndpointError, match=r"/completion: a sampler.*; asked POST, 2 tokens, model m, n_predict 4"
        ):
            sampler.answer([Request(0, [4, 5], 4, torch.Generator())])


LEFT_OUT = {"token_ids": [4], "logprobs": logprobs(-1.0, -2.0), "finish_reason": "stop"}


@pytest.mark.parametrize(
    "named", [{"stop_reason": 7}, {"matched_stop": 7}, {"stop_reason": None, "matched_stop": 7}], ids=str
)
def test_an_end_that_was_left_out_is_the_one_that_the_server_names(named):
    for ends in (7, [1, 7], [7, 1]):
        assert token_server(ends, **LEFT_OUT, **named) == Answer([4, 7], [-1.0, -2.0], True)
    shown = {**LEFT_OUT, "token_ids": [4, 1]}
    assert token_server([1, 7], **shown, **named).tokens == [4, 1], "what was sampled is what stands there"


@pytest.mark.parametrize(
    ("stop", "got"), [(None, "None"), (6, "6"), (True, "True"), ("</s>", "'</s>'"), (7.0, "7.0"), (10**400, "a number")]
)
def test_none_of_several_ends_is_guessed(stop, got):
    rule = r"must name it \(stop_reason, matched_stop, id\), one of 1, 7, got "
    with pytest.raises(EndpointError, match=rule + got):
        token_server([1, 7], **LEFT_OUT, stop_reason=stop)
    if stop is not None:  # nor is a single end taken for another one that the server names
        with pytest.raises(EndpointError, match="one of 1, got " + got):
            token_server(**LEFT_OUT, stop_reason=stop)


def llama_server(ends, *probs, tokens=(4,)):
    reply = {"tokens": list(tokens), "completion_probabilities": list(probs), "stop_type": "eos", "stopping_word": ""}
    with serve(lambda *_: reply, [{"id": "m", "owned_by": "llamacpp"}]) as server:
        return EndpointSampler(Endpoint(server.url), ends, 10).answer([Request(0, [4, 5], 4, torch.Generator())])[0]


def test_llama_cpp_names_the_end_beside_its_log_prob():
    first, last = {"id": 4, "logprob": -1.0}, {"id": 7, "logprob": -2.0}
    assert llama_server([1, 7], first, last) == Answer([4, 7], [-1.0, -2.0], True)
    assert llama_server([1, 7], first, last, tokens=(4, 7)) == Answer([4, 7], [-1.0, -2.0], True)
    with pytest.raises(EndpointError, match="one of 1, 7, got None"):
        llama_server([1, 7], first, {"logprob": -2.0})
    with pytest.raises(EndpointError, match="one of 1, 8, got 7"):
        llama_server([1, 8], first, last)

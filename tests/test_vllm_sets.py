"""Kept sets from vLLM's own generation: its fields as 0.28.0 and 0.33.0 send them, or one line."""

import threading

import pytest
import torch

pytest.importorskip("httpx2")
pytest.importorskip("transformers")

from openai_server import serve
from test_rollout import Ragged, make, one_thread  # noqa: F401

from ppg_fast.dialogues.packing import pack
from ppg_fast.endpoint import Endpoint, EndpointError
from ppg_fast.models import causal_lm as models
from ppg_fast.rollouts.generation import Answer, EndpointSampler, LocalSampler, Request
from ppg_fast.rollouts.rollout import collect_groups


def contents(answer, version):
    """``logprobs.content`` of a version: what stands in it beside the log-prob differs."""
    if version == "0.28":
        beside = {"bytes": None, "top_logprobs": []}
        return [{"token": f"token_id:{t}", "logprob": l, **beside} for t, l in answer]
    return [{"token_id": t, "logprob": l, "rank": 1, "top_logprobs": []} for t, l in answer]


class Engine:
    """A policy behind vLLM's /inference/v1/generate."""

    def __init__(self, version):
        self.model, self.chat = make()
        self.model.eval()
        self.version, self.lock = version, threading.Lock()

    def __call__(self, path, payload):
        assert path == "/inference/v1/generate"
        assert set(payload) == {"model", "token_ids", "sampling_params"}
        tokens, given = payload["token_ids"], payload["sampling_params"]
        assert (given["temperature"], given["top_p"], given["logprobs"]) == (1.0, 0.8, 0)
        with self.lock, torch.no_grad():
            stream = torch.Generator().manual_seed(given["seed"])
            sampler = LocalSampler(self.model, given["stop_token_ids"], [], 1.0, given["top_p"], given["top_k"])
            answer = sampler.answer([Request(0, tokens, given["max_tokens"], stream)])[0]
        said = list(zip(answer.tokens, answer.logprobs, strict=True))
        choice = {
            "index": 0, "finish_reason": "stop" if answer.ended else "length", "token_ids": answer.tokens,
            "routed_experts": None, "sampling_mask": answer.kept, "logprobs": {"content": contents(said, self.version)},
        }  # fmt: skip
        usage = {"prompt_tokens": len(tokens), "completion_tokens": len(said), "total_tokens": len(tokens) + len(said)}
        return {"request_id": "generate-tokens-1", "choices": [choice], "usage": usage, "prompt_logprobs": None}


@pytest.mark.parametrize(("version", "top_k"), [("0.28", 0), ("0.33", 5)])
def test_the_log_probs_are_the_policys_over_the_sets(version, top_k):
    engine = Engine(version)
    with serve(engine, [{"id": "m", "owned_by": "vllm"}]) as server:
        sampler = EndpointSampler(Endpoint(server.url), engine.chat.end_id, top_p=0.8, top_k=top_k)
        stream = torch.Generator().manual_seed(1)
        rollouts = collect_groups(sampler, engine.chat, Ragged, range(3), 2, generator=stream, max_new_tokens=6)
    assert {payload["sampling_params"]["top_k"] for _, payload in server.requests} == {top_k or 512}
    batch = pack([r.sample for r in rollouts])
    assert batch.kept is not None
    assert 1 < len(batch.kept.ids) / int((batch.labels >= 0).sum()) <= (top_k or 40)
    of_sets = models.token_logprobs(engine.model, batch)
    torch.testing.assert_close(batch.rollout_logprobs, of_sets, rtol=1e-4, atol=2e-5)


def asked_once(owner="vllm", prompt_tokens=2, **choice):
    """A sampler of 10 tokens, asked for 4 after 2, whose server answers so."""
    given = {
        "index": 0, "finish_reason": "length", "token_ids": [4, 7], "sampling_mask": [[4, 5], [7]],
        "logprobs": {"content": contents([(4, -1.0), (7, 0.0)], "0.28")}, **choice,
    }  # fmt: skip
    answer = {"choices": [given], "usage": {"prompt_tokens": prompt_tokens}}
    with serve(lambda *_: answer, [{"id": "m", "owned_by": owner}]) as server:
        sampler = EndpointSampler(Endpoint(server.url), 1, 10, top_k=2)
        return sampler.answer([Request(0, [4, 5], 4, torch.Generator())])[0]


def test_sets_stand_beside_tokens():
    assert asked_once() == Answer([4, 7], [-1.0, 0.0], False, kept=[[4, 5], [7]])
    ended = {"token_ids": [4, 1], "sampling_mask": [[4, 5], [1]]}
    assert asked_once(**ended).ended, "a server that does not know the end"
    more = {"token_ids": [1, 7], "sampling_mask": [[1, 5], [7]]}
    assert asked_once(**more) == Answer([1], [-1.0], True, kept=[[1, 5]]), "what follows the end is cut, its set too"


SERVED = r"sampling_mask, a list of ids for each token \(vllm serve MODEL --return-sampling-mask --logprobs-mode proc"
WRONG = {
    "none": ({"sampling_mask": None}, SERVED),
    "flat": ({"sampling_mask": [4, 7]}, SERVED),
    "text": ({"sampling_mask": [["4"], [7]]}, SERVED),
    "true": ({"sampling_mask": [[4, True], [7]]}, SERVED),
    "one for two": ({"sampling_mask": [[4, 7]]}, "one kept set a token, got 1 for 2 tokens"),
    "end left out": (
        {"logprobs": {"content": contents([(4, -1.0), (7, 0.0), (1, -1.0)], "0.33")}, "finish_reason": "stop"},
        "one kept set a token, got 2 for 3 tokens",
    ),
    "empty": ({"sampling_mask": [[4], []]}, "in the set that it was drawn from, which token 1 is not"),
    "another's": ({"sampling_mask": [[5], [7]]}, "in the set that it was drawn from, which token 0 is not"),
    "beyond": ({"sampling_mask": [[4, 10], [7]]}, "from 0 to 9, each once, which that of token 0 is not"),
    "twice": ({"sampling_mask": [[4], [7, 7]]}, "each once, which that of token 1 is not"),
    "no log-probs": ({"logprobs": None}, "no token ids with log-probs"),
    "log-probs of /completions": ({"logprobs": {"token_logprobs": [-1.0, 0.0]}}, "no token ids with log-probs"),
    "another prompt": ({"prompt_tokens": 3}, "must read the 2 tokens it is given, but read 3"),
    "aborted": ({"finish_reason": "abort"}, "end by itself .* got 'abort'"),
}


@pytest.mark.parametrize(("choice", "message"), WRONG.values(), ids=WRONG)
def test_what_is_no_set_of_the_policys_tokens_is_refused(choice, message):
    with pytest.raises(EndpointError, match=message) as caught:
        asked_once(**choice)
    for part in ("/inference/v1/generate: ", "; asked POST, 2 tokens, model m, max_tokens 4"):
        assert part in str(caught.value)


@pytest.mark.parametrize("owner", ["llamacpp", "sglang"])
def test_servers_without_sets_are_refused_before_they_are_asked(owner):
    rule = f"a sampler endpoint with top_p or top_k must be vLLM >= 0.28 .*, got '{owner}'"
    with pytest.raises(ValueError, match=rule):
        asked_once(owner)
    with serve(lambda *_: {}) as server:
        for wrong, message in (({"top_p": 0.0}, "top_p must be a finite number > 0"), ({"top_k": -1}, "top_k must be")):
            with pytest.raises(ValueError, match=message):
                EndpointSampler(Endpoint(server.url), 1, **wrong)

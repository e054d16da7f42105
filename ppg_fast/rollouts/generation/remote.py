"""Answers of a server: token ids in, token ids and their log-probs out."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ppg_fast.endpoint import SHOWN, Endpoint, EndpointError
from ppg_fast.rollouts.generation.answers import Answer, Request

# no truncation of the distribution and no penalty, whatever the server's or the model's own defaults are
PLAIN = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class EndpointSampler:
    """Samples at temperature 1 from the model that a server runs.

    vLLM and SGLang: ``/completions`` with ``return_token_ids`` (fields ``token_ids``, ``prompt_token_ids``,
    ``logprobs.token_logprobs``). llama.cpp, known by ``owned_by`` in its ``/models``: its own ``/completion`` with
    ``return_tokens`` and ``n_probs`` (fields ``tokens``, ``completion_probabilities``). A server that gives text only
    is refused: what was sampled would have to be guessed. Only at temperature 1 do all of them mean the same by a
    log-prob (vLLM and llama.cpp report it before the temperature, SGLang after).
    """

    def __init__(self, endpoint: Endpoint, end_id: int) -> None:
        self.endpoint, self.end_id = endpoint, end_id
        listed = endpoint.models()
        self.native = any(model.get("owned_by") == "llamacpp" for model in listed)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """All requests at once, as far as the endpoint's concurrency goes. EndpointError where an answer is not made of
        tokens."""
        seeds = [int(torch.randint(2**31, (1,), generator=request.random)) for request in requests]
        ask = self._llama_cpp if self.native else self._completion
        return self.endpoint.map(lambda pair: ask(*pair), list(zip(requests, seeds, strict=True)))

    def _completion(self, request: Request, seed: int) -> Answer:
        settings = {"max_tokens": request.limit, "stop_token_ids": [self.end_id], "seed": seed, **PLAIN}
        wanted = {"logprobs": 1, "return_token_ids": True, "add_special_tokens": False}
        payload = {"model": self.endpoint.model, "prompt": request.tokens, **settings, **wanted}
        got = self.endpoint.post("/completions", payload)
        choice = _first(got.get("choices"))
        read = choice.get("prompt_token_ids")
        if read is not None and read != request.tokens:
            raise EndpointError(
                f"{self.endpoint.url} must read the tokens it is given, but read {len(read)} for {len(request.tokens)}"
            )
        logprobs = choice.get("logprobs")
        values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
        return self._checked(choice.get("token_ids"), values, choice.get("finish_reason") == "stop", got)

    def _llama_cpp(self, request: Request, seed: int) -> Answer:
        settings = {"n_predict": request.limit, "seed": seed, "temperature": 1.0, "samplers": ["temperature"]}
        payload = {"prompt": request.tokens, "return_tokens": True, "n_probs": 1, **settings}
        got = self.endpoint.request("POST", self.endpoint.url.removesuffix("/v1") + "/completion", payload)
        if got.get("truncated"):
            raise EndpointError(
                f"{self.endpoint.url} must not cut the dialogue: {len(request.tokens)} tokens exceed its context"
            )
        probs = got.get("completion_probabilities")
        values = [p.get("logprob") for p in probs if isinstance(p, dict)] if isinstance(probs, list) else None
        return self._checked(got.get("tokens"), values, got.get("stop_type") == "eos", got)

    def _checked(self, tokens: Any, logprobs: Any, ended: bool, got: dict[str, Any]) -> Answer:
        """An answer of tokens; a server may leave out the end token that it stopped at, but not its log-prob."""
        if not _all_are(tokens, int) or not _all_are(logprobs, (int, float)):
            rule = "history must never be decoded and encoded again; vLLM, SGLang and llama.cpp give them"
            lacks = "gives no token ids with log-probs, so it can be a partner or a judge but no sampler"
            raise EndpointError(f"{self.endpoint.url} {lacks} ({rule}), got {str(got)[:SHOWN]}")
        if ended and len(logprobs) == len(tokens) + 1:
            tokens = [*tokens, self.end_id]
        if not tokens or len(tokens) != len(logprobs) or not all(map(math.isfinite, logprobs)):
            raise EndpointError(
                f"{self.endpoint.url} must give one finite log-prob a token, got {len(logprobs)} for "
                f"{len(tokens)} tokens"
            )
        return Answer(list(tokens), [float(value) for value in logprobs], ended)


def _all_are(values: Any, kind: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)


def _first(choices: Any) -> dict[str, Any]:
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}

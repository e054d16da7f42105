"""Answers of a server: token ids in, token ids and their log-probs out."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ppg_fast.endpoint import Endpoint
from ppg_fast.replies import first_choice
from ppg_fast.rollouts.generation import llama_cpp, vllm
from ppg_fast.rollouts.generation.answers import Answer, Request
from ppg_fast.rollouts.generation.local import MOST_KEPT
from ppg_fast.rules import require_integer, require_number
from ppg_fast.spec import require

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
ROUNDING = 1e-4  # nats that the log of a probability may exceed 0 by
NO_LOGPROB = -9999.0  # what vLLM writes where it has none
ENDS = {"stop": True, "length": False, "eos": True, "limit": False, None: False}  # whether the answer ended by itself


class EndpointSampler:
    """Samples at temperature 1 from the model that a server runs.

    vLLM and SGLang: ``/completions`` with ``return_token_ids`` (fields ``token_ids``, ``prompt_token_ids``,
    ``logprobs.token_logprobs``). llama.cpp, known by ``owned_by`` in its ``/models``: its own ``/completion`` with
    ``return_tokens`` and ``n_probs`` (fields ``tokens``, ``completion_probabilities``). A server that gives text only
    is refused: what was sampled would have to be guessed. Only at temperature 1 do all of them mean the same by a
    log-prob (vLLM and llama.cpp report it before the temperature, SGLang after).

    `EndpointError` for an answer that is not what the policy could have said: a token id outside of ``vocab_size``,
    more tokens than asked for, not one log-prob <= 0 for each token. An answer may leave out the end token that it
    stopped at, one of ``end_ids``: it is what the server names (vLLM's ``stop_reason``, SGLang's ``matched_stop``, the
    id beside llama.cpp's last log-prob), or the only one there is; of several without a name, none is guessed. An
    answer of a server that does not know an end is over there all the same. llama.cpp does not say the ``banned``
    tokens, as the model in this process does not, and its log-probs are before that; a log-prob that it does not list,
    of a token after which the text stops within a character, is asked for by itself. ``positions``: how many tokens
    the policy reads at most; the attribute is no more than what the server's context has room for, where it lists that.
    ``unknown``: a token may come without a log-prob (null, vLLM's -9999), which then is NaN.

    ``top_p`` < 1 or ``top_k`` > 0: tokens are drawn from kept sets, of at most 512 without ``top_k``, which come with
    the answers, and log-probs are over them. vLLM >= 0.28 alone hands them over, by ``/inference/v1/generate`` (fields
    ``token_ids``, ``logprobs.content``, ``sampling_mask``). ValueError for llama.cpp and SGLang.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        end_ids: int | Sequence[int],
        vocab_size: int = 2**31,
        banned: Sequence[int] = (),
        positions: int | None = None,
        unknown: bool = False,
        top_p: float = 1.0,
        top_k: int = 0,
    ) -> None:
        self.endpoint, self.vocab_size, self.unknown = endpoint, vocab_size, unknown
        self.end_ids = [end_ids] if isinstance(end_ids, int) else list(end_ids)
        self.bans = [[token, False] for token in banned]
        listed = endpoint.models()
        self.native = any(model.get("owned_by") == "llamacpp" for model in listed)
        require_number("top_p", top_p, 0.0, 1.0, open_low=True)
        require_integer("top_k", top_k, 0)
        self.truncation = {"top_p": top_p, "top_k": top_k or MOST_KEPT} if top_p < 1 or top_k else None
        owners = [model.get("owned_by") for model in listed]
        rule = f"a sampler endpoint with top_p or top_k must be vLLM >= 0.28 ({vllm.SERVED})"
        require(self.truncation is None or not set(owners) & set(vllm.OTHERS), rule, ", ".join(map(str, owners)))
        self.positions = min(filter(None, (positions, _context(endpoint.model, listed))), default=2**62)

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """All requests at once, as far as the endpoint's concurrency goes. EndpointError where an answer is not made of
        tokens."""
        seeds = [int(torch.randint(2**31, (1,), generator=request.random)) for request in requests]
        ask = self._llama_cpp if self.native else self._completion if self.truncation is None else self._from_sets
        return self.endpoint.map(lambda pair: ask(*pair), list(zip(requests, seeds, strict=True)))

    def _completion(self, request: Request, seed: int) -> Answer:
        settings = {"max_tokens": request.limit, "stop_token_ids": self.end_ids, "seed": seed, **PLAIN}
        wanted = {"logprobs": 1, "return_token_ids": True, "add_special_tokens": False}
        payload = {"model": self.endpoint.model, "prompt": request.tokens, **settings, **wanted}

        def read(answer: dict[str, Any]) -> Answer:
            choice = first_choice(answer)
            read = choice.get("prompt_token_ids")
            if read is not None and read != request.tokens:
                count = len(read) if isinstance(read, list) else type(read).__name__
                raise ValueError(f"a sampler must read the tokens it is given, {len(request.tokens)}, but read {count}")
            logprobs = choice.get("logprobs")
            values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
            # vLLM says null where it stopped at the model's eos
            stop = choice.get("matched_stop") if choice.get("stop_reason") is None else choice["stop_reason"]
            return self._checked(choice.get("token_ids"), values, choice.get("finish_reason"), stop, request.limit)

        return self.endpoint.post("/completions", payload, read)

    def _from_sets(self, request: Request, seed: int) -> Answer:
        of_length = {"max_tokens": request.limit, "stop_token_ids": self.end_ids, "seed": seed, "logprobs": 0}
        settings = {**PLAIN, **(self.truncation or {}), **of_length}
        payload = {"model": self.endpoint.model, "token_ids": request.tokens, "sampling_params": settings}

        def read(answer: dict[str, Any]) -> Answer:
            choice = first_choice(answer)
            usage = answer.get("usage")
            count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
            if count not in (None, len(request.tokens)):
                raise ValueError(f"a sampler must read the {len(request.tokens)} tokens it is given, but read {count}")
            tokens, values = choice.get("token_ids"), vllm.logprobs_in(choice)
            found = self._checked(tokens, values, choice.get("finish_reason"), None, request.limit)
            found.kept = vllm.sets_of(choice, found.tokens, self.vocab_size)
            return found

        return self.endpoint.request("POST", vllm.address(self.endpoint), payload, read)

    def _llama_cpp(self, request: Request, seed: int) -> Answer:
        settings = {"n_predict": request.limit, "seed": seed, **llama_cpp.PLAIN, "logit_bias": self.bans}
        asked = {"model": self.endpoint.model, "prompt": request.tokens, "return_tokens": True, "n_probs": 1}

        def read(answer: dict[str, Any]) -> Answer:
            if answer.get("truncated"):
                rule = f"a sampler must not cut the dialogue: {len(request.tokens)} tokens exceed its context"
                raise ValueError(f"{rule} (--ctx-size, which llama.cpp shares among its --parallel slots)")
            listed = answer.get("completion_probabilities")
            probs = [p for p in listed if isinstance(p, dict)] if isinstance(listed, list) else None
            tokens = answer.get("tokens")
            values = None if probs is None else self._values(request, tokens, probs)
            stop = probs[-1].get("id") if probs else None
            return self._checked(tokens, values, answer.get("stop_type"), stop, request.limit)

        return self.endpoint.request("POST", llama_cpp.address(self.endpoint), {**asked, **settings}, read)

    def _values(self, request: Request, tokens: Any, probs: list[dict[str, Any]]) -> list[Any]:
        """The log-prob of each token, as far as the lists are any; those that llama.cpp leaves out are asked for."""
        ids: list[Any] = [p.get("id") for p in probs]
        values: list[Any] = [p.get("logprob") for p in probs]
        if not _all_are(tokens, int) or not _all_are(ids, int) or not len(ids) <= len(tokens) <= request.limit:
            return values
        places = llama_cpp.listed_places(tokens, ids)

        def value(i: int) -> Any:
            if i in places:
                return values[places[i]]
            return llama_cpp.logprob_of(self.endpoint, [*request.tokens, *tokens[:i]], tokens[i], self.end_ids[0])

        return [value(i) for i in range(len(tokens))]

    def _checked(self, tokens: Any, logprobs: Any, end: Any, stop: Any, limit: int) -> Answer:
        """An answer of tokens; a server may leave out the end token that it stopped at, but not its log-prob. ``stop``:
        the end token that it names. ValueError for anything that is none."""
        if self.unknown and isinstance(logprobs, list):
            logprobs = [math.nan if value in (None, NO_LOGPROB) else value for value in logprobs]
        if not _all_are(tokens, int) or not _all_are(logprobs, (int, float)):
            rule = "history must never be decoded and encoded again; vLLM, SGLang and llama.cpp give them"
            lacks = "the server gives no token ids with log-probs, so it can be a partner or a judge but no sampler"
            raise ValueError(f"{lacks} ({rule})")
        if not isinstance(end, str | None) or end not in ENDS:
            raise ValueError(f"a sampler's answer must end by itself (stop) or at its limit (length), got {end!r}")
        ended = ENDS[end]
        if ended and len(logprobs) == len(tokens) + 1:
            tokens = [*tokens, self._left_out(stop)]
        if not tokens or len(tokens) != len(logprobs):
            raise ValueError(f"a sampler must give one log-prob a token, got {len(logprobs)} for {len(tokens)} tokens")
        if len(tokens) > limit:
            raise ValueError(f"a sampler must give at most the {limit} tokens it is asked for, got {len(tokens)}")
        if outside := [token for token in tokens if not 0 <= token < self.vocab_size]:
            rule = f"a sampler's token ids must be those of the policy, from 0 to {self.vocab_size - 1}"
            raise ValueError(f"{rule}, got {_number(outside[0])}: does the server serve this model?")
        told = [v for v in logprobs if not (self.unknown and isinstance(v, float) and math.isnan(v))]
        if wrong := [value for value in told if not NO_LOGPROB < value <= ROUNDING]:
            raise ValueError(f"a sampler must give one finite log-prob <= 0 a token, got {_number(wrong[0])}")
        # a server that does not know one of the ends goes on after it
        end = next((i for i, token in enumerate(tokens) if token in self.end_ids), None)
        said = slice(len(tokens) if end is None else end + 1)
        return Answer(list(tokens)[said], [float(value) for value in logprobs][said], ended or end is not None)

    def _left_out(self, stop: Any) -> int:
        """The end token that an answer leaves out: the one that the server names, or the only one."""
        if stop is None and len(self.end_ids) == 1:
            return self.end_ids[0]
        if not _all_are([stop], int) or stop not in self.end_ids:
            rule = "a sampler that leaves out the end token it stopped at must name it (stop_reason, matched_stop, id)"
            said = _number(stop) if isinstance(stop, int) else repr(stop)[:60]
            raise ValueError(f"{rule}, one of {', '.join(map(str, self.end_ids))}, got {said}")
        return stop


def _context(name: str, listed: Sequence[dict[str, Any]]) -> int | None:
    """How many tokens a dialogue may have: vLLM lists ``max_model_len``, llama.cpp ``n_ctx``, the last of which it
    takes for a sign that an answer was cut."""
    model = next((m for m in listed if m["id"] == name), listed[0])
    meta: Any = model.get("meta")
    context: Any = meta.get("n_ctx") if isinstance(meta, dict) else None
    rooms: list[Any] = [model.get("max_model_len"), context - 1 if _all_are([context], int) else None]
    return next((room for room in rooms if _all_are([room], int) and room > 0), None)


def _all_are(values: Any, kind: Any) -> bool:
    return isinstance(values, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in values)


def _number(value: float) -> str:
    """As it prints; Python does not print an integer of 5,000 digits."""
    return "a number beyond 1e18" if isinstance(value, int) and abs(value) > 10**18 else f"{value}"

"""What llama.cpp's own server leaves out of an answer: the log-prob of a token after which the text stops within a
character, as in most emoji."""

from collections.abc import Sequence
from typing import Any

from ppg_fast.endpoint import Endpoint

PLAIN = {"temperature": 1.0, "samplers": ["temperature"]}  # of its samplers, none that cuts the distribution
LIKELY, ALL = 1_000, 1_000_000  # tokens whose log-probs are asked for; the server gives no more than it has
SURE = 1_000.0  # added to a logit: nothing else is sampled


def listed_places(tokens: Sequence[int], ids: Sequence[int]) -> dict[int, int]:
    """Where in ``ids``, the tokens with a listed log-prob, each token stands: only those of which it is certain.

    A token is certain where the first way to find ``ids`` among ``tokens``, in order, and the last one agree.
    ValueError where there is none.
    """
    first, last = _found(tokens, ids), _found(tokens[::-1], ids[::-1])
    if first is None or last is None:
        rule = "a sampler must give the log-probs of the tokens that it sampled, and gives those of others"
        raise ValueError(f"{rule}, got ids {list(ids)[:8]} for {list(tokens)[:8]}")
    last = [len(tokens) - 1 - place for place in reversed(last)]
    return {place: j for j, (place, other) in enumerate(zip(first, last, strict=True)) if place == other}


def _found(tokens: Sequence[int], ids: Sequence[int]) -> list[int] | None:
    places: list[int] = []
    for i, token in enumerate(tokens):
        if len(places) < len(ids) and token == ids[len(places)]:
            places.append(i)
    return places if len(places) == len(ids) else None


def address(endpoint: Endpoint) -> str:
    """Of its own completions, which stand beside the OpenAI protocol's."""
    return endpoint.url.removesuffix("/v1") + "/completion"


def logprob_of(endpoint: Endpoint, tokens: Sequence[int], token: int, whole: int) -> float:
    """The log-prob of ``token`` after ``tokens``: the server is made to say ``whole``, a token of whole characters, and
    to list the log-probs of all, which are those before that bias. EndpointError where it does not."""
    bias = {"logit_bias": [[whole, SURE]], "n_predict": 1, "return_tokens": True, **PLAIN}
    for count in (LIKELY, ALL):
        payload = {"model": endpoint.model, "prompt": list(tokens), "n_probs": count, **bias}

        def read(answer: dict[str, Any], last: bool = count == ALL) -> float | None:
            return _listed(answer, token, last)

        value = endpoint.request("POST", address(endpoint), payload, read)
        if value is not None:
            return value
    raise AssertionError("the last one reads a value or raises")


def _listed(answer: dict[str, Any], token: int, last: bool) -> float | None:
    try:
        top = answer["completion_probabilities"][0]["top_logprobs"]
        found = [p["logprob"] for p in top if p["id"] == token]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError("a sampler must list top_logprobs where it is asked for n_probs") from error
    if not found and last:
        raise ValueError(f"a sampler must list the log-prob of every token, got none of {token}")
    return found[0] if found else None

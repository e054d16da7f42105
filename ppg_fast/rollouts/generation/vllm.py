"""What vLLM's own generation, tokens in and tokens out, has beyond the OpenAI protocol: the kept set that each token
was drawn from (``sampling_mask``, from 0.28 on)."""

from collections.abc import Sequence
from typing import Any

from ppg_fast.endpoint import Endpoint

SERVED = "vllm serve MODEL --return-sampling-mask --logprobs-mode processed_logprobs"  # log-probs are over the sets
OTHERS = ("llamacpp", "sglang")  # what servers that hand no sets over in this way call themselves in ``owned_by``


def address(endpoint: Endpoint) -> str:
    """Of its generation, which stands beside the OpenAI protocol's."""
    return endpoint.url.removesuffix("/v1") + "/inference/v1/generate"


def logprobs_in(choice: dict[str, Any]) -> list[Any] | None:
    """The log-prob of each token, as far as there is a list."""
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    return [c.get("logprob") if isinstance(c, dict) else c for c in content] if isinstance(content, list) else None


def sets_of(choice: dict[str, Any], tokens: Sequence[int], vocab_size: int) -> list[list[int]]:
    """The kept set of each of ``tokens``, which the answer's begin with. ValueError where there is none, and for one
    that is no set of the policy's tokens or lacks the token that was drawn from it."""
    sets, given = choice.get("sampling_mask"), len(choice["token_ids"])
    if not isinstance(sets, list) or not all(_is_ids(ids) for ids in sets):
        raise ValueError(f"a sampler of kept sets must give sampling_mask, a list of ids for each token ({SERVED})")
    if len(sets) != given or given < len(tokens):
        count = max(given, len(tokens))
        raise ValueError(f"a sampler must give one kept set a token, got {len(sets)} for {count} tokens")
    for place, (token, ids) in enumerate(zip(tokens, sets, strict=False)):
        if len(set(ids)) != len(ids) or not all(0 <= i < vocab_size for i in ids):
            rule = f"a kept set must be of token ids of the policy, from 0 to {vocab_size - 1}, each once"
            raise ValueError(f"{rule}, which that of token {place} is not: does the server serve this model?")
        if token not in ids:
            raise ValueError(f"a token must be in the set that it was drawn from, which token {place} is not")
    return sets[: len(tokens)]


def _is_ids(ids: Any) -> bool:
    return isinstance(ids, list) and all(type(i) is int for i in ids)

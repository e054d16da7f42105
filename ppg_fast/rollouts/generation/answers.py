"""What is asked of a sampler, and what it gives back: tokens in, tokens out."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch


@dataclass
class Request:
    """The next answer of one dialogue.

    ``dialogue``: which one; a sampler may remember what it has read of it. ``tokens``: everything so far. ``limit``:
    most tokens of the answer. ``random``: the dialogue's own source of randomness (on the CPU), so that its answers do
    not depend on the other dialogues of a batch.
    """

    dialogue: int
    tokens: list[int]
    limit: int
    random: torch.Generator


@dataclass
class Answer:
    """Tokens as sampled, the end token included, and the log-probability of each.

    ``logprobs``: in nats, at the sampling temperature, over the whole vocabulary or, where the sampler truncates, over
    ``kept``, the tokens that each was drawn from. ``entropies``: of that distribution, one a token where they were
    asked for. ``ended``: by itself, and not at the limit.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False
    entropies: list[float] = field(default_factory=list)
    kept: list[list[int]] | None = None


class Sampler(Protocol):
    """Answers for some dialogues at once."""

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer for each request, in their order; a dialogue that is not asked for is over and does not come
        back."""
        ...

"""What a policy talks to: a partner that opens a dialogue, replies to every answer and rewards it."""

import random
from collections.abc import Sequence
from typing import Protocol

from ppg_fast.dialogues.message import Message


class Environment(Protocol):
    """One dialogue at a time. A turn is one answer of the assistant; ``step`` takes it and rewards it."""

    def reset(self, seed: int) -> list[Message]:
        """Start the dialogue that ``seed`` names and return its opening: system message and first user message.

        The same seed gives the same partner: the rollouts of one group share it, so a baseline over the group is fair.
        """
        ...

    def step(self, assistant_text: str) -> tuple[Message | Sequence[Message] | None, float, bool]:
        """Take the answer; return (the partner's reply or None when done, the turn's finite reward, whether the
        dialogue is over).

        A reply may be several messages. One with ``tools``, JSON schemas of functions, has them in its opening.
        """
        ...


class TeachableEnvironment(Environment, Protocol):
    """An environment that knows what good answers are, for a warm start by imitation and for a scale of its returns."""

    def demonstrate(self, rng: random.Random, skill: float) -> str:
        """An answer to the open question by a scripted assistant that is right with probability about ``skill``."""
        ...

    def best_return(self) -> float:
        """The return of the best possible assistant in the dialogue that was reset last."""
        ...

    def agreement(self) -> list[tuple[str, bool]]:
        """(kind of turn, whether the answer was right) of every turn so far: says WHAT is learned, the return only how
        much."""
        ...

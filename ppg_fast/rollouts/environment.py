"""What a policy talks to: a partner that opens a dialogue, replies to every answer and pays for it."""

import random
from collections.abc import Sequence
from typing import Protocol

from ppg_fast.dialogues.dialogue import Dialogue, Message


class Environment(Protocol):
    """One dialogue at a time. A turn is one answer of the assistant; ``step`` settles it."""

    def reset(self, seed: int) -> list[Message]:
        """Start the dialogue that ``seed`` names and return its opening: system message and first user message.

        The same seed gives the same partner: the rollouts of one group share it, so a baseline over the group is fair.
        """
        ...

    def step(self, assistant_text: str) -> tuple[Message | None, float, bool]:
        """Take the answer; return (the partner's reply or None when done, the turn's finite reward, whether the
        dialogue is over)."""
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


class LoggedDialogue:
    """A logged dialogue as an Environment: the partner says what it said then, whatever it is told, and pays nothing.

    It shows how a policy talks in the places of the log. It cannot score: a logged partner does not hear the new
    answers. ``seed`` picks the dialogue; system and user messages before the first answer are the opening, at most
    ``max_turns`` follow.
    """

    def __init__(self, dialogues: Sequence[Dialogue], max_turns: int = 3) -> None:
        if not dialogues:
            raise ValueError("LoggedDialogue needs at least one dialogue, got none")
        self.dialogues, self.max_turns = dialogues, max_turns

    def reset(self, seed: int) -> list[Message]:
        """The messages before the first answer."""
        messages = self.dialogues[seed % len(self.dialogues)].messages
        first = next((i for i, m in enumerate(messages) if m.role == "assistant"), len(messages))
        self._replies = [m for m in messages[first:] if m.role != "assistant"]
        self._turn = 0
        return list(messages[:first])

    def step(self, assistant_text: str) -> tuple[Message | None, float, bool]:
        """The partner's next line of the log, reward 0."""
        del assistant_text
        done = self._turn >= min(len(self._replies), self.max_turns - 1)
        reply = None if done else self._replies[self._turn]
        self._turn += 1
        return reply, 0.0, done

"""One interface for every kind of reward: dialogues in, one number per assistant turn out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ppg_fast.dialogues.message import Message
from ppg_fast.rewards.values import RULE, number_of, numbers_of
from ppg_fast.rules import FLOAT32_MAX
from ppg_fast.spec import require_number, require_one_of

SCOPES = ("turn", "dialogue")
Value = float | None | Sequence[float | None]


@dataclass(frozen=True)
class Transcript:
    """A dialogue as rewards see it. ``info``: what else its prompt or its line of data says of it."""

    id: str
    messages: tuple[Message, ...]
    info: Mapping[str, Any] = field(default_factory=dict)

    @property
    def turns(self) -> int:
        """Number of assistant messages."""
        return sum(message.role == "assistant" for message in self.messages)

    @property
    def calls(self) -> bool:
        """Whether the last message calls tools."""
        return bool(self.messages) and bool(self.messages[-1].tool_calls)

    def prefixes(self) -> list["Transcript"]:
        """The dialogue so far, once for each answer: up to the answer and with it."""
        ends = [n + 1 for n, message in enumerate(self.messages) if message.role == "assistant"]
        return [replace(self, messages=self.messages[:end]) for end in ends]


class Scorer(Protocol):
    """Values of some dialogues at once, in their order. None: not scored.

    One whose ``scores_calls`` is False is not asked about an answer that calls tools, as a turn.
    """

    def __call__(self, transcripts: Sequence[Transcript], /) -> Sequence[Value]: ...


@dataclass(frozen=True)
class Reward:
    """A scorer, what it is asked about, and its weight in the sum.

    ``scope`` turn: it sees the dialogue up to each answer and says one number for that answer. dialogue: it sees the
    whole and says either one number, which the last turn gets (the others get 0), or one a turn.
    """

    name: str
    scorer: Scorer
    scope: str = "turn"
    weight: float = 1.0

    def __post_init__(self) -> None:
        require_one_of("scope of a reward", self.scope, SCOPES)
        require_number(f"the weight of reward {self.name}", self.weight, -math.inf)

    def turns(self, transcripts: Sequence[Transcript]) -> list[list[float | None]]:
        """One value per assistant turn of each dialogue. ValueError names reward, dialogue and turn of a value that is
        none."""
        prefixes = [p for t in transcripts for p in t.prefixes()] if self.scope == "turn" else list(transcripts)
        asked = [p for p in prefixes if self._asks(p)]
        values = list(self.scorer(asked)) if asked else []
        if len(values) != len(asked):
            raise ValueError(
                f"reward {self.name} must give one value for each of {len(asked)} dialogues, got {len(values)}"
            )
        if self.scope == "dialogue":
            return [self._by_turn(value, t) for value, t in zip(values, asked, strict=True)]
        given = iter(values)
        checked = iter([self._number(next(given), p) if self._asks(p) else None for p in prefixes])
        return [[next(checked) for _ in range(t.turns)] for t in transcripts]

    def _asks(self, prefix: Transcript) -> bool:
        """Whether the scorer is asked about it: some are not about a turn that only calls tools."""
        return self.scope == "dialogue" or not prefix.calls or getattr(self.scorer, "scores_calls", True)

    def _by_turn(self, value: Value, transcript: Transcript) -> list[float | None]:
        """A dialogue's value over its turns."""
        try:
            row = numbers_of(value, transcript.turns)
        except Exception as error:  # a generator of the user's may raise anything
            why = str(error) if isinstance(error, ValueError) else f"failed: {type(error).__name__}: {error}"
            raise ValueError(f"reward {self.name} at dialogue {transcript.id!r} {why}") from error
        if row is not None:
            return row
        number = self._number(value, transcript)
        return [None if number is None else 0.0] * (transcript.turns - 1) + [number]

    def _number(self, value: Any, transcript: Transcript) -> float | None:
        try:
            return number_of(value)
        except ValueError as error:
            where = f"reward {self.name} at dialogue {transcript.id!r}, turn {transcript.turns - 1},"
            raise ValueError(f"{where} {error}") from error


@dataclass(frozen=True)
class Scores:
    """``totals``: the weighted sum per dialogue and turn, None where no part scored it. ``parts``: each reward's own
    values by name."""

    totals: list[list[float | None]]
    parts: dict[str, list[list[float | None]]]

    @classmethod
    def together(cls, parts: Sequence["Scores"]) -> "Scores":
        """Those of several sets of dialogues, one after the other."""
        names = dict.fromkeys(name for part in parts for name in part.parts)
        totals = [row for part in parts for row in part.totals]
        return cls(totals, {name: [row for part in parts for row in part.parts[name]] for name in names})

    def without_calls(self, transcripts: Sequence[Transcript]) -> "Scores":
        """The same, with 0 for a turn that only calls tools and that nobody scored: nothing is missing there."""
        totals = []
        for row, transcript in zip(self.totals, transcripts, strict=True):
            turns = zip(row, transcript.prefixes(), strict=True)
            totals.append([0.0 if value is None and prefix.calls else value for value, prefix in turns])
        return replace(self, totals=totals)

    @property
    def unscored(self) -> int:
        """Turns without a total."""
        return sum(row.count(None) for row in self.totals)

    def describe(self) -> dict[str, float]:
        """Mean and standard deviation of each part over its scored turns, as rewards/<name>/mean|std, and what was not
        scored."""
        metrics: dict[str, float] = {}
        for name, rows in self.parts.items():
            values = [value for row in rows for value in row if value is not None]
            mean = sum(values) / max(1, len(values))
            metrics[f"rewards/{name}/mean"] = mean
            metrics[f"rewards/{name}/std"] = math.hypot(*(v - mean for v in values)) / math.sqrt(max(1, len(values)))
        return {**metrics, "rewards/unscored": self.unscored}


def score(rewards: Sequence[Reward], transcripts: Sequence[Transcript]) -> Scores:
    """All rewards of all dialogues. A turn that one part leaves unscored keeps the sum of the others."""
    parts = {reward.name: reward.turns(transcripts) for reward in rewards}
    totals: list[list[float | None]] = []
    for number, transcript in enumerate(transcripts):
        rows = [parts[reward.name][number] for reward in rewards]
        totals.append([_sum(rewards, [row[turn] for row in rows]) for turn in range(transcript.turns)])
        for turn, total in enumerate(totals[-1]):
            if total is not None and not abs(total) <= FLOAT32_MAX:
                where = f"dialogue {transcript.id!r}, turn {turn}"
                raise ValueError(f"the weighted sum of rewards at {where} {RULE}, got {total}")
    return Scores(totals, parts)


def _sum(rewards: Sequence[Reward], values: Sequence[float | None]) -> float | None:
    scored = [reward.weight * value for reward, value in zip(rewards, values, strict=True) if value is not None]
    return sum(scored) if scored else None

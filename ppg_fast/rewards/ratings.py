"""Human ratings of logged answers, from a JSONL."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from ppg_fast.rewards.scoring import Transcript


class Ratings:
    """Lines ``{"id": dialogue, "turn": 0, "rating": 4, "rater": "a"}``: the mean over the raters of each turn, None
    where nobody rated.

    ``turn`` counts the assistant's messages from 0; left out, the rating is that of the last turn. ``rater`` may be
    left out where a turn has one rating only. ValueError names file and line: malformed, a rating that is not finite, a
    rater twice at one turn; and a rating of a turn that its dialogue has not.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.ratings: dict[str, dict[int | None, dict[str | None, float]]] = {}
        self.used: set[str] = set()
        for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), 1):
            if line.strip():
                self._add(line, f"{path}, line {number}")
        if not self.ratings:
            raise ValueError(f"{path} holds no rating")

    def __call__(self, transcripts: Sequence[Transcript], /) -> list[list[float | None]]:
        """One mean rating per turn of each dialogue."""
        return [self._values(transcript) for transcript in transcripts]

    @property
    def unused(self) -> list[str]:
        """Dialogues with ratings that were not asked for."""
        return sorted(self.ratings.keys() - self.used)

    def _add(self, line: str, where: str) -> None:
        try:
            record = json.loads(line)
            dialogue, turn, rating, rater = record["id"], record.get("turn"), record["rating"], record.get("rater")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{where} must be a JSON object with id and rating: {type(error).__name__}: {error}"
            ) from error
        if not isinstance(dialogue, str) or not (turn is None or (type(turn) is int and turn >= 0)):
            raise ValueError(f"{where}: id must be a string and turn an integer >= 0, got {dialogue!r} and {turn!r}")
        if isinstance(rating, bool) or not isinstance(rating, (int, float)) or not math.isfinite(rating):
            raise ValueError(f"{where}: a rating must be a finite number, got {rating!r}")
        raters = self.ratings.setdefault(dialogue, {}).setdefault(turn, {})
        if rater in raters:
            raise ValueError(f"{where}: rater {rater!r} rates dialogue {dialogue!r}, turn {turn}, a second time")
        raters[rater] = float(rating)

    def _values(self, transcript: Transcript) -> list[float | None]:
        values: list[float | None] = [None] * transcript.turns
        for turn, raters in self.ratings.get(transcript.id, {}).items():
            at = transcript.turns - 1 if turn is None else turn
            if at >= len(values):
                raise ValueError(
                    f"{self.path} rates turn {turn} of dialogue {transcript.id!r}, which has {len(values)}"
                )
            if values[at] is not None:
                raise ValueError(
                    f"{self.path} rates the last turn of dialogue {transcript.id!r} with and without its number"
                )
            values[at] = sum(raters.values()) / len(raters)
        self.used.add(transcript.id)
        return values

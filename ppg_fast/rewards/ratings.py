"""Human ratings of logged answers, from a JSONL."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppg_fast.rewards.scoring import Transcript
from ppg_fast.rewards.values import number_of, shown

KEYS = ("id", "turn", "rating", "rater")
ALIKE = ("id", "turn", "turns", "turnid", "turnindex", "turnnumber", "rating", "ratings", "rater", "raters", "raterid")


class Ratings:
    """Lines ``{"id": dialogue, "turn": 0, "rating": 4, "rater": "a"}``: the mean over the raters of each turn, None
    where nobody rated.

    ``turn`` counts the assistant's messages from 0; left out, the rating is that of the last turn. ``rater`` may be
    left out where a turn has one rating only; further keys are ignored, but not a second spelling of these four.
    ``content``: what is read in place of the file. ValueError names file and line: malformed, a rating that is no
    finite number, a rater twice at one turn; and a rating of a turn that its dialogue has not.
    """

    def __init__(self, path: str, content: bytes | None = None) -> None:
        self.path = path
        self.ratings: dict[str, dict[int | None, dict[str | int | None, float]]] = {}
        self.used: set[str] = set()
        content = Path(path).read_bytes() if content is None else content
        # lines end at "\n" only: a name may hold what else Python takes for an end of line
        for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
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

    def _add(self, line: bytes, where: str) -> None:
        try:
            record = json.loads(line.decode("utf-8"), object_pairs_hook=_once)
        except (ValueError, RecursionError) as error:  # brackets thousands deep, an integer of thousands of digits too
            raise ValueError(f"{where} is no JSON that can be read: {error}") from error
        if not isinstance(record, dict) or not {"id", "rating"} <= record.keys():
            raise ValueError(f"{where} must be a JSON object with id and rating, got {shown(record)}")
        spelled = [key for key in record if key not in KEYS and key.strip().lower().replace("_", "") in ALIKE]
        if spelled:
            raise ValueError(f"{where}: the keys are {', '.join(KEYS)}, got {spelled[0]!r}")
        dialogue, turn, rater = record["id"], record.get("turn"), record.get("rater")
        if not isinstance(dialogue, str) or not (turn is None or (type(turn) is int and turn >= 0)):
            rule = f"{where}: id must be a string and turn an integer >= 0"
            raise ValueError(f"{rule}, got {shown(dialogue)} and {shown(turn)}")
        if not (rater is None or type(rater) in (str, int)):
            raise ValueError(f"{where}: a rater must be a string or an integer, got {shown(rater)}")
        try:
            rating = None if isinstance(record["rating"], bool) else number_of(record["rating"])
        except ValueError:
            rating = None
        if rating is None:
            raise ValueError(f"{where}: a rating must be a finite number, got {shown(record['rating'])}")
        raters = self.ratings.setdefault(dialogue, {}).setdefault(turn, {})
        if rater in raters:
            raise ValueError(f"{where}: rater {rater!r} rates dialogue {dialogue!r}, turn {turn}, a second time")
        raters[rater] = rating

    def _values(self, transcript: Transcript) -> list[float | None]:
        values: list[float | None] = [None] * transcript.turns
        for turn, raters in self.ratings.get(transcript.id, {}).items():
            at = transcript.turns - 1 if turn is None else turn
            if at >= len(values):
                raise ValueError(
                    f"{self.path} rates turn {shown(turn)} of dialogue {transcript.id!r}, which has {len(values)}"
                )
            if values[at] is not None:
                raise ValueError(
                    f"{self.path} rates the last turn of dialogue {transcript.id!r} with and without its number"
                )
            values[at] = sum(raters.values()) / len(raters)
        self.used.add(transcript.id)
        return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. ValueError for a key that stands twice."""
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice")
    return record

"""What people said of dialogues, as labels to train a reward model on: pairs, scores, ratings, demonstrations."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from ppg_fast.dialogues.dialogue import Dialogue, Reading, read_file
from ppg_fast.rewards.links import Target
from ppg_fast.rewards.ratings import Ratings
from ppg_fast.rules import FLOAT32_MAX
from ppg_fast.spec import require

PAIRS = "chosen and rejected"  # the format's name in `Reading.formats`


@dataclass(frozen=True)
class Label:
    """What was said of ``dialogues``, one or of a pair the chosen and the rejected; `ppg_fast.rewards.links` says what
    the target is. Labels of one prompt share ``group``."""

    dialogues: tuple[Dialogue, ...]
    target: Target
    group: str

    @property
    def where(self) -> str:
        """File and line that it was read from."""
        return self.dialogues[0].where


def read_labels(data: str, ratings: str | None, own: str | None, strict: bool) -> tuple[str, list[Label]]:
    """The kind of the labels in a file, and the labels.

    Lines of chosen and rejected are pairs (``margin`` a number, ``tie`` true). ``ratings``: ratings of its turns by
    id, as ``ratings:FILE`` reads them. ``own``: own rollouts, against which ``data`` are demonstrations. Else what the
    lines hold: one reward a dialogue is its score, turn_rewards are ratings. ValueError for a file of several kinds and
    for one without a label.
    """
    require(not (ratings and own), "ratings and own exclude each other, got both", own)
    with warnings.catch_warnings():  # that a turn without a reward counts as 0, which here it does not
        warnings.filterwarnings("ignore", message=".*(they count as 0|is that of its last turn)")
        read = read_file(data, strict, scored=not (ratings or own))
    pairs = read.formats[PAIRS]
    if own:
        theirs = [Label((d,), 1.0, d.group_id) for d in read.dialogues]
        return "demonstrations", [*theirs, *_of_own(own, strict)]
    if ratings:
        return "ratings", rated(read.dialogues, Ratings(ratings))
    mixed = f"{data} must hold labels of one kind"
    require(pairs in (0, len(read.dialogues)), f"{mixed}: pairs, or dialogues with rewards", dict(read.formats))
    if pairs:
        return "pairs", _pairs(read, data)
    whole = read.whole.total()
    require(whole in (0, len(read.dialogues)), f"{mixed}: a reward a dialogue, or turn_rewards", dict(read.whole))
    if whole:
        scores = _standard([float(d.turn_rewards[-1] or 0.0) for d in read.dialogues])
        return "scores", [Label((d,), y, d.group_id) for d, y in zip(read.dialogues, scores, strict=True)]
    values = iter(_standard([float(v) for d in read.dialogues for v in d.turn_rewards if v is not None]))
    rows = [tuple(None if v is None else next(values) for v in d.turn_rewards) for d in read.dialogues]
    found = zip(read.dialogues, rows, strict=True)
    return "ratings", _some([Label((d,), row, d.group_id) for d, row in found if any(v is not None for v in row)], data)


def _of_own(path: str, strict: bool) -> list[Label]:
    return [Label((d,), -1.0, d.group_id) for d in read_file(path, strict, scored=False).dialogues]


def _some(labels: list[Label], path: str) -> list[Label]:
    require(bool(labels), f"{path} must hold a label", "none")
    return labels


def _pairs(read: Reading, path: str) -> list[Label]:
    """Each chosen dialogue with its rejected one; a pair whose sides are alike says nothing and is left out."""
    sides = {d.id: d for d in read.dialogues}
    labels, lone, alike = [], 0, 0
    for dialogue in read.dialogues:
        name, _, side = dialogue.id.rpartition("/")
        other = sides.get(f"{name}/rejected" if side == "chosen" else f"{name}/chosen")
        lone += other is None
        if other is None or side != "chosen":
            continue
        if other.messages == dialogue.messages:
            alike += 1
            continue
        labels.append(Label((dialogue, other), _margin(dialogue), dialogue.group_id))
    for count, what in ((lone, "sides whose other side cannot be read"), (alike, "pairs whose sides are alike")):
        if count:
            warnings.warn(f"{path}: {count} {what} are left out", stacklevel=2)
    return _some(labels, path)


def _margin(dialogue: Dialogue) -> float | None:
    """By how much the chosen side is better, None where neither is. ValueError for what is no number."""
    tie, margin = dialogue.more.get("tie", False), dialogue.more.get("margin")
    where = dialogue.where or f"dialogue {dialogue.id!r}"
    require(isinstance(tie, bool), f"{where}: tie must be true or false", tie)
    right = margin is None or (isinstance(margin, (int, float)) and not isinstance(margin, bool))
    require(right and abs(margin or 0) <= FLOAT32_MAX, f"{where}: margin must be a finite number", margin)
    require(not (tie and margin), f"{where}: a tie has no margin", margin)
    return None if tie else float(margin or 0)


def rated(dialogues: Sequence[Dialogue], given: Ratings) -> list[Label]:
    """Ratings in units of each rater's own spread about the rater's own mean, then the mean over the raters; a label
    for each dialogue that has one. ValueError for none, and for the rating of a turn that its dialogue has not."""
    path = given.path
    known = {d.id: len(d.turn_rewards) for d in dialogues}
    by_rater: dict[object, list[tuple[str, int, float]]] = {}
    for name, turns in given.ratings.items():
        for turn, raters in turns.items() if name in known else ():
            at = known[name] - 1 if turn is None else turn
            require(at < known[name], f"{path} must rate turns that there are: dialogue {name!r} has {known[name]}", at)
            for rater, rating in raters.items():
                by_rater.setdefault(rater, []).append((name, at, rating))
    if unused := sorted(given.ratings.keys() - known.keys()):
        seen = f"{len(unused)} dialogues with ratings are not in the data, such as {unused[0]!r}"
        warnings.warn(f"{path}: {seen}", stacklevel=3)
    found: dict[tuple[str, int], list[float]] = {}
    for rows in by_rater.values():
        for (name, at, _), value in zip(rows, _standard([rating for *_, rating in rows]), strict=True):
            found.setdefault((name, at), []).append(value)
    labels = []
    for d in dialogues:
        values = [found.get((d.id, turn)) for turn in range(known[d.id])]
        if any(values):
            labels.append(Label((d,), tuple(sum(v) / len(v) if v else None for v in values), d.group_id))
    return _some(labels, path)


def _standard(values: Sequence[float]) -> list[float]:
    """In standard deviations about the mean; all 0 where they are alike."""
    mean = sum(values) / max(1, len(values))
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values)))
    return [(v - mean) / spread if spread else 0.0 for v in values]

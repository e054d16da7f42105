"""What there is to rate and what comes next: the turns of each dialogue, or two dialogues of one opening."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ppg_fast.dialogues.dialogue import Dialogue, read_file
from ppg_fast.rating.answers import Answers, Place
from ppg_fast.rewards.scoring import Transcript
from ppg_fast.spec import require

RATINGS = (1, 2, 3, 4, 5)
PREFERENCES = (1, 0.5, 0)  # the first of a pair is better, neither is, the second is
Rewards = Callable[[Sequence[Transcript]], list[list[float | None]]]
ROLLOUTS = "rollouts/step-*.jsonl"  # of a run, by --keep-rollouts


class Tasks:
    """The dialogues of a file, or of the rollouts that a run keeps: new ones are found while it trains, and come first.

    ``pairs``: two dialogues of one opening are compared, each dialogue in one pair at most. ``rewards``: of each turn
    of some dialogues, by a reward model; what it is least sure of then comes first, `unsure`. Nothing here is written
    but by ``answers``. ValueError for a source without a dialogue, or without a pair.
    """

    def __init__(self, source: Path, answers: Answers, pairs: bool = False, rewards: Rewards | None = None) -> None:
        self.source, self.answers, self.pairs, self.rewards = source, answers, pairs, rewards
        self.returns: dict[str, list[float]] = {}  # of each dialogue, by the reward model
        self.skipped: set[Place] = set()
        self.dialogues: dict[str, Dialogue] = {}
        self.compared: dict[str, tuple[str, str]] = {}  # by the id of the first
        self.files: set[Path] = set()
        self.look()
        wanted = (
            "two dialogues of one opening (--pairs)" if pairs else "a dialogue (a run keeps them by --keep-rollouts)"
        )
        require(bool(self.compared if pairs else self.dialogues), f"{source} must hold {wanted}", "none")

    def look(self) -> None:
        """Read the files that are new."""
        found = sorted(self.source.glob(ROLLOUTS), reverse=True) if self.source.is_dir() else [self.source]
        new: dict[str, Dialogue] = {}
        for path in (path for path in found if path not in self.files):
            new |= {dialogue.id: dialogue for dialogue in read_file(path, scored=False).dialogues}
            self.files.add(path)
        if new:
            self.dialogues = new | self.dialogues
            if self.pairs:
                self.compared = _pairs(new) | self.compared
            if self.rewards:
                of_turns = self.rewards([Transcript(d.id, d.messages, _tools(d)) for d in new.values()])
                said = ([value for value in row if value is not None] for row in of_turns)  # calls of tools have none
                self.returns |= dict(zip(new, said, strict=True))

    def places(self) -> Iterator[Place]:
        """What there is to answer: the newest first, or what the reward model is least sure of."""
        names = list(self.compared if self.pairs else self.dialogues)
        names = sorted(names, key=self.unsure()) if self.rewards else names
        if self.pairs:
            yield from ((first, None) for first in names)
        else:
            for name in names:
                yield from ((name, turn) for turn in range(len(self.dialogues[name].turn_rewards)))

    def unsure(self) -> Callable[[str], float]:
        """How far the reward model is from not knowing: of a pair the difference of the two returns, of a dialogue that
        of its mean reward and the median of all."""
        if self.pairs:
            total = {name: sum(values) for name, values in self.returns.items()}
            return lambda first: abs(total[first] - total[self.compared[first][1]])
        mean = {name: sum(values) / max(1, len(values)) for name, values in self.returns.items()}
        middle = median(mean.values())
        return lambda name: abs(mean[name] - middle)

    def next(self) -> dict[str, Any]:
        """What to show: the first place without an answer that was not skipped, as JSON; "id" None at the end."""
        self.look()
        open_places = [place for place in self.places() if place not in self.answers.given]
        place = next((place for place in open_places if place not in self.skipped), None)
        state: dict[str, Any] = {"done": len(self.answers.given), "left": len(open_places), "pairs": self.pairs}
        state["undo"] = bool(self.answers.last)
        if place is None:
            return {**state, "id": None, "turn": None, "dialogues": []}
        shown = self.compared[place[0]] if self.pairs else (place[0],)
        return {**state, "id": place[0], "turn": place[1], "dialogues": [self._shown(name) for name in shown]}

    def _shown(self, name: str) -> list[dict[str, Any]]:
        messages, turn = [], 0
        for message in self.dialogues[name].messages:
            calls = [
                f"{call['function']['name']}({call['function'].get('arguments', '')})" for call in message.tool_calls
            ]
            said: dict[str, Any] = {"role": message.role, "text": "\n".join(filter(None, [message.content, *calls]))}
            if message.role == "assistant":
                said |= {"turn": turn, "rating": self.answers.given.get((name, turn))}
                turn += 1
            messages.append(said)
        return messages

    def rate(self, name: object, turn: object, rating: object) -> None:
        """Write one answer. ValueError for what was not asked."""
        self._require(name, turn)
        allowed = PREFERENCES if self.pairs else RATINGS
        right = isinstance(rating, (int, float)) and not isinstance(rating, bool) and rating in allowed
        require(right, f"a rating must be one of {', '.join(map(str, allowed))}", rating)
        more = {"against": self.compared[str(name)][1]} if self.pairs else {}
        self.answers.add(name, turn, rating, **more)  # type: ignore[arg-type]

    def skip(self, name: object, turn: object) -> None:
        """Show it no more, in this process."""
        self._require(name, turn)
        self.skipped.add((name, turn))  # type: ignore[arg-type]

    def undo(self) -> None:
        """Take the last answer back, and show its place again."""
        place = self.answers.undo()
        if place:
            self.skipped.discard(place)

    def _require(self, name: object, turn: object) -> None:
        if self.pairs:
            known = isinstance(name, str) and name in self.compared and turn is None
        else:
            turns = len(self.dialogues[name].turn_rewards) if isinstance(name, str) and name in self.dialogues else 0
            known = isinstance(turn, int) and not isinstance(turn, bool) and 0 <= turn < turns
        require(known, f"an answer must be about {'a pair' if self.pairs else 'a turn'} of {self.source}", [name, turn])


def _tools(dialogue: Dialogue) -> dict[str, Any]:
    return {"tools": list(dialogue.tools)} if dialogue.tools else {}


def _pairs(dialogues: dict[str, Dialogue]) -> dict[str, tuple[str, str]]:
    """Dialogues of one group two by two, by the id of the one that is shown first: a hash decides, so that place says
    nothing."""
    groups: dict[str, list[str]] = {}
    for name, dialogue in dialogues.items():
        groups.setdefault(dialogue.group_id, []).append(name)
    found = {}
    for names in groups.values():
        for one, other in zip(names[::2], names[1::2], strict=False):
            turned = hashlib.sha256(f"{one}\n{other}".encode()).digest()[0] % 2
            pair = (other, one) if turned else (one, other)
            found[pair[0]] = pair
    return found

"""`--reward human:FOLDER`: what people say of a step's dialogues in `ppg-fast rate` is the reward that it is taken
with."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ppg_fast import stopping
from ppg_fast.config import TrainConfig
from ppg_fast.dialogues.logged import Dialogue
from ppg_fast.jobs.run_folder import RunFolder
from ppg_fast.rewards.ratings import Ratings
from ppg_fast.spec import require

HUMAN = "human"
PAUSE = 0.5  # seconds between two looks


def human_of(config: TrainConfig) -> "HumanRatings | None":
    """The ratings that the config's reward is; None where it is another. ValueError where people are one reward of
    several, or would not see all dialogues of a step."""
    formula = config.reward or ""
    if f"{HUMAN}:" not in formula:
        return None
    kind, _, folder = formula.strip().partition(":")
    alone = kind == HUMAN and bool(folder) and " + " not in formula and not config.judge
    require(alone, "the ratings of people must be the whole reward: human:RUN/ratings, without a judge", formula)
    count = config.num_prompts * config.num_generations
    rule = f"keep_rollouts must be at least the {count} dialogues of a step with reward human, which rates all of them"
    require(config.keep_rollouts >= count, rule, config.keep_rollouts)
    return HumanRatings(Path(folder))


class HumanRatings:
    """Every file ``folder``/RATER.jsonl of `ppg-fast rate`; a turn's reward is the mean over the raters."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def known(self) -> dict[str, dict[int | None, float]]:
        """The mean rating of each turn by dialogue. ValueError for a file that is none, with its line."""
        given: dict[str, dict[int | None, list[float]]] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            if path.name.endswith(".pairs.jsonl") or not path.read_bytes().endswith(b"\n"):
                continue  # comparisons; a line that is being written
            for name, turns in Ratings(str(path)).ratings.items():
                for turn, raters in turns.items():
                    given.setdefault(name, {}).setdefault(turn, []).extend(raters.values())
        return {name: {t: sum(v) / len(v) for t, v in turns.items()} for name, turns in given.items()}

    def rewarded(
        self, run: RunFolder, step: int, dialogues: Sequence[Dialogue], say: Callable[[str], None]
    ) -> list[Dialogue]:
        """The dialogues of ``step`` with the rewards that people gave, once every turn has one.

        They stand in the run's rollouts, unrated while people rate them and with their rewards afterwards: a step that
        a resumed run takes again finds the same rewards there, whatever was rated since.
        """
        before = run.kept_rollouts(step)
        whole = all(value is not None for d in before for value in d.turn_rewards)
        if whole and [d.id for d in before] == [d.id for d in dialogues]:
            return before
        unrated = [replace(d, turn_rewards=(None,) * len(d.turn_rewards)) for d in dialogues]
        run.keep_rollouts(step, unrated)
        rated = self._wait(unrated, say)
        run.keep_rollouts(step, rated)
        return rated

    def _wait(self, dialogues: Sequence[Dialogue], say: Callable[[str], None]) -> list[Dialogue]:
        said = False
        with stopping.interruptible():
            while True:
                known = self.known()
                rows = [[known.get(d.id, {}).get(t) for t in range(len(d.turn_rewards))] for d in dialogues]
                missing = sum(row.count(None) for row in rows)
                if not missing:
                    return [replace(d, turn_rewards=tuple(row)) for d, row in zip(dialogues, rows, strict=True)]
                if not said:
                    say(f"waits for ratings of {missing} turns in {self.folder}: ppg-fast rate {self.folder.parent}")
                    said = True
                time.sleep(PAUSE)

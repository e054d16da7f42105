"""`--reward human:FOLDER`: what people say in `ppg-fast rate` of the dialogues of a run that is under way."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ppg_fast import stopping
from ppg_fast.config import OF_HUMAN, TrainConfig
from ppg_fast.dialogues.logged import Dialogue
from ppg_fast.jobs.run_folder import RunFolder
from ppg_fast.rewards.formula import TERM, split_terms
from ppg_fast.rewards.ratings import Ratings
from ppg_fast.spec import require

HUMAN = "human"
PAUSE = 0.5  # seconds between two looks


def human_of(config: TrainConfig) -> "HumanRatings | None":
    """The ratings that every step waits for, which are its reward: those of ``human:FOLDER`` without a reward_model.
    None where the reward is another, or a model that learns from them.

    ValueError for settings of people where nobody is asked; and where people are one reward of several without a
    model, or would not see the dialogues that they are to rate.
    """
    formula = (config.reward or "").strip()
    folders = [folder for kind, folder, _ in terms_of(formula) if kind == HUMAN]
    of = "a reward_model" if folders else "reward human:RUN/ratings"
    for name in () if folders and config.reward_model else OF_HUMAN:
        value = getattr(config, name)
        require(value == getattr(TrainConfig, name), f"{name} must be left out without {of}", value)
    if not folders:
        return None
    rule = "reward must name the ratings of people once: human:RUN/ratings"
    require(len(folders) == 1 and bool(folders[0]), rule, formula)
    if config.reward_model:
        rule = "keep_rollouts must be at least 1 with reward human: it is these dialogues that people rate"
        require(config.keep_rollouts >= 1, rule, config.keep_rollouts)
        return None
    rule = "people without a reward_model must be the whole reward: human:RUN/ratings, without a judge"
    require(formula == f"{HUMAN}:{folders[0]}" and not config.judge, rule, formula)
    count = config.num_prompts * config.num_generations
    rule = f"keep_rollouts must be at least the {count} dialogues of a step, all of which people rate"
    require(config.keep_rollouts >= count, f"{rule} without a reward_model", config.keep_rollouts)
    return HumanRatings(Path(folders[0]))


def terms_of(formula: str | None) -> list[tuple[str, str, float]]:
    """What stands before the colon of each term of a reward, what behind it, and its weight."""
    read = [found for term in split_terms(formula or "") if (found := TERM.fullmatch(term))]
    parts = [(found["what"].partition(":"), float(found["weight"] or 1.0)) for found in read]
    return [(kind, rest, weight) for (kind, _, rest), weight in parts]


class HumanRatings:
    """Every file ``folder``/RATER.jsonl of `ppg-fast rate`, as far as its lines are whole; comparisons are not read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def read(self) -> list[Ratings]:
        """The files that hold a rating. ValueError for one that is none, with its line."""
        whole = {path: path.read_bytes() for path in sorted(self.folder.glob("*.jsonl"))}
        ended = {path: text[: text.rfind(b"\n") + 1] for path, text in whole.items()}  # the rest is being written
        rated = {path: text for path, text in ended.items() if text.strip() and not path.name.endswith(".pairs.jsonl")}
        return [Ratings(str(path), text) for path, text in rated.items()]

    def lines(self) -> list[str]:
        """One line a rating, in the format of `Ratings`; who gave no name has that of the file."""
        return [
            json.dumps(
                {"id": name, **({} if turn is None else {"turn": turn}), "rating": rating}
                | {"rater": Path(given.path).stem if rater is None else rater}
            )
            for given in self.read()
            for name, turns in given.ratings.items()
            for turn, raters in turns.items()
            for rater, rating in raters.items()
        ]

    def known(self) -> dict[str, dict[int | None, float]]:
        """The mean rating of each turn by dialogue."""
        every: dict[str, dict[int | None, list[float]]] = {}
        for given in self.read():
            for name, turns in given.ratings.items():
                for turn, raters in turns.items():
                    every.setdefault(name, {}).setdefault(turn, []).extend(raters.values())
        return {name: {t: sum(v) / len(v) for t, v in turns.items()} for name, turns in every.items()}

    def rewarded(
        self, run: RunFolder, step: int, dialogues: Sequence[Dialogue], say: Callable[[str], None]
    ) -> list[Dialogue]:
        """The dialogues of ``step`` with the mean ratings of their turns as rewards, once every turn has one.

        They stand in the run's rollouts, unrated while people rate them and with their rewards afterwards: a step that
        a resumed run takes again finds the same rewards there, whatever was rated since.
        """
        before = run.kept_rollouts(step)
        whole = all(value is not None for d in before for value in d.turn_rewards)
        if whole and [d.id for d in before] == [d.id for d in dialogues]:
            return before
        unrated = [replace(d, turn_rewards=(None,) * len(d.turn_rewards)) for d in dialogues]
        run.keep_rollouts(step, unrated)
        rated = self.wait(unrated, say)
        run.keep_rollouts(step, rated)
        return rated

    def wait(self, dialogues: Sequence[Dialogue], say: Callable[[str], None]) -> list[Dialogue]:
        """``dialogues`` with the mean ratings of their turns, once every turn has one."""
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

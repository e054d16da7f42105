"""`--reward human:RUN/ratings --reward-model FOLDER`: a reward model that learns from people while it rewards."""

import hashlib
import json
import random
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppg_fast import stopping
from ppg_fast.config import REWARD_TRAINING_DEFAULTS, SOFT_Q, TrainConfig, make_config
from ppg_fast.dialogues.logged import Dialogue
from ppg_fast.dialogues.packing import Sample
from ppg_fast.distributed import Ranks
from ppg_fast.jobs.human import HUMAN, HumanRatings, terms_of
from ppg_fast.jobs.reward_report import lines as report
from ppg_fast.jobs.reward_training import RewardTraining
from ppg_fast.jobs.run_folder import REWARD_MODEL, ROLLOUTS, RunFolder
from ppg_fast.rewards.labels import Label, rated
from ppg_fast.rewards.ratings import Ratings
from ppg_fast.rewards.reward_model import RewardModel
from ppg_fast.spec import require
from ppg_fast.writing import opened, writing

RATINGS = "ratings"
APART = 5  # one rated dialogue in so many is held out of all fits
AS_RUN = ("device", "seed", "template_date", "max_tokens", "strict")  # settings that a fit shares with the run
Fit = tuple[list[str], dict[str, Tensor] | None, dict[str, list[float]], dict[str, float]]


class RefittedModel(RewardModel):
    """The reward model of ``config.reward_model``, which every ``human_every`` steps goes on learning from all ratings
    in ``folder`` so far.

    A model whose head is zero, as that of a language model, rewards nothing: until it has learned something, each step
    waits for the ratings of the dialogues kept of the step before. What a fit reads is written beside these first, so
    that a step which is taken again is fitted to the same. ``weights``, where it has been fitted, and ``lines``, the
    ratings that it has learned from, are the state of a checkpoint; with soft Q-learning also the dialogues that were
    ``said`` and may still be rated, and those that are ``replayed`` with what people said as their rewards.
    """

    def __init__(self, folder: str, config: TrainConfig, device: torch.device | str) -> None:
        super().__init__(str(config.reward_model), device, config.max_tokens, config.template_date, begin=True)
        require(self.one_pass, "reward_model must be causal, with its logits read by a linear score", self.folder)
        self.ratings, self.config = HumanRatings(Path(folder)), config
        self.weights: dict[str, Tensor] | None = None
        self.lines: list[str] = []
        terms = terms_of(config.reward)
        self.weight = sum(weight for kind, _, weight in terms if kind == HUMAN)
        beside = [weight for kind, _, weight in terms if kind != HUMAN and weight]
        self.replays = config.loss_type == SOFT_Q and not beside
        self.said: dict[str, tuple[int, dict[str, Any]]] = {}
        self.replayed: list[dict[str, Any]] = []

    @property
    def informed(self) -> bool:
        """Whether it tells answers apart at all."""
        return bool(self.model.score.weight.any())

    def refit(self, run: RunFolder, step: int, ranks: Ranks, say: Callable[[str], None]) -> dict[str, float]:
        """Before ``step``: learn from the ratings so far, where that is due; what is logged of it. All ranks call
        it."""
        if step == 1 or (self.informed and (step - 1) % self.config.human_every):
            return {}
        start = time.perf_counter()
        self.lines, weights, targets, found = ranks.run_on_main(lambda: self._fit(run, step, say))
        if weights is not None:
            self.weights = weights
            self.model.load_state_dict(weights)
        said, fresh = self.said, step - self.config.human_every  # what nobody has rated by the second fit is let go
        self.said = {name: one for name, one in said.items() if name in targets or one[0] >= fresh}
        self.replayed = [{**one, "rewards": targets[name]} for name, (_, one) in said.items() if name in targets]
        return {"human_time": time.perf_counter() - start, **found}

    def remember(self, step: int, dialogues: Sequence[Dialogue], samples: Sequence[Sample]) -> None:
        """Keep dialogues that people may rate, as they were sampled, where they would come again."""
        if self.replays:
            pairs = zip(dialogues, samples, strict=False)
            self.said |= {dialogue.id: (step, asdict(sample)) for dialogue, sample in pairs}

    def again(self, step: int, count: int) -> list[Sample]:
        """Up to ``count`` dialogues that people have rated, for ``step``."""
        some = random.Random(f"rated {step}").sample(self.replayed, min(count, len(self.replayed)))
        return [Sample(**one) for one in some]

    def state_dict(self) -> dict[str, Any]:
        """All that fits change. None of it is changed in place: it is what a checkpoint of now holds, whenever that is
        written."""
        return {name: getattr(self, name) for name in ("weights", "lines", "replayed")} | {"said": dict(self.said)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.weights, self.lines = saved["weights"], saved["lines"]
        self.replayed, self.said = saved["replayed"], saved["said"]
        if self.weights is not None:
            self.model.load_state_dict(self.weights)

    def _fit(self, run: RunFolder, step: int, say: Callable[[str], None]) -> Fit:
        """What `refit` does on one rank: the ratings, the weights where they are new, the rewards of dialogues that are
        rated throughout, metrics."""
        path = run.path / ROLLOUTS / f"{RATINGS}-{step:06d}.jsonl"
        if not path.is_file():
            if not self.informed:
                self.ratings.wait(run.kept_rollouts(step - 1), say)
            self._write(run, path, step, say)
        lines, dialogues = _held(run, path.read_text(encoding="utf-8").splitlines(), step)
        given, before = "".join(f"{line}\n" for line in lines), set(self.lines)
        labels = _of_answers(rated(dialogues, Ratings(str(path), given.encode()))) if lines else []
        targets = {label.dialogues[0].id: rewards for label in labels if (rewards := self._rewards(label))}
        found = {"human/ratings": float(len(lines))}
        new = [float(json.loads(line)["rating"]) for line in lines if line not in before]
        found |= {"human/rating": sum(new) / len(new)} if new else {}
        if set(lines) == before:
            say(f"step {step}: no new ratings in {self.ratings.folder} (ppg-fast rate {self.ratings.folder.parent})")
            return lines, None, targets, found
        if all(map(self._apart, labels)):
            say(f"step {step}: all of {len(labels)} rated dialogues are held out: nothing to learn from yet")
            return lines, None, targets, found
        training = RewardTraining("ratings", labels, self, self._settings(), str(path), apart=self._apart)
        held_out = self._train(training)
        self._save(run)
        at, text = training.best["step"], report("ratings", held_out)[0]
        say(f"step {step}: {len(lines)} ratings of {len(labels)} dialogues, fitted in {at} steps; {text}")
        found |= {"human/held_out": float(len(training.held_out)), "human/fit_steps": float(at)}
        found |= {f"human/{name}": held_out[name] for name in ("correlation", "length_correlation") if held_out}
        return lines, training.best["weights"], targets, found

    def _train(self, training: RewardTraining) -> dict[str, Any]:
        """Fit, to the best weights; what held-out ratings say of them."""
        with stopping.interruptible():  # the state is that of before until it is done
            if self.informed and training.held_out:
                training.observe(training.evaluate())  # a fit that makes it worse is none
            for _ in training.evaluations():
                pass
            held_out = training.keep_best()
        self.model.zero_grad(set_to_none=True)
        return held_out

    def _settings(self) -> TrainConfig:
        """Those of a fit: `ppg-fast reward`'s, as far as the run does not say."""
        settings = {name: getattr(self.config, name) for name in AS_RUN}
        steps, rate = self.config.human_steps, self.config.human_learning_rate
        settings |= {"max_steps": steps, "learning_rate": rate, "eval_every": max(1, steps // 10)}
        return make_config(REWARD_TRAINING_DEFAULTS, settings)

    def _apart(self, label: Label) -> bool:
        """Whether a rated dialogue is held out: of all fits, whatever is rated later."""
        name = f"{self.config.seed} {label.dialogues[0].id}"
        return hashlib.sha256(name.encode()).digest()[0] % APART == 0

    def _rewards(self, label: Label) -> list[float]:
        """What people said of the turns, in the model's units; nothing where an answer is not rated."""
        target, answers = label.target, _answers(label)
        assert isinstance(target, Sequence)
        if any(value is None and answer for value, answer in zip(target, answers, strict=True)):
            return []
        return [self.weight * (value or 0.0) for value in target]

    def _write(self, run: RunFolder, path: Path, step: int, say: Callable[[str], None]) -> None:
        """What the fit before ``step`` is to read, whole at once."""
        every = self.ratings.lines()
        lines, _ = _held(run, every, step)
        if others := len(every) - len(lines):
            say(f"{others} ratings in {self.ratings.folder} are of dialogues that this run does not hold: not read")
        with writing(run.path), opened(path) as file:
            file.write("".join(line + "\n" for line in lines))

    def _save(self, run: RunFolder) -> None:
        """The model as a folder of the run, file by file: what else lies there stays."""
        folder, new = run.path / REWARD_MODEL, run.path / REWARD_MODEL / ".new"
        with writing(run.path):
            self.model.save_pretrained(new)
            self.tokenizer.save_pretrained(new)
            for file in new.iterdir():
                file.replace(folder / file.name)
            shutil.rmtree(new)


def _held(run: RunFolder, lines: Sequence[str], step: int) -> tuple[list[str], list[Dialogue]]:
    """Those of ``lines`` that are about dialogues kept of the steps before ``step``, and the dialogues of these
    steps."""
    names = [json.loads(line)["id"] for line in lines]
    steps = {int(found[1]) for name in names if (found := re.match(r"step-(\d{6,})/", name))}
    dialogues = [dialogue for before in sorted(steps) if before < step for dialogue in run.kept_rollouts(before)]
    known = {dialogue.id for dialogue in dialogues}
    return [line for line, name in zip(lines, names, strict=True) if name in known], dialogues


def _answers(label: Label) -> list[bool]:
    """Of each turn whether it answers: one that calls tools has no reward of a model."""
    messages = label.dialogues[0].messages
    return [not message.tool_calls for message in messages if message.role == "assistant"]


def _of_answers(labels: Sequence[Label]) -> list[Label]:
    """Those that hold the rating of an answer."""
    pairs = [(label, zip(label.target, _answers(label), strict=True)) for label in labels]  # type: ignore[arg-type]
    return [label for label, turns in pairs if any(value is not None and answer for value, answer in turns)]

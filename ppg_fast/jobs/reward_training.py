"""`ppg-fast reward`: labels of dialogues in, a reward model that `--reward model:FOLDER` reads out."""

import hashlib
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppg_fast.config import REWARD_TRAINING, TrainConfig
from ppg_fast.dialogues.dialogue import as_json
from ppg_fast.jobs.inputs import content_digest
from ppg_fast.jobs.job import keep_readable
from ppg_fast.jobs.policy import device_of
from ppg_fast.jobs.reward_report import Judged, lines, measure
from ppg_fast.rewards.labels import Label, read_labels
from ppg_fast.rewards.links import link_loss
from ppg_fast.rewards.reward_model import RewardModel
from ppg_fast.rewards.scoring import Transcript
from ppg_fast.rewards.turn_logits import Row, batches, logits_of
from ppg_fast.spec import require, require_number
from ppg_fast.training import checkpoint
from ppg_fast.training.objective import Schedule
from ppg_fast.training.optimisers import load_optimizer_state, make_optimizer, set_learning_rate

CHECKPOINTS, REPORT = "checkpoints", "reward.json"
HOW_FAR = ("device", "max_tokens", "strict")  # settings of no consequence for what is learned


@dataclass(frozen=True)
class Sources:
    """Where labels and the first weights are, and what else decides the training.

    ``center``: weight of the squared rewards, which an offset shared by all dialogues is free to grow by otherwise.
    ``patience``: evaluations without a lower held-out loss after which it ends.
    """

    data: str
    model: str
    output: Path
    ratings: str | None = None
    own: str | None = None
    center: float = 0.01
    patience: int = 3


class RewardTraining:
    """Labels of one ``kind`` (`links.KINDS`), the model that learns from them, and the step that it is at.

    ``source``: where the labels are from, in errors; ``center`` and ``patience`` as in `Sources`. ``apart``: whether a
    label is held out; None: at most a fifth and ``eval_dialogues`` are, drawn at random, all of a prompt together.
    ValueError for labels that cannot be read, and for a model that looks ahead.
    """

    def __init__(
        self,
        kind: str,
        labels: Sequence[Label],
        reader: RewardModel,
        config: TrainConfig,
        source: str,
        center: float = Sources.center,
        patience: int = Sources.patience,
        apart: Callable[[Label], bool] | None = None,
    ) -> None:
        self.kind, self.reader, self.config, self.center, self.patience = kind, reader, config, center, patience
        require(reader.one_pass, "model must be causal, with its logits read by a linear score", reader.folder)
        self.model, self.pad = reader.model, reader.pad
        _, read = keep_readable(labels, self._read, config.strict, source, "labels")
        self.labels, self.rows = [label for label, _ in read], [rows for _, rows in read]
        self.held_out, self.seen = self._split(apart)
        self.schedule = Schedule(**{f.name: getattr(config, f.name) for f in fields(Schedule)})
        self.optimizer = make_optimizer(
            self.model, config.optim, arguments=config.optim_args,
            betas=(config.adam_beta1, config.adam_beta2), weight_decay=config.weight_decay,
        )  # fmt: skip
        self.step, self.since = 0, 0
        self.best: dict[str, Any] = {"loss": math.inf, "step": 0, "weights": None}

    @classmethod
    def of(cls, sources: Sources, config: TrainConfig) -> "RewardTraining":
        """That of `ppg-fast reward`. ValueError for bad input, before anything is written."""
        require_number("center", sources.center, 0.0)
        require(sources.patience >= 1, "patience must be an integer >= 1", sources.patience)
        kind, labels = read_labels(sources.data, sources.ratings, sources.own, config.strict)
        device = device_of(config.device)
        reader = RewardModel(sources.model, device, config.max_tokens, config.template_date, begin=True)
        return cls(kind, labels, reader, config, sources.data, sources.center, sources.patience)

    def _read(self, label: Label) -> tuple[Label, list[list[Row]]]:
        """A label and the rows of its dialogues, without turns that only call tools: they are not scored either."""
        every: list[list[Row]] = []
        for dialogue in label.dialogues:
            tools = {"tools": list(dialogue.tools)} if dialogue.tools else {}
            prefixes = Transcript(dialogue.id, dialogue.messages, tools).prefixes()
            said = [not prefix.calls for prefix in prefixes]
            every.append(self.reader.rows([prefix for prefix in prefixes if not prefix.calls]))
            require(any(said), f"dialogue {dialogue.id!r} must have an answer that is no call of tools", "calls only")
            if isinstance(label.target, tuple):
                target = tuple(value for value, kept in zip(label.target, said, strict=True) if kept)
                rated = any(value is not None for value in target)
                require(rated, f"dialogue {dialogue.id!r} must have a rating of such an answer", "none")
                label = replace(label, target=target)
        return label, every

    def _split(self, apart: Callable[[Label], bool] | None) -> tuple[list[int], list[int]]:
        """Labels held out, and the others."""
        if apart:
            chosen = [apart(label) for label in self.labels]
            return [i for i, held in enumerate(chosen) if held], [i for i, held in enumerate(chosen) if not held]
        groups: dict[str, list[int]] = {}
        for i, label in enumerate(self.labels):
            groups.setdefault(label.group, []).append(i)
        names = list(groups)
        random.Random(self.config.seed).shuffle(names)
        most, held = min(self.config.eval_dialogues, len(self.labels) // 5), set[int]()
        for name in names:
            if len(held) + len(groups[name]) <= most:
                held.update(groups[name])
        return sorted(held), [i for i in range(len(self.labels)) if i not in held]

    def chosen(self, step: int) -> list[int]:
        """The labels of ``step`` (from 1): each once an epoch, in an order of its own."""
        count, n = min(self.config.num_prompts, len(self.seen)), len(self.seen)
        places = [divmod(place, n) for place in range((step - 1) * count, step * count)]
        orders = {e: random.Random(f"{self.config.seed} {e}").sample(range(n), n) for e, _ in places}
        return [self.seen[orders[epoch][place]] for epoch, place in places]

    def judge(self, part: Sequence[int]) -> list[Judged]:
        """What the model says of some labels, in one pass; differentiable."""
        rows = [row for i in part for of_dialogue in self.rows[i] for row in of_dialogue]
        logits = iter(logits_of(self.model, rows, self.pad).unbind())
        judged = []
        for i in part:
            rewards: list[Tensor] = []
            for of_dialogue in self.rows[i]:
                found = {number: next(logits) for row in of_dialogue for number, _ in row.answers}
                rewards.append(torch.stack([found[turn] for turn in sorted(found)]))
            tokens = tuple(max(len(row.tokens) for row in of_dialogue) for of_dialogue in self.rows[i])
            judged.append(Judged(self.labels[i], tuple(rewards), tokens))
        return judged

    def parts(self, labels: Sequence[int]) -> Iterator[list[int]]:
        """Labels whose rows go through the model together, under ``max_tokens`` padded tokens."""
        joined = [Row([0] * max(len(r.tokens) for d in self.rows[i] for r in d), []) for i in labels]
        width = [sum(len(d) for d in self.rows[i]) for i in labels]
        budget = self.config.max_tokens // max(width)
        at = 0
        for part in batches(joined, max(1, budget), self.pad):
            yield list(labels[at : at + len(part)])
            at += len(part)

    def train_step(self) -> float:
        """One step; its loss. FloatingPointError where that or its gradient is not finite."""
        self.step += 1
        labels, total = self.chosen(self.step), 0.0
        set_learning_rate(self.optimizer, self.schedule.learning_rate_at(self.step))
        self.optimizer.zero_grad(set_to_none=True)
        for part in self.parts(labels):
            losses = [link_loss(self.kind, j.rewards, j.label.target, self.center) for j in self.judge(part)]
            loss = torch.stack(losses).sum() / len(labels)
            loss.backward()
            total += float(loss.detach())
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm))
        if not (math.isfinite(norm) and math.isfinite(total)):
            raise FloatingPointError(f"loss and gradient must be finite, got {total} and {norm} at step {self.step}")
        self.optimizer.step()
        return total

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """`measure` of the labels held out; of all where none are."""
        labels = self.held_out or self.seen
        return measure(self.kind, [j for part in self.parts(labels) for j in self.judge(part)], self.center)

    def observe(self, found: dict[str, Any]) -> bool:
        """Take in an evaluation; whether it is the best so far."""
        better = found["loss"] < self.best["loss"]
        self.since = 0 if better else self.since + 1
        if better:
            weights = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
            self.best = {"loss": found["loss"], "step": self.step, "weights": weights}
        return better

    @property
    def over(self) -> bool:
        """Whether all steps are taken, or held-out labels say that more make it worse."""
        return self.step >= self.config.max_steps or (bool(self.held_out) and self.since >= self.patience)

    def evaluations(self) -> Iterator[tuple[float, dict[str, Any], bool]]:
        """Train until it is `over`. After each evaluation: the loss of the last step, what was found, whether it is the
        best so far."""
        while not self.over:
            loss = self.train_step()
            if self.step % self.config.eval_every == 0 or self.step == self.config.max_steps:
                found = self.evaluate()
                yield loss, found, self.observe(found)

    def keep_best(self) -> dict[str, Any]:
        """Back to the best weights; what held-out labels say of them, nothing without any."""
        if self.best["weights"] is not None:
            self.model.load_state_dict(self.best["weights"])
        return self.evaluate() if self.held_out else {}

    def state_dict(self) -> dict[str, Any]:
        """All that training changes."""
        state = {"step": self.step, "since": self.since, "best": self.best}
        return {**state, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.step, self.since, self.best = saved["step"], saved["since"], saved["best"]
        self.model.load_state_dict(saved["model"])
        load_optimizer_state(self.optimizer, saved["optimizer"])


def train_reward_model(sources: Sources, config: TrainConfig) -> dict[str, Any]:
    """Train, say how good it is, and write the folder; what `reward.json` holds.

    The same command goes on where it was stopped. ValueError where ``output`` holds anything else, before anything is
    written.
    """
    output = sources.output
    there = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    began = CHECKPOINTS in there and REPORT not in there
    fresh = not there and not output.is_file()
    require(fresh or began, "output must be a new folder, or one that this command began", str(output))
    training = RewardTraining.of(sources, config)
    digest = _digest(training, sources)
    saved = checkpoint.newest(output / CHECKPOINTS) if began else None
    if saved:
        rule = f"{output} must be of the same labels, model and settings to go on (or choose another output)"
        require(saved.get("digest") == digest, rule, "others")
        training.load_state_dict(saved["training"])
        print(f"{output} goes on after step {training.step}")
    count = f"{len(training.seen)} {training.kind} to train on, {len(training.held_out)} held out"
    print(count if training.held_out else f"{count}: nothing tells when to stop")
    for loss, found, better in training.evaluations():
        best, told = " (best)" if better else "", found.get("accuracy", found.get("correlation"))
        print(f"step {training.step}: loss {loss:.4f}, held-out loss {found['loss']:.4f}, {told:.3f}{best}")
        state = {"digest": digest, "training": training.state_dict()}
        checkpoint.save(output / CHECKPOINTS, training.step, state, keep=1)
    return _finish(training, sources)


def _digest(training: RewardTraining, sources: Sources) -> str:
    """A checksum of all that decides what is learned."""
    settings = {name: getattr(training.config, name) for name in REWARD_TRAINING if name not in HOW_FAR}
    data = [([as_json(d) for d in label.dialogues], label.target) for label in training.labels]
    parts = settings, sources.center, sources.patience, training.kind, data, content_digest(Path(sources.model))
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _finish(training: RewardTraining, sources: Sources) -> dict[str, Any]:
    """The best weights into the folder, with the report beside them."""
    output = sources.output
    found = training.keep_best()
    training.model.save_pretrained(output)
    training.reader.tokenizer.save_pretrained(output)
    settings = {name: getattr(training.config, name) for name in REWARD_TRAINING}
    told = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(sources).items()}
    report = {"kind": training.kind, "step": training.best["step"], "held_out": found, "settings": settings, **told}
    nan = [name for name, value in found.items() if isinstance(value, float) and math.isnan(value)]
    known = {**found, **dict.fromkeys(nan)}  # NaN is no JSON
    text = json.dumps({**report, "held_out": known}, indent=1, allow_nan=False)
    (output / REPORT).write_text(text + "\n", encoding="utf-8")
    shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    for line in lines(training.kind, found):
        print(line)
    print(f"{output} holds the model of step {training.best['step']}: --reward model:{output}")
    return report

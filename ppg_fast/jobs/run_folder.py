"""The folder of a run."""

import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import wraps
from pathlib import Path
from typing import Any

from ppg_fast.config import TrainConfig, write_yaml
from ppg_fast.dialogues.chat_format import ChatFormat
from ppg_fast.dialogues.dialogue import Dialogue, read_dialogues, write_dialogues
from ppg_fast.dialogues.packing import Sample
from ppg_fast.jobs import cards, curves
from ppg_fast.jobs.inputs import input_paths, with_absolute_paths
from ppg_fast.jobs.ownership import OwnedFolder, escaped, require_folder
from ppg_fast.jobs.run_files import ENTRIES, recognise
from ppg_fast.jobs.samples import SAMPLES, answer_rows, append_rows, append_whole, keep_rows, page
from ppg_fast.jobs.trackers import Trackers
from ppg_fast.models.export import write_base
from ppg_fast.rollouts.rollout import Rollout
from ppg_fast.training.objective import Objective
from ppg_fast.writing import writing

METRICS, CONFIG, SUMMARY, CURVE, CHECKPOINT = (
    "metrics.jsonl",
    "config.yaml",
    "summary.json",
    "learning_curve.png",
    "checkpoint",
)
CHECKPOINTS, NOT_FINITE, TURNS, README = "checkpoints", "not_finite.jsonl", "turns.png", "README.md"
ROLLOUTS, REWARD_MODEL = "rollouts", "reward_model"
STEPS = ("imitation", "train")  # phases that take steps


def kept(method: Callable[..., None]) -> Callable[..., None]:
    """A method that writes: without effect on ranks that do not keep the folder; whatever fails is an OSError."""

    @wraps(method)
    def write(self: "RunFolder", *arguments: Any, **options: Any) -> None:
        if self.keeps:
            with writing(self.path):
                method(self, *arguments, **options)

    return write


class RunFolder:
    """metrics.jsonl (one line a step, written at once), config.yaml, samples, learning_curve.png, checkpoint/ and
    summary.json.

    Nothing is written before `open`. ``description``: what is trained, on what and how, in a sentence. ``keeps``:
    whether this process writes; of several ranks one does, and the others only know the metrics.
    """

    def __init__(self, config: TrainConfig, description: str = "", keeps: bool = True) -> None:
        self.config, self.description, self.keeps = config, description, keeps
        self.path, self.start, self.position = Path(config.output_dir), time.perf_counter(), 0
        self.metrics: list[dict[str, Any]] = []
        self.owned = OwnedFolder(require_folder(config.output_dir), ENTRIES, recognise, keep_last=CONFIG)

    @kept
    def open(self, resume: bool = False) -> None:
        """Begin to write: config.yaml, README.md and the trackers.

        FileExistsError if the folder already holds a run and the config's ``overwrite`` is off. With it, the files that
        the run listed as its own are moved aside until the first step of this one, and others stay. ``resume``: the
        folder holds a run, and that is the one to go on with.
        """
        if resume:
            self.owned.own(*ENTRIES)
        else:
            self.owned.begin(self.config.overwrite, input_paths(asdict(self.config)))
        try:
            self.trackers = Trackers(self.config, self.path, resume)
        except BaseException:
            self.owned.restore()
            raise
        new = self.path / f"{CONFIG}.new"
        write_yaml(new, replace(self.config, **with_absolute_paths(asdict(self.config))))
        new.replace(self.path / CONFIG)
        cards.write_readme(self.path, self.config, self.description, None)

    def log(self, phase: str, metrics: dict[str, Any]) -> None:
        """Append one line of metrics; ``phase`` is imitation, train or eval."""
        row = {"phase": phase, "seconds": round(self.seconds, 3), **metrics}
        self.metrics.append(row)
        self.position += phase in STEPS
        if phase in STEPS and self.keeps:
            self.owned.discard()
        self._write(row)

    @kept
    def close(self) -> None:
        """The trackers end the run."""
        self.trackers.finish()

    @kept
    def _write(self, row: dict[str, Any]) -> None:
        line = json.dumps({k: _number(v) if isinstance(v, float) else v for k, v in row.items()}) + "\n"
        append_whole(self.path / METRICS, line)
        under_way = row["phase"] not in (*STEPS, "eval")  # what is neither tells of the step under way
        self.trackers.log(row["phase"], row, self.position + under_way)

    def require_metrics(self, size: int) -> None:
        """ValueError where metrics.jsonl has fewer than ``size`` bytes."""
        path = self.path / METRICS
        there = path.stat().st_size if path.exists() else 0
        if there < size:
            raise ValueError(f"{path} must hold the {size} bytes that it had at the checkpoint, got {there}")

    def rewind(self, size: int, seconds: float, end: int | None = None) -> None:
        """Back to the first ``size`` bytes of metrics.jsonl, written ``seconds`` after the start. ValueError where it
        has fewer.

        ``end``: the last step of a run that ended and is to go further; its evaluation there, written next, stays.
        """
        self.require_metrics(size)
        path = self.path / METRICS
        if path.exists():
            whole = path.read_bytes()
            following, newline, _ = whole[size:].partition(b"\n")
            if end is not None and newline and _is_evaluation(following, end):
                size += len(following) + 1
            if self.keeps:
                os.truncate(path, size)
            self.metrics = [json.loads(line) for line in whole[:size].split(b"\n") if line]
        self.position = sum(row["phase"] in STEPS for row in self.metrics)
        if self.keeps:
            keep_rows(self.path / SAMPLES, {row["phase"]: row["step"] for row in self.metrics})
        self.start = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """Since the start; of a resumed run, without the time between."""
        return time.perf_counter() - self.start

    def of_phase(self, phase: str) -> list[dict[str, Any]]:
        """The logged rows of ``phase``."""
        return [row for row in self.metrics if row["phase"] == phase]

    @property
    def steps(self) -> int:
        """The last training step that was logged."""
        rows = self.of_phase("train")
        return rows[-1]["step"] if rows else 0

    @property
    def skipped_steps(self) -> int:
        """Steps of all phases whose loss or gradient was not finite."""
        return sum((self.of_phase(phase) or [{"skipped_steps": 0}])[-1]["skipped_steps"] for phase in STEPS)

    def start_and_end(self, *names: str) -> dict[str, float]:
        """The first and the last value of evaluation metrics, as <name>/start and <name>/end."""
        rows = self.of_phase("eval")
        return {
            f"{name}/{when}": round(row[name], 4)
            for name in names
            for when, row in (("start", rows[0]), ("end", rows[-1]))
        }

    @kept
    def write_samples(self, when: str, rollouts: Sequence[Rollout], note: str, scored: bool = True) -> None:
        """samples_<when>.md: whole dialogues, each answer with its reward if ``scored``."""
        (self.path / f"samples_{when}.md").write_text(page(when, rollouts, note, scored), encoding="utf-8")

    @kept
    def log_samples(
        self,
        phase: str,
        step: int,
        samples: Sequence[Sample],
        chat: ChatFormat,
        objective: Objective,
        scored: bool = True,
    ) -> None:
        """Answers of a few dialogues to samples.jsonl and the trackers' tables, with reward, return and advantage of
        each turn."""
        rows = answer_rows(phase, step, samples, chat.decode, objective, scored)
        append_rows(self.path / SAMPLES, rows)
        self.trackers.log_table(f"{phase}/samples", rows, self.position)

    @kept
    def keep_rollouts(self, step: int, dialogues: Sequence[Dialogue]) -> None:
        """rollouts/step-<step>.jsonl, whole at once: dialogues of a step for people to rate while it trains."""
        folder = self.path / ROLLOUTS
        folder.mkdir(exist_ok=True)
        write_dialogues(folder / f"step-{step:06d}.jsonl", dialogues)

    def kept_rollouts(self, step: int) -> list[Dialogue]:
        """What `keep_rollouts` wrote for ``step``; nothing where it has not."""
        path = self.path / ROLLOUTS / f"step-{step:06d}.jsonl"
        with warnings.catch_warnings():  # that turns without a reward count as 0, which here nobody has said
            warnings.simplefilter("ignore", UserWarning)
            return read_dialogues(path) if path.is_file() else []

    @kept
    def save_checkpoint(self, model: Any, tokenizer: Any, state_dict: dict[str, Any] | None = None) -> None:
        """checkpoint/: safetensors, config and tokenizer, as the Auto classes of transformers read them. Replaces the
        last one whole; what else lies there stays.

        Of a model with adapters these alone, as peft saves them. ``state_dict``: the weights, where ``model`` holds a
        part of them only.
        """
        new, old = self.path / f"{CHECKPOINT}.new", self.path / CHECKPOINT
        shutil.rmtree(new, ignore_errors=True)
        try:
            model.save_pretrained(new, state_dict=state_dict)
            tokenizer.save_pretrained(new)
            write_base(new, model)
        except BaseException:  # a full disk: leave room for the summary
            shutil.rmtree(new, ignore_errors=True)
            raise
        mine = [
            f"{CHECKPOINT}/{escaped(file.relative_to(new).as_posix())}" for file in new.rglob("*") if file.is_file()
        ]
        self.owned.own(*mine)
        for file in self.owned.others(old):
            (new / file).parent.mkdir(parents=True, exist_ok=True)
            (old / file).rename(new / file)
        shutil.rmtree(old, ignore_errors=True)
        new.rename(old)

    def save_batches(self, batches: Sequence[tuple[int, Sequence[Sample]]], decode: Callable[[list[int]], str]) -> Path:
        """not_finite.jsonl: one line a dialogue of the given (step, dialogues): tokens, turn ids, rewards, log-probs,
        text."""
        rows = (
            {"step": step, **asdict(sample), "text": decode(sample.tokens)}
            for step, samples in batches
            for sample in samples
        )
        if self.keeps:
            self.owned.discard()
            with writing(self.path / NOT_FINITE):
                (self.path / NOT_FINITE).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return self.path / NOT_FINITE

    @kept
    def write_summary(self, **values: Any) -> None:
        """summary.json: how it ended, from where to where, and what decides the run. README.md and the model card say
        it for people."""
        names = ("policy_class", "loss_type", "seed", "data", "prompts", "model")
        chosen = {name: getattr(self.config, name) for name in names}
        spent = {"seconds": round(self.seconds, 1), "cpu_seconds": round(time.process_time(), 1)}
        summary = {**values, **chosen, **spent}
        if values.get("status") == "finished":  # after no step at all, if none was asked for
            self.owned.discard()
        (self.path / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        cards.write_readme(self.path, self.config, self.description, summary)
        cards.write_model_card(self.path / CHECKPOINT, self.config, self.description, summary)

    @kept
    def draw_curve(self, key: str, eval_key: str, title: str, unit: str) -> None:
        """learning_curve.png: ``key`` of every training step, ``eval_key`` of every evaluation; turns.png: by turn
        index."""
        curves.draw_curve(self.path / CURVE, self.of_phase("train"), self.of_phase("eval"), key, eval_key, title, unit)
        curves.draw_turns(self.path / TURNS, self.of_phase("train"), self.of_phase("eval"))


def _is_evaluation(line: bytes, step: int) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return row["phase"] == "eval" and row["step"] == step


def _number(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None  # JSON has no word for the others

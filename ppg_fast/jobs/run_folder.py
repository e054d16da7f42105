"""The folder of a run and what is shown while it runs."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Any

from ppg_fast.config import TrainConfig, write_yaml
from ppg_fast.dialogues.chat_format import ChatFormat
from ppg_fast.dialogues.packing import Sample
from ppg_fast.jobs import cards, curves
from ppg_fast.jobs.samples import SAMPLES, answer_rows, append_rows, keep_rows, page
from ppg_fast.jobs.trackers import FOLDER as TRACKERS
from ppg_fast.jobs.trackers import Trackers
from ppg_fast.rollouts.rollout import Rollout
from ppg_fast.training.objective import Objective

METRICS, CONFIG, SUMMARY, CURVE, CHECKPOINT = (
    "metrics.jsonl",
    "config.yaml",
    "summary.json",
    "learning_curve.png",
    "checkpoint",
)
CHECKPOINTS, NOT_FINITE, TURNS, README = "checkpoints", "not_finite.jsonl", "turns.png", "README.md"
STEPS = ("imitation", "train")  # phases that take steps
OURS = (
    CHECKPOINTS,
    METRICS,
    SUMMARY,
    CURVE,
    TURNS,
    CHECKPOINT,
    NOT_FINITE,
    SAMPLES,
    TRACKERS,
    "samples_before.md",
    "samples_after.md",
    README,
    CONFIG,
)  # config last: see below


def kept(method: Callable[..., None]) -> Callable[..., None]:
    """A method that writes: without effect on ranks that do not keep the folder."""

    @wraps(method)
    def write(self: "RunFolder", *arguments: Any, **options: Any) -> None:
        if self.keeps:
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

    @kept
    def open(self, resume: bool = False) -> None:
        """Begin to write: config.yaml, README.md and the trackers.

        FileExistsError if the folder already holds a run and the config's ``overwrite`` is off. With it, the files of a
        run are removed and others stay. ``resume``: the folder holds a run, and that is the one to go on with.
        """
        held = [] if resume else [name for name in OURS if (self.path / name).exists()]
        if held and not self.config.overwrite:
            wanted = "give another --output-dir, --resume to go on with it, or --overwrite to replace it"
            raise FileExistsError(f"{self.path} already holds a run ({held[0]}): {wanted}")
        for name in held:  # the config goes last, so that no half of a run is taken up with the settings of another
            old = self.path / name
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        self.path.mkdir(parents=True, exist_ok=True)
        new = self.path / f"{CONFIG}.new"
        write_yaml(new, self.config)
        new.replace(self.path / CONFIG)
        self.trackers = Trackers(self.config, self.path, resume)
        cards.write_readme(self.path, self.config, self.description, None)

    def log(self, phase: str, metrics: dict[str, Any]) -> None:
        """Append one line of metrics; ``phase`` is imitation, train or eval."""
        row = {"phase": phase, "seconds": round(self.seconds, 3), **metrics}
        self.metrics.append(row)
        self.position += phase in STEPS
        self._write(row)

    @kept
    def close(self) -> None:
        """The trackers end the run."""
        self.trackers.finish()

    @kept
    def _write(self, row: dict[str, Any]) -> None:
        with open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps({k: _number(v) if isinstance(v, float) else v for k, v in row.items()}) + "\n")
        under_way = row["phase"] not in (*STEPS, "eval")  # what is neither tells of the step under way
        self.trackers.log(row["phase"], row, self.position + under_way)

    def rewind(self, size: int, seconds: float) -> None:
        """Back to the first ``size`` bytes of metrics.jsonl, written ``seconds`` after the start. ValueError where it
        has fewer."""
        path = self.path / METRICS
        there = path.stat().st_size if path.exists() else 0
        if there < size:
            raise ValueError(f"{path} must hold the {size} bytes that it had at the checkpoint, got {there}")
        if there:
            if self.keeps:
                os.truncate(path, size)
            self.metrics = [json.loads(line) for line in path.read_bytes()[:size].decode("utf-8").splitlines()]
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
    def save_checkpoint(self, model: Any, tokenizer: Any, state_dict: dict[str, Any] | None = None) -> None:
        """checkpoint/: safetensors, config and tokenizer, as the Auto classes of transformers read them. Replaces the
        last one whole.

        Of a model with adapters these alone, as peft saves them. ``state_dict``: the weights, where ``model`` holds a
        part of them only.
        """
        new, old = self.path / f"{CHECKPOINT}.new", self.path / CHECKPOINT
        shutil.rmtree(new, ignore_errors=True)
        model.save_pretrained(new, state_dict=state_dict)
        tokenizer.save_pretrained(new)
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
        (self.path / SUMMARY).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        cards.write_readme(self.path, self.config, self.description, summary)
        cards.write_model_card(self.path / CHECKPOINT, self.config, self.description, summary)

    @kept
    def draw_curve(self, key: str, eval_key: str, title: str, unit: str) -> None:
        """learning_curve.png: ``key`` of every training step, ``eval_key`` of every evaluation; turns.png: by turn
        index."""
        curves.draw_curve(self.path / CURVE, self.of_phase("train"), self.of_phase("eval"), key, eval_key, title, unit)
        curves.draw_turns(self.path / TURNS, self.of_phase("train"), self.of_phase("eval"))


def _number(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None  # JSON has no word for the others


class Progress:
    """A bar on a terminal; elsewhere a plain line every ``every`` steps, or eight a phase."""

    def __init__(self, enabled: bool, every: int) -> None:
        from rich.console import Console

        self.console, self.every = Console(), every
        self.bar = enabled and self.console.is_terminal

    def say(self, text: str) -> None:
        """One line, above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def phase(self, name: str, steps: int) -> Iterator["Phase"]:
        """A bar of ``steps`` while the block runs."""
        if not self.bar:
            yield Phase(self, name, steps, None)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
        )
        with Bar(*columns, TimeRemainingColumn(), console=self.console) as bar:
            yield Phase(self, name, steps, (bar, bar.add_task(name, total=steps, status="")))


class Phase:
    """What `Progress.phase` hands out."""

    def __init__(self, progress: Progress, name: str, steps: int, task: tuple[Any, Any] | None) -> None:
        self.progress, self.name, self.steps, self.task = progress, name, steps, task

    def show(self, metrics: dict[str, Any], key: str) -> None:
        """One step done: the metric ``key``, speed and memory. A step without any advantage is said so, a change of
        class why."""
        step, name = metrics["step"], "return" if key == "reward" else key
        speed, memory = metrics["perf/tokens_per_second"], metrics["perf/peak_memory_mb"]
        status = f"{name} {metrics[key]:.3f}  {speed:,.0f} tokens/s  peak {memory:,.0f} MB"
        if not metrics["active_turns"]:
            self.progress.say(f"step {step}: no turn has an advantage, so the loss is zero and nothing was learned")
        if "auto/reason" in metrics:
            self.progress.say(f"step {step}: {metrics['auto/reason']}")
        if self.task:
            bar, task = self.task
            bar.update(task, completed=step, status=status)
        elif step % max(self.progress.every, self.steps // 8) == 0 or step == self.steps:
            self.progress.say(f"{self.name} {step}/{self.steps}  {status}")

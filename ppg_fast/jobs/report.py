"""The folder of a run and what is shown while it runs."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ppg_fast.config import TrainConfig, write_yaml
from ppg_fast.data import Sample
from ppg_fast.rollout import Rollout

METRICS, CONFIG, SUMMARY, CURVE, CHECKPOINT = "metrics.jsonl", "config.yaml", "summary.json", "learning_curve.png", "checkpoint"
CHECKPOINTS, NOT_FINITE = "checkpoints", "not_finite.jsonl"
SHOWN = 4  # dialogues in a samples file
OURS = (
    CHECKPOINTS,
    METRICS,
    SUMMARY,
    CURVE,
    CHECKPOINT,
    NOT_FINITE,
    "samples_before.md",
    "samples_after.md",
    CONFIG,
)  # config last: see below


class RunFolder:
    """metrics.jsonl (one line a step, written at once), config.yaml, samples, learning_curve.png, checkpoint/ and summary.json.

    FileExistsError if the folder already holds a run and ``overwrite`` is off. With it, the files of a run are removed and others stay.
    ``resume``: the folder holds a run, and that is the one to go on with.
    """

    def __init__(self, config: TrainConfig, resume: bool = False) -> None:
        self.path, self.start = Path(config.output_dir), time.perf_counter()
        self.metrics: list[dict[str, Any]] = []
        held = [] if resume else [name for name in OURS if (self.path / name).exists()]
        if held and not config.overwrite:
            wanted = "give another --output-dir, --resume to go on with it, or --overwrite to replace it"
            raise FileExistsError(f"{self.path} already holds a run ({held[0]}): {wanted}")
        for name in held:  # the config goes last, so that no half of a run is taken up with the settings of another
            old = self.path / name
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        self.path.mkdir(parents=True, exist_ok=True)
        new = self.path / f"{CONFIG}.new"
        write_yaml(new, config)
        new.replace(self.path / CONFIG)

    def log(self, phase: str, metrics: dict[str, Any]) -> None:
        """Append one line of metrics; ``phase`` is imitation, train or eval."""
        row = {"phase": phase, "seconds": round(self.seconds, 3), **metrics}
        self.metrics.append(row)
        with open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps({k: _number(v) if isinstance(v, float) else v for k, v in row.items()}) + "\n")

    def rewind(self, size: int, seconds: float) -> None:
        """Back to the first ``size`` bytes of metrics.jsonl, written ``seconds`` after the start. ValueError where it has fewer."""
        path = self.path / METRICS
        there = path.stat().st_size if path.exists() else 0
        if there < size:
            raise ValueError(f"{path} must hold the {size} bytes that it had at the checkpoint, got {there}")
        if there:
            os.truncate(path, size)
            self.metrics = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
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
        return {f"{name}/{when}": round(row[name], 4) for name in names for when, row in (("start", rows[0]), ("end", rows[-1]))}

    def write_samples(self, when: str, rollouts: Sequence[Rollout], note: str, scored: bool = True) -> None:
        """samples_<when>.md: whole dialogues, each answer with its reward if ``scored``."""
        lines = [f"# Dialogues {when} training", "", note, ""]
        for number, rollout in enumerate(rollouts, 1):
            lines += [f"## Dialogue {number}" + (f": return {rollout.total_reward:.2f}" if scored else ""), ""]
            rewards = iter(zip(rollout.sample.rewards, rollout.cut_off, strict=True))
            for message in rollout.messages:
                text = " ".join(message.content.split()) or "(silence)"
                if message.role == "assistant":
                    reward, cut_off = next(rewards)
                    text += (" (cut off)" if cut_off else "") + (f" `reward {reward:.2f}`" if scored else "")
                lines.append(f"- **{message.role}**: {text}")
            lines.append("")
        (self.path / f"samples_{when}.md").write_text("\n".join(lines), encoding="utf-8")

    def save_checkpoint(self, model: Any, tokenizer: Any) -> None:
        """checkpoint/: safetensors, config and tokenizer, as the Auto classes of transformers read them. Replaces the last one whole."""
        new, old = self.path / f"{CHECKPOINT}.new", self.path / CHECKPOINT
        shutil.rmtree(new, ignore_errors=True)
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        shutil.rmtree(old, ignore_errors=True)
        new.rename(old)

    def save_batches(self, batches: Sequence[tuple[int, Sequence[Sample]]], decode: Callable[[list[int]], str]) -> Path:
        """not_finite.jsonl: one line a dialogue of the given (step, dialogues): tokens, turn ids, rewards, log-probs, text."""
        rows = ({"step": step, **asdict(sample), "text": decode(sample.tokens)} for step, samples in batches for sample in samples)
        (self.path / NOT_FINITE).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return self.path / NOT_FINITE

    def write_summary(self, config: TrainConfig, **values: Any) -> None:
        """summary.json: how it ended, from where to where, and what decides the run."""
        chosen = {name: getattr(config, name) for name in ("policy_class", "loss_type", "seed", "data", "model")}
        spent = {"seconds": round(self.seconds, 1), "cpu_seconds": round(time.process_time(), 1)}
        text = json.dumps({**values, **chosen, **spent}, indent=2)
        (self.path / SUMMARY).write_text(text + "\n", encoding="utf-8")

    def draw_curve(self, key: str, eval_key: str, title: str, unit: str) -> None:
        """learning_curve.png: ``key`` of every training step, ``eval_key`` of every evaluation on held-out dialogues."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        styles: tuple[dict[str, Any], ...] = ({"alpha": 0.4}, {"marker": "o", "linewidth": 2})
        for phase, name, style in zip(("train", "eval"), (key, eval_key), styles, strict=True):
            rows = [row for row in self.of_phase(phase) if name in row]
            if rows:
                axes.plot([r["step"] for r in rows], [r[name] for r in rows], label=f"{name} ({phase})", **style)
                axes.legend()
        axes.set(xlabel="step", ylabel=unit, title=title)
        axes.grid(alpha=0.3)
        figure.savefig(self.path / CURVE, dpi=120)


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

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[status]}"))
        with Bar(*columns, TimeRemainingColumn(), console=self.console) as bar:
            yield Phase(self, name, steps, (bar, bar.add_task(name, total=steps, status="")))


class Phase:
    """What `Progress.phase` hands out."""

    def __init__(self, progress: Progress, name: str, steps: int, task: tuple[Any, Any] | None) -> None:
        self.progress, self.name, self.steps, self.task = progress, name, steps, task

    def show(self, metrics: dict[str, Any], key: str) -> None:
        """One step done: the metric ``key``, speed and memory. A step without any advantage is said so."""
        step, name = metrics["step"], "return" if key == "reward" else key
        speed, memory = metrics["perf/tokens_per_second"], metrics["perf/peak_memory_mb"]
        status = f"{name} {metrics[key]:.3f}  {speed:,.0f} tokens/s  peak {memory:,.0f} MB"
        if not metrics["active_turns"]:
            self.progress.say(f"step {step}: no turn has an advantage, so the loss is zero and nothing was learned")
        if self.task:
            bar, task = self.task
            bar.update(task, completed=step, status=status)
        elif step % max(self.progress.every, self.steps // 8) == 0 or step == self.steps:
            self.progress.say(f"{self.name} {step}/{self.steps}  {status}")

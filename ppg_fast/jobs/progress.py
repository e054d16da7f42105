"""What is shown while a run runs; an output that is lost is `ppg_fast.console`'s."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ppg_fast.training.auto import WEIGHT


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
        # warnings go above the bar where they would break it, and where stderr leads otherwise
        bar = Bar(*columns, TimeRemainingColumn(), console=self.console, redirect_stderr=sys.stderr.isatty())
        task = bar.add_task(name, total=steps, status="")
        bar.start()
        try:
            yield Phase(self, name, steps, (bar, task))
        finally:
            bar.stop()


class Phase:
    """What `Progress.phase` hands out."""

    def __init__(self, progress: Progress, name: str, steps: int, task: tuple[Any, Any] | None) -> None:
        self.progress, self.name, self.steps, self.task = progress, name, steps, task

    def show(self, metrics: dict[str, Any], key: str) -> None:
        """One step done: the metric ``key``, speed and memory. A step without any advantage is said so; after the last,
        the weights that auto has found."""
        step, name = metrics["step"], "return" if key == "reward" else key
        speed, memory = metrics["perf/tokens_per_second"], metrics["perf/peak_memory_mb"]
        status = f"{name} {metrics[key]:.3f}  {speed:,.0f} tokens/s  peak {memory:,.0f} MB"
        if not metrics["active_turns"] and not metrics["loss"]:  # a KL term or a likelihood may teach something yet
            self.progress.say(f"step {step}: no turn has an advantage, so the loss is zero and nothing was learned")
        if self.task:
            bar, task = self.task
            bar.update(task, completed=step, status=status)
        elif step % max(self.progress.every, self.steps // 8) == 0 or step == self.steps:
            self.progress.say(f"{self.name} {step}/{self.steps}  {status}")
        by_lag = {name.removeprefix(WEIGHT): x for name, x in metrics.items() if name.startswith(WEIGHT)}
        if by_lag and step == self.steps:
            found = ", ".join(f"{lag}: {weight:.2f}" for lag, weight in by_lag.items())
            self.progress.say(f"auto weighs rewards by the turns between, on average, {found}")

"""The plots of a run, from its logged rows alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]
PART = 0.25  # of the steps: the beginning and the end of a training, averaged


def draw_curve(path: Path, train: Rows, held_out: Rows, key: str, eval_key: str, title: str, unit: str) -> None:
    """``key`` of every training step and ``eval_key`` of every evaluation, over the steps."""
    figure, (axes,) = _figure(1)
    styles: tuple[dict[str, Any], ...] = ({"alpha": 0.4}, {"marker": "o", "linewidth": 2})
    named = (("train", train, key), ("eval", held_out, eval_key))
    for (phase, logged, name), style in zip(named, styles, strict=True):
        rows = [row for row in logged if row.get(name) is not None]
        if rows:
            axes.plot([r["step"] for r in rows], [r[name] for r in rows], label=f"{name} ({phase})", **style)
            axes.legend()
    axes.set(xlabel="step", ylabel=unit, title=title)
    figure.savefig(path, dpi=120)


def draw_turns(path: Path, train: Rows, held_out: Rows) -> None:
    """Return and advantage by turn index over the first and the last quarter of the steps, mean and standard deviation;
    held-out log-probs by turn where they were evaluated."""
    logprobs = any(name.startswith("eval/turns/logprob/") for row in held_out for name in row)
    figure, panels = _figure(3 if logprobs else 2)
    part = max(1, round(len(train) * PART))
    for axes, (title, name) in zip(
        panels, (("windowed return", "turns/return"), ("advantage", "turns/advantage")), strict=False
    ):
        for label, rows in ((f"first {part} steps", train[:part]), (f"last {part} steps", train[-part:])):
            _draw_band(axes, rows, name, label)
        axes.set(xlabel="turn", title=f"{title}, mean and standard deviation")
    if logprobs:
        for label, rows in (("before", held_out[:1]), ("after", held_out[-1:])):
            _draw_band(panels[2], rows, "eval/turns/logprob", label)
        panels[2].set(xlabel="turn", title="held-out log-prob, nats a token")
    for axes in panels:
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(path, dpi=120)


def turn_profile(rows: Rows, name: str) -> list[tuple[str, float, float]]:
    """(turn label, mean, standard deviation) of ``name``/<t>, averaged over ``rows``; in the order of turns."""
    labels = {key.rsplit("/", 1)[1] for row in rows for key in row if key.startswith(name + "/")}

    def mean(key: str) -> float:
        values = [row[key] for row in rows if row.get(key) is not None]
        return sum(values) / max(1, len(values))

    order = sorted(labels, key=lambda label: int(label.split("-")[0]))
    return [(label, mean(f"{name}/{label}"), mean(f"{name}_std/{label}")) for label in order]


def _draw_band(axes: Any, rows: Rows, name: str, label: str) -> None:
    profile = turn_profile(rows, name)
    if not profile:
        return
    places = range(len(profile))
    means, spreads = [p[1] for p in profile], [p[2] for p in profile]
    (line,) = axes.plot(places, means, marker="o", label=label)
    low, high = ([m + sign * s for m, s in zip(means, spreads, strict=True)] for sign in (-1, 1))
    axes.fill_between(places, low, high, alpha=0.15, color=line.get_color())
    shown = list(places)[:: max(1, len(profile) // 8)]
    axes.set_xticks(shown, [profile[i][0] for i in shown])


def _figure(panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 if panels == 1 else 5 * panels, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, panels, i + 1) for i in range(panels)]
    for one in axes:
        one.grid(alpha=0.3)
    return figure, axes

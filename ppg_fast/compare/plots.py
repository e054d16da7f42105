"""Plots of a comparison as SVG text. Same numbers, same text."""

import io
from typing import Any

COLOURS = {"greedy": "C0", "full": "C3", "auto": "black", "imitation": "gray"}
CYCLE = ("C1", "C2", "C4", "C5", "C6", "C8", "C9")


def _colours(names: list[str]) -> dict[str, str]:
    others = [n for n in names if n not in COLOURS]
    return {**COLOURS, **{n: CYCLE[i % len(CYCLE)] for i, n in enumerate(others)}}


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def _legend(figure: Any, axes: Any) -> None:
    """Beside the panels, once, so that it hides no curve."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8)


def _svg(figure: Any) -> str:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "ppg_fast", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return "\n".join(line.rstrip() for line in text.getvalue().rstrip("\n").split("\n")) + "\n"


def curves(problems: list[dict[str, Any]]) -> str:
    """Return against steps, one panel a version of a problem: mean over seeds and its 95 % band."""
    figure, panels = _figure(4.8 * len(problems) + 1.6, 3.6, len(problems))
    for axes, p in zip(panels, problems, strict=True):
        colours = _colours(list(p["classes"]))
        for name, c in p["classes"].items():
            own = name == p["policy_class"]
            label = f"{name} (made for)" if own else name
            axes.plot(
                c["steps"], c["mean"], color=colours[name], label=label, linewidth=2.4 if own or name == "auto" else 1.2
            )
            axes.fill_between(c["steps"], c["low"], c["high"], color=colours[name], alpha=0.15, linewidth=0)
        axes.axhline(p["best_return"], color="gray", linestyle=":", linewidth=1)
        seeds = max((len(c["seeds"]) for c in p["classes"].values()), default=0)
        axes.set(title=f"{p['problem']}, {p['version']} ({seeds} seeds)", xlabel="step", ylabel="expected return")
        axes.grid(alpha=0.3)
    _legend(figure, panels[0])
    return _svg(figure)


def gradients(problems: list[dict[str, Any]]) -> str:
    """Variance against bias of each class's batch gradient at the start, one panel a version of a problem."""
    shown = [p for p in problems if p["gradient"]]
    figure, panels = _figure(5.4 * len(shown), 3.2, len(shown))
    for axes, p in zip(panels, shown, strict=True):
        colours = _colours(list(p["classes"]))
        for name, g in p["gradient"].items():
            axes.scatter(g["bias"], g["variance"], color=colours.get(name, "C7"), s=45)
            if "bias_high" in g:
                axes.hlines(g["variance"], g["bias_low"], g["bias_high"], color=colours.get(name, "C7"), linewidth=1)
            axes.annotate(name, (g["bias"], g["variance"]), fontsize=7, xytext=(4, 3), textcoords="offset points")
        axes.set(title=f"{p['problem']}, {p['version']}", xlabel="bias", ylabel="variance", yscale="log")
        largest = max(0.1, *(g.get("bias_high", g["bias"]) for g in p["gradient"].values()))
        axes.set_xlim(-0.05 * largest, 1.25 * largest)  # room for the names
        axes.margins(y=0.12)
        axes.grid(alpha=0.3)
    return _svg(figure)


def shares(entry: dict[str, Any]) -> str:
    """Share of the way to the best return, a point a problem and a bar for the mean, by class."""
    figure, (axes,) = _figure(7.5, 0.6 + 0.36 * len(entry["classes"]))
    order = sorted(entry["classes"], key=lambda c: entry["classes"][c]["mean"])
    colours = _colours(list(entry["classes"]))
    for height, name in enumerate(order):
        each = entry["classes"][name]["each"]
        axes.scatter(each, [height] * len(each), color=colours[name], alpha=0.35, s=14)
        axes.plot(
            [entry["classes"][name]["mean"]] * 2, [height - 0.35, height + 0.35], color=colours[name], linewidth=2.5
        )
    axes.set(
        yticks=range(len(order)),
        yticklabels=order,
        xlabel="mean return over training: 0 as at the start, 1 the best there is",
    )
    axes.grid(alpha=0.3)
    return _svg(figure)


def credits(log: dict[str, Any]) -> str:
    """Mean windowed return of each turn, by class."""
    figure, (axes,) = _figure(7.5, 3.4)
    classes = log["credits"]["classes"]
    colours = _colours(list(classes))
    for name, c in classes.items():
        axes.plot(range(1, len(c["by_turn"]) + 1), c["by_turn"], color=colours[name], label=name)
    axes.set(xlabel="turn", ylabel="mean return credited", title="What each class credits")
    axes.grid(alpha=0.3)
    _legend(figure, axes)
    return _svg(figure)


def scores(log: dict[str, Any]) -> str:
    """Held-out likelihood while training, weighted by the reward of the turn and of the dialogue."""
    figure, panels = _figure(10.8, 3.4, 2)
    colours = _colours(list(log["classes"]))
    for axes, key in zip(panels, ("per_turn", "per_dialogue"), strict=True):
        for name, c in log["classes"].items():
            axes.plot(c["steps"], c["curves"][key], color=colours[name], label=name)
        axes.set(xlabel="step", ylabel="nats a token", title=f"held-out likelihood, weighted {key.replace('_', ' ')}")
        axes.grid(alpha=0.3)
    _legend(figure, panels[0])
    return _svg(figure)


def window(found: dict[str, Any], clear: float) -> str:
    """The signal of each lag, with the dotted line that it must pass to be clear, and the alignment of each class; bars
    of ``clear`` standard errors."""
    figure, (left, right) = _figure(10.8, max(3.4, 0.9 + 0.34 * len(found["classes"])), 2)
    for row in found["lags"]:
        value, error = row["signal"]["value"], row["signal"]["error"]
        left.bar(row["lag"], value, color="C3" if row["clear"] else "C7", yerr=clear * error, ecolor="black", capsize=3)
        left.hlines(row["least"], row["lag"] - 0.4, row["lag"] + 0.4, color="C0", linestyle=":")
    left.axhline(0, color="black", linewidth=0.8)
    left.set(xlabel="lag: turns from an answer to the reward", ylabel="squared length of the lag's gradient")
    left.set(title=f"What answers move, window {found['window']}", xticks=[row["lag"] for row in found["lags"]][:40])
    names = [name for name in found["classes"] if found["classes"][name]["alignment"]["value"] is not None]
    for height, name in enumerate(reversed(names)):
        alignment = found["classes"][name]["alignment"]
        colour = "C3" if name == found["window"] else "C0"
        right.errorbar(alignment["value"], height, xerr=clear * (alignment["error"] or 0), fmt="o", color=colour)
    title = f"alignment of a step's gradient ({found['dialogues_per_step']} dialogues)"
    right.set(yticks=range(len(names)), yticklabels=names[::-1], title=title, xlabel="1: the true direction, no noise")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return _svg(figure)

"""Results of `make study-real` as text for docs/study_real.md."""

from collections.abc import Callable, Sequence
from statistics import mean, stdev
from typing import Any

from ..tables import NOT_MEASURED, Results, duration, of, table
from .cells import ARMS, FULL, WINDOW, grid
from .prediction import line

FILE = "study_real"
CLEAR = 2.0  # standard errors over seeds beyond which a difference is called clear


def _section(render: Callable[[dict[str, Any]], str]) -> Callable[[Results], str]:
    return lambda results: "".join(render(file) for _, file in of(results, FILE)) or NOT_MEASURED


# ---- what was predicted ----------------------------------------------------------------------------------------------
def _predicted(file: dict[str, Any]) -> str:
    """The registered lines, each lag's signal beside what chance makes of it, and whether the window moved."""
    predictions, judge = file["predictions"], file["judge"]
    text = "".join(
        f"* `{line(int(d), p, judge['digest'])}`, on {p['datetime']}, {p['cpu_seconds']:.0f} s of a core\n"
        for d, p in predictions.items()
    )
    lags = max(len(p["lags"]) for p in predictions.values())
    rows = [
        (f"delay {d}", *(_signal(p["lags"][lag]) if lag < len(p["lags"]) else "" for lag in range(lags)))
        for d, p in predictions.items()
    ]
    text += "\n" + table(("signal by chance's standard errors", *(f"lag {lag}" for lag in range(lags))), rows)
    return f"{text}\n{_moved(predictions)}\n\n{_judge(judge)}\n"


def _signal(lag: dict[str, Any]) -> str:
    ratio = lag["signal"]["value"] / lag["by_chance"]
    return f"**{ratio:.1f}**" if lag["clear"] else f"{ratio:.1f}"


def _moved(predictions: dict[str, Any]) -> str:
    """Each window beside the smallest one without bias, and whether the longer delay has the longer window."""
    said, last = [], {int(d): p["last_clear_lag"] for d, p in predictions.items()}
    for delay, lag in last.items():
        built = f"{predictions[str(delay)]['window']} where lookahead:{delay + 1} is built"
        how = "no lag is clear" if lag is None else f"too {'long' if lag > delay else 'short'} by {abs(lag - delay)}"
        said.append(built if lag == delay else f"{built} ({how})")
    text = f"Predicted: {'; '.join(said)}."
    if len(last) < 2:
        return f"{text} The other delay is not measured yet."
    short, long = (last[delay] for delay in sorted(last))
    moves = short is not None and long is not None and long > short
    return f"{text} The window {'moves' if moves else '**does not** move'} with the delay."


def _judge(judge: dict[str, Any]) -> str:
    return (
        f"The judge: {judge['lines']:,} lines of {judge['dialogues']} dialogues ({', '.join(judge['files'])}), "
        f"{judge['consistent']:.0%} of them consistent; of a consistent and an inconsistent line among "
        f"{judge['held_out_lines']:,} held out it scores the former higher in {judge['auc']:.0%}."
    )


# ---- what training said ----------------------------------------------------------------------------------------------
def _trained(file: dict[str, Any]) -> str:
    cells, total = file["cells"], len(grid())
    spent = duration(sum(c["cpu_seconds"] for c in cells)) if cells else "0 s"
    text = f"{len(cells)} of {total} cells are trained, {spent} of a core in all.\n"
    for delay in sorted({c["delay"] for c in cells}):
        mine = [c for c in cells if c["delay"] == delay]
        seeds = sorted({c["seed"] for c in mine})
        rows = [_row(arm, [c for c in mine if c["arm"] == arm], mine) for arm in ARMS]
        heads = ("seeds", "mean return", "beyond full, same seeds", "held out, before", "after", "truthful, first step")
        named = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
        text += f"\n**The partner settles after {delay} turns**, {named}\n\n"
        text += table(("", *heads, "last third"), [row for row in rows if row]) + f"\n{_verdict(mine)}\n"
    return text


def _row(arm: str, cells: Sequence[dict[str, Any]], all_arms: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    if not cells:
        return ()
    name = arm if arm == cells[0]["policy_class"] else f"{arm}: {cells[0]['policy_class']}"
    third = lambda c: c["truthful"][-(len(c["truthful"]) // 3 or 1) :]  # noqa: E731
    return (
        name if arm in (WINDOW, "lag weights") else arm,
        str(len(cells)),
        f"{mean(mean(c['returns']) for c in cells):.2f}",
        _said(beyond(arm, all_arms)) if arm != FULL else "",
        f"{mean(c['before']['return'] for c in cells):.2f}",
        f"{mean(c['after']['return'] for c in cells):.2f}",
        f"{mean(c['truthful'][0] for c in cells):.0%}",
        f"{mean(mean(third(c)) for c in cells):.0%}",
    )


def beyond(arm: str, cells: Sequence[dict[str, Any]]) -> list[float]:
    """Of each seed that both have: the arm's mean return over training minus that of full planning."""
    by_seed = {name: {c["seed"]: mean(c["returns"]) for c in cells if c["arm"] == name} for name in (arm, FULL)}
    return [by_seed[arm][s] - by_seed[FULL][s] for s in sorted(by_seed[arm].keys() & by_seed[FULL].keys())]


def _said(differences: Sequence[float]) -> str:
    if not differences:
        return ""
    if len(differences) == 1:
        return f"{differences[0]:+.2f} (one seed)"
    return f"{mean(differences):+.2f} ± {stdev(differences) / len(differences) ** 0.5:.2f}"


def _verdict(cells: Sequence[dict[str, Any]]) -> str:
    """The predicted window beside full planning, and who is first."""
    by_arm = {arm: [c for c in cells if c["arm"] == arm] for arm in ARMS}
    most = max(map(len, by_arm.values()))
    means = {arm: mean(mean(c["returns"]) for c in mine) for arm, mine in by_arm.items() if len(mine) == most}
    first, differences = max(means, key=lambda arm: means[arm]), beyond(WINDOW, cells)
    text = f"Largest mean return among arms of {most} seed{'s' * (most > 1)}: {first}."
    if len(differences) < 2:
        return f"{text} Nothing can be said of the window before two seeds have it and full planning."
    error = stdev(differences) / len(differences) ** 0.5
    clear = abs(mean(differences)) > CLEAR * error
    side = "above" if mean(differences) > 0 else "below"
    return f"{text} The window is {side} full planning, {'clearly' if clear else 'not clearly'} ({_said(differences)})."


SECTIONS: dict[str, Callable[[Results], str]] = {
    "study_real_prediction": _section(_predicted),
    "study_real_training": _section(_trained),
}

"""Results of `make real` as text for docs/real.md."""

from collections.abc import Callable, Iterable
from typing import Any

from ..tables import NOT_MEASURED, Results, duration, of, table

AIM, MINUTES = 0.8, 15  # of the best held-out return, and the time in which it is wanted
TURNS = 3  # a dialogue's return at most: every answer is paid up to 1
MEMORY_AIM = 0.5  # of the next best's peak


def _bytes(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def _each(name: str) -> Callable[[Callable[[dict[str, Any]], str]], Callable[[Results], str]]:
    """A section of the result file ``name``, one text a device."""

    def wrap(render: Callable[[dict[str, Any]], str]) -> Callable[[Results], str]:
        def section(results: Results) -> str:
            return "".join(render(file) for _, file in of(results, name)) or NOT_MEASURED

        return section

    return wrap


def _quoted(text: str) -> str:
    """One line, safe inside of a table."""
    return " ".join(text.split()).replace("|", "\\|") or "(nothing)"


# ---- they came whole -------------------------------------------------------------------------------------------------
@_each("real_speech")
def speech_section(file: dict[str, Any]) -> str:
    """What each model says greedily."""
    rows = [
        (
            s["model"],
            f"{s['vocabulary']:,}",
            _bytes(s["weights_bytes"]),
            s["text"],
            _quoted(s["said"]),
            _yes(s["right"]),
        )
        for s in file["spoken"]
    ]
    return table(("model", "words", "float32 weights", "given", "said", "as it should"), rows)


def _yes(right: bool) -> str:
    return "yes" if right else "**no**"


# ---- it learns -------------------------------------------------------------------------------------------------------
def best(runs: Iterable[dict[str, Any]]) -> float:
    """The highest held-out return of any seed at any step."""
    return max(point["reward"] for run in runs for point in run["points"])


def reached(run: dict[str, Any], top: float) -> dict[str, Any] | None:
    """The first evaluation of a run at ``AIM`` of the best."""
    return next((point for point in run["points"] if point["reward"] >= AIM * top), None)


@_each("real_persona")
def persona_section(file: dict[str, Any]) -> str:
    """Held-out return of each seed while it trains, as a share of the best of all."""
    runs = file["runs"]
    top, steps = best(runs), [point["step"] for point in runs[0]["points"]]
    rows = []
    for run in runs:
        shares = (f"{p['reward'] / top:.0%} ({p['reward']:.2f})" for p in run["points"])
        rows.append((f"seed {run['seed']}", *shares, *_times(run, top)))
    heads = ("held-out return", *(f"step {step}" for step in steps), "at the aim", "of a core until then", "all of it")
    settings = ", ".join(f"{name} {value}" for name, value in file["settings"].items())
    return f"{table(heads, rows)}\n{_verdict(runs, top)}\n\nSettings: {settings}.\n"


def _times(run: dict[str, Any], top: float) -> tuple[str, str, str]:
    """When the aim was reached, by the clock and in processor seconds, and what the whole run took."""
    whole = f"{duration(run['seconds'])}, {duration(run['cpu_seconds'])} of a core, load before {run['load_before']}"
    point = reached(run, top)
    if point is None:
        return "never", "", whole
    return f"step {point['step']}, {duration(point['seconds'])}", duration(_cpu_until(run, point)), whole


def _cpu_until(run: dict[str, Any], point: dict[str, Any]) -> float:
    """Of the run's processor seconds, the share of its clock that had passed."""
    return run["cpu_seconds"] * min(1.0, point["seconds"] / run["seconds"])


def _verdict(runs: list[dict[str, Any]], top: float) -> str:
    points = [reached(run, top) for run in runs]
    by_clock = sum(p is not None and p["seconds"] <= 60 * MINUTES for p in points)
    core = sum(p is not None and _cpu_until(r, p) <= 60 * MINUTES for r, p in zip(runs, points, strict=True))
    text = (
        f"{AIM:.0%} of the best ({top:.2f} of {TURNS}) within {MINUTES} minutes: {by_clock} of {len(runs)} seeds by the"
    )
    return f"{text} clock of this machine, {core} of {len(runs)} by one core's own time."


@_each("real_persona")
def samples_section(file: dict[str, Any]) -> str:
    """Dialogues of the first seed before and after, and what plain transformers say from what was saved."""
    run, text = file["runs"][0], ""
    for when, found in run["dialogues"].items():
        text += f"**{when.capitalize()} training**, seed {run['seed']}\n\n"
        text += "".join(f"{dialogue.strip()}\n\n" for dialogue in found)
    rows = [
        (
            f"seed {r['seed']}, stopped after step {r['stopped_after']}",
            r["asked"],
            *map(_quoted, (r["before"], r["after"])),
        )
        for r in file["runs"]
        if "after" in r
    ]
    heads = ("plain transformers, greedily", "asked", "before", "after")
    return text.replace("<", "&lt;") + table(heads, rows)


@_each("real_tried")
def tried_section(file: dict[str, Any]) -> str:
    """Every setting that was tried, also those that failed."""
    names = list(file["tried"][0]["settings"])
    varied = [n for n in names if len({str(t["settings"][n]) for t in file["tried"]}) > 1]
    rows = [
        (
            ", ".join(f"{n} {t['settings'][n]}" for n in varied) or t["name"],
            ", ".join(f"{p['step']}: {p['reward']:.2f}" for p in t["points"]),
            ", ".join(f"{reward:.2f}" for reward in t["returns"]),
            duration(t["step_seconds"]),
        )
        for t in file["tried"]
    ]
    return table(("what was tried", "held-out return by step", "return of each step", "clock a step"), rows)


# ---- logged dialogues ------------------------------------------------------------------------------------------------
@_each("real_logged")
def logged_section(file: dict[str, Any]) -> str:
    """The checks of an offline run on each file."""
    return "\n".join(map(_checks, file["files"]))


def _checks(file: dict[str, Any]) -> str:
    points, losses, turns, error = file["points"], file["losses"], file["turns"], file["merge_error"]
    rows = [
        ("held-out log-prob, nats a token", " → ".join(f"{p['logprob']:.3f}" for p in points)),
        ("loss, first and last step", f"{losses[0]:.1f} → {losses[-1]:.1f}"),
        ("turns whose trained tokens are the logged answer and its end", f"{turns['exact']:,} of {turns['read']:,}"),
        (f"stopped after step {file['stopped_after']}, went on: the same weights", _yes(file["resumed_alike"])),
        ("merged and adapted model, largest difference of a log-prob", f"{error['merged']:.1e}"),
        ("trained and plain model, the same", f"{error['trained']:.1e}"),
        ("time", f"{duration(file['seconds'])}, {duration(file['cpu_seconds'])} of a core"),
        ("peak memory of the process", _bytes(file["peak_bytes"])),
        ("plain transformers before", _quoted(file["before"])),
        ("after, from the merged folder", _quoted(file["after"])),
    ]
    return table((file["data"], f"{turns['dialogues']} dialogues"), rows)


# ---- a wide vocabulary -----------------------------------------------------------------------------------------------
@_each("real_wide_vocabulary")
def wide_section(file: dict[str, Any]) -> str:
    """A step of each contestant, and ours as a share of the next best."""
    text = ""
    for what, share in dict.fromkeys((s["what"], s["share"]) for s in file["steps"]):
        steps = [s for s in file["steps"] if (s["what"], s["share"]) == (what, share)]
        rows = [
            (
                s["name"],
                _bytes(s["peak_bytes"]),
                _bytes(s["state_bytes"]),
                _bytes(s["peak_bytes"] - s["state_bytes"]),
                f"{s['cpu_seconds']:.1f} s",
                f"{s['seconds']:.1f} s",
                str(s["load_before"]),
                f"{s['grad_norm']:.5g}",
            )
            for s in steps
        ]
        heads = ("peak memory", "weights and gradients", "above them", "of a core", "clock", "load before", "gradient")
        active = f"{steps[0]['active']:,} of {file['tokens']:,} tokens active"
        text += f"**{what[0].upper()}{what[1:]}, {active}**\n\n{table(('', *heads), rows)}\n{_compared(steps)}\n\n"
    return text.rstrip("\n") + "\n"


def _compared(steps: list[dict[str, Any]]) -> str:
    """Our step against the best of the others, each measure by itself."""
    ours, others = ([s for s in steps if (s["name"] == "ppg_fast") is mine] for mine in (True, False))
    if not (ours and others):
        return "Not compared."
    above = lambda s: s["peak_bytes"] - s["state_bytes"]  # noqa: E731
    peak, extra, time = (
        of_step(ours[0]) / min(map(of_step, others))
        for of_step in (lambda s: s["peak_bytes"], above, lambda s: s["cpu_seconds"])
    )
    met = "met" if peak <= MEMORY_AIM and time <= 1 else "missed"
    said = (
        f"Ours as a share of the next best: peak {peak:.0%}, above weights and gradients {extra:.0%}, time {time:.0%}"
    )
    return f"{said}; the aim ({MEMORY_AIM:.0%} of the peak, no more time) is {met}."


SECTIONS: dict[str, Callable[[Results], str]] = {
    "real_speech": speech_section,
    "real_persona": persona_section,
    "real_persona_samples": samples_section,
    "real_tried": tried_section,
    "real_logged": logged_section,
    "real_wide_vocabulary": wide_section,
}

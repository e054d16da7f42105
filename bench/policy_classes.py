"""A finished `ppg-fast compare` as a result file and charts: `python -m ppg_fast.bench.policy_classes runs/compare
runs/compare-log`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from ppg_fast.compare import across, plots
from ppg_fast.compare.columns import across_table, class_table, credit_table, least, score_table
from ppg_fast.compare.study import BY, SOFT_Q
from ppg_fast.compare.summary import CLEAR, difference
from ppg_fast.compare.tabular_runs import LEARNING_RATE
from ppg_fast.rollouts.problems import DRAWN, REVIEW

from . import machine, result_file
from .tables import NOT_MEASURED, Results, of, table

# comparisons of classes, of losses, of classes with a critic and a discount under several kinds of noise (tabular, and
# in words), and of what holds a loss back
NAME, LOSSES, LIMITS = "policy_classes", "soft_q_study", "soft_q_limits"
RIVALS, IN_WORDS = "credit_rivals", "credit_rivals_in_words"


def main(argv: Sequence[str] | None = None) -> None:
    """Write the results file ``policy_classes.cpu`` and one chart a problem, one of the credits and one of the scores
    of each log; of comparisons of losses ``soft_q_study.cpu`` or ``soft_q_limits.cpu``, which have no charts."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Store finished comparisons of policy classes.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that `ppg-fast compare` wrote")
    parser.add_argument("--output", type=Path, default=result_file.FOLDER)
    parser.add_argument("--losses", action="store_const", dest="name", const=LOSSES, help="they compare losses")
    parser.add_argument(
        "--rivals", action="store_const", dest="name", const=RIVALS, help="only what holds over many problems"
    )
    parser.add_argument("--in-words", action="store_const", dest="name", const=IN_WORDS, help="the same in words")
    parser.add_argument(
        "--limits", action="store_const", dest="name", const=LIMITS, help="they compare losses, one number changed each"
    )
    parser.set_defaults(name=NAME)
    arguments = parser.parse_args(argv)
    summaries = [json.loads((run / "compare.json").read_text()) for run in arguments.runs]
    problems = [
        p if arguments.name == NAME else {**p, "settings": s["settings"]}
        for s in summaries
        for p in s["problems"]
        if not p["problem"].startswith(DRAWN)
    ]
    logs = [s["log"] for s in summaries if s["log"]]
    file = machine.header(
        " ; ".join(s["command"] for s in summaries), "cpu", cpu_seconds=sum(s["cpu_seconds"] for s in summaries)
    )
    entries = [
        entry if arguments.name == NAME else {**entry, "settings": s["settings"]}
        for s in summaries
        for entry in s["across"]
    ]
    file |= {"problems": [] if arguments.name in (RIVALS, IN_WORDS) else problems, "across": entries, "logs": logs}
    result_file.write(arguments.output, f"{arguments.name}.cpu", _rounded(file))
    for name, svg in charts(file).items() if arguments.name == NAME else ():
        (arguments.output / name).write_text(svg)


def charts(file: dict[str, Any]) -> dict[str, str]:
    """Name -> SVG."""
    found = {}
    for name in dict.fromkeys(p["problem"] for p in file["problems"]):
        versions = [p for p in file["problems"] if p["problem"] == name]
        found[f"{NAME}.{name}.svg"] = plots.curves(versions)
        if any(p["gradient"] for p in versions):
            found[f"{NAME}.{name}.gradients.svg"] = plots.gradients(versions)
    found |= {_chart_of(entry): plots.shares(entry) for entry in file["across"]}
    for log in file["logs"]:
        found[f"{NAME}.{_stem(log)}.credits.svg"] = plots.credits(log)
        found[f"{NAME}.{_stem(log)}.scores.svg"] = plots.scores(log)
    return found


def _chart_of(entry: dict[str, Any]) -> str:
    return f"{NAME}.{'drawn' if entry['drawn'] else 'made'}.{entry['version']}.svg"


def _stem(log: dict[str, Any]) -> str:
    return Path(log["data"]).stem + (f".{log['decompose']}" if log["decompose"] else "")


def _rounded(value: Any) -> Any:
    """Five digits: what the charts need, in a file that can be read."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


# ---- sections --------------------------------------------------------------------------------------------------------
def overview_section(results: Results) -> str:
    """One row a version of a problem: the class it was made for, its rival, auto, and the verdict on the mean return
    over training."""
    text = ""
    for _, file in of(results, NAME):
        rows, weighed = [], any("auto" in p["classes"] for p in file["problems"])
        for p in file["problems"]:
            own, classes = p["policy_class"], p["classes"]
            others = [c for c in classes if c not in (own, "auto")]
            if own not in classes or not others:
                continue
            rival = max(others, key=lambda c, classes=classes: classes[c]["area"]["mean"])
            row = [
                f"{p['problem']}, {p['version']}",
                str(len(classes[own]["seeds"])),
                own,
                f"{classes[own]['area']['mean']:.2f}",
            ]
            row += [f"{rival} {classes[rival]['area']['mean']:.2f}"]
            row += [f"{classes['auto']['area']['mean']:.2f}" if "auto" in classes else ""] * weighed
            rows.append((*row, p["verdict"][0].split(":")[0]))
        heads = ("problem", "seeds", "made for", "its mean return", "best other class")
        heads += (*["auto"] * weighed, "verdict")
        text += f"{file['ppg_fast']['cpu_seconds'] / 60:.0f} minutes of computing on one core\n\n" + table(heads, rows)
    return text or NOT_MEASURED


def across_section(results: Results) -> str:
    """What a class is worth where nobody knows the problem: its share of each, together."""
    text = ""
    for _, file in of(results, NAME):
        for entry in file["across"]:
            text += f"\n**{across.title(entry)}**\n\n![shares](../bench/results/{_chart_of(entry)})\n\n"
            text += table(*across_table(entry))
    return text.lstrip("\n") or NOT_MEASURED


def rivals_section(results: Results) -> str:
    """Shares over many problems, a table for each kind of noise, how far each is from full planning, and on which
    problem it is furthest below it."""
    text = ""
    for _, file in (*of(results, RIVALS), *of(results, IN_WORDS)):
        text += f"{file['ppg_fast']['cpu_seconds'] / 60:.0f} minutes of computing on one core\n"
        kinds: dict[str, list[dict[str, Any]]] = {}
        for entry in file["across"]:
            kinds.setdefault(_kind(entry), []).append(entry)
        for kind, entries in kinds.items():
            classes = [e["classes"] for e in entries]
            names = sorted(classes[0], key=lambda c, of=classes: -mean(x[c]["mean"] for x in of if c in x))
            rows = []
            for name in names:
                arms = [of.get(name) for of in classes]
                worst = min((c for c in arms if c and c.get("least_minus_full")), key=_least, default=None)
                rows.append([name, *map(_share, arms), least(worst) if worst else ""])
            text += f"\n**{kind}**\n\n" + table(["", *map(_problems, entries), "minus full on its worst problem"], rows)
        text += "\n"
    return text.rstrip("\n") + "\n" if text else NOT_MEASURED


def _least(c: dict[str, Any]) -> float:
    return float(c["least_minus_full"]["mean"])


def _kind(entry: dict[str, Any]) -> str:
    given = entry["settings"]
    noise = "The problem's noise" if given["noise"] == 1 else f"{given['noise']:g} of the problem's noise"
    noise = "Noise like the logs' verdicts" if given.get("noise_of") else noise
    noise = "Noise that a group shares" if given["shared_noise"] else noise
    return noise + (", in words" if entry["version"] == "language" else "")


def _problems(entry: dict[str, Any]) -> str:
    kind = "by a reviewer" if entry["problems"][0].startswith(REVIEW) else "drawn" if entry["drawn"] else "made"
    return f"{len(entry['problems'])} {kind}"


def _share(c: dict[str, Any] | None) -> str:
    if c is None:  # an arm that was not trained on these problems
        return ""
    d = c["minus_full"]
    return f"{c['mean']:.1%}" + (f" ({100 * d['mean']:+.1f} ± {100 * d['error']:.1f})" if d else "")


def problems_section(results: Results) -> str:
    """Charts, numbers and verdicts of every problem."""
    text = ""
    for _, file in of(results, NAME):
        for name in dict.fromkeys(p["problem"] for p in file["problems"]):
            versions = [p for p in file["problems"] if p["problem"] == name]
            text += f"\n### {name}: made for {versions[0]['policy_class']}\n\n{versions[0]['why'].capitalize()}.\n\n"
            text += f"![{name}](../bench/results/{NAME}.{name}.svg)\n\n"
            if any(p["gradient"] for p in versions):
                text += f"![gradients of {name}](../bench/results/{NAME}.{name}.gradients.svg)\n\n"
            for p in versions:
                text += f"**{p['version']}**, best return {p['best_return']:g}\n\n{table(*class_table(p))}\n"
                text += "".join(f"- {v}\n" for v in p["verdict"]) + "\n"
    return text.strip("\n") + "\n" if text else NOT_MEASURED


def logs_section(results: Results) -> str:
    """What each class credits of logged dialogues, and the held-out scores of models trained with it."""
    text = ""
    for _, file in of(results, NAME):
        for log in file["logs"]:
            credit, stem = log["credits"], _stem(log)
            text += (
                f"\n**{log['data']}**: {credit['dialogues']} dialogues, {credit['turns']} turns, mean reward "
                f"{credit['reward']:.3f}\n\n"
            )
            text += f"![credits](../bench/results/{NAME}.{stem}.credits.svg)\n\n"
            text += table(*credit_table(log))
            text += f"\n![scores](../bench/results/{NAME}.{stem}.scores.svg)\n\n"
            text += table(*score_table(log))
    return text.lstrip("\n") or NOT_MEASURED


def losses_section(results: Results) -> str:
    """Losses side by side: last returns, and the largest fall between two evaluations."""
    text = ""
    for _, file in of(results, LOSSES):
        for p in file["problems"]:
            given = p["settings"]
            data = f"{given['offline']} dialogues of the start" if given["offline"] else "its own dialogues"
            noise = "the problem's noise" if given["noise"] == 1 else f"{given['noise']:g} times its noise"
            seeds = max(len(c["seeds"]) for c in p["classes"].values())
            steps = max(c["steps"][-1] for c in p["classes"].values())
            how = f"beta {given['beta']:g}, {steps} steps, seeds: {seeds}"
            head = f"{p['problem']}, {p['version']}: {data}, {noise}; {how}"
            rows = []
            for arm, c in p["classes"].items():
                means = (f"{c[k]['mean']:.2f} ± {c[k]['std']:.2f}" for k in ("area", "final"))
                rows.append((arm, f"{c['mean'][0]:.2f}", *means, f"{max(c['drop']['each']):.2f}"))
            heads = ("class and loss", "start", "mean return", "last return", "largest fall of a seed")
            text += f"\n**{head}** (best {p['best_return']:g})\n\n{table(heads, rows)}\n"
            text += "".join(f"- {v}\n" for v in p["verdict"] if seeds > 1)  # differences are within seeds
    return text.strip("\n") + "\n" if text else NOT_MEASURED


def limits_section(results: Results) -> str:
    """Soft Q-learning and the policy gradient on one log as beta, steps and learning rates change: last returns, and
    those of where soft Q-learning would end."""
    text = ""
    for _, file in of(results, LIMITS):
        rows = []
        for p in file["problems"]:
            for name, plain in ((c, of_it) for c, of_it in p["classes"].items() if BY not in c):
                soft_q, given = p["classes"][name + BY + SOFT_Q], p["settings"]
                rates = (f"{c.get('learning_rate', {'mean': LEARNING_RATE})['mean']:g}" for c in (soft_q, plain))
                ends = (soft_q[end]["mean"] for end in ("soft_optimum", "soft_optimum_of_log"))
                d = difference(soft_q["final"]["each"], plain["final"]["each"])
                numbers = (f"{number:.2f}" for number in (*ends, soft_q["final"]["mean"], plain["final"]["mean"]))
                how = f"{given['beta']:g}", str(plain["steps"][-1]), ", ".join(rates)
                met = "met" if d["mean"] >= -CLEAR * d["error"] else "missed"
                rows.append((name, *how, *numbers, f"{d['mean']:+.2f} ± {d['error']:.2f}", met))
        heads = ("class", "beta", "steps", "learning rates, soft Q and policy gradient", "soft optimum")
        heads += ("the same of the log", "soft Q ends at", "policy gradient", "difference within seeds", "bar")
        text += table(heads, rows)
    return text or NOT_MEASURED


if __name__ == "__main__":
    main()

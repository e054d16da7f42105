"""`ppg-fast compare`: the policy classes side by side over seeds, on the built-in problems or on logged dialogues."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ppg_fast.compare import across, results
from ppg_fast.compare.columns import across_table
from ppg_fast.compare.study import (
    AUTO,
    CLASSES,
    IMITATION,
    LOG_CLASSES,
    LOSS_TYPES,
    REINFORCE,
    SOFT_Q,
    Study,
    class_names,
    is_class,
)
from ppg_fast.compare.summary import of_log, of_problem
from ppg_fast.compare.verdict_noise import covariances
from ppg_fast.config import Parser
from ppg_fast.jobs.ownership import OwnedFolder, require_folder
from ppg_fast.rewards.decomposition import DECOMPOSITIONS
from ppg_fast.rollouts.problems import PROBLEMS
from ppg_fast.spec import require, require_number, require_one_of

ABOUT = """Policy classes side by side: curves, gradients, a report. With --prompts FILE or --env: the window that your
own rewards need, measured on rollouts (ppg-fast compare --prompts FILE --help)."""
LEAST = 32  # logged dialogues: those of a step
SETTINGS, REPORT, NUMBERS = "settings.json", "report.html", "compare.json"
ENTRIES = (SETTINGS, REPORT, NUMBERS, "warm-*.pt", f"{results.RESULTS}/*-{'[0-9a-f]' * 6}.json")  # what it may remove


def parser() -> argparse.ArgumentParser:
    """All flags."""
    p = Parser(prog="ppg-fast compare", description=ABOUT)
    p.add_argument(
        "--problem", default="all", help=f"{', '.join(PROBLEMS)}, review, drawn:A..B, several with commas, or all [all]"
    )
    p.add_argument(
        "--version",
        default="both",
        help="tabular (exact, seconds), language (the real trainer, a small model), or both [both]",
    )
    p.add_argument(
        "--data", help="logged dialogues instead: what each class credits, and training with each on a part of them"
    )
    p.add_argument(
        "--decompose",
        help=f"with data: turn_rewards are a running score; {' or '.join(DECOMPOSITIONS)} makes rewards of it",
    )
    p.add_argument("--strict", action="store_true", help="with data: a bad line is an error instead of a warning")
    p.add_argument(
        "--max-dialogue-tokens",
        type=int,
        default=1024,
        help="with data: train on the turns that end within these, 0: all; credits are whole [1024]",
    )
    p.add_argument(
        "--policy-classes",
        help=f"with commas; on problems also discount:0.9 (full planning with this gamma) and gae:0.95 (with a critic) "
        f"[{CLASSES}; with data {LOG_CLASSES}]",
    )
    _add_flags_of_problems(p)
    p.add_argument("--seeds", type=int, default=3, help="how many [3]")
    p.add_argument(
        "--first-seed", type=int, default=0, help="the first of them: others than those that a choice was made on [0]"
    )
    p.add_argument("--max-steps", type=int, help="training steps [60 tabular, 40 language, 60 with data]")
    p.add_argument(
        "--batches", type=int, default=24, help="independent batches for the gradients of the language version [24]"
    )
    p.add_argument("--jobs", type=int, default=1, help="processes, of one thread each [1]")
    p.add_argument(
        "--output-dir",
        default="runs/compare",
        help="results, a file for each class and seed; the same command goes on where it was [runs/compare]",
    )
    p.add_argument("--overwrite", action="store_true", help="throw away what the folder holds")
    return p


def _add_flags_of_problems(p: argparse.ArgumentParser) -> None:
    """What only the built-in problems have."""
    p.add_argument(
        "--loss-type",
        default=REINFORCE,
        help=f"on problems: {' or '.join(LOSS_TYPES)}, or both with a comma [reinforce]",
    )
    p.add_argument("--beta", type=float, default=0.1, help="of soft_q, as in train [0.1]")
    p.add_argument(
        "--offline", type=int, default=0, help="train on so many dialogues of the policy at the start, 0: its own [0]"
    )
    p.add_argument("--noise", type=float, default=1.0, help="what the noise of the rewards is multiplied by [1]")
    p.add_argument(
        "--noise-of", nargs="+", metavar="FILE", help="noise that varies as the rewards of these logged dialogues do"
    )
    p.add_argument(
        "--shared-noise",
        action="store_true",
        help="the dialogues of a group have the same noise, as with a partner drawn by one seed",
    )
    p.add_argument(
        "--tune",
        type=int,
        default=0,
        help="tabular: seeds of their own by which each class and problem gets the best of four learning rates [0]",
    )


def main(argv: Sequence[str]) -> int:
    """Compute the results that are missing, then write the report and the numbers. ValueError for bad input, before
    anything is computed."""
    given = parser().parse_args(list(argv))
    study = _study(given)
    parts = study.parts(given.problem, given.version, range(given.first_seed, given.first_seed + given.seeds))
    folder = Path(given.output_dir)
    owned = _open(folder, study, given.overwrite)
    try:
        _compute(folder, parts, study, given.jobs, owned.discard)
        owned.discard()
    finally:  # where no result was computed, the comparison that was there is there again
        owned.restore()
    files = (given.data, given.output_dir, *(given.noise_of or ()))
    words = (Path(word).name if word in files else word for word in argv)  # no folders
    summary = summarise(study, [run for part in parts for run in part], folder, f"ppg-fast compare {' '.join(words)}")
    results.write_whole(folder / NUMBERS, json.dumps(summary, indent=1) + "\n")
    from ppg_fast.compare.page import render

    results.write_whole(folder / REPORT, render(summary))
    _print(summary)
    print(f"\nreport: {folder / REPORT}   numbers: {folder / NUMBERS}")
    return 0


def _study(given: argparse.Namespace) -> Study:
    """The study that the flags describe; ValueError for numbers and names that are none."""
    for name, least in (("seeds", 1), ("jobs", 1), ("batches", 3), ("first_seed", 0), ("max_dialogue_tokens", 0)):
        require(getattr(given, name) >= least, f"{name} must be at least {least}", getattr(given, name))
    require(given.first_seed + given.seeds <= 2**63, "the last seed must be below 2^63", given.first_seed)
    require(given.max_steps is None or given.max_steps >= 1, "max_steps must be at least 1", given.max_steps)
    classes = class_names(given.policy_classes, bool(given.data))
    losses = tuple(dict.fromkeys(name.strip() for name in given.loss_type.split(",")))
    own_rollouts = losses == (REINFORCE,) and not given.offline
    if not own_rollouts:
        classes = tuple(c for c in classes if c != AUTO or given.policy_classes)
    require(
        own_rollouts or AUTO not in classes,
        "auto must be left out: it looks at policy gradients of its own rollouts",
        AUTO,
    )
    for arm in classes:
        known = is_class(arm) or arm in (AUTO, IMITATION) or (own_rollouts and not given.data)
        require(known, "an arm that is no policy class must be left out but for policy gradients on problems", arm)
    if given.decompose is not None:
        require(bool(given.data), "decompose needs data", given.decompose)
        require_one_of("decompose", given.decompose, tuple(DECOMPOSITIONS))
    settings = {name: getattr(given, name) for name in ("data", "decompose", "strict", "max_dialogue_tokens")}
    return Study(given.output_dir, classes, given.max_steps, given.batches, **settings, **_on_problems(given, losses))


def _on_problems(given: argparse.Namespace, losses: tuple[str, ...]) -> dict[str, Any]:
    """The losses of a study and what they train on; ValueError for what has no meaning together."""
    for name in losses:
        require_one_of("loss_type", name, LOSS_TYPES)
    require_number("beta", given.beta, 0.0, open_low=True)
    require_number("noise", given.noise, 0.0)
    require(given.tune == 0 or given.version == "tabular", "tune must be 0 unless version is tabular", given.tune)
    require(given.tune >= 0, "tune must be at least 0", given.tune)
    require(given.offline == 0 or given.offline >= LEAST, f"offline must be 0 or at least {LEAST}", given.offline)
    found = {"loss_types": losses, "beta": given.beta, "offline": given.offline}
    found |= {"noise": given.noise, "shared_noise": given.shared_noise, "tune": given.tune}
    found["noise_of"] = tuple(given.noise_of or ())
    usual = {name: getattr(Study, name) for name in found}
    for name, value in found.items():
        rule = f"{name} must be left out with data: it is of the built-in problems"
        require(not given.data or value == usual[name], rule, value)
    require(SOFT_Q in losses or given.beta == usual["beta"], "beta needs loss_type soft_q", given.beta)
    return found | ({"noise_of": covariances(given.noise_of)} if given.noise_of else {})


def _compute(
    folder: Path,
    parts: Sequence[Sequence[results.Run]],
    study: Study,
    jobs: int,
    begun: Callable[[], None] = lambda: None,
) -> None:
    """Compute what is missing, a line for each result; ``begun`` is called once there is one."""
    there = [results.read(folder, run) is not None for part in parts for run in part]
    missing = there.count(False)
    print(f"{len(there)} results, {len(there) - missing} of them computed before; {folder}", flush=True)
    for number, (run, result) in enumerate(results.compute(folder, parts, study, jobs), 1):
        begun()
        what = f"{run.version} {run.problem} {run.policy_class} seed {run.seed}"
        last = f"  return {result['returns'][-1]:.2f}" if "returns" in result else ""
        print(f"{number}/{missing}  {what}{last}  {result['seconds']:.1f} s", flush=True)


def _print(summary: dict[str, Any]) -> None:
    """Verdicts, and what the classes are worth over many problems."""
    for p in (p for p in summary["problems"] if p["verdict"]):
        print(f"\n{p['problem']}, {p['version']} (made for {p['policy_class']})")
        print("\n".join(f"  {v}" for v in p["verdict"]))
    for entry in summary["across"]:
        lines = [(table := across_table(entry)).heads, *table.rows]
        print(f"\n{across.title(entry)}\n" + "\n".join("  ".join(f"{text:>15}" for text in line) for line in lines))


def _open(folder: Path, study: Study, overwrite: bool) -> OwnedFolder:
    """Make the folder, or go on in one whose results stand beside ours. With ``overwrite``, what a comparison listed as
    its own is moved aside."""
    owned = OwnedFolder(require_folder(str(folder)), ENTRIES, _recognise, keep_last=SETTINGS)
    path, settings = folder / SETTINGS, json.loads(json.dumps(study.settings()))
    owned.recover()
    if overwrite or not owned.held():
        owned.begin(overwrite, [Path(study.data)] if study.data else [])
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        added = ("beta", "offline", "noise", "shared_noise", "tune", "noise_of")  # which an older version has not
        before = json.loads(json.dumps({name: getattr(Study, name) for name in added})) | before
        other = {k: (before.get(k), v) for k, v in settings.items() if before.get(k) != v}
        rule = f"{folder} holds a comparison with other settings (give another --output-dir, or --overwrite)"
        require(not other, rule, ", ".join(f"{k} {a} -> {b}" for k, (a, b) in other.items()))
    results.write_whole(path, json.dumps(settings, indent=1) + "\n")
    return owned


def _recognise(folder: Path) -> list[str]:
    """The entries of a comparison that began before there were lists."""
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    return list(ENTRIES) if isinstance(settings, dict) and {"classes", "problems"} <= settings.keys() else []


def summarise(study: Study, runs: Sequence[results.Run], folder: Path, command: str) -> dict[str, Any]:
    """All numbers of the report."""
    found = {run: result for run in runs if (result := results.read(folder, run)) is not None}
    problems, log = [], None
    for version, name in dict.fromkeys((run.version, run.problem) for run in runs):
        mine = [(run.policy_class, r) for run, r in found.items() if (run.version, run.problem) == (version, name)]
        looked = next((r for c, r in mine if c == results.MEASUREMENT), {})
        of_classes = {name: [r for c, r in mine if c == name] for name in study.arms}
        if version == "logged":
            log = {"data": Path(str(study.data)).name, "decompose": study.decompose, **of_log(looked, of_classes)}
        else:
            problems.append(of_problem(name, version, of_classes, looked.get("gradient")))
    return {
        "command": command,
        "cpu_seconds": round(sum(result["seconds"] for result in found.values()), 1),
        "settings": study.settings(),
        "problems": problems,
        "log": log,
        "across": across.across(problems),
    }

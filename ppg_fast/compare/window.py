"""`ppg-fast compare --prompts`: the window, measured on rollouts of the user's own model, prompts, partner and
rewards, before anything is trained."""

import argparse
import html
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ppg_fast.compare import plots, results
from ppg_fast.compare.columns import Table
from ppg_fast.compare.lags import CLEAR, FEWEST, LagSignals, measure
from ppg_fast.compare.page import image, table, whole
from ppg_fast.config import OF_PROMPTS, OF_REWARDS, PROMPTS, Parser, TrainConfig, add_flags, make_config
from ppg_fast.dialogues.packing import Sample, micro_batches, pack
from ppg_fast.jobs.human import HUMAN, terms_of
from ppg_fast.jobs.ownership import require_folder
from ppg_fast.jobs.policy import Policy
from ppg_fast.jobs.prompts import PromptsJob
from ppg_fast.models.score_sketch import ScoreSketch
from ppg_fast.policy_classes import PolicyClass, policy_classes
from ppg_fast.rewards import load_function
from ppg_fast.spec import require

REPORT, NUMBERS = "window.html", "window.json"
CLASSES = "greedy,lookahead:2,lookahead:3,lookahead:4,segment:4,full"
SETTINGS = (  # of `ppg-fast train` that rollouts depend on
    *("prompts", "strict", "model", "width", "layers", "vocab_size", "template_date", "chat_template"),
    *("chat_template_kwargs", "device", "dtype", "threads", "seed", "num_prompts", "num_generations", "max_new_tokens"),
    *("max_turns", "temperature", "top_p", "top_k", "max_tokens", "max_dialogue_tokens"),
    *OF_PROMPTS,
    *OF_REWARDS,
    *("timeout", "retries", "concurrency", "rollout_batch"),
)

READING = f"""Lag d: the reward d turns after an answer. Signal: squared length of the gradient that the rewards at this
lag give, an unbiased estimate: 0 where no answer moves a reward d turns later; ± one standard error, by the jackknife
over groups of rollouts of one opening. By chance up to: what a lag whose true signal is 0 may reach, two of its
standard errors, and more where many lags are looked at or scores point one way; among 20 measurements without any
signal about one has a lag beyond it. Clear: beyond it. Share: what the lag contributes to the gradient of full planning
along it; all lags add up to 100 %, and one can be negative. Window: up to the last clear lag. Bias: squared distance of
a class's expected gradient from that of full planning, in squared lengths of the latter. Alignment: the expected cosine
of one training step's gradient with that of full planning, which bias and noise both lower; as ratios of estimates,
cosine and alignment may pass 1, and they are empty where full planning's own gradient was lost in noise. Scores are the
gradients of an answer's log-prob at the output head's input. Bars: {CLEAR:g} standard errors. All of it is about the
policy as it is; after training the window may be another. Window and weights were chosen on the rollouts that they are
judged on here, which favours them."""


def parser() -> argparse.ArgumentParser:
    """All flags."""
    p = Parser(
        prog="ppg-fast compare",
        description="Which window your rewards need: rollouts of your model, and what its answers move at each lag.",
    )
    p.add_argument("--env", metavar="MODULE:CLASS", help="environments in place of prompts: file.py:Class, made anew")
    p.add_argument("--rollouts", type=int, default=256, help="dialogues, of whole steps of training [256]")
    p.add_argument("--policy-classes", default=CLASSES, help=f"with commas [{CLASSES}]")
    p.add_argument("--sketch", type=int, default=2048, help="numbers that keep the score of a turn [2048]")
    p.add_argument("--output-dir", default="runs/window", help=f"for {REPORT} and {NUMBERS} [runs/window]")
    p.add_argument("--overwrite", action="store_true", help="replace the report that is there")
    add_flags(p, SETTINGS, PROMPTS)
    return p


def main(argv: Sequence[str]) -> int:
    """Roll out, measure, report. ValueError for bad input, before anything is computed."""
    start, flags = time.perf_counter(), vars(parser().parse_args(list(argv)))
    own = {name: flags.pop(name) for name in ("env", "rollouts", "policy_classes", "sketch", "overwrite")}
    folder, classes = require_folder(flags["output_dir"]), policy_classes(own["policy_classes"])
    if own["env"]:  # which ends its dialogues itself: the fewer turns of prompts would cut them
        flags.setdefault("max_turns", TrainConfig.max_turns)
    config = make_config(PROMPTS, flags)
    _check(config, own)
    for name in (REPORT, NUMBERS):
        there = own["overwrite"] or not (folder / name).exists()
        require(there, f"{folder} must hold no {name} (--overwrite replaces it)", name)
    policy, batches = _of_environments(config, own["env"]) if own["env"] else _of_prompts(config)
    signals, returns = _collect(policy, batches, classes, own["rollouts"], own["sketch"])
    found = measure(signals, classes, config.num_prompts * config.num_generations)
    words = (Path(word).name if word == flags["output_dir"] else word for word in argv)
    summary = {
        "command": f"ppg-fast compare {' '.join(words)}",
        "mean_return": sum(returns) / len(returns),
        **found,
        "seconds": round(time.perf_counter() - start, 1),
    }
    folder.mkdir(parents=True, exist_ok=True)
    results.write_whole(folder / NUMBERS, json.dumps(summary, indent=1) + "\n")
    results.write_whole(folder / REPORT, render(summary))
    for part in (lag_table(summary), class_table(summary)):
        print("\n" + "\n".join("  ".join(f"{text:>16}" for text in row) for row in (part.heads, *part.rows)))
    print(f"\n{verdict(summary)}\nreport: {folder / REPORT}   numbers: {folder / NUMBERS}")
    return 0


def _check(config: TrainConfig, own: dict[str, Any]) -> None:
    """ValueError for settings that do not go together."""
    require(bool(config.prompts) != bool(own["env"]), "compare measures prompts or env, one of them", "both")
    require(not own["env"] or bool(config.model), "env needs model, a checkpoint folder", config.model)
    if own["env"]:
        for name in (*OF_PROMPTS, *OF_REWARDS):
            usual = getattr(TrainConfig, name)
            require(getattr(config, name) == usual, f"{name} goes with prompts, not with env", getattr(config, name))
    rule = "reward must be given without people, who rate while ppg-fast train runs"
    require(all(kind != HUMAN for kind, _, _ in terms_of(config.reward)), rule, config.reward)
    require(config.num_generations >= 2, "num_generations must be at least 2, to compare with", config.num_generations)
    step, least = config.num_prompts * config.num_generations, FEWEST * config.num_generations
    rollouts = own["rollouts"]
    rule = f"rollouts must be a multiple of num_prompts x num_generations, {step}, and at least {least}"
    require(rollouts >= least and rollouts % step == 0, rule, rollouts)
    require(1 <= own["sketch"] <= 2**20, "sketch must be from 1 to 2^20 numbers", own["sketch"])


def _of_prompts(config: TrainConfig) -> tuple[Policy, Iterator[list[Sample]]]:
    """The policy, and the rollouts of one training step after the other."""
    job = PromptsJob(config)
    return job.policy, (job.collect(step) for step in range(1, 2**31))


def _of_environments(config: TrainConfig, env: str) -> tuple[Policy, Iterator[list[Sample]]]:
    """Likewise, of environments; a step has seeds of its own."""
    make = load_function(env, what="class of environments")
    policy = Policy(config, lambda: None)

    def rollouts(step: int) -> list[Sample]:
        seeds = range((step - 1) * config.num_prompts, step * config.num_prompts)
        return [r.sample for r in policy.roll_out(make, seeds, config.num_generations, policy.generator)]

    return policy, (rollouts(step) for step in range(1, 2**31))


def _collect(
    policy: Policy, batches: Iterator[list[Sample]], classes: Sequence[PolicyClass], rollouts: int, size: int
) -> tuple[LagSignals, list[float]]:
    """The signals of so many rollouts, and their returns; a line a step."""
    import torch

    config, signals, returns = policy.config, LagSignals(classes), []
    sketch = ScoreSketch(policy.model.get_output_embeddings().weight.shape[1], size, config.seed)
    while len(returns) < rollouts:
        samples = next(batches)
        whole_step = pack(samples)
        scores = torch.zeros(*whole_step.rewards.shape, size)
        for part in micro_batches([len(s.tokens) for s in samples], config.max_tokens):
            found = sketch.of_turns(
                policy.model, pack([samples[i] for i in part]).to(policy.model.device), config.temperature
            )
            scores[part, : found.shape[1]] = found
        signals.add(scores, whole_step.rewards, whole_step.turn_counts, whole_step.group_ids)
        returns += [sum(s.rewards) for s in samples]
        print(f"{len(returns)}/{rollouts} rollouts, mean return {sum(returns) / len(returns):.3f}", flush=True)
    return signals, returns


def verdict(found: dict[str, Any]) -> str:
    """The window in a sentence or two."""
    last, rollouts = found["last_clear_lag"], found["rollouts"]
    if last is None:
        return f"window: full. No lag beyond what chance gives in {rollouts} rollouts: full planning, or more of them"
    text = (
        f"window: {found['window']}. Answers move rewards up to {last} turns later, as far as {rollouts} rollouts tell"
    )
    bias = found["classes"][found["window"]]["bias"]
    if found["window"] == "full" or bias["value"] is None:
        return text
    most = max(0.0, bias["value"] + CLEAR * bias["error"]) ** 0.5
    return f"{text}; what lies beyond is at most {most:.0%} of the gradient's length (95 %)"


def lag_table(found: dict[str, Any]) -> Table:
    """The lags."""
    rows = []
    for r in found["lags"]:
        signal, least = _number(r["signal"], ".3g"), f"{r['least']:.3g}"
        rows.append((str(r["lag"]), signal, least, "clear" if r["clear"] else "", _number(r["share"], ".0%")))
    return Table(("lag", "signal", "by chance up to", "", "share"), rows)


def class_table(found: dict[str, Any]) -> Table:
    """The classes."""
    rows = [
        (name, *(_number(c[key], ".2f") for key in ("alignment", "cosine", "bias")))
        for name, c in found["classes"].items()
    ]
    return Table(("class", "alignment", "cosine", "bias"), rows)


def _number(estimate: dict[str, float | None], form: str) -> str:
    value, error = estimate["value"], estimate["error"]
    return "" if value is None or error is None else f"{value:{form}} ± {error:{form}}"


def render(found: dict[str, Any]) -> str:
    """The page."""
    counts = f"{found['rollouts']} rollouts in {found['groups']} groups, {found['turns']} turns, "
    counts += f"mean return {found['mean_return']:.3f}; {found['seconds']:,.0f} s"
    weights = f"<p>Measured weights of the lags (experimental): {found['weights']}</p>" if found["weights"] else ""
    body = f"<h1>The window, measured</h1><p><small>{html.escape(found['command'])}<br>{counts}</small></p>"
    body += f"<p><b>{html.escape(verdict(found))}.</b></p>{image(plots.window(found, CLEAR))}"
    body += table(lag_table(found)) + table(class_table(found), found["window"]) + weights
    return whole("The window, measured", f"{body}<h2>How to read it</h2><p>{READING}</p>")

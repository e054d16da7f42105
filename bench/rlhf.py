"""`make rlhf-demo`: from pairs to a reward model to a policy, with the true return beside the model's.

Everything is made here: a persona policy that imitated half-right answers, pairs of its dialogues compared by a rater
who knows the true return and errs, `ppg-fast reward`, and `ppg-fast train --reward model:...` on the personas of
training, with a KL term. The interview's own reward, which the model never saw, is told beside it on held-out personas.
One run on that reward itself says what could be had, and one on the model's without the KL term what becomes of a
policy that may go where the model knows nothing. A part that is finished is not done again; one that was stopped begins
anew.

Bars, set before the first run: `BARS`. That first run, with a rater who erred more often (`NOISE` 0.75) and no KL term,
missed both: docs/log.md.
"""

import argparse
import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppg_fast.rollouts.persona import PersonaInterview
from ppg_fast.writing import opened

from . import machine, result_file
from .chart import Line, lines
from .finished_runs import FinishedRuns, Run, ppg_fast
from .tables import NOT_MEASURED, Results, duration, of, table

if TYPE_CHECKING:
    from ppg_fast.rollouts.rollout import Rollout

NAME = "rlhf"
CHART = "rlhf.cpu.svg"
NOISE = 0.4  # of the rater: A is better with probability sigmoid((R_A - R_B) / NOISE)
KL = 0.1  # weight of the KL divergence to the weights at the start, where the reward is a model's
FIRST_PAIR = 10**6  # seed of the first pair's persona
BARS = (
    "the reward model is right on more than 60 % of held-out pairs, lower end of its 95 % interval",
    "trained on it, the true return rises from start to end by more than two standard errors over the seeds",
)
ON = {"model": "the model's reward", "free": "the model's reward without KL", "true": "the true reward"}
ALONE = ("free-0", "true-0")  # beside the seeds


@dataclass(frozen=True)
class Settings:
    """Sizes of the demonstration."""

    pairs: int = 2000
    seeds: int = 3
    steps: int = 80
    imitation_steps: int = 400
    reward_steps: int = 600
    width: int = 128
    eval_dialogues: int = 64


class Demo(FinishedRuns):
    """Its parts, in a folder."""

    def start(self) -> None:
        """The policy that is compared and trained on: imitation alone."""
        own = ["--width", self.settings.width, "--imitation-steps", self.settings.imitation_steps]
        self.train("start", *own, "--max-steps", 0)

    def compare(self) -> None:
        """Pairs of its dialogues, one persona each, and how often the rater said what is true."""
        if (self.folder / "pairs.json").exists():
            return
        from ppg_fast.config import make_config
        from ppg_fast.jobs.policy import Policy

        policy = Policy(make_config({"model": str(self.folder / "start/checkpoint"), "threads": 1}), lambda: None)
        seeds = range(FIRST_PAIR, FIRST_PAIR + self.settings.pairs)
        rollouts = policy.roll_out(PersonaInterview, seeds, 2, policy.generator)
        rng, told = random.Random(0), []
        with opened(self.folder / "pairs.jsonl") as file:
            for number, sides in enumerate(zip(rollouts[::2], rollouts[1::2], strict=True)):
                pair, right = rated(sides, rng)
                told.append(right)
                file.write(json.dumps({"id": f"pair-{number}", **pair}) + "\n")
        decided = [right for right in told if right is not None]
        found = {"count": len(told), "ties": told.count(None), "agreement": sum(decided) / max(1, len(decided))}
        (self.folder / "pairs.json").write_text(json.dumps(found) + "\n")

    def reward(self) -> None:
        """The reward model; the command goes on by itself where it was stopped."""
        if not (self.folder / "rm/reward.json").exists():
            start, steps = str(self.folder / "start/checkpoint"), str(self.settings.reward_steps)
            flags = ["--model", start, "-o", str(self.folder / "rm"), "--max-steps", steps, "--learning-rate", "1e-3"]
            self.run(["reward", str(self.folder / "pairs.jsonl"), *flags, "--eval-dialogues", "400"])

    def policies(self) -> None:
        """On the model's reward, a run for each seed, then one without the KL term; and one on the true reward."""
        own = ["--model", self.folder / "start/checkpoint", "--imitation-steps", 0, "--max-steps", self.settings.steps]
        by_model = ["--reward", f"model:{self.folder / 'rm'}"]
        for seed in range(self.settings.seeds):
            self.train(f"model-{seed}", *own, "--seed", seed, "--kl-coef", KL, *by_model)
        self.train("free-0", *own, "--seed", 0, *by_model)
        self.train("true-0", *own, "--seed", 0)

    def found(self) -> dict[str, Any]:
        """What the finished parts say."""
        report = json.loads((self.folder / "rm/reward.json").read_text())
        names = [*(f"model-{seed}" for seed in range(self.settings.seeds)), *ALONE]
        curves = [self._curve(name) for name in names]
        pairs = json.loads((self.folder / "pairs.json").read_text())
        held_out = {**report["held_out"], "step": report["step"]}
        return {"settings": asdict(self.settings), "pairs": pairs, "held_out": held_out, "curves": curves}

    def _curve(self, name: str) -> dict[str, Any]:
        """Held-out returns of a finished run: by what trains it, and the true ones."""
        points = [
            {"step": r["step"], "trained": r["eval/reward"], "true": r.get("eval/interview", r["eval/reward"])}
            for r in self.rows(name)
            if r["phase"] == "eval"
        ]
        summary = self.summary(name)
        return {"on": name.rpartition("-")[0], "seed": summary["seed"], "seconds": summary["seconds"], "points": points}


def rated(sides: "Sequence[Rollout]", rng: random.Random) -> tuple[dict[str, Any], bool | None]:
    """A line of pairs, and whether the rater said which side is truly better; None for a tie, which the rater sees."""
    returns = [side.total_reward for side in sides]
    written = [[message.as_json() for message in side.messages] for side in sides]
    if returns[0] == returns[1]:
        return {"chosen": written[0], "rejected": written[1], "tie": True}, None
    first = rng.random() < 1 / (1 + math.exp(-(returns[0] - returns[1]) / NOISE))
    chosen, rejected = written if first else written[::-1]
    return {"chosen": chosen, "rejected": rejected}, first == (returns[0] > returns[1])


# ---- rendered --------------------------------------------------------------------------------------------------------
def rlhf_section(results: Results) -> str:
    """For docs/reward_models.md."""
    text = ""
    for _, file in of(results, NAME):
        pairs, held_out = file["pairs"], file["held_out"]
        low, high = held_out["accuracy_interval"]
        text += (
            f"{pairs['count']:,} pairs, {pairs['ties']:,} of them ties; of the others the rater was right on "
            f"{pairs['agreement']:.0%}. The reward model (step {held_out['step']}) was right on "
            f"{held_out['accuracy']:.0%} of the held-out pairs as the rater told them, {low:.0%} to {high:.0%}.\n\n"
        )
        text += table(("trained on", "by it, before", "after", "true, before", "best", "after", "time"), _rows(file))
        text += f"\n![Return over steps, by the model and true](../{result_file.FOLDER}/{CHART})\n\n"
        text += "".join(f"- {bar}: **{'met' if met else 'missed'}** ({said}).\n" for bar, met, said in verdicts(file))
    return text or NOT_MEASURED


def _rows(file: dict[str, Any]) -> list[tuple[str, ...]]:
    rows = []
    for c in file["curves"]:
        first, last, best = c["points"][0], c["points"][-1], max(point["true"] for point in c["points"])
        numbers = first["trained"], last["trained"], first["true"], best, last["true"]
        rows.append(
            (f"{ON[c['on']]}, seed {c['seed']}", *(f"{number:.2f}" for number in numbers), duration(c["seconds"]))
        )
    return rows


def verdicts(file: dict[str, Any]) -> list[tuple[str, bool, str]]:
    """Each bar, whether it is met, and by what."""
    low = file["held_out"]["accuracy_interval"][0]
    gains = [c["points"][-1]["true"] - c["points"][0]["true"] for c in file["curves"] if c["on"] == "model"]
    mean = sum(gains) / len(gains)
    error = math.sqrt(sum((g - mean) ** 2 for g in gains) / max(1, len(gains) - 1) / len(gains))
    met, told = (low > 0.6, mean > 2 * error), (f"{low:.0%}", f"{mean:+.2f}, standard error {error:.2f}")
    return list(zip(BARS, met, told, strict=True))


def charts(results: Results) -> dict[str, str]:
    """Name -> SVG."""
    found = {}
    for _, file in of(results, NAME):
        curves = file["curves"]
        by_model = [_line(c, "trained") for c in curves if c["on"] != "true"]
        true = [_line(c, "true") for c in curves]
        found[CHART] = lines((("return by the reward model, which trains", by_model), ("true return", true)))
    return found


def _line(c: dict[str, Any], key: str) -> Line:
    kind = {"model": "ours", "free": "ceiling", "true": "peer"}[c["on"]]
    return Line(f"trained on {ON[c['on']]}", [(point["step"], point[key]) for point in c["points"]], kind)


def main(argv: Sequence[str] | None = None, run: Run = ppg_fast) -> None:
    """Do the parts that are not finished and write ``rlhf.cpu`` with its chart."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Pairs, a reward model, a policy trained on it.")
    parser.add_argument("--folder", type=Path, default=Path("runs/rlhf"))
    parser.add_argument("--output", type=Path, default=result_file.FOLDER)
    parser.add_argument("--only", choices=("start", "compare", "reward", "train"), help="this part alone")
    for field in fields(Settings):
        flag = f"--{field.name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=field.default, help=f"[{field.default}]")
    given = vars(parser.parse_args(argv))
    demo = Demo(given["folder"], Settings(**{field.name: given[field.name] for field in fields(Settings)}), run)
    parts = {"start": demo.start, "compare": demo.compare, "reward": demo.reward, "train": demo.policies}
    for part in (given["only"],) if given["only"] else parts:
        parts[part]()
    if not given["only"]:
        file = machine.header("make rlhf-demo", "cpu") | demo.found()
        result_file.write(given["output"], f"{NAME}.cpu", file)
        for name, svg in charts({f"{NAME}.cpu": file}).items():
            (given["output"] / name).write_text(svg)


if __name__ == "__main__":
    main()

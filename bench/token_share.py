"""A share of each answer's tokens (`train --token-share`): held-out returns while it trains, over seeds, and the time
of the head: `python -m ppg_fast.bench.token_share`, the time alone with `--head`.

The policy is that of the persona interview, the same half-right one for every run; runs of one seed draw the same
personas. A run that is finished is not done again, and more `--seeds` may join later.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ppg_fast.dialogues.packing import CONTEXT, PackedBatch, Sample, pack
from ppg_fast.functional import linear_policy_loss
from ppg_fast.training.token_share import kept_of_turns, train_most_uncertain

from . import machine, result_file
from .finished_runs import FinishedRuns, Run, ppg_fast
from .intervals import interval, medians, over, verdict
from .tables import NOT_MEASURED, Results, duration, of, table
from .timing import Contestant, Pace, interleave, stats

NAME, HEAD = "token_share", "token_share_head"
SHARES = (1.0, 0.5, 0.2)
AIM = 0.35  # of the head's time at share 1, at most, at the smallest share
ANSWER, TURNS = 32, 8  # tokens of an answer, and of what is said before it; answers of a dialogue


@dataclass(frozen=True)
class Settings:
    """Sizes of the runs."""

    steps: int = 30
    imitation_steps: int = 400
    width: int = 128
    eval_dialogues: int = 64


# ---- curves ----------------------------------------------------------------------------------------------------------
class Curves(FinishedRuns):
    """A run for each seed and share from one start, in a folder."""

    def compute(self, seeds: int) -> list[dict[str, Any]]:
        """The runs that are missing; held-out returns and the share of the answers' tokens that had a gradient, of
        each of them."""
        own = ["--width", self.settings.width, "--imitation-steps", self.settings.imitation_steps]
        self.train("start", *own, "--max-steps", 0)
        start = ["--model", self.folder / "start/checkpoint", "--imitation-steps", 0]
        found = []
        for seed in range(seeds):
            for share in SHARES:
                name = f"share-{share:g}-{seed}"
                flags = ["--max-steps", self.settings.steps, "--seed", seed, "--token-share", share]
                self.train(name, *start, *flags)
                found.append({"share": share, "seed": seed, **self._curve(name)})
        return found

    def _curve(self, name: str) -> dict[str, Any]:
        rows = self.rows(name)
        points = [[row["step"], round(row["eval/reward"], 4)] for row in rows if row["phase"] == "eval"]
        trained = statistics.fmean(row["perf/active_row_share"] for row in rows if row["phase"] == "train")
        return {"trained": round(trained, 4), "points": points, "seconds": self.summary(name)["seconds"]}


# ---- the head --------------------------------------------------------------------------------------------------------
def made_batch(dialogues: int, vocabulary: int) -> PackedBatch:
    """Dialogues of `TURNS` answers, as many tokens of context as of answers, entropies drawn at random."""
    generator = torch.Generator().manual_seed(0)
    turn_ids = [turn for t in range(TURNS) for turn in [CONTEXT] * ANSWER + [t] * ANSWER]
    samples = []
    for group in range(dialogues):
        tokens = torch.randint(vocabulary, (len(turn_ids),), generator=generator).tolist()
        entropies = torch.rand(len(turn_ids), generator=generator).tolist()
        samples.append(Sample(tokens, turn_ids, [1.0] * TURNS, group, entropies=entropies))
    return pack(samples)


def measure_head(dialogues: int = 8, vocabulary: int = 50000, width: int = 256, rounds: int = 15) -> dict[str, Any]:
    """Seconds of choosing the tokens, the loss from hidden states and its gradients in them and in the head, in rounds
    with each other."""
    batch = made_batch(dialogues, vocabulary)
    entropies = batch.entropies
    assert entropies is not None
    generator = torch.Generator().manual_seed(1)
    shapes = (len(batch.tokens), width), (vocabulary, width)
    hidden, weight = (torch.randn(shape, generator=generator).mul_(width**-0.5).requires_grad_() for shape in shapes)
    advantages = torch.where(torch.randn(len(batch.tokens), generator=generator) > 0, 1.0, -1.0)

    def call(share: float) -> tuple[torch.Tensor, ...]:
        chosen = batch if share == 1 else train_most_uncertain(batch, entropies, share)
        out = linear_policy_loss(
            hidden, weight, chosen.labels, advantages, cu_seqlens=chosen.cu_seqlens, reduction="sequence_sum",
            skip_zero_advantages=True,
        )  # fmt: skip
        return torch.autograd.grad(out.loss, (hidden, weight))

    calls = {share: partial(call, share) for share in SHARES}
    for one in calls.values():
        one()
    contestants = [Contestant(f"{share:g}", "ours", one) for share, one in calls.items()]
    seconds = interleave(contestants, Pace(rounds, budget=math.inf), "cpu")
    rows = [
        {"share": share, "active": int(kept_of_turns(batch, share).sum()), "stats": stats(seconds[f"{share:g}"])}
        for share in SHARES
    ]
    return {"size": [len(batch.tokens), vocabulary, width], "rows": rows}


# ---- rendered --------------------------------------------------------------------------------------------------------
def curves_section(results: Results) -> str:
    """For docs/losses.md: the mean return of each share at every evaluation, and the last ones seed by seed."""
    text = ""
    for _, file in of(results, NAME):
        by_share = {s: sorted((c for c in file["curves"] if c["share"] == s), key=lambda c: c["seed"]) for s in SHARES}
        whole, rows = by_share[1.0], []
        for share, curves in by_share.items():
            points = zip(*(c["points"] for c in curves), strict=True)
            shown = [_mean([value for _, value in at]) for at in points]
            less = [c["points"][-1][1] - all_of_it["points"][-1][1] for c, all_of_it in zip(curves, whole, strict=True)]
            trained = f"{statistics.fmean(c['trained'] for c in curves):.0%}"
            rows.append((f"{share:g}", trained, *shown, "" if share == 1 else _mean(less, signed=True)))
        steps = (f"step {step}" for step, _ in whole[0]["points"])
        text += f"Persona interview, held-out return, mean and standard error of {len(whole)} seeds from one start:\n\n"
        text += table(("share", "tokens with a gradient", *steps, "last, less share 1's, within seeds"), rows)
    return text or NOT_MEASURED


def head_section(results: Results) -> str:
    """For docs/losses.md: the head's time at each share, beside the whole."""
    text = ""
    for where, file in of(results, HEAD):
        N, V, D = file["size"]
        entries = {row["share"]: {"group": HEAD, "stats": row["stats"]} for row in file["rows"]}
        rows = []
        for row in file["rows"]:
            ratio = over(medians(entries[row["share"]]), medians(entries[1.0]))
            between = None if ratio is None else interval(ratio)
            said = "" if ratio is None else f"{ratio[0]:.2f}"
            said += f" ({between[0]:.2f} to {between[1]:.2f})" if between else ""
            rows.append((f"{row['share']:g}", f"{row['active']:,}", duration(row["stats"]["median"]), said))
        least = min(entries)
        ratio = over(medians(entries[least]), medians(entries[1.0]))
        met = None if ratio is None else verdict(ratio, AIM)
        text += f"\n**N {N:,}, V {V:,}, D {D:,}, float32, threads: {file['ppg_fast']['threads']}** ({where})\n\n"
        text += table(("share", "rows with a gradient", "choice, loss and gradients", "time / share 1"), rows)
        told = {True: "**met**", False: "**missed**", None: "**undecided**"}[met]
        text += f"\nAim: at share {least:g} at most {AIM:g} of the time at share 1: {told}.\n"
    return text.lstrip("\n") or NOT_MEASURED


SECTIONS = {NAME: curves_section, HEAD: head_section}


def _mean(values: Sequence[float], signed: bool = False) -> str:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{statistics.fmean(values):{'+' if signed else ''}.2f} ± {error:.2f}"


def main(argv: Sequence[str] | None = None, run: Run = ppg_fast, measure: Callable[[], Any] = measure_head) -> int:
    """Write ``token_share.cpu``, or the file of the head's time on this processor."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="What a share of each answer's tokens does.")
    parser.add_argument("--head", action="store_true", help="the time of the head alone")
    parser.add_argument("--seeds", type=int, default=10, help="of the curves [10]")
    parser.add_argument("--folder", type=Path, default=Path("runs/token_share"))
    parser.add_argument("--output", type=Path, default=result_file.FOLDER)
    for name, size in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=size, help=f"[{size}]")
    given = vars(parser.parse_args(argv))
    command = "python -m ppg_fast.bench.token_share" + " --head" * given["head"]
    if given["head"]:
        file = machine.header(command, "cpu", threads=torch.get_num_threads()) | measure()
        result_file.write(given["output"], result_file.name_of(HEAD, "cpu", file["machine_info"]), file)
        return 0
    settings = Settings(**{name: given[name] for name in asdict(Settings())})
    curves = Curves(given["folder"], settings, run).compute(given["seeds"])
    file = machine.header(f"{command} --seeds {given['seeds']}", "cpu") | {"settings": asdict(settings)}
    result_file.write(given["output"], f"{NAME}.cpu", file | {"curves": curves})
    return 0


if __name__ == "__main__":
    sys.exit(main())

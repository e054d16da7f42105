"""What each rank runs for test_ranks_end.py: `ends_case.py FOLDER` writes how the runs of two ranks ended."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from forks import run_ranks
from kill_case import TINY, flags

from ppg_fast import stopping
from ppg_fast.cli import main
from ppg_fast.distributed import Ranks
from ppg_fast.jobs import RunFolder
from ppg_fast.jobs.prompts import PromptsJob

REWARDS = """
def some(messages, id):
    return None if id in ("q0", "q1", "q2") else 1.0
def none(messages):
    return None
def large(messages, id):
    return 1e39 if id == "q1" else 1.0
def fine(messages):
    return float(len(messages[-1]["content"]) % 3)
"""


def prompts(folder: Path) -> list[str]:
    """Five, of which one is held out; a step takes the others."""
    lines = [{"id": f"q{i}", "messages": [{"role": "user", "content": "why ?"}]} for i in range(5)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "rewards.py").write_text(REWARDS)
    return [
        *TINY,
        *flags(
            "--max-steps 4 --num-prompts 4 --num-generations 2 --partner none --policy-class greedy --vocab-size 280"
        ),
        *("--prompts", str(folder / "prompts.jsonl")),
    ]


def ends(folder: Path, rank: int, world: int) -> dict[str, object]:
    """Exit statuses of one run of each reward, and of one that a signal to the first rank alone ends in a rollout."""
    options, codes = prompts(folder), {}

    def train(name: str, reward: str) -> int:
        given = ["--output-dir", str(folder / f"{name}-{world}"), "--reward", f"{folder / 'rewards.py'}:{reward}"]
        return main(["train", *options, *given])

    # q4 is held out; of the two prompts that a rank takes in a step, one rank's are both without a reward
    split, PromptsJob.split = PromptsJob.split, lambda *_: ([4], [0, 1, 2, 3])  # type: ignore[method-assign]
    codes |= {name: train(name, name) for name in ("some", "none", "large")}
    PromptsJob.split = split  # type: ignore[method-assign]
    codes["whole"] = train("whole", "fine")
    check, count = stopping.check, 0

    def sending() -> None:
        nonlocal count
        count += 1
        if count == 5 and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        check()

    stopping.check = sending
    codes["cut"] = train("cut", "fine")
    stopping.check = check
    codes["resumed"] = main(["train", "--resume", str(folder / f"cut-{world}")])
    return codes


def on_rank(folder: Path) -> None:
    RunFolder.draw_curve = lambda *_: None  # type: ignore[method-assign]  # most of a tiny run's time
    ranks = Ranks.join(device="cpu", timeout=60)
    found = ends(folder, ranks.rank, ranks.world)
    (folder / f"rank{ranks.rank}of{ranks.world}.json").write_text(json.dumps(found))
    ranks.leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_ranks(2, lambda: on_rank(Path(sys.argv[1])))

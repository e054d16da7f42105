"""Runs that are killed at many moments, resumed, and compared bit by bit with one that was not: `python kill_case.py
FOLDER`.

One process imports everything once and forks the runs, each of them a process of its own, so that a run costs its steps
and not its imports. It prints one JSON line a trial.
"""

import gc
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import rich.progress
import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from ppg_fast import backends
from ppg_fast.cli import main
from ppg_fast.jobs import RunFolder
from ppg_fast.spec import require
from ppg_fast.training import checkpoint

WARM = (rich.progress, PreTrainedTokenizerFast, Qwen3ForCausalLM)  # imported before forks


def flags(text: str) -> list[str]:
    return text.split()


TINY = flags(
    "--device cpu --width 16 --layers 1 --no-progress --save-every 2 --eval-every 3 --max-new-tokens 2 "
    "--eval-dialogues 1"
)
JOBS = {  # with a KL term, so that the weights at the start are part of the state, and with one checkpoint kept;
    # soft_q has dialogues of earlier steps in its own
    "persona": flags(
        "--imitation-steps 3 --imitation-batch 2 --max-steps 5 --num-prompts 2 --num-generations 2 --kl-coef 0.1 "
        "--entropy-coef 0.1"
    ),
    "soft_q": flags(
        "--imitation-steps 0 --max-steps 4 --num-prompts 2 --num-generations 2 --max-turns 4 --loss-type soft_q "
        "--replay 2 --num-iterations 2"
    ),
    "offline": flags("--max-steps 8 --vocab-size 280 --num-prompts 3 --keep-checkpoints 1"),
}
CLOCKS = ("seconds", "step_time", "perf/tokens_per_second", "perf/peak_memory_mb")


def write_dialogues(path: Path) -> None:
    for i in range(10):
        answers = [f"i am anna number {i} .", "yes , quite sure !"]
        messages = [
            m for a in answers for m in ({"role": "user", "content": "who ?"}, {"role": "assistant", "content": a})
        ]
        with open(path, "a") as file:
            file.write(
                json.dumps({"id": f"d{i}", "group_id": "g", "messages": messages, "turn_rewards": [1.0, i / 10]}) + "\n"
            )


def start(argv: list[str], log: Path, folder: Path, die_at: int = 0) -> int:
    """A run in a process of its own that kills itself at its ``die_at``-th touch of a file in ``folder``; 0: never."""
    if child := os.fork():
        return child
    output, touched = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY), 0
    os.dup2(output, 1)
    os.dup2(output, 2)

    def count(event: str, arguments: tuple) -> None:
        nonlocal touched
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate") and str(folder) in str(
            arguments[0]
        ):
            touched += 1
            if touched == die_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    RunFolder.draw_curve = lambda *_: None  # a third of a life, and no part of what is compared
    status = main(argv)
    log.with_suffix(".touched").write_text(str(touched))
    os._exit(status)


def finish(child: int) -> int:
    """The exit status as a shell counts it."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return 128 - status if status < 0 else status


def again(argv: list[str], folder: Path) -> list[str]:
    """What to call after a death: --resume, or the same once more where not even the settings had been written."""
    return ["train", "--resume", str(folder)] if (folder / "config.yaml").exists() else argv


def result(folder: Path) -> tuple[dict, list[dict]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    saved = checkpoint.newest(folder / "checkpoints")
    require(saved is not None, "a finished run must have a checkpoint", folder)
    state = {name: saved[name] for name in ("phase", "finished", "taken", "training", "policy", "random")}
    return {**state, "weights": (folder / "checkpoint/model.safetensors").read_bytes()}, [
        {k: v for k, v in row.items() if k not in CLOCKS} for row in rows
    ]


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(
            one.view(torch.uint8) if one.dim() else one, other.view(torch.uint8) if one.dim() else other
        )
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def trial(job: str, argv: list[str], folder: Path, deaths: list[float | int], truth: tuple) -> None:
    """Die after so many seconds (float) or at such a touch (int), one life after the other, then live to the end."""
    argv, log, killed = [*argv, "--output-dir", str(folder)], folder.with_suffix(".log"), 0
    for death in deaths:
        child = start(again(argv, folder), log, folder, death if isinstance(death, int) else 0)
        if isinstance(death, float):
            time.sleep(death)
            os.kill(child, signal.SIGKILL)
        killed += finish(child) == 128 + signal.SIGKILL
    status = finish(start(again(argv, folder), log, folder))
    state, rows = result(folder) if status == 0 else ({}, [])
    line = {
        "job": job,
        "deaths": deaths,
        "killed": killed,
        "status": status,
        "state": same(state, truth[0]),
        "rows": rows == truth[1],
    }
    print(json.dumps(line | ({} if status == 0 else {"log": log.read_text()[-2000:]})), flush=True)


def every_trial(folder: Path) -> None:
    backends.default("cpu")
    torch.set_num_threads(1)
    # imports; no backward pass
    main(["train", *TINY, "--imitation-steps", "0", "--max-steps", "0", "--output-dir", str(folder / "warm")])
    sys.stdout.flush()
    gc.freeze()
    write_dialogues(folder / "log.jsonl")
    rng = random.Random(0)
    for job, options in JOBS.items():
        argv = ["train", *TINY, *options, *(["--data", str(folder / "log.jsonl")] if job == "offline" else [])]
        whole = folder / f"{job}-whole"
        began = time.perf_counter()
        status = finish(start([*argv, "--output-dir", str(whole)], whole.with_suffix(".log"), whole))
        seconds = time.perf_counter() - began
        require(status == 0, "the run that is not killed must finish", whole.with_suffix(".log").read_text())
        truth, touches = result(whole), int(whole.with_suffix(".touched").read_text())
        step = max(1, touches // (3 if job == "soft_q" else 6))  # it is a persona job but for its state
        for at in range(1 + rng.randrange(step), touches + 1, step):
            trial(job, argv, folder / f"{job}-touch-{at}", [at], truth)
        for number in range(2):
            deaths = [rng.uniform(0, seconds) for _ in range(rng.randint(1, 3))]
            trial(job, argv, folder / f"{job}-time-{number}", deaths, truth)


if __name__ == "__main__":
    every_trial(Path(sys.argv[1]))

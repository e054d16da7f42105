"""A training run whose sampler and partner is llama.cpp's own server, which dies and comes back: `python -m
ppg_fast.bench.llama_run FOLDER`, where `make test-llama` made the folder."""

import argparse
import itertools
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import result_file
from .llama_server import ASKED, EXACT, FLOAT32, MODEL, NAME, Server, served_by

REWARD = "def length(messages):\n    return min(len(messages[-1]['content']), 40) / 40\n"
SMALL = """--num-prompts 2 --num-generations 2 --max-turns 2 --max-new-tokens 12 --partner-tokens 12 --eval-dialogues 1
--no-progress --eval-every 99 --save-every 0 --learning-rate 1e-4 --policy-class greedy --seed 3 --device cpu"""
BETWEEN = (30, 120)  # seconds from the server's return to its next death
DIFFERENCE = "sampling/sampling_logp_difference/max"
END = 300.0  # seconds that a run may take to stop


class Run:
    """A training run in a process of its own against a server that is brought back where it dies."""

    def __init__(self, models: Path, folder: Path) -> None:
        self.models, self.folder, self.out, self.gguf = models, folder, folder / "run", folder / "policy.gguf"
        (folder / "rewards.py").write_text(REWARD)
        lines = [{"messages": [{"role": "user", "content": text}], "id": f"p{i}"} for i, text in enumerate(ASKED[:4])]
        (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.gguf.symlink_to((models / FLOAT32).resolve())  # what the refresh writes takes its place
        self.server = Server(self.gguf, folder, *EXACT, kept=True)

    def train(self, *more: str) -> "subprocess.Popen[bytes]":
        """Start training."""
        script = result_file.ROOT / "examples/llama_cpp/refresh.py"
        refresh = f"{sys.executable} {script} {{folder}} --like {self.models / NAME} --gguf {self.gguf}"
        refresh += f" --pid {self.server.pid_file} --url {self.server.address} --seconds 60"
        url = f"{self.server.address}/v1"
        given = ["--model", self.models / MODEL, "--prompts", self.folder / "prompts.jsonl", "--output-dir", self.out]
        given += ["--reward", f"{self.folder / 'rewards.py'}:length", "--partner", url, "--sampler", url]
        return self.start("train", *given, "--sampler-refresh", refresh, *SMALL.split(), *more)

    def start(self, *arguments: Any) -> "subprocess.Popen[bytes]":
        """Start a command of ours."""
        command = [sys.executable, "-m", "ppg_fast", *map(str, arguments)]
        with (self.folder / "run.log").open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=result_file.ROOT)
        return self.process

    def said(self) -> str:
        """By the command that was started last."""
        return (self.folder / "run.log").read_text()

    def rows(self, phase: str) -> list[dict[str, Any]]:
        """The metrics so far."""
        text = (self.out / "metrics.jsonl").read_text() if (self.out / "metrics.jsonl").exists() else ""
        return [row for row in map(json.loads, text.split("\n")[:-1]) if row["phase"] == phase]

    def wait_for_rollouts(self, process: "subprocess.Popen[bytes]", seconds: float = 900) -> None:
        """Until the server, restarted with the run's own weights, works at one of its requests."""
        deadline, seen = time.monotonic() + seconds, None
        while process.poll() is None and time.monotonic() < deadline:
            log = self.server.log.read_bytes()
            if seen is not None and b"launch_slot" in log[seen:]:
                return
            if seen is None and not self.gguf.is_symlink():
                seen = len(log)
            time.sleep(0.02)
        raise TimeoutError(self.said()[-500:])

    def stop(self) -> None:
        """Both, without mercy."""
        self.process.kill()
        self.process.wait()
        self.server.stop()


def survived(models: Path, folder: Path, seconds: float, seed: int = 0) -> dict[str, Any]:
    """What a run did in ``seconds`` while its server was killed at random moments, until SIGTERM asked it to stop."""
    run, moments, killed = Run(models, folder), random.Random(seed), []
    process, began = run.train("--max-steps", "100000", "--retries", "8"), time.monotonic()
    try:
        while (passed := time.monotonic() - began) < seconds and process.poll() is None:
            time.sleep(min(moments.uniform(*BETWEEN), seconds - passed))
            if run.server.answers() and process.poll() is None:
                run.server.kill()
                killed.append(round(time.monotonic() - began, 1))
        alive = process.poll() is None
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=END)
        return {"seconds": time.monotonic() - began, "killed": killed, "alive": alive, "status": status} | _facts(run)
    finally:
        run.stop()


def _facts(run: Run) -> dict[str, Any]:
    """Of the steps that were taken and of the requests that they made."""
    steps, last = run.rows("train"), (run.rows("rollout") or [{}])[-1]
    ends = [row["seconds"] for row in steps]
    return {
        "steps": [row["step"] for row in steps],
        "longest": max((b - a for a, b in itertools.pairwise(ends)), default=None),
        "difference": max((row[DIFFERENCE] for row in steps if DIFFERENCE in row), default=None),  # no turn, none
        **{name.removeprefix("endpoint/"): last[name] for name in last if name.startswith("endpoint/")},
        "last_line": (run.said().replace(str(run.folder), "").strip().splitlines() or [""])[-1][:300],
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Write ``llama_run.cpu.json``; 1 where the run did not live until it was stopped."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("folder", type=Path, help="where the models are")
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--output", type=Path, default=result_file.FOLDER)
    arguments = parser.parse_args(argv)
    from . import machine

    said = f"make test-llama ; python -m ppg_fast.bench.llama_run .llama --minutes {arguments.minutes:g}"
    file = machine.header(said, "cpu", server=served_by())
    with tempfile.TemporaryDirectory() as folder:
        found = survived(arguments.folder.resolve(), Path(folder), 60 * arguments.minutes)
    print(f"wrote {result_file.write(arguments.output, 'llama_run.cpu', file | {'run': found})}")
    return 0 if found["alive"] else 1


if __name__ == "__main__":
    sys.exit(main())

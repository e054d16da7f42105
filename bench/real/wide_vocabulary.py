"""A training step on 2,048 tokens with Gemma's 262,144 words: ours beside TRL's GRPO and transformers' own loss.

Each runs in a process of its own, so that its peak is its own. Every token's advantage is 1: there the three have the
same gradient, and its norm says so.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from . import models

NAMES = ("ppg_fast", "TRL GRPO", "transformers")
RECOMPUTED = ", activations recomputed"
# what trains: the rank of adapters, and whether layers keep their input only, by transformers' own switch
WHAT = {
    f"all weights{RECOMPUTED}": (0, True),
    "all weights": (0, False),
    f"LoRA{RECOMPUTED}": (16, True),
    "LoRA": (16, False),
}
TOKENS, TURN = 2048, 32  # a turn of the policy; of a quarter active, every fourth
SHARES = (1.0, 0.25)
WORDS = (1000, 200_000)  # the tokens are drawn from


def measure(arguments: Any) -> dict[str, Any]:
    """Every contestant, each in its own process, one after the other; with ``--set "only=TEXT|TEXT"`` those whose case
    holds one of the texts, "LoRA 0.25" say."""
    models.folder(models.GEMMA3)
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    wanted = arguments.set.get("only", "").split("|")
    cases = [case for case in product(WHAT, SHARES, NAMES) if any(w in " ".join(map(str, case)) for w in wanted)]
    return {"tokens": TOKENS, "threads": 1, "steps": [_once(work, *case) for case in cases]}


def _once(work: Path, what: str, share: float, name: str) -> dict[str, Any]:
    """A step, or what it gave if it has been taken in this folder."""
    kept = work / f"wide {what} {share} {name}.json"
    if not kept.exists():
        kept.write_text(json.dumps(_apart(what, share, name)))
    return json.loads(kept.read_text())


def _apart(what: str, share: float, name: str) -> dict[str, Any]:
    load = os.getloadavg()[0]
    call = [sys.executable, "-m", "ppg_fast.bench.real.wide_vocabulary", what, str(share), name]
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(call, env={**os.environ, **own}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}, {what}: {(done.stderr.strip().splitlines() or ['killed'])[-1][:300]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"  {what}, {share:.0%} active, {name}: {found}", file=sys.stderr, flush=True)
    return {"what": what, "share": share, "name": name, "load_before": round(load, 2), **found}


# ---- in the process --------------------------------------------------------------------------------------------------
def sample_of(share: float) -> Any:
    """``TOKENS`` random tokens; the first is context, of the rest the ``share`` are the policy's, in turns of ``TURN``.

    A reward every third turn from the last, so that the return over three turns is 1 everywhere.
    """
    import torch

    from ppg_fast.dialogues.packing import Sample

    tokens = torch.randint(*WORDS, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    every, turns = round(1 / share), [-1] * TOKENS
    count = 0
    for first in range(0, TOKENS, TURN * every):
        start = max(first + TURN * (every - 1), 1)
        turns[start : first + TURN * every] = [count] * (first + TURN * every - start)
        count += 1
    return Sample(tokens, turns, [float((count - 1 - turn) % 3 == 0) for turn in range(count)], 0)


def _transformers_step(problem: Any) -> Callable[[], Any]:
    """Loss and backward as transformers computes them from ``labels``, then clipping and the optimizer."""
    import torch

    tokens = torch.tensor([problem.sample.tokens])
    labels = torch.where(torch.tensor([problem.sample.turn_ids]) >= 0, tokens, -100)
    problem.model.set_attn_implementation("sdpa")

    def step() -> None:
        problem.optimizer.zero_grad(set_to_none=True)
        problem.model(tokens, labels=labels, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(problem.model.parameters(), 1e9)
        problem.optimizer.step()

    return step


def _problem(what: str, share: float, name: str) -> Any:
    import torch
    from ppg_fast.bench.problem import Case
    from ppg_fast.bench.whole_step import WholeStep
    from transformers import AutoModelForCausalLM

    from ppg_fast.models.adaptation import add_lora, checkpoint_activations
    from ppg_fast.models.freed_memory import give_back_freed_memory

    torch.set_num_threads(1)
    model: Any = AutoModelForCausalLM.from_pretrained(models.folder(models.GEMMA3), dtype=torch.float32).train()
    rank, recomputed = WHAT[what]
    if rank:
        torch.manual_seed(0)
        add_lora(model, rank)
    if recomputed:
        checkpoint_activations(model)
        if name == "ppg_fast":  # as ppg-fast train does
            give_back_freed_memory(model)
    size = model.config.get_text_config()
    case = Case("training_step", TOKENS, size.vocab_size, size.hidden_size, device="cpu", dtype="float32")
    chosen = [p for p in model.parameters() if p.requires_grad]
    return WholeStep(case, model, torch.optim.SGD(chosen, lr=0.0), sample_of(share), {})


def _step(name: str, problem: Any) -> Callable[[], Any]:
    from ppg_fast.bench.whole_step import our_step, trl_step

    return {"ppg_fast": our_step, "TRL GRPO": trl_step, "transformers": _transformers_step}[name](problem)


def one(what: str, share: float, name: str) -> dict[str, Any]:
    """Seconds, processor seconds and peak memory of a model's first step.

    ``state_bytes``: weights and gradients, which any trainer of them needs. ``peak_bytes``: the weights and what the
    process grew by during the step, gradients included.
    """
    import torch
    from ppg_fast.bench import memory

    problem = _problem(what, share, name)
    step = _step(name, problem)
    every = list(problem.model.parameters())
    trained = [p for p in every if p.requires_grad]
    weights, gradients = (sum(p.numel() * p.element_size() for p in some) for some in (every, trained))
    sum(float(p.detach().sum()) for p in every)  # read from the disk, if they were not yet
    memory._settle()
    before = memory._kilobytes("VmRSS")
    memory.CLEAR.write_text("5")  # the high-water mark starts again from here
    wall, used = time.perf_counter(), time.process_time()
    step()
    seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - used
    peak = weights + 1024 * (memory._kilobytes("VmHWM") - before)
    norm = torch.stack([p.grad.double().norm() for p in trained if p.grad is not None]).norm()
    return {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "peak_bytes": peak,
        "state_bytes": weights + gradients,
        "grad_norm": float(norm),
        "active": problem.active_tokens,
    }


if __name__ == "__main__":
    print(json.dumps(one(sys.argv[1], float(sys.argv[2]), sys.argv[3])))

"""What each rank runs for test_ranks.py: `torchrun ranks_case.py FOLDER` writes what came out; without a launcher it is
one process. `ranks_case.py FOLDER HOW` loses a rank of a run and prints what the other did."""

import json
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from forks import fork, meeting
from kill_case import TINY, flags
from torch import distributed
from torch.distributed.tensor import Shard, distribute_tensor

from ppg_fast import backends
from ppg_fast.cli import main
from ppg_fast.dialogues.packing import CONTEXT, Sample
from ppg_fast.distributed import Ranks
from ppg_fast.jobs import OfflineJob, PersonaJob, RunFolder
from ppg_fast.models.causal_lm import distribute, make_model
from ppg_fast.models.sharding import whole
from ppg_fast.policy_classes import FullPlanning, Lookahead
from ppg_fast.spec import PolicyLossSpec, SoftQSpec
from ppg_fast.training import checkpoint
from ppg_fast.training.objective import Objective, Schedule
from ppg_fast.training.trainer import TrainingState, optimise

V = 23
PARALLEL = ("ddp", "fsdp2")
JOBS = {
    "persona": [
        *TINY,
        *flags(
            "--imitation-steps 2 --imitation-batch 3 --max-steps 4 --num-prompts 3 --num-generations 3 --max-turns 4"
        ),
        *flags("--kl-coef 0.1 --entropy-coef 0.1 --num-iterations 2 --loss-type ppo --max-tokens 200"),
    ],
    "offline": [*TINY, *flags("--max-steps 4 --vocab-size 280 --num-prompts 5 --kl-coef 0.1 --max-tokens 100")],
}


def dialogues(
    count: int, seed: int = 0, turns: tuple[int, ...] = (3, 1, 2, 5, 1, 4), group: int = 3, logprobs: bool = False
) -> list[Sample]:
    """Of very different lengths; groups of ``group`` in a row, so that ranks hold parts of them."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        n = turns[i % len(turns)]
        turn_ids = [CONTEXT] + [t for turn in range(n) for t in (CONTEXT, turn, turn, turn)]
        tokens = torch.randint(2, V, (len(turn_ids),), generator=generator).tolist()
        chances = (-torch.rand(len(turn_ids), generator=generator)).tolist() if logprobs else None
        found.append(Sample(tokens, turn_ids, torch.rand(n, generator=generator).tolist(), i // group, chances))
    return found


def idle_rank() -> list[Sample]:
    """Two dialogues, one for each rank; the second, alone in its group and without a reward, has no advantage."""
    one, two = dialogues(2, turns=(3, 3), group=1)
    return [one, replace(two, rewards=[0.0] * len(two.rewards))]


def unrewarded() -> list[Sample]:
    return [replace(d, rewards=[0.0] * len(d.rewards)) for d in dialogues(5)]


def exploding(step: int) -> list[Sample]:
    """In step 2 one dialogue, and so one rank, has a loss that float32 cannot hold."""
    first, *others = dialogues(7, step)
    return [replace(first, rewards=[3e38] * len(first.rewards)) if step == 2 else first, *others]


@dataclass(frozen=True)
class Case:
    """Some steps of training: the dialogues of each, objective and schedule."""

    samples: Callable[[int], list[Sample]] = lambda step: dialogues(7, step)
    objective: Objective = field(default_factory=lambda: Objective(Lookahead(2)))
    max_tokens: int = 30
    steps: int = 2
    tied: bool = True
    sync_each_batch: bool = False
    frozen: str = "-"  # weights with this in their name do not learn
    bf16: bool = False


PPO = PolicyLossSpec(loss_type="ppo", clip_low=0.02, clip_high=0.03, kl_coef=0.1, entropy_coef=0.01)
PLAIN = Objective(Lookahead(2), baseline="none")
CASES = {  # between them every reduction
    "sequence_sum": Case(),
    "imitation": Case(objective=Objective(imitate=True, reduction="token_mean")),
    "ppo, KL, entropy, 2 iterations": Case(objective=Objective(FullPlanning(), spec=PPO, num_iterations=2)),
    "gspo, 2 iterations": Case(
        objective=Objective(Lookahead(2), spec=PolicyLossSpec(loss_type="gspo"), num_iterations=2)
    ),
    "turn regression, 2 iterations": Case(
        objective=Objective(Lookahead(2), reduction="sum", eta=0.5, num_iterations=2), max_tokens=12
    ),
    "soft Q-learning, replay, 2 iterations": Case(
        objective=Objective(
            Lookahead(2), 0.9, "none", reduction="sum", num_iterations=2, soft_q=SoftQSpec(beta=0.5), replay=1
        ),
        max_tokens=12,
        steps=3,
    ),
    "a critic, GAE": Case(objective=Objective(FullPlanning(), 0.9, "value", gae_lambda=0.8), max_tokens=12, steps=3),
    "auto": Case(objective=Objective(FullPlanning(), signals=True, auto=True), max_tokens=12, steps=3),
    "importance cap, sequence_mean": Case(
        lambda step: dialogues(7, step, logprobs=True),
        Objective(spec=PolicyLossSpec(importance_cap=2.0), reduction="sequence_mean"),
    ),
    "one long dialogue, many short": Case(lambda step: dialogues(7, step, turns=(9, 1, 1, 1, 1, 1, 1)), max_tokens=6),
    "a rank without an active token": Case(lambda step: idle_rank(), PLAIN),
    "a rank without a dialogue": Case(lambda step: dialogues(1, step), PLAIN),
    "no dialogue at all": Case(lambda step: [], PLAIN),
    "nothing to learn": Case(lambda step: unrewarded(), PLAIN),
    "not finite on one rank": Case(exploding, PLAIN, steps=3),
    "head of its own, token_mean": Case(objective=Objective(Lookahead(2), reduction="token_mean"), tied=False),
    "gradients reduced each time, sum": Case(objective=Objective(Lookahead(2), reduction="sum"), sync_each_batch=True),
    "frozen head": Case(frozen="embed"),
    "frozen layer": Case(frozen="layers.0"),
    "bf16": Case(bf16=True),
}


def build(case: Case, parallel: str) -> tuple:
    model, ranks = make_model(V, width=16, layers=2), Ranks(parallel, case.bf16, case.sync_each_batch)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(case.frozen not in name)
    if not case.tied:
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().flip(0).clone())
        model.config.tie_word_embeddings = False
    distribute(model, ranks)
    return model, ranks


def run(case: Case, parallel: str) -> dict:
    model, ranks = build(case, parallel)
    schedule = Schedule(case.steps, 1e-2, warmup_steps=0, max_tokens=case.max_tokens)
    state = TrainingState.start(model, case.objective, schedule)
    rows = list(optimise(model, case.samples, case.objective, schedule, state, ranks))
    return {
        "rows": [{k: v for k, v in row.items() if not k.startswith("perf/") and k != "step_time"} for row in rows],
        "weights": {name: whole(w).clone() for name, w in model.state_dict().items()},
        "shards": sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in model.parameters()),
    }


def everything(parallel: str) -> dict[str, dict]:
    return {name: run(case, parallel) for name, case in CASES.items()}


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


LOSSES = {"killed": lambda: os.kill(os.getpid(), signal.SIGKILL), "silent": lambda: time.sleep(3600)}


def train(*options: object, cut_at: int = 0, act: Callable[[], None] = terminate) -> int:
    """`ppg-fast train`; at step ``cut_at`` rank 1 alone, or the only one, is told to end, or worse."""
    collects = {job: job.collect for job in (OfflineJob, PersonaJob)}

    def cutting(collect: Callable) -> Callable:
        def collected(self: object, step: int) -> list[Sample]:
            if step == cut_at and distributed.get_rank() == 1 % distributed.get_world_size():
                act()
            return collect(self, step)

        return collected

    for job, collect in collects.items():
        job.collect = cutting(collect)
    # most of a tiny run's time, and no part of what is compared
    draw, RunFolder.draw_curve = RunFolder.draw_curve, lambda *_: None
    try:
        return main(["train", *map(str, options)])
    finally:
        RunFolder.draw_curve = draw
        for job, collect in collects.items():
            job.collect = collect


def jobs(folder: Path, parallel: str, first: bool) -> dict[str, int]:
    """Exit statuses of whole runs, of runs that are cut, and of their second halves; the runs are folders for the test
    to look into."""
    codes = {}
    for job in JOBS:
        options = (*JOBS[job], *(("--data", folder / "log.jsonl") if job == "offline" else ()), "--parallel", parallel)
        codes[f"{job} whole"] = train(*options, "--output-dir", folder / f"{job}-{parallel}")
        codes[f"{job} cut"] = train(*options, "--output-dir", folder / f"{job}-{parallel}-cut", cut_at=3)
        if first:
            shutil.copytree(folder / f"{job}-{parallel}-cut", folder / f"{job}-{parallel}-moved")
            shutil.copytree(folder / f"{job}-alone-cut", folder / f"{job}-alone-to-{parallel}")
        distributed.barrier()
        codes[f"{job} resumed"] = train("--resume", folder / f"{job}-{parallel}-cut")
        codes[f"{job} taken up"] = train("--resume", folder / f"{job}-alone-to-{parallel}", "--parallel", parallel)
    return codes


def failures(folder: Path, ranks: Ranks) -> dict[str, object]:
    """Rank 1 alone cannot write its part of a checkpoint; then one byte of its part of another is not what it wrote."""
    tensors = {step: distribute_tensor(torch.full((4096,), float(step)), ranks.mesh, [Shard(0)]) for step in (1, 2, 3)}
    states = {step: {"step": step, "spread": tensor} for step, tensor in tensors.items()}
    checkpoint.save(folder, 1, states[1], 3, ranks)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if ranks.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 12, limits[1]))
    try:
        checkpoint.save(folder, 2, states[2], 3, ranks)
        refusal = ""
    except OSError as error:
        refusal = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    distributed.barrier()
    kept = sorted(path.name for path in folder.iterdir())
    distributed.barrier()
    path = checkpoint.save(folder, 3, states[3], 3, ranks) / checkpoint.SHARDS / "__1_0.distcp"
    if ranks.rank == 1:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    distributed.barrier()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = checkpoint.newest(folder, ranks)
    assert found is not None
    return {
        "refusal": refusal,
        "kept": kept,
        "found": (found["step"], whole(found["spread"]), found["spread"].to_local().numel()),
        "said": [str(w.message) for w in said],
    }


def on_ranks(folder: Path) -> None:
    torch.set_num_threads(1)
    backends.default("cpu")
    ranks = Ranks.join(device="cpu", timeout=60)
    results = {parallel: everything(parallel) for parallel in PARALLEL}
    codes = {parallel: jobs(folder, parallel, ranks.is_main) for parallel in PARALLEL}
    failing = Ranks("fsdp2")
    distribute(make_model(V, width=16, layers=1), failing)
    results |= {"codes": codes, "failures": failures(folder / "failures", failing)}
    torch.save(results, folder / f"rank{ranks.rank}of{ranks.world}.pt")
    ranks.leave()


def lose(folder: Path, how: str) -> dict[str, object]:
    """Exit status and words of rank 0 of a run whose rank 1 is lost, without torchrun, which would end it."""
    options = (*JOBS["offline"], "--data", folder / "log.jsonl", "--rank-timeout", 5, "--parallel", "fsdp2")

    def run() -> int:
        return train(*options, "--output-dir", folder / how, cut_at=4, act=LOSSES[how])

    logs = [folder / f"{how}-{rank}.log" for rank in range(2)]
    children = [fork(run, of, log) for of, log in zip(meeting(2), logs, strict=True)]
    status = os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1])
    os.kill(children[1], signal.SIGKILL)  # where it is only silent
    os.waitpid(children[1], 0)
    return {"how": how, "status": status, "said": logs[0].read_text()}


if __name__ == "__main__":
    if sys.argv[2:]:
        torch.set_num_threads(1)
        for how in sys.argv[2:]:
            print(json.dumps(lose(Path(sys.argv[1]), how)), flush=True)
    else:
        on_ranks(Path(sys.argv[1]))

"""A cell of the study: one arm trained on one partner from one seed, in a process of its own.

The arms of a seed begin with the same weights and sampling noise, and meet the same openings step by step.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ppg_fast.writing import opened

from .dialogue import PARTNERS

ARMS = ("full", "gamma 0.9", "GAE", "the window", "greedy", "lag weights", "auto")
FULL, GAMMA, GAE, WINDOW, GREEDY, LAGS, AUTO = ARMS
SEEDS = (0, 1, 2)
SETTINGS: dict[str, Any] = {
    "lora_rank": 16,
    "lora_target_modules": ".*layers[.]2[0-9][.].*_proj",  # the last ten of thirty layers: half of the backward pass
    "learning_rate": 4e-4,
    "warmup_steps": 1,
    "max_steps": 12,
    "num_prompts": 4,
    "num_generations": 8,
    "max_new_tokens": 4,
    "temperature": 0.5,  # at 1 a model of this size, of four bits a weight, says little that can be understood
    "dtype": "bfloat16",  # half the time of float32 where the processor has such products; the adapters are float32
    "eval_dialogues": 32,
    "threads": 1,
    "device": "cpu",
}
HELD_OUT = 10**9  # seed of the first dialogue that no cell trains on


@dataclass(frozen=True)
class Cell:
    """Which one."""

    delay: int
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"delay {self.delay}, {self.arm}, seed {self.seed}"

    def settings(self, prediction: dict[str, Any]) -> dict[str, Any]:
        """What the arm changes; ``prediction`` names the window and the weights of the lags."""
        return {
            FULL: {"policy_class": "full"},
            GAMMA: {"policy_class": "full", "gamma": 0.9},
            GAE: {"policy_class": "full", "baseline": "value", "gae_lambda": 0.95},
            WINDOW: {"policy_class": prediction["window"]},
            GREEDY: {"policy_class": "greedy"},
            LAGS: {"policy_class": prediction["weights"]},
            AUTO: {"policy_class": "auto"},
        }[self.arm]


def grid() -> list[Cell]:
    """All cells in the order in which they are trained: the arms of a seed and a delay side by side."""
    return [Cell(delay, arm, seed) for seed in SEEDS for delay in PARTNERS for arm in ARMS]


def told(rollouts: Sequence[Any]) -> dict[str, float]:
    """Means over dialogues: the return without the partner's moods, and the share of truthful answers."""
    earned = sum(r.total_reward - r.environment.moods for r in rollouts) / len(rollouts)
    return {"return": earned, "truthful": sum(r.environment.truthful for r in rollouts) / len(rollouts)}


def train(cell: Cell, settings: dict[str, Any]) -> dict[str, Any]:
    """What is `told` of each step's rollouts, and of held-out dialogues before and after."""
    from ppg_fast.config import TrainConfig
    from ppg_fast.jobs.policy import Policy
    from ppg_fast.training.trainer import optimise

    start = time.perf_counter()
    config = TrainConfig(seed=cell.seed, **settings)
    policy, partner, steps = Policy(config, lambda: None), PARTNERS[cell.delay], []

    def collect(step: int) -> Any:
        first = cell.seed * 10**6 + 10**5 + step * config.num_prompts
        seeds = range(first, first + config.num_prompts)
        rollouts = policy.roll_out(partner, seeds, config.num_generations, policy.generator)
        steps.append(told(rollouts))
        return [r.sample for r in rollouts]

    def held_out() -> dict[str, float]:
        seeds = range(HELD_OUT, HELD_OUT + config.eval_dialogues)
        return told(policy.roll_out(partner, seeds, 1, policy.sampling_generator(0)))

    before = held_out()
    for row in optimise(policy.model, collect, policy.objective(), policy.schedule()):
        print(f"{cell}: step {row['step']} {steps[-1]} gradient {row['grad_norm']:.3g}", flush=True)
    return {
        **asdict(cell),
        "policy_class": config.policy_class,
        "before": before,
        "after": held_out(),
        "returns": [round(s["return"], 4) for s in steps],
        "truthful": [round(s["truthful"], 4) for s in steps],
        "seconds": round(time.perf_counter() - start, 1),
    }


def main(given: str, output: str) -> None:
    """``given``: JSON of a cell and its settings; its result into the file ``output``."""
    task = json.loads(given)
    found = train(Cell(**task["cell"]), task["settings"])
    with opened(Path(output)) as file:
        file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])

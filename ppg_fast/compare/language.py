"""A problem with a language model: training runs of the real trainer, and the gradient of every class measured on
common rollouts."""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppg_fast.compare.summary import CLEAR
from ppg_fast.config import TrainConfig
from ppg_fast.dialogues.chat_format import make_word_tokenizer
from ppg_fast.dialogues.packing import Sample, pack
from ppg_fast.functional import partial_returns, turn_advantages
from ppg_fast.jobs.persona import demonstrate
from ppg_fast.jobs.policy import Policy
from ppg_fast.models.causal_lm import token_advantages, token_logprobs
from ppg_fast.policy_classes import policy_class
from ppg_fast.rollouts.problems import Problem, ProblemDialogue, words
from ppg_fast.training.auto import WEIGHT
from ppg_fast.training.objective import Objective, Schedule
from ppg_fast.training.trainer import optimise

DEFAULTS: dict[str, Any] = {
    "width": 32, "layers": 1, "threads": 1, "max_new_tokens": 2, "num_prompts": 4, "num_generations": 8,
    "learning_rate": 2e-3,
    "max_steps": 40, "imitation_steps": 40, "imitation_batch": 16, "imitation_learning_rate": 5e-3, "eval_every": 5,
    "eval_dialogues": 64,
}  # fmt: skip


@dataclass(frozen=True)
class ProblemInWords:
    """A problem; ``shared``: the dialogues of a group have the same noise."""

    problem: Problem
    shared: bool = False

    def dialogue(self, rng: random.Random | None = None) -> ProblemDialogue:
        """One with noise from ``rng``, or without."""
        return ProblemDialogue(self.problem, rng, self.shared)


class Student:
    """A small model after its warm start, which is common to all classes of a seed; kept in ``folder`` so that it is
    made once."""

    def __init__(self, of: ProblemInWords, config: TrainConfig, folder: Path) -> None:
        self.of, self.config = of, config
        self.policy = Policy(config, lambda: make_word_tokenizer(words()))
        path = folder / f"warm-{of.problem.name}-{config.seed}.pt"
        if path.exists():
            self.policy.model.load_state_dict(torch.load(path, weights_only=True))
        else:
            self._imitate()
            new = path.with_suffix(f".{os.getpid()}.new")
            torch.save(self.policy.model.state_dict(), new)
            new.replace(path)
        self.policy.rng, self.policy.generator = (
            random.Random(config.seed + 1),
            self.policy.sampling_generator(config.seed + 1),
        )

    def _imitate(self) -> None:
        """A script that tosses a coin between the two answers."""
        c, policy = self.config, self.policy
        make = lambda g: demonstrate(policy.chat, self.of.dialogue(), policy.rng, c.teacher_skill, g)  # noqa: E731
        collect = lambda step: [make(g) for g in range(c.imitation_batch)]  # noqa: E731
        schedule = Schedule(c.imitation_steps, c.imitation_learning_rate, 10, 1.0)
        for _ in optimise(policy.model, collect, Objective(imitate=True, reduction="token_mean"), schedule):
            pass

    def rollouts(self, step: int) -> list[Sample]:
        """Groups of dialogues with noise."""
        del step
        policy, c = self.policy, self.config
        seeds = [policy.rng.getrandbits(48) for _ in range(c.num_prompts)]
        make = lambda: self.of.dialogue(policy.rng)  # noqa: E731
        return [r.sample for r in policy.roll_out(make, seeds, c.num_generations, policy.generator)]

    def logged(self, count: int) -> Callable[[int], list[Sample]]:
        """Steps on ``count`` dialogues of the policy as it is now, all of them one group."""
        c = self.config
        size = c.num_prompts * c.num_generations
        log = [replace(sample, group_id=0) for i in range(0, count, size) for sample in self.rollouts(i)][:count]
        return lambda _: self.policy.rng.sample(log, size)

    def evaluate(self) -> float:
        """Mean return without noise, of the same dialogues and sampling every time."""
        count = self.config.eval_dialogues
        rollouts = self.policy.roll_out(self.of.dialogue, range(count), 1, self.policy.sampling_generator(0))
        return sum(r.total_reward for r in rollouts) / count


def train(of: ProblemInWords, config: TrainConfig, folder: Path, offline: int = 0) -> dict[str, Any]:
    """One run: steps, mean returns at them, and with auto the mean weight of each lag at the end. ``offline``: on so
    many dialogues of the warm start in place of its own."""
    student = Student(of, config, folder)
    collect = student.logged(offline) if offline else student.rollouts
    steps, returns, weights = [0], [student.evaluate()], {}
    for row in optimise(student.policy.model, collect, student.policy.objective(), student.policy.schedule()):
        weights = {name: value for name, value in row.items() if name.startswith(WEIGHT)} or weights
        if row["step"] % config.eval_every == 0 or row["step"] == config.max_steps:
            steps.append(row["step"])
            returns.append(student.evaluate())
    found = {
        "steps": steps,
        "returns": returns,
        "dialogues_per_step": config.num_prompts * config.num_generations,
    }
    return found | ({"weights": list(weights.values())} if weights else {})


def measure(
    of: ProblemInWords, config: TrainConfig, folder: Path, classes: Sequence[str], batches: int
) -> dict[str, Any]:
    """Every class's batch gradient at the warm start, in the space of all parameters, over ``batches`` independent
    batches.

    With g_m the gradient of batch m, unbiased (sums over pairs of different batches):
        |G_S|^2 = <g_m, g_m'>,  bias^2 = <d_m, d_m'> with d = g_S - g_full,  cosine from <g_S, g_full>;  variance =
        E|g|^2 - |G_S|^2
    ``bias_low``, ``bias_high``: two standard errors beside its square; where the first is 0, none was seen.
    ``cosine`` is a ratio of such estimates, cut at 1. ``alignment``: expected cosine of a batch gradient with G_full.
    """
    student = Student(of, config, folder)
    chosen = [policy_class(c) for c in classes]
    full, gradients = list(classes).index("full"), []
    for step in range(batches):
        samples = student.rollouts(step)
        batch = pack(samples)
        returns = (partial_returns(batch.rewards, c, turn_counts=batch.turn_counts) for c in chosen)
        advantages = [
            token_advantages(batch, turn_advantages(r, batch.group_ids, turn_counts=batch.turn_counts)) for r in returns
        ]
        parameters = [p for p in student.policy.model.parameters() if p.requires_grad]
        logprobs = token_logprobs(student.policy.model, batch)
        rows = []
        for number, a in enumerate(advantages):
            out = torch.autograd.grad(
                (logprobs * a).sum() / len(samples), parameters, retain_graph=number + 1 < len(advantages)
            )
            rows.append(torch.cat([g.flatten() for g in out]))
        gradients.append(torch.stack(rows))
    return _statistics(torch.stack(gradients).double(), classes, full)


def _squared_length(drawn: Tensor) -> tuple[float, float]:
    """|E d|^2 of (M, D) independent draws, without bias, and its standard error by the jackknife over draws."""
    M, products = len(drawn), drawn @ drawn.T
    pairs, own, rows = products.sum() - products.trace(), products.diagonal(), products.sum(1)
    without = (pairs - 2 * (rows - own)) / ((M - 1) * (M - 2))  # each draw left out in turn
    return float(pairs / (M * (M - 1))), float(((M - 1) / M * (without - without.mean()).square().sum()).sqrt())


def _statistics(gradients: Tensor, classes: Sequence[str], full: int) -> dict[str, Any]:
    """By class, from (M, C, D) batch gradients."""
    M = len(gradients)
    total = gradients.sum(0)
    own = torch.einsum("mcd,med->ce", gradients, gradients)
    inner, square = (total @ total.T - own) / (M * (M - 1)), own.diagonal() / M
    out = {}
    for c, name in enumerate(classes):
        bias, error = _squared_length(gradients[:, c] - gradients[:, full])
        scale, true = float(inner[c, c].clamp(min=1e-12)) ** 0.5, float(inner[full, full].clamp(min=1e-12)) ** 0.5
        out[name] = {
            "gradient_norm": scale,
            "variance": float(square[c] - inner[c, c]),
            "bias": max(0.0, bias) ** 0.5,
            "bias_low": max(0.0, bias - CLEAR * error) ** 0.5,
            "bias_high": max(0.0, bias + CLEAR * error) ** 0.5,
            "cosine": max(-1.0, min(1.0, float(inner[c, full]) / (scale * true))),
            "alignment": float(inner[c, full] / square[c].sqrt()) / true,
        }
    return out

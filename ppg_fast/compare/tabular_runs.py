"""Training runs of a tabular policy, whose return is exact at every step."""

from typing import Any

import torch

from ppg_fast.compare.tabular import TabularProblem, estimate, sampled_signals, soft_q_gradient
from ppg_fast.policy_classes import PolicyClass, policy_class
from ppg_fast.rollouts.problems import problem
from ppg_fast.training.auto import WindowChooser
from ppg_fast.training.experience import Experience
from ppg_fast.training.objective import Schedule

ROUNDING = 1e-9  # of the enumeration: less bias than this is none
PROMPTS, GROUP, STEPS, LEARNING_RATE, EVERY = 4, 8, 60, 0.1, 2


def train(
    name: str,
    chosen: str,
    seed: int,
    *,
    candidates: tuple[PolicyClass, ...],
    max_steps: int = STEPS,
    beta: float = 0.0,
    offline: int = 0,
    noise: float = 1.0,
) -> dict[str, Any]:
    """One run from the policy that tosses a coin, with the trainer's optimizer and schedule; ``beta`` > 0: by soft
    Q-learning. ``offline``: on so many dialogues of that policy in place of its own; ``noise`` times the problem's."""
    tabular, generator = TabularProblem(problem(name).with_noise(noise)), torch.Generator().manual_seed(seed)
    logged = tabular.sample(tabular.start(), offline, generator) if offline else None
    experience = Experience(0)
    logits = tabular.start().requires_grad_()
    schedule = Schedule(max_steps, LEARNING_RATE, warmup_steps=1)
    optimizer = torch.optim.AdamW([logits], lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    chooser = WindowChooser(candidates) if chosen == "auto" else None
    steps, returns, changes = [0], [tabular.value(logits.detach())], []
    for step in range(1, max_steps + 1):
        now = logits.detach()
        if logged:  # all of one policy, so that they are one group
            drawn = torch.randperm(offline, generator=generator)[: PROMPTS * GROUP]
            actions, rewards = (values[drawn] for values in logged)
        else:
            actions, rewards = tabular.sample(now, PROMPTS * GROUP, generator)
        window = chooser.current if chooser else policy_class(chosen)
        if beta:
            counts = torch.full((len(rewards),), rewards.shape[1])
            experience.take_in((), experience.means_with(rewards, counts))
            logits.grad = soft_q_gradient(now, tabular.start(), window, actions, rewards, beta, experience.means)
        else:
            group = len(rewards) if logged else GROUP
            logits.grad = -estimate(tabular, now, window, actions, rewards, group) * (chooser.scale if chooser else 1.0)
        if chooser:
            row = chooser.observe(sampled_signals(now, candidates, actions, rewards, GROUP))
            if "auto/reason" in row:
                changes.append([step, row["policy_class"], row["auto/reason"]])
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate_at(step)
        optimizer.step()
        if step % EVERY == 0 or step == max_steps:
            steps.append(step)
            returns.append(tabular.value(logits.detach()))
    return {"steps": steps, "returns": returns, "changes": changes, "dialogues_per_step": PROMPTS * GROUP}


def measure(name: str, classes: tuple[str, ...], noise: float = 1.0) -> dict[str, Any]:
    """Exact moments at the start, of the mean over a step's dialogues."""
    tabular = TabularProblem(problem(name).with_noise(noise))
    out = {}
    for c in classes:
        m = tabular.moments(tabular.start(), c, GROUP)
        signal, variance = float(m.gradient.square().sum()), m.group_variance / PROMPTS
        row = {
            "gradient_norm": signal**0.5,
            "variance": variance,
            "bias": m.bias if m.bias > ROUNDING else 0.0,
            "cosine": m.cosine,
        }
        out[c] = {**row, "alignment": m.cosine * (signal / (signal + variance)) ** 0.5}
    return out

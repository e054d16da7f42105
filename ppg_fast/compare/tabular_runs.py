"""Training runs of tabular policies, all seeds at once; the return is exact at every step."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ppg_fast.compare.tabular import TabularProblem, ascent, estimate, sampled_signals, soft_q_gradient
from ppg_fast.compare.tabular_critic import TabularCritic
from ppg_fast.functional import partial_returns, turn_advantages
from ppg_fast.policy_classes import PolicyClass
from ppg_fast.training.auto import CreditWeights, mean_by_lag
from ppg_fast.training.experience import Experience
from ppg_fast.training.objective import Schedule

ROUNDING = 1e-9  # of the enumeration: less bias than this is none
PROMPTS, GROUP, STEPS, LEARNING_RATE, EVERY = 4, 8, 60, 0.1, 2
COUNT = PROMPTS * GROUP  # dialogues of a step
RATES = (LEARNING_RATE / 2, LEARNING_RATE, LEARNING_RATE * 2, LEARNING_RATE * 4)  # to choose among

# (step, logits (S, T, 2), actions and rewards (S, COUNT, T)) -> the direction to go, (S, T, 2)
Learner = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def train(
    tabular: TabularProblem,
    learner: Learner,
    seeds: Sequence[int],
    *,
    max_steps: int = STEPS,
    offline: int = 0,
    learning_rate: float = LEARNING_RATE,
) -> list[dict[str, Any]]:
    """One run of each seed from the policy that tosses a coin, with the trainer's optimizer and schedule.

    ``offline``: on so many dialogues of that policy in place of its own. A seed's run does not depend on the others.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    start = tabular.start().expand(len(seeds), -1, -1)
    logged = _sampled(tabular, start, offline, generators, offline) if offline else None
    logits = start.clone().requires_grad_()
    schedule = Schedule(max_steps, learning_rate, warmup_steps=1)
    optimizer = torch.optim.AdamW([logits], lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    steps, returns = [0], [tabular.value(start)]
    for step in range(1, max_steps + 1):
        now = logits.detach()
        if logged:
            drawn = torch.stack([torch.randperm(offline, generator=g)[:COUNT] for g in generators])[..., None]
            actions, rewards = (values.take_along_dim(drawn, 1) for values in logged)
        else:
            actions, rewards = _sampled(tabular, now, COUNT, generators, GROUP)
        logits.grad = -learner(step, now, actions, rewards)
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate_at(step)
        optimizer.step()
        if step % EVERY == 0 or step == max_steps:
            steps.append(step)
            returns.append(tabular.value(logits.detach()))
    found = [
        {"steps": steps, "returns": curve, "dialogues_per_step": COUNT} for curve in torch.stack(returns, 1).tolist()
    ]
    for result, weights in zip(found, getattr(learner, "weights", ()), strict=False):
        result["weights"] = weights
    return found


def _sampled(
    tabular: TabularProblem, logits: Tensor, count: int, generators: Sequence[torch.Generator], group_size: int
) -> tuple[Tensor, Tensor]:
    """Actions and rewards (S, count, T), those of each policy by its own generator."""
    found = [tabular.sample(z, count, g, group_size) for z, g in zip(logits, generators, strict=True)]
    actions, rewards = zip(*found, strict=True)
    return torch.stack(actions), torch.stack(rewards)


def tuned(tabular: TabularProblem, make: Callable[[int], Learner], seeds: Sequence[int], **how: Any) -> float:
    """Of `RATES` the learning rate whose mean return over training is the highest, by ``seeds`` that nothing else
    uses."""
    returns = {}
    for rate in RATES:
        runs = train(tabular, make(len(seeds)), seeds, learning_rate=rate, **how)
        returns[rate] = sum(sum(run["returns"]) for run in runs)
    return max(RATES, key=returns.__getitem__)


# ---- learners --------------------------------------------------------------------------------------------------------
class PolicyGradient:
    """By a policy class; ``group_size``: of the leave-one-out baseline."""

    def __init__(self, window: PolicyClass, gamma: float = 1.0, group_size: int = GROUP) -> None:
        self.window, self.gamma, self.group_size = window, gamma, group_size

    def __call__(self, step: int, logits: Tensor, actions: Tensor, rewards: Tensor) -> Tensor:
        return estimate(logits, self.window, actions, rewards, self.group_size, self.gamma)


class Gae:
    """By generalised advantages over turns, with a critic that learns from each step after it was used."""

    def __init__(self, gae_lambda: float, turns: int, seeds: int) -> None:
        self.gae_lambda, self.critic = gae_lambda, TabularCritic(seeds, turns)

    def __call__(self, step: int, logits: Tensor, actions: Tensor, rewards: Tensor) -> Tensor:
        values = self.critic.values(actions, rewards).flatten(0, 1)
        # without values a residual is the reward, and full planning has no lambda
        ahead = self.gae_lambda if step > 1 else 1.0
        returns = partial_returns(rewards.flatten(0, 1), "full", values=values, gae_lambda=ahead)
        groups = torch.arange(len(returns)) // GROUP
        advantages = turn_advantages(returns, groups, "value", values=values)
        self.critic.learn(actions, rewards)
        return ascent(logits, actions, advantages.view(rewards.shape))


class Auto:
    """By the weights that each seed's own `CreditWeights` finds."""

    def __init__(self, seeds: int) -> None:
        self.found = [CreditWeights() for _ in range(seeds)]

    @property
    def weights(self) -> list[list[float]]:
        """The mean weight of each lag now, of each seed."""
        return [[value for _, value in mean_by_lag(own.matrix(own.turns))] for own in self.found]

    def __call__(self, step: int, logits: Tensor, actions: Tensor, rewards: Tensor) -> Tensor:
        count, turns = rewards.shape[1:]
        weights = torch.stack([own.scale * own.matrix(turns) for own in self.found])
        centred = turn_advantages(rewards.flatten(0, 1), torch.arange(len(logits) * count) // GROUP).view(rewards.shape)
        direction = ascent(logits, actions, torch.einsum("sik,stk->sit", centred.double(), weights))
        for i, own in enumerate(self.found):
            own.observe(sampled_signals(logits[i], actions[i], rewards[i], GROUP))
        return direction


class SoftQ:
    """By soft Q-learning, with the coin as reference."""

    def __init__(self, window: PolicyClass, beta: float, reference: Tensor, seeds: int) -> None:
        self.window, self.beta, self.reference = window, beta, reference
        self.experiences = [Experience(0) for _ in range(seeds)]

    def __call__(self, step: int, logits: Tensor, actions: Tensor, rewards: Tensor) -> Tensor:
        found = []
        for experience, z, taken, paid in zip(self.experiences, logits, actions, rewards, strict=True):
            counts = torch.full((len(paid),), paid.shape[1])
            experience.take_in((), experience.means_with(paid, counts))
            found.append(soft_q_gradient(z, self.reference, self.window, taken, paid, self.beta, experience.means))
        return -torch.stack(found)


def soft_optima(tabular: TabularProblem, window: PolicyClass, beta: float, offline: int, seed: int) -> dict[str, float]:
    """The return of where soft Q-learning ends: with every expectation known, and with those of a seed's ``offline``
    dialogues in their place."""
    logged = tabular.sample(tabular.start(), offline, torch.Generator().manual_seed(seed), offline)
    rows = tabular.window(window)
    exact, of_log = tabular.soft_optimum(rows, beta), tabular.soft_optimum(rows, beta, *logged)
    return {"soft_optimum": float(tabular.value(exact)), "soft_optimum_of_log": float(tabular.value(of_log))}


# ---- moments ---------------------------------------------------------------------------------------------------------
def measure(tabular: TabularProblem, classes: Sequence[str]) -> dict[str, Any]:
    """Exact moments at the start, of the mean over a step's dialogues."""
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

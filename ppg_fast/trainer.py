"""The training loop: collect dialogues, credit each turn for its window of rewards, take a step. Plain PyTorch around the kernels.

One loop serves three purposes, which differ in where the dialogues come from and what a turn's advantage is: on-policy partial policy
gradients (rollouts; windowed return minus a baseline), offline reward-weighted likelihood (logged dialogues; the windowed return) and
imitation (demonstrations; 1).
"""

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ppg_fast.data import CONTEXT, PackedBatch, Sample, micro_batches, pack
from ppg_fast.functional import PolicyLossOutput, partial_returns, turn_advantages
from ppg_fast.model import policy_loss, token_logprobs
from ppg_fast.spec import Lookahead, PolicyClass, PolicyLossSpec


@dataclass(frozen=True)
class Objective:
    """What a step climbs. ``imitate``: every turn has advantage 1, which is supervised fine-tuning through the same kernel."""

    policy_class: PolicyClass = field(default_factory=lambda: Lookahead(3))
    gamma: float = 1.0
    baseline: str = "leave_one_out"
    spec: PolicyLossSpec = field(default_factory=PolicyLossSpec)
    reduction: str = "sequence_sum"
    num_iterations: int = 1
    imitate: bool = False


@dataclass(frozen=True)
class Schedule:
    """Steps and step sizes: AdamW, ``warmup_steps`` to the peak learning rate, then linear to ``final_learning_rate`` of it.

    A step whose loss or gradient is not finite is skipped; more than ``max_skipped_steps`` of them in a row end the training.
    """

    max_steps: int
    learning_rate: float
    warmup_steps: int = 5
    final_learning_rate: float = 0.2
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_tokens: int = 16384
    max_skipped_steps: int = 3

    def learning_rate_at(self, step: int) -> float:
        """Of steps 1 .. max_steps."""
        rise = min(1.0, step / max(1, self.warmup_steps))
        return self.learning_rate * rise * (1 - (1 - self.final_learning_rate) * step / self.max_steps)


class NotFinite(FloatingPointError):
    """Too many steps in a row had a loss or gradient that is not finite. ``batches``: (step, its dialogues) of each of them."""

    def __init__(self, message: str, batches: list[tuple[int, Sequence[Sample]]]) -> None:
        super().__init__(message)
        self.batches = batches


@dataclass
class TrainingState:
    """What steps change, but for the sources of randomness. ``reference``: the weights at the start, where a KL term wants them."""

    model: Any
    optimizer: torch.optim.Optimizer
    reference: Any = None
    step: int = 0
    num_tokens: int = 0
    skipped_steps: int = 0

    @classmethod
    def start(cls, model: Any, objective: Objective, schedule: Schedule) -> "TrainingState":
        """Before the first step."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=schedule.weight_decay)
        return cls(model, optimizer, copy.deepcopy(model).requires_grad_(False) if objective.spec.kl_coef else None)

    def state_dict(self) -> dict[str, Any]:
        """Everything, as `torch.save` likes it."""
        return {name: v.state_dict() if hasattr(v, "state_dict") else v for name, v in vars(self).items()}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for name, value in saved.items():
            if isinstance(value, dict):
                getattr(self, name).load_state_dict(value)
            else:
                setattr(self, name, value)


def optimise(
    model: Any,
    collect: Callable[[int], Sequence[Sample]],
    objective: Objective,
    schedule: Schedule,
    state: TrainingState | None = None,
) -> Iterator[dict[str, Any]]:
    """Train ``model`` in place; yield the metrics of each step after it was taken, so that the caller may look, evaluate, save or stop.

    ``collect(step)`` gives the dialogues of a step: on-policy, it rolls out the model as it is now. ``state``: where to go on from,
    kept up to date. NotFinite after too many skipped steps; the weights are those before them.
    """
    state = state or TrainingState.start(model, objective, schedule)
    skipped: list[tuple[int, Sequence[Sample]]] = []
    for step in range(state.step + 1, schedule.max_steps + 1):
        start = time.perf_counter()
        samples = collect(step)
        for group in state.optimizer.param_groups:
            group["lr"] = schedule.learning_rate_at(step)
        metrics = update(model, state.optimizer, samples, objective, schedule, state.reference)
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
            skipped = []
        else:
            skipped.append((step, samples))
            state.skipped_steps += 1
        if len(skipped) > schedule.max_skipped_steps:
            seen = f"loss {metrics['loss']} and gradient norm {metrics['grad_norm']} at step {step}, the last of {len(skipped)} in a row"
            raise NotFinite(f"loss and gradient must be finite (the weights are those before these steps), got {seen}", skipped)
        seconds = time.perf_counter() - start
        tokens = sum(len(s.tokens) for s in samples)
        state.step, state.num_tokens = step, state.num_tokens + tokens
        yield {
            "step": step,
            **metrics,
            "learning_rate": schedule.learning_rate_at(step),
            "num_tokens": state.num_tokens,
            "skipped_steps": state.skipped_steps,
            "step_time": seconds,
            "perf/tokens_per_second": tokens / seconds,
            "perf/peak_memory_mb": peak_memory_mb(model),
        }


def update(
    model: Any,
    optimizer: torch.optim.Optimizer,
    samples: Sequence[Sample],
    objective: Objective,
    schedule: Schedule,
    reference: Any = None,
) -> dict[str, Any]:
    """``num_iterations`` steps on one set of dialogues; the metrics of the last.

    The loss is that of all dialogues at once, whatever the budget of a forward pass: advantages are made and denominators counted
    over all of them. Where no turn has an advantage, the loss is a connected zero, no step is taken and ``active_turns`` is 0.
    Where loss or gradient is not finite, as the metrics then say, the weights stay as they are and no further iteration follows.
    """
    batches = [pack(part) for part in list(micro_batches(samples, schedule.max_tokens)) or [[]]]
    everything = pack(samples)
    returns, advantages = credit(everything, objective)
    normalizer = _normalizer(samples, objective.reduction)
    rows = advantages.split([len(b.turn_counts) for b in batches])
    spec, device = objective.spec, model.device
    olds = [_frozen(model, b, spec) if objective.num_iterations > 1 else None for b in batches]
    refs = [None if reference is None else _frozen(reference, b, spec) for b in batches]
    sums, norm = _Sums(), 0.0
    for _ in range(objective.num_iterations):
        optimizer.zero_grad(set_to_none=True)
        sums = _Sums()
        for batch, part, old, ref in zip(batches, rows, olds, refs, strict=True):
            batch = batch.to(device)
            out = policy_loss(
                model,
                batch,
                part.to(device),
                spec,
                old_logprobs=old,
                ref_logprobs=ref,
                rollout_logprobs=batch.rollout_logprobs if spec.importance_cap else None,
                reduction=objective.reduction,
                normalizer=normalizer,
            )
            out.loss.backward()
            sums.add(out)
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.max_grad_norm))
        if not (math.isfinite(norm) and math.isfinite(sums.loss)):
            break
        if norm > 0:
            optimizer.step()
    return {**sums.means(), "grad_norm": norm, **describe(samples, everything, returns, advantages)}


TOKEN_MEANS = {"entropy": "entropy", "kl": "kl", "approx_kl": "approx_kl", "clip_fraction": "clip_ratio/region_mean"}  # ours: TRL's


class _Sums:
    """Loss and token means of a step, over its micro-batches."""

    def __init__(self) -> None:
        self.loss, self.tokens, self.totals = 0.0, 0, {"logprob": 0.0}

    def add(self, out: PolicyLossOutput) -> None:
        read = int((out.logprobs != 0).sum())
        self.loss += float(out.loss.detach())
        self.tokens += read
        self.totals["logprob"] += float(out.logprobs.sum())
        for ours, name in TOKEN_MEANS.items():
            if ours in out.metrics:
                self.totals[name] = self.totals.get(name, 0.0) + float(out.metrics[ours]) * read

    def means(self) -> dict[str, Any]:
        return {"loss": self.loss, **{name: total / max(1, self.tokens) for name, total in self.totals.items()}}


def credit(batch: PackedBatch, objective: Objective) -> tuple[Tensor, Tensor]:
    """Windowed returns and advantages of every turn, both (S, T) float32."""
    counts = batch.turn_counts
    there = torch.arange(batch.rewards.shape[1]) < counts[:, None]
    if objective.imitate:
        return batch.rewards, there.float()
    if not len(counts):
        return batch.rewards, batch.rewards
    returns = partial_returns(batch.rewards, objective.policy_class, gamma=objective.gamma, turn_counts=counts)
    return returns, turn_advantages(returns, batch.group_ids, baseline=objective.baseline, turn_counts=counts)


def _normalizer(samples: Sequence[Sample], reduction: str) -> float | None:
    """The reduction's denominator over all micro-batches: labels are the assistant's tokens but a dialogue's first."""
    labels = [sum(turn != CONTEXT for turn in s.turn_ids[1:]) for s in samples]
    total = {"token_mean": sum(labels), "sequence_mean": sum(n > 0 for n in labels), "sequence_sum": sum(n > 0 for n in labels)}
    return max(1.0, float(total[reduction])) if reduction in total else None


def _frozen(model: Any, batch: PackedBatch, spec: PolicyLossSpec) -> Tensor:
    with torch.no_grad():
        return token_logprobs(model, batch.to(model.device), spec.temperature)


def describe(samples: Sequence[Sample], batch: PackedBatch, returns: Tensor, advantages: Tensor) -> dict[str, Any]:
    """What the dialogues of a step were like, in the names that TRL uses where it has one."""
    totals = batch.rewards.sum(1)
    lengths = [sum(turn != CONTEXT for turn in s.turn_ids) / max(1, len(s.rewards)) for s in samples]
    groups = [totals[batch.group_ids == g] for g in batch.group_ids.unique()]
    metrics = {
        "reward": float(totals.mean()) if len(totals) else 0.0,
        "reward_std": float(totals.std(correction=0)) if len(totals) else 0.0,
        "frac_reward_zero_std": sum(bool((g == g[0]).all()) for g in groups) / max(1, len(groups)),
        "completions/mean_length": sum(lengths) / max(1, len(lengths)),
        "turns/mean_count": float(batch.turn_counts.float().mean()) if len(totals) else 0.0,
        "turns/adv_abs_mean": float(advantages.abs().sum() / batch.turn_counts.sum().clamp(min=1)),
        "active_turns": int((advantages != 0).sum()),
    }
    for turn in range(int(batch.turn_counts.max()) if len(totals) else 0):
        metrics[f"turns/return/{turn}"] = float(returns[batch.turn_counts > turn, turn].mean())
    return metrics


def require_nonnegative(samples: Sequence[Sample], names: Sequence[str]) -> None:
    """ValueError at the first negative reward: log pi weighted by it is no lower bound of the objective any more."""
    for sample, name in zip(samples, names, strict=True):
        for turn, reward in enumerate(sample.rewards):
            if reward < 0:
                rule = "offline rewards must be >= 0 (negative ones void the lower bound; allow_negative_rewards permits them)"
                raise ValueError(f"{rule}, got {reward} in dialogue {name!r}, turn {turn}")


def warn_if_hardly_credited(samples: Sequence[Sample], objective: Objective) -> None:
    """Warn where rewards come with the last turn only and the policy class looks less far ahead: most turns then learn nothing."""
    long = [s for s in samples if len(s.rewards) > 1]
    if not long or any(any(s.rewards[:-1]) for s in long) or not any(s.rewards[-1] for s in long):
        return
    returns, _ = credit(pack(long), objective)
    turns = sum(len(s.rewards) for s in long if s.rewards[-1])
    credited = int((returns != 0).sum())
    if credited < turns:
        seen = f"{objective.policy_class} credits {credited} of {turns} turns, FullPlanning() all"
        warnings.warn(f"rewards come with the last turn only: {seen}", stacklevel=2)


def peak_memory_mb(model: Any) -> float:
    """Peak of allocated CUDA memory where the model is on a GPU, else of the process's resident memory, in MB (10^6 bytes)."""
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device) / 1e6
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # bytes there, KiB elsewhere

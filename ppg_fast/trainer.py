"""The training loop: collect dialogues, credit each turn for its window of rewards, take a step. Plain PyTorch around the kernels.

One loop serves three purposes, which differ in where the dialogues come from and what a turn's advantage is: on-policy partial policy
gradients (rollouts; windowed return minus a baseline), offline reward-weighted likelihood (logged dialogues; the windowed return) and
imitation (demonstrations; 1).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppg_fast.adaptation import StartingWeights, load_trainable_state, trainable_state
from ppg_fast.data import PackedBatch, Sample, pack
from ppg_fast.metrics import TokenMeans, describe, peak_memory_mb
from ppg_fast.model import policy_loss, token_logprobs
from ppg_fast.objective import Objective, Schedule, credit, denominator, live_batches, reading
from ppg_fast.optimisers import make_optimizer, set_learning_rate
from ppg_fast.spec import PolicyLossSpec


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
    reference: StartingWeights | None = None
    step: int = 0
    num_tokens: int = 0
    skipped_steps: int = 0

    @classmethod
    def start(cls, model: Any, objective: Objective, schedule: Schedule) -> "TrainingState":
        """Before the first step."""
        optimizer = make_optimizer(
            model,
            schedule.optim,
            arguments=schedule.optim_args,
            betas=(schedule.adam_beta1, schedule.adam_beta2),
            weight_decay=schedule.weight_decay,
            offload=schedule.optim_offload,
        )
        return cls(model, optimizer, StartingWeights(model) if objective.spec.kl_coef else None)

    def state_dict(self) -> dict[str, Any]:
        """Everything that training changes, as `torch.save` likes it: frozen weights are not in it."""
        values = {name: v.state_dict() if hasattr(v, "state_dict") else v for name, v in vars(self).items() if name != "model"}
        return {"model": trainable_state(self.model), **values}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for name, value in saved.items():
            if name == "model":
                load_trainable_state(self.model, value)
            elif isinstance(value, dict):
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
        set_learning_rate(state.optimizer, schedule.learning_rate_at(step))
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
    reference: StartingWeights | None = None,
) -> dict[str, Any]:
    """``num_iterations`` steps on one set of dialogues; the metrics of the last.

    The loss is that of all dialogues at once, whatever the budget of a forward pass: advantages are made and denominators counted
    over all of them. Where no turn has an advantage, the loss is a connected zero, no step is taken and ``active_turns`` is 0.
    Where loss or gradient is not finite, as the metrics then say, the weights stay as they are and no further iteration follows.
    """
    everything = pack(samples)
    returns, advantages = credit(everything, objective)
    normalizer = denominator(samples, objective.reduction)
    parts = live_batches(samples, advantages, objective, schedule.max_tokens)
    batches, rows = zip(*parts, strict=True)
    spec, device = objective.spec, model.device
    olds = [_frozen(model, b, spec, schedule) if objective.num_iterations > 1 else None for b in batches]
    refs: list[Tensor | None] = [None] * len(batches)
    if reference is not None:
        with reference.in_place() as start:
            refs = [_frozen(start, b, spec, schedule) for b in batches]
    sums, norm = TokenMeans(), 0.0
    for _ in range(objective.num_iterations):
        optimizer.zero_grad(set_to_none=True)
        sums = TokenMeans()
        for batch, part, old, ref in zip(batches, rows, olds, refs, strict=True):
            batch = batch.to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=schedule.bf16):
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
            sums.add(out, batch.rollout_logprobs, old)
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.max_grad_norm))
        if not (math.isfinite(norm) and math.isfinite(sums.loss)):
            break
        if norm > 0:
            optimizer.step()
    read = reading(samples, advantages, objective, batches)
    seen = describe(samples, everything, returns, advantages, spec, shared_ratios=objective.num_iterations > 1)
    return {**sums.means(), "grad_norm": norm, **read, **seen}


def _frozen(model: Any, batch: PackedBatch, spec: PolicyLossSpec, schedule: Schedule) -> Tensor:
    """Log-probs without a gradient, and without dropout."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=schedule.bf16):
            return token_logprobs(model, batch.to(model.device), spec.temperature)
    finally:
        model.train(was_training)

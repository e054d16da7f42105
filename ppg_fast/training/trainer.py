"""The training loop: collect dialogues, credit each turn for its window of rewards, take a step. Plain PyTorch around
the kernels.

One loop serves three purposes, which differ in where the dialogues come from and what a turn's advantage is: on-policy
partial policy gradients (rollouts; windowed return minus a baseline), offline reward-weighted likelihood (logged
dialogues; the windowed return) and imitation (demonstrations; 1).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ppg_fast.dialogues.packing import NOTHING, PackedBatch, Sample, micro_batches, pack
from ppg_fast.distributed import Ranks, whole
from ppg_fast.models.adaptation import StartingWeights
from ppg_fast.models.causal_lm import PolicyModule
from ppg_fast.spec import PolicyLossSpec
from ppg_fast.training.metrics import TokenMeans, describe, peak_memory_mb
from ppg_fast.training.objective import Objective, Schedule, credit, denominator, live_parts, reading
from ppg_fast.training.optimisers import set_learning_rate
from ppg_fast.training.signals import SignalTokens
from ppg_fast.training.state import NotFinite, TrainingState


def optimise(
    model: Any,
    collect: Callable[[int], Sequence[Sample]],
    objective: Objective,
    schedule: Schedule,
    state: TrainingState | None = None,
    ranks: Ranks | None = None,
) -> Iterator[dict[str, Any]]:
    """Train ``model`` in place; yield the metrics of each step after it was taken, so that the caller may look,
    evaluate, save or stop.

    ``collect(step)`` gives the dialogues of a step: on-policy, it rolls out the model as it is now. ``state``: where to
    go on from,
    kept up to date. ``ranks``: who trains it together, `spread` before; each of them collects the dialogues of all, and
    all of them yield the same metrics. NotFinite after too many skipped steps; the weights are those before them.
    """
    ranks = ranks or Ranks()
    state = state or TrainingState.start(model, objective, schedule)
    for step in range(state.step + 1, schedule.max_steps + 1):
        start = time.perf_counter()
        samples = collect(step)
        set_learning_rate(state.optimizer, schedule.learning_rate_at(step))
        chooser = state.chooser
        now = replace(objective, policy_class=chooser.current, scale=chooser.scale) if chooser else objective
        metrics = update(model, state.optimizer, samples, now, schedule, state.reference, ranks)
        if math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]):
            state.skipped.in_a_row.clear()
        else:
            state.skipped.add(step, samples)
        if len(in_a_row := state.skipped.in_a_row) > schedule.max_skipped_steps:
            seen = (
                f"loss {metrics['loss']} and gradient norm {metrics['grad_norm']} at step {step}, the last of "
                f"{len(in_a_row)} in a row"
            )
            raise NotFinite(
                f"loss and gradient must be finite (the weights are those before these steps), got {seen}", in_a_row
            )
        signals = metrics.pop("signals", None)
        if chooser and signals:
            metrics |= chooser.observe(signals)
        seconds = time.perf_counter() - start
        tokens = sum(len(s.tokens) for s in samples)
        state.step, state.num_tokens = step, state.num_tokens + tokens
        yield {
            "step": step,
            **metrics,
            "learning_rate": schedule.learning_rate_at(step),
            "num_tokens": state.num_tokens,
            "skipped_steps": state.skipped.total,
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
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """``num_iterations`` steps on one set of dialogues; the metrics of the last.

    The loss is that of all dialogues at once, whatever the budget of a forward pass and the number of ranks: advantages
    are made and denominators counted over all of them, and only the passes are shared out. Where no turn has an
    advantage, the loss is a connected zero, no step is taken and ``active_turns`` is 0. Where loss or gradient is not
    finite, as the metrics then say, the weights stay as they are and no further iteration follows. Where the objective
    has candidates, the metrics hold their `Signals` at the weights before the first step.
    """
    ranks = ranks or Ranks()
    everything = pack(samples)
    returns, advantages = credit(everything, objective)
    normalizer = denominator(samples, objective.reduction)
    parts = live_parts(samples, advantages, objective)
    passes = _passes(parts, schedule.max_tokens, ranks)
    spec, device = objective.spec, model.device
    module = ranks.module(model) or PolicyModule(model, torch.bfloat16 if schedule.bf16 else None)
    olds, refs = _given_logprobs(module, [batch for batch, _ in passes], device, objective, reference, ranks)
    signals = SignalTokens(samples, everything, objective) if objective.candidates else None
    sums, norm = TokenMeans(), 0.0
    for iteration in range(objective.num_iterations):
        optimizer.zero_grad(set_to_none=True)
        sums = TokenMeans()
        for number, ((batch, rows), old, ref) in enumerate(zip(passes, olds, refs, strict=True), 1):
            batch = batch.to(device)
            with ranks.accumulate(module, last=number == len(passes)):
                out = module(
                    batch,
                    (advantages[rows] if rows else torch.zeros(1, 1)).to(device),
                    spec,
                    old_logprobs=old,
                    ref_logprobs=ref,
                    rollout_logprobs=batch.rollout_logprobs if spec.importance_cap else None,
                    reduction=objective.reduction,
                    normalizer=normalizer,
                    skip_zero_advantages=signals is None,  # other classes may have an advantage there
                    score_norms=signals is not None and iteration == 0,
                )
                (out.loss * ranks.world).backward()  # the engines take the mean over the ranks
            sums.add(out, batch.rollout_logprobs, old)
            if signals and iteration == 0:
                signals.add(batch, rows, out)
        sums = TokenMeans.total(ranks.gather(sums))
        norm = float(whole(torch.nn.utils.clip_grad_norm_(model.parameters(), schedule.max_grad_norm)))
        if not (math.isfinite(norm) and math.isfinite(sums.loss)):
            break
        if norm > 0:
            optimizer.step()
    read = reading(samples, advantages, objective, [part for part, _ in parts])
    seen = describe(samples, everything, returns, advantages, spec, shared_ratios=objective.num_iterations > 1)
    found = {"signals": signals.measure(ranks)} if signals else {}
    return {**sums.means(), "grad_norm": norm, **read, **seen, **found}


def _passes(parts: Sequence[tuple[Sample, int]], max_tokens: int, ranks: Ranks) -> list[tuple[PackedBatch, list[int]]]:
    """This rank's micro-batches of ``parts``, each with its rows of the advantages; as many as any rank has, and at
    least one."""
    mine = [parts[i] for i in ranks.share([len(part.tokens) for part, _ in parts])]
    row = {id(part): row for part, row in mine}
    batches = list(micro_batches([part for part, _ in mine], max_tokens))
    passes = [(pack(batch), [row[id(part)] for part in batch]) for batch in batches]
    lacking = max(1, ranks.largest(len(passes))) - len(passes)
    return passes + [(pack([NOTHING]), [])] * lacking


def _given_logprobs(
    module: torch.nn.Module,
    batches: Sequence[PackedBatch],
    device: torch.device,
    objective: Objective,
    reference: StartingWeights | None,
    ranks: Ranks,
) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    """Of each batch under the weights before the first of several iterations, and under the reference; None where
    nothing asks for them."""
    spec, none = objective.spec, [None] * len(batches)
    olds = [_frozen(module, b, device, spec, ranks) for b in batches] if objective.num_iterations > 1 else none
    if reference is None:
        return olds, none
    with reference.in_place():
        return olds, [_frozen(module, b, device, spec, ranks) for b in batches]


def _frozen(
    module: torch.nn.Module, batch: PackedBatch, device: torch.device, spec: PolicyLossSpec, ranks: Ranks
) -> Tensor:
    """Log-probs without a gradient, and without dropout."""
    was_training = module.training
    module.eval()
    try:
        with ranks.no_grad_forward(module):
            return module(batch.to(device), None, spec)
    finally:
        module.train(was_training)

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
from torch import nn

from ppg_fast.dialogues.packing import Sample, pack
from ppg_fast.distributed import Ranks
from ppg_fast.models.adaptation import StartingWeights
from ppg_fast.models.causal_lm import PolicyModule
from ppg_fast.models.sharding import whole
from ppg_fast.spec import require
from ppg_fast.training.critic import Critic
from ppg_fast.training.experience import Experience
from ppg_fast.training.metrics import TokenMeans, by_turn, describe, peak_memory_mb, reading
from ppg_fast.training.objective import Objective, Schedule, credit, denominator, likelihood, live_turns, tokens_to_read
from ppg_fast.training.optimisers import set_learning_rate
from ppg_fast.training.passes import Pass, add_logprobs, compare_with, loss_of, make_passes, of_all, regress, weighed
from ppg_fast.training.state import NotFinite, TrainingState
from ppg_fast.training.turn_scores import TurnScores

__all__ = ["NotFinite", "TrainingState", "optimise", "update"]


def optimise(
    model: Any,
    collect: Callable[[int], Sequence[Sample]],
    objective: Objective,
    schedule: Schedule,
    state: TrainingState | None = None,
    ranks: Ranks | None = None,
    again: Callable[[int, int], Sequence[Sample]] | None = None,
) -> Iterator[dict[str, Any]]:
    """Train ``model`` in place; yield the metrics of each step after it was taken, so that the caller may look,
    evaluate, save or stop.

    ``collect(step)`` gives the dialogues of a step: on-policy, it rolls out the model as it is now. ``state``: where to
    go on from, kept up to date. ``ranks``: who trains it together, after `Ranks.shard`; each of them collects the
    dialogues of all, and all of them yield the same metrics. ``again(step, count)``: for soft Q-learning, up to
    ``count`` dialogues of earlier steps that come again, as what it remembers itself. NotFinite after too many skipped
    steps, or at the end where all were skipped; the weights are those before them. `Stopped` at a signal, where the
    process listens to them: between two passes before the weights move, so that ``state`` is that of the last step that
    was yielded.
    """
    require(again is None or objective.soft_q is not None, "again must be None without soft_q", again)
    ranks = ranks or Ranks()
    state = state or TrainingState.start(model, objective, schedule)
    for step in range(state.step + 1, schedule.max_steps + 1):
        ranks.check()
        start, rate, weights = time.perf_counter(), schedule.learning_rate_at(step), state.credit_weights
        samples = collect(step)
        set_learning_rate(state.optimizer, rate)
        now = objective
        if weights and weights.applied:
            longest = max([1, *(len(s.rewards) for s in samples)])
            now = replace(objective, policy_class=weights.policy_class(longest), scale=weights.scale)
        known, mean_returns = remembered(state.experience, step, samples)
        old = [*known, *(again(step, len(samples)) if again else ())]
        beside = old, mean_returns, state.critic
        metrics = update(model, state.optimizer, samples, now, schedule, state.reference, ranks, *beside)
        read = [*samples, *old]
        state.skipped.observe(step, read, metrics["loss"], metrics["grad_norm"], schedule.max_skipped_steps)
        if state.experience and not state.skipped.in_a_row:
            state.experience.take_in(samples, mean_returns)
        lesson, signals = metrics.pop("lesson", None), metrics.pop("signals", None)
        if state.critic and lesson and not state.skipped.in_a_row:
            state.critic.take_in(lesson)
        if weights and signals:
            metrics |= weights.observe(signals)
        seconds, tokens = time.perf_counter() - start, sum(len(s.tokens) for s in read)
        state.step, state.num_tokens = step, state.num_tokens + tokens
        yield {
            "step": step,
            **metrics,
            "learning_rate": rate,
            "num_tokens": state.num_tokens,
            "skipped_steps": state.skipped.total,
            "step_time": seconds,
            "perf/tokens_per_second": tokens / seconds,
            "perf/peak_memory_mb": peak_memory_mb(model),
        }
    state.skipped.require_some_taken(schedule.max_steps)


def remembered(
    experience: Experience | None, step: int, samples: Sequence[Sample]
) -> tuple[Sequence[Sample], Sequence[float]]:
    """What soft Q-learning takes a step with beside its ``samples``: as many of earlier steps, and the mean return from
    each turn index on; nothing for other losses."""
    if experience is None:
        return (), ()
    new = pack(samples)
    return experience.draw(step, len(samples)), experience.means_with(new.rewards, new.turn_counts)


def update(
    model: Any,
    optimizer: torch.optim.Optimizer,
    samples: Sequence[Sample],
    objective: Objective,
    schedule: Schedule,
    reference: StartingWeights | None = None,
    ranks: Ranks | None = None,
    again: Sequence[Sample] = (),
    mean_returns: Sequence[float] = (),
    critic: Critic | None = None,
) -> dict[str, Any]:
    """``num_iterations`` steps on one set of dialogues; the metrics of the last. Dialogues that come ``again`` are
    trained on too, and what is said of rewards and turns is said without them. ``mean_returns``: of dialogues like
    these, from each turn index on, for soft Q-learning. ``critic``: completes the advantages in the first iteration;
    what it is to learn from the step is the metrics' lesson.

    The loss is that of all dialogues at once, whatever the budget of a forward pass and the number of ranks: advantages
    are made and denominators counted over all of them, and only the passes are shared out. Where no turn has an
    advantage, the loss is a connected zero, no step is taken and ``active_turns`` is 0. Where loss or gradient is not
    finite, as the metrics then say, the weights stay as they are and no further iteration follows. Where the objective
    asks for signals, the metrics hold the `StepSignals` at the weights before the first step.
    """
    ranks = ranks or Ranks()
    module = ranks.module(model) or PolicyModule(model, torch.bfloat16 if schedule.bf16 else None)
    batch, share = pack([*samples, *again]), objective.token_share
    known = share == 1 or batch.entropies is not None or objective.num_iterations > 1
    rule = "token_share must be 1 where neither the dialogues bring entropies nor several iterations find them"
    require(known, rule, share)
    returns, advantages = credit(batch, objective, critic.means if critic else ())
    weights, everywhere = likelihood(batch, returns, objective), objective.teacher or objective.soft_q or critic
    live = live_turns(advantages, batch.turn_mask.float() if everywhere else weights)
    lengths = tokens_to_read(batch, live, objective)
    passes = make_passes(batch, advantages, lengths, schedule.max_tokens, model.device, ranks, weights)
    if objective.soft_q:
        compare_with(passes, mean_returns)
    ranks.check()
    add_logprobs(passes, module, objective, reference, ranks)
    scores = TurnScores(batch) if objective.signals else None
    normalizer, means, norm = denominator(batch, objective), TokenMeans(), 0.0
    regression: dict[str, float] = {}
    readings = critic.read_with(passes, batch, objective) if critic else []
    for iteration in range(objective.num_iterations):
        optimizer.zero_grad(set_to_none=True)
        # only before the weights move may a signal end the step: between two iterations it is neither taken nor not
        check = ranks.check if iteration == 0 else lambda: None
        if objective.eta:
            moved = iteration > 0 or objective.from_start
            regression = regress(passes, module, batch, returns, objective, ranks, moved, check)
        means = backward(module, passes, objective, normalizer, ranks, None if iteration else scores, check)
        norm = float(whole(nn.utils.clip_grad_norm_(model.parameters(), schedule.max_grad_norm)))
        if not (math.isfinite(norm) and math.isfinite(means.loss)):
            regression = {}  # the loss that is not finite is what the metrics say
            break
        if norm > 0:
            optimizer.step()
    new, shared_ratios = slice(len(samples)), objective.num_iterations > 1
    fresh = batch.part(range(len(samples))) if again else batch
    if objective.soft_q:
        values, advantages = weighed(passes, batch, objective, ranks)
        regression = by_turn("turns/value", values[new], fresh.turn_mask)
    lesson: dict[str, Any] = {}
    if critic:
        advantages = of_all(passes, [one.advantages for one in passes], batch, ranks).float()
        lesson = critic.lesson(readings, passes, batch, objective, ranks)
    return {
        **means.means(),
        **regression,
        **lesson,
        "grad_norm": norm,
        **reading(batch, live, objective.spec, lengths, share),
        **describe(samples, fresh, returns[new], advantages[new], objective.spec, shared_ratios, live[new], share),
        **({"signals": scores.measure(passes, ranks)} if scores else {}),
    }


def backward(
    module: nn.Module,
    passes: Sequence[Pass],
    objective: Objective,
    normalizer: float | None,
    ranks: Ranks,
    scores: TurnScores | None,
    check: Callable[[], None],
) -> TokenMeans:
    """Forward and backward of every pass; gradients are those of the loss of all of them, on all ranks. ``scores``
    reads their turns; ``check`` is asked before each pass."""
    means = TokenMeans()
    for number, one in enumerate(passes):
        check()
        with ranks.accumulate(module, last=number + 1 == len(passes)):
            out = loss_of(one, module, objective, normalizer, scores.watch(number, one) if scores else None)
            (out.loss * ranks.world).backward()  # the engines take the mean over the ranks
        # the sampler's policy is not the one of now in a second iteration, nor in dialogues of earlier steps
        means.add(out, None if objective.soft_q else one.batch.rollout_logprobs, one.old_logprobs)
    return TokenMeans.total(ranks.gather(means.read()))

"""Evaluation on held-out dialogues: each turn on its logged prefix, and whole rollouts, both by turn index."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ppg_fast.dialogues.packing import Sample, micro_batches, pack
from ppg_fast.spec import PolicyLossSpec
from ppg_fast.training.metrics import by_turn, describe
from ppg_fast.training.objective import Objective, credit

OF_ROLLOUTS = ("reward", "completions/", "turns/mean_count", "turns/return")


def on_logged_prefix(
    module: nn.Module, samples: Sequence[Sample], objective: Objective, max_tokens: int
) -> dict[str, float]:
    """How likely the logged answers are, each after the logged dialogue before it; one forward pass, no gradient.

    ``eval/logprob``: mean over tokens, nats. ``eval/weighted_logprob``: mean over dialogues of sum_t R_t log pi(a_t |
    h_t) with R_t the
    windowed return, which is what offline training climbs. By turn index t: ``eval/turns/logprob/<t>``, mean over
    dialogues of the turn's mean token log-prob, ``eval/turns/weighted_logprob/<t>``, mean of R_t log pi(a_t | h_t).
    ``module``: a PolicyModule, as ranks spread it; its dropout is off meanwhile.
    """
    if not samples:
        return {}
    batches, was_training = list(micro_batches(samples, max_tokens)), module.training
    module.eval()
    try:
        with torch.no_grad():
            parts = [_turn_sums(module, batch) for batch in batches]
    finally:
        module.train(was_training)
    width = max(logprobs.shape[1] for logprobs, _ in parts)
    logprobs, tokens = (
        torch.cat([torch.nn.functional.pad(p[i], (0, width - p[i].shape[1])) for p in parts]) for i in (0, 1)
    )
    everything = pack([sample for batch in batches for sample in batch])
    returns, _ = credit(everything, objective)
    there = tokens > 0
    weighted = logprobs * returns.double()
    return {
        "eval/logprob": float(logprobs.sum() / tokens.sum().clamp(min=1)),
        "eval/weighted_logprob": float(weighted.sum() / len(samples)),
        **by_turn("eval/turns/logprob", logprobs / tokens.clamp(min=1), there),
        **by_turn("eval/turns/weighted_logprob", weighted, there),
    }


def _turn_sums(module: nn.Module, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
    """Log-prob (S, T) float64 of each turn's tokens together, and how many they are; on the CPU."""
    batch = pack(samples)
    logprobs = module(batch.to(next(module.parameters()).device), None, PolicyLossSpec()).double().cpu()
    lengths = torch.diff(batch.cu_seqlens).long()
    shape = batch.rewards.shape
    active = batch.labels >= 0
    place = torch.arange(shape[0]).repeat_interleave(lengths)[active] * shape[1] + batch.turn_ids[active]
    sums = torch.zeros(shape.numel(), dtype=torch.float64).index_add_(0, place, logprobs[active])
    return sums.view(shape), place.bincount(minlength=shape.numel()).view(shape)


def of_rollouts(samples: Sequence[Sample], objective: Objective) -> dict[str, float]:
    """What whole rollouts earn: ``eval/reward``, ``eval/turns/return/<t>`` and the lengths of answers, as a training
    step names them."""
    batch = pack(samples)
    returns, advantages = credit(batch, objective)
    seen = describe(samples, batch, returns, advantages)
    return {f"eval/{name}": value for name, value in seen.items() if name.startswith(OF_ROLLOUTS)}

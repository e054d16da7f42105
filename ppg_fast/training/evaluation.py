"""Evaluation on held-out dialogues: each turn on its logged prefix, and whole rollouts, both by turn index."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ppg_fast import stopping
from ppg_fast.dialogues.packing import PackedBatch, Sample, micro_batches, pack
from ppg_fast.spec import PolicyLossSpec
from ppg_fast.training.metrics import by_turn, describe
from ppg_fast.training.objective import Objective, credit

OF_ROLLOUTS = ("reward", "completions/", "turns/mean_count", "turns/return")


def on_logged_prefix(
    module: nn.Module,
    samples: Sequence[Sample],
    objective: Objective,
    max_tokens: int,
    check: Callable[[], None] = stopping.check,
) -> dict[str, float]:
    """How likely the logged answers are, each after the logged dialogue before it; one forward pass, no gradient.

    ``eval/logprob``: mean over tokens, nats. ``eval/weighted_logprob``: mean over dialogues of
    sum_t R_t log pi(a_t | h_t) with R_t the windowed return, the objective of offline training. By turn index t:
    ``eval/turns/logprob/<t>``, mean over dialogues of the turn's mean token log-prob, and
    ``eval/turns/weighted_logprob/<t>``, mean of R_t log pi(a_t | h_t). ``module``: a PolicyModule, as ranks share it;
    its dropout is off meanwhile. ``check`` is asked before each pass whether to go on; it raises where not.
    """
    if not samples:
        return {}
    batch = pack(samples)
    returns, _ = credit(batch, objective)
    logprobs, tokens = turn_logprobs(module, batch, max_tokens, check)
    read = tokens > 0
    weighted = logprobs * returns.double()
    return {
        "eval/logprob": float(logprobs.sum() / tokens.sum().clamp(min=1)),
        "eval/weighted_logprob": float(weighted.sum() / len(samples)),
        **by_turn("eval/turns/logprob", logprobs / tokens.clamp(min=1), read),
        **by_turn("eval/turns/weighted_logprob", weighted, read),
    }


def turn_logprobs(
    module: nn.Module, batch: PackedBatch, max_tokens: int, check: Callable[[], None] = stopping.check
) -> tuple[Tensor, Tensor]:
    """Log-prob (S, T) float64 of each turn's tokens together, and how many they are; on the CPU."""
    device, was_training = next(module.parameters()).device, module.training
    logprobs = torch.zeros(len(batch.tokens), dtype=torch.float64)
    module.eval()
    try:
        with torch.no_grad():
            for dialogues in micro_batches(torch.diff(batch.cu_seqlens).tolist(), max_tokens):
                check()
                at = torch.isin(batch.dialogue_ids, torch.tensor(dialogues))
                logprobs[at] = module(batch.part(dialogues).to(device), None, PolicyLossSpec()).double().cpu()
    finally:
        module.train(was_training)
    return batch.sum_of_turns(logprobs), batch.sum_of_turns(torch.ones_like(logprobs)).long()


def of_rollouts(samples: Sequence[Sample], objective: Objective) -> dict[str, float]:
    """What whole rollouts earn: ``eval/reward``, ``eval/turns/return/<t>`` and the lengths of answers, as a training
    step names them."""
    batch = pack(samples)
    returns, advantages = credit(batch, objective)
    seen = describe(samples, batch, returns, advantages)
    return {f"eval/{name}": value for name, value in seen.items() if name.startswith(OF_ROLLOUTS)}

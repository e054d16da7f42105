"""From rewards, masks and logits to the reduced loss and its gradient in two launches. Contract:
ppg_fast/backends.py"""

from typing import Any

import torch
import triton
from torch import Tensor

from ppg_fast.contract import Columns, Reduction, Turns
from ppg_fast.spec import BASELINES, PolicyLossSpec

from .launch import on_device
from .partial_returns import split, window
from .plan import DIALOGUES, ROWS, plan_kernel
from .policy_loss import sweep
from .weights import COUNTERS, SEQUENCE_MEAN, SEQUENCE_SUM, SUM, TOKEN_MEAN

REDUCTIONS = {
    "token_mean": TOKEN_MEAN,
    "sequence_mean": SEQUENCE_MEAN,
    "sequence_sum": SEQUENCE_SUM,
    "sum": SUM,
    "none": SUM,
}


def pair(column: Tensor | None) -> tuple[int, int]:
    """Batch and row stride in elements of a (B, L) column, or of one (L,) where B is 1."""
    if column is None:
        return 0, 0
    return (0, column.stride(0)) if column.dim() == 1 else (column.stride(0), column.stride(1))


def plan(logits: Tensor, columns: Columns, turns: Turns | None, reduction: Reduction) -> dict[str, Any]:
    """Launch 1 -> what `sweep` takes of it: labels with -1 where masked, slot of each row in the advantages, counts,
    sequences, ticket."""
    B, L, _ = logits.shape
    N, S = B * L, reduction.sequences
    by_sequence = reduction.kind == "sequence_mean"
    sizes = N, N if turns else 0, N if by_sequence else 0, S * COUNTERS.value, 1
    row_labels, slots, sequences, counts, ticket = torch.empty(
        sum(sizes), dtype=torch.int32, device=logits.device
    ).split(sizes)
    rewards = turn_counts = segment_ids = reward_mask = group_ids = advantages = None
    T, lookahead, segment_length, gamma, baseline, std_eps = 0, 1, None, 1.0, "none", 0.0
    if turns is not None:
        rewards, turn_counts, segment_ids, reward_mask, group_ids = turns[:5]
        T, gamma, baseline, std_eps = rewards.shape[1], turns.gamma, turns.baseline, turns.std_eps
        lookahead, segment_length = window(T, turns.lookahead, turns.segment_length)
        advantages = torch.empty(S, T, dtype=torch.float32, device=logits.device)
    loss_mask, turn_ids = columns.loss_mask, columns.turn_ids
    as_bytes = torch.uint8  # of booleans, a view
    if loss_mask is not None and loss_mask.dtype == torch.bool:
        loss_mask = loss_mask.view(as_bytes)
    plan_kernel[(triton.cdiv(S, DIALOGUES) * T + S * COUNTERS.value,)](
        columns.labels, loss_mask, turn_ids,
        rewards, turn_counts, segment_ids, None if reward_mask is None else reward_mask.view(as_bytes), group_ids,
        reduction.cu_seqlens,
        row_labels, slots if turns else None, sequences if by_sequence else None, counts, advantages, ticket,
        *pair(columns.labels), *pair(loss_mask), *pair(turn_ids),
        N, L, S, T, lookahead, segment_length, *split(gamma), float(std_eps),
        BASELINE=BASELINES.index(baseline), DIALOGUES=DIALOGUES, ROWS=ROWS, num_warps=8, enable_fp_fusion=True,
    )  # fmt: skip
    return {
        "labels": row_labels,
        "advantages": columns.advantages if turns is None else advantages,
        "slots": slots if turns else None,
        "sequences": sequences if by_sequence else None,
        "counts": counts,
        "ticket": ticket,
    }


def fused_policy_loss(
    logits: Tensor,  # (B, L, V)
    columns: Columns,
    turns: Turns | None,
    reduction: Reduction,
    spec: PolicyLossSpec,
    skip_zero_advantages: bool,
    entropy: bool,
    dlogits: Tensor | None,  # (B, L, V) out, may be the logits themselves
    score_norm: Tensor | None = None,  # (B, L) out
) -> tuple[Tensor, Tensor, Tensor]:
    """-> reduced loss, log-prob and entropy of each row (B, L) float32; writes ``dlogits`` where given. Contract:
    ppg_fast/backends.py"""
    B, L, _ = logits.shape
    N, each, shape = B * L, reduction.kind == "none", columns.labels.shape
    losses, logprobs = (torch.empty(shape, dtype=torch.float32, device=logits.device) for _ in range(2))
    entropy = entropy or spec.entropy_coef != 0 or score_norm is not None
    entropies = torch.empty(shape if entropy else (0,), dtype=torch.float32, device=logits.device)
    if N == 0:
        return losses if each else torch.zeros((), dtype=torch.float32, device=logits.device), logprobs, entropies
    total = None if each else torch.empty((), dtype=torch.float32, device=logits.device)
    with on_device(logits):
        planned = plan(logits, columns, turns, reduction)
        sweep(
            logits, planned.pop("labels"), planned.pop("advantages"), None, *columns[4:], spec, losses, logprobs,
            entropies, dlogits,
            normalizer=reduction.normalizer, kind=REDUCTIONS[reduction.kind].value, sequence_count=reduction.sequences,
            total=total,
            skip_zero=skip_zero_advantages and not spec.needs_every_row, score_norms=score_norm, **planned,
        )  # fmt: skip
    return losses if total is None else total, logprobs, entropies

"""The launch before the sweep of a fused policy loss: the advantage of each turn, which rows are active, and how many.
Mirrors csrc/cuda/credit.cu
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppg_fast.spec import BASELINES, Columns, Reduction, Turns

from .partial_returns import double, split, window, window_end, window_return
from .weights import COUNTERS

LEAVE_ONE_OUT = tl.constexpr(BASELINES.index("leave_one_out"))
GROUP_STD = tl.constexpr(BASELINES.index("group_std"))
NO_BASELINE = tl.constexpr(BASELINES.index("none"))
DIALOGUES = 32  # per program, and compared with these at a time
ROWS = 1024  # that one program counts at a time
LARGEST_LABEL = tl.constexpr(2**31 - 1)


@triton.jit
def masked_return(rewards, reward_mask, row, t, has_turn, count, T, gamma):
    """sum over k with reward_mask[t, k] of gamma^(k - t) r_k, by Horner's rule from both ends towards t, in float64."""
    future = has_turn.to(tl.float64) * 0.0
    for back in range(T - t):
        k = T - 1 - back
        inside = has_turn & (k < count) & (tl.load(reward_mask + t * T + k) != 0)
        future = gamma * future + tl.load(rewards + row + k, mask=inside, other=0.0).to(tl.float64)
    past = has_turn.to(tl.float64) * 0.0
    for k in range(t):
        inside = has_turn & (k < count) & (tl.load(reward_mask + t * T + k) != 0)
        past = (past + tl.load(rewards + row + k, mask=inside, other=0.0).to(tl.float64)) / gamma
    return future + tl.where(t > 0, past, 0.0)


@triton.jit
def turn_return(rewards, turn_counts, segment_ids, reward_mask, b, t, S, T, lookahead, segment_length, gamma):
    """-> whether dialogue b has a turn t, and that turn's return as a float32 in a float64."""
    count = T
    if turn_counts is not None:
        count = tl.load(turn_counts + b, mask=b < S, other=0).to(tl.int32)
    has_turn = (b < S) & (t < count)
    row = b.to(tl.int64) * T
    if reward_mask is not None:
        total = masked_return(rewards, reward_mask, row, t, has_turn, count, T, gamma)
    else:
        end = window_end(t, lookahead, segment_length, count)
        total = window_return(rewards, segment_ids, row, t, has_turn, end, tl.minimum(lookahead, T - t), gamma)
    return has_turn, total.to(tl.float32).to(tl.float64)


@triton.jit
def turn_advantages(
    p, rewards, turn_counts, segment_ids, reward_mask, group_ids, advantages, S, T, lookahead, segment_length, gamma,
    std_eps,
    BASELINE: tl.constexpr, DIALOGUES: tl.constexpr,
):  # fmt: skip
    """Advantages of turn t of DIALOGUES dialogues: return minus the baseline over the members of the group that have
    a turn t.

    The returns of the members are computed again by every program that needs them, so that none waits for another.
    """
    t = p % T
    lane = tl.arange(0, DIALOGUES)
    b = p // T * DIALOGUES + lane
    has_turn, own = turn_return(
        rewards, turn_counts, segment_ids, reward_mask, b, t, S, T, lookahead, segment_length, gamma
    )
    advantage = own
    if BASELINE != NO_BASELINE:
        group = tl.load(group_ids + b, mask=b < S, other=0)
        members = tl.zeros((DIALOGUES,), tl.int32)
        total = tl.zeros((DIALOGUES,), tl.float64)
        for start in range(0, S, DIALOGUES):
            others = start + lane
            other_has_turn, theirs = turn_return(
                rewards, turn_counts, segment_ids, reward_mask, others, t, S, T, lookahead, segment_length, gamma
            )  # fmt: skip
            other_group = tl.load(group_ids + others, mask=others < S, other=0)
            same = (group[:, None] == other_group[None, :]) & other_has_turn[None, :]
            members += tl.sum(same.to(tl.int32), 1)
            total += tl.sum(tl.where(same, theirs[None, :], 0.0), 1)
        if BASELINE == LEAVE_ONE_OUT:
            advantage = own - (total - own) / tl.maximum(members - 1, 1).to(tl.float64)
        else:
            mean = total / tl.maximum(members, 1).to(tl.float64)
            advantage = own - mean
        if BASELINE == GROUP_STD:
            square = tl.zeros((DIALOGUES,), tl.float64)
            for start in range(0, S, DIALOGUES):
                others = start + lane
                other_has_turn, theirs = turn_return(
                    rewards, turn_counts, segment_ids, reward_mask, others, t, S, T, lookahead, segment_length, gamma
                )  # fmt: skip
                other_group = tl.load(group_ids + others, mask=others < S, other=0)
                same = (group[:, None] == other_group[None, :]) & other_has_turn[None, :]
                apart = theirs[None, :] - mean[:, None]
                square += tl.sum(tl.where(same, apart * apart, 0.0), 1)
            advantage = advantage / (tl.sqrt(square / tl.maximum(members - 1, 1).to(tl.float64)) + std_eps)
        advantage = tl.where(members <= 1, own, advantage)
    tl.store(advantages + b.to(tl.int64) * T + t, tl.where(has_turn, advantage, 0.0).to(tl.float32), mask=b < S)


@triton.jit
def is_set(mask):
    """Whether a mask of any dtype is not 0, which NaN is not either."""
    if mask.dtype.is_fp16() or mask.dtype.is_bf16():
        mask = mask.to(tl.float32)
    return mask != 0


# lengths, strides and pointers change from call to call: a kernel specialised on them would be compiled again
PER_CALL = ["labels", "loss_mask", "turn_ids", "rewards", "turn_counts", "segment_ids", "reward_mask", "group_ids"]
PER_CALL += ["cu_seqlens", "row_labels", "slots", "sequences", "counts", "advantages", "ticket"]
PER_CALL += ["N", "L", "S", "T", "lookahead", "segment_length"]
PER_CALL += [f"{column}_{of}" for column in ("labels", "loss_mask", "turn_ids") for of in ("batch", "row")]


@triton.jit(do_not_specialize=PER_CALL)
def credit_kernel(
    labels, loss_mask, turn_ids,  # (B, L) of any strides; the latter two may be None
    rewards, turn_counts, segment_ids, reward_mask, group_ids,  # (S, T), (S,), (S, T), (T, T), (S,); all may be None
    cu_seqlens,  # (S + 1,) or None
    # out: (N,), (N,) or None, (N,) or None, (S, COUNTERS), (S, T) or None, ()
    row_labels, slots, sequences, counts, advantages, ticket,
    labels_batch: tl.int64, labels_row: tl.int64, loss_mask_batch: tl.int64, loss_mask_row: tl.int64,
    turn_ids_batch: tl.int64, turn_ids_row: tl.int64,
    N, L, S, T, lookahead, segment_length, gamma, gamma_low, std_eps,
    BASELINE: tl.constexpr, DIALOGUES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The first programs compute the advantages of one turn of DIALOGUES dialogues each, the others the labels and the
    active count of one part of a sequence each."""
    p = tl.program_id(0)
    if p == 0:
        tl.store(ticket, 0)
    turn_programs = tl.cdiv(S, DIALOGUES) * T
    if p < turn_programs:
        if rewards is not None:
            turn_advantages(
                p, rewards, turn_counts, segment_ids, reward_mask, group_ids, advantages, S, T, lookahead,
                segment_length,
                double(gamma, gamma_low), std_eps, BASELINE, DIALOGUES,
            )  # fmt: skip
    else:
        s = (p - turn_programs) // COUNTERS
        part = (p - turn_programs) % COUNTERS
        begin = s * (N // S)
        end = begin + N // S
        if cu_seqlens is not None:
            # every row is written, whatever the first and the last bound say
            begin = tl.where(s > 0, tl.load(cu_seqlens + s).to(tl.int32), 0)
            end = tl.where(s < S - 1, tl.minimum(tl.load(cu_seqlens + s + 1).to(tl.int32), N), N)
        count = tl.zeros((ROWS,), tl.int32)
        for start in range(begin + part * ROWS, end, COUNTERS * ROWS):
            n = start + tl.arange(0, ROWS)
            inside = (n < end) & (n >= 0)
            b = (n // L).to(tl.int64)
            l = (n % L).to(tl.int64)
            label = tl.load(labels + b * labels_batch + l * labels_row, mask=inside, other=-1)
            active = label >= 0
            if loss_mask is not None:
                active = active & is_set(
                    tl.load(loss_mask + b * loss_mask_batch + l * loss_mask_row, mask=inside, other=0)
                )
            if turn_ids is not None:
                turn = tl.load(turn_ids + b * turn_ids_batch + l * turn_ids_row, mask=inside, other=-1)
                active = active & (turn >= 0)
                bound = T
                if turn_counts is not None:
                    bound = tl.minimum(tl.load(turn_counts + s).to(tl.int32), T)
                tl.store(slots + n, tl.where((turn >= 0) & (turn < bound), s * T + turn, -1).to(tl.int32), mask=inside)
            if sequences is not None:
                tl.store(sequences + n, s, mask=inside)
            tl.store(row_labels + n, tl.where(active, tl.minimum(label, LARGEST_LABEL), -1).to(tl.int32), mask=inside)
            count += active.to(tl.int32)
        tl.store(counts + s * COUNTERS + part, tl.sum(count, 0))


def pair(column: Tensor | None) -> tuple[int, int]:
    """Batch and row stride in elements of a (B, L) column, or of one (L,) where B is 1."""
    if column is None:
        return 0, 0
    return (0, column.stride(0)) if column.dim() == 1 else (column.stride(0), column.stride(1))


def credit(logits: Tensor, columns: Columns, turns: Turns | None, reduction: Reduction) -> dict[str, Any]:
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
    credit_kernel[(triton.cdiv(S, DIALOGUES) * T + S * COUNTERS.value,)](
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

"""The small launch before the sweep of a fused policy loss: which rows are read, what each turn is credited with, how
many rows count.

It decides per token and per turn, where the sweep pays for every logit.
"""

import triton
import triton.language as tl

from ppg_fast.spec import BASELINES

from .partial_returns import double, window_end, window_return
from .weights import COUNTERS

LEAVE_ONE_OUT = tl.constexpr(BASELINES.index("leave_one_out"))
GROUP_STD = tl.constexpr(BASELINES.index("group_std"))
NO_BASELINE = tl.constexpr(BASELINES.index("none"))
DIALOGUES = 32  # of one program, and that are compared with them at once
ROWS = 1024  # that one program counts at once
LARGEST_LABEL = tl.constexpr(2**31 - 1)


@triton.jit
def masked_return(rewards, reward_mask, row, t, here, count, T, gamma):
    """The sum over k with reward_mask[t, k] of gamma^(k - t) r_k, Horner's rule from both ends towards t, in
    float64."""
    future = here.to(tl.float64) * 0.0
    for back in range(T - t):
        k = T - 1 - back
        inside = here & (k < count) & (tl.load(reward_mask + t * T + k) != 0)
        future = gamma * future + tl.load(rewards + row + k, mask=inside, other=0.0).to(tl.float64)
    past = here.to(tl.float64) * 0.0
    for k in range(t):
        inside = here & (k < count) & (tl.load(reward_mask + t * T + k) != 0)
        past = (past + tl.load(rewards + row + k, mask=inside, other=0.0).to(tl.float64)) / gamma
    return future + tl.where(t > 0, past, 0.0)


@triton.jit
def turn_return(rewards, turn_counts, segment_ids, reward_mask, b, t, S, T, lookahead, segment_length, gamma):
    """-> whether dialogue b has a turn t, and that turn's return as a float32 in a float64."""
    count = T
    if turn_counts is not None:
        count = tl.load(turn_counts + b, mask=b < S, other=0).to(tl.int32)
    here = (b < S) & (t < count)
    row = b.to(tl.int64) * T
    if reward_mask is not None:
        total = masked_return(rewards, reward_mask, row, t, here, count, T, gamma)
    else:
        end = window_end(t, lookahead, segment_length, count)
        total = window_return(rewards, segment_ids, row, t, here, end, tl.minimum(lookahead, T - t), gamma)
    return here, total.to(tl.float32).to(tl.float64)


@triton.jit
def turn_advantages(
    p, rewards, turn_counts, segment_ids, reward_mask, group_ids, advantages, S, T, lookahead, segment_length, gamma,
    std_eps,
    BASELINE: tl.constexpr, DIALOGUES: tl.constexpr,
):  # fmt: skip
    """Turn t of DIALOGUES dialogues: its returns minus the baseline over the members of their groups that have such a
    turn.

    The members' returns are computed again where they are needed: they are few, and no program waits for another.
    """
    t = p % T
    lane = tl.arange(0, DIALOGUES)
    b = p // T * DIALOGUES + lane
    here, own = turn_return(
        rewards, turn_counts, segment_ids, reward_mask, b, t, S, T, lookahead, segment_length, gamma
    )
    advantage = own
    if BASELINE != NO_BASELINE:
        group = tl.load(group_ids + b, mask=b < S, other=0)
        members = tl.zeros((DIALOGUES,), tl.int32)
        total = tl.zeros((DIALOGUES,), tl.float64)
        for start in range(0, S, DIALOGUES):
            others = start + lane
            there, theirs = turn_return(
                rewards, turn_counts, segment_ids, reward_mask, others, t, S, T, lookahead, segment_length, gamma
            )  # fmt: skip
            other_group = tl.load(group_ids + others, mask=others < S, other=0)
            same = (group[:, None] == other_group[None, :]) & there[None, :]
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
                there, theirs = turn_return(
                    rewards, turn_counts, segment_ids, reward_mask, others, t, S, T, lookahead, segment_length, gamma
                )  # fmt: skip
                other_group = tl.load(group_ids + others, mask=others < S, other=0)
                same = (group[:, None] == other_group[None, :]) & there[None, :]
                apart = theirs[None, :] - mean[:, None]
                square += tl.sum(tl.where(same, apart * apart, 0.0), 1)
            advantage = advantage / (tl.sqrt(square / tl.maximum(members - 1, 1).to(tl.float64)) + std_eps)
        advantage = tl.where(members <= 1, own, advantage)
    tl.store(advantages + b.to(tl.int64) * T + t, tl.where(here, advantage, 0.0).to(tl.float32), mask=b < S)


@triton.jit
def is_set(mask):
    """Whether a mask of any dtype is not 0; NaN is not."""
    if mask.dtype.is_fp16() or mask.dtype.is_bf16():
        mask = mask.to(tl.float32)
    return mask != 0


# nothing here is worth a kernel of its own: lengths, strides and pointers differ from call to call
PLANNED = [
    "labels",
    "loss_mask",
    "turn_ids",
    "rewards",
    "turn_counts",
    "segment_ids",
    "reward_mask",
    "group_ids",
    "cu_seqlens",
]
PLANNED += [
    "row_labels",
    "slots",
    "sequences",
    "counts",
    "advantages",
    "ticket",
    "N",
    "L",
    "S",
    "T",
    "lookahead",
    "segment_length",
]
PLANNED += ["labels_batch", "labels_row", "loss_mask_batch", "loss_mask_row", "turn_ids_batch", "turn_ids_row"]


@triton.jit(do_not_specialize=PLANNED)
def plan_kernel(
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
    """The first programs take a turn of some dialogues each, the others a part of a sequence: its rows and how many of
    them are active."""
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
            there = (n < end) & (n >= 0)
            b = (n // L).to(tl.int64)
            l = (n % L).to(tl.int64)
            label = tl.load(labels + b * labels_batch + l * labels_row, mask=there, other=-1)
            active = label >= 0
            if loss_mask is not None:
                active = active & is_set(
                    tl.load(loss_mask + b * loss_mask_batch + l * loss_mask_row, mask=there, other=0)
                )
            if turn_ids is not None:
                turn = tl.load(turn_ids + b * turn_ids_batch + l * turn_ids_row, mask=there, other=-1)
                active = active & (turn >= 0)
                bound = T
                if turn_counts is not None:
                    bound = tl.minimum(tl.load(turn_counts + s).to(tl.int32), T)
                tl.store(slots + n, tl.where((turn >= 0) & (turn < bound), s * T + turn, -1).to(tl.int32), mask=there)
            if sequences is not None:
                tl.store(sequences + n, s, mask=there)
            tl.store(row_labels + n, tl.where(active, tl.minimum(label, LARGEST_LABEL), -1).to(tl.int32), mask=there)
            count += active.to(tl.int32)
        tl.store(counts + s * COUNTERS + part, tl.sum(count, 0))

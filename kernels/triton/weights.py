"""The weight of a row's loss in the reduction, and the sum of the weighted losses.

Mirrors ppg_fast/functional/tokens.py, reduction_weights and ordered_sum.
"""

import triton
import triton.language as tl

TOKEN_MEAN = tl.constexpr(0)
SEQUENCE_MEAN = tl.constexpr(1)
SEQUENCE_SUM = tl.constexpr(2)
SUM = tl.constexpr(3)  # and none
COUNTERS = tl.constexpr(8)  # programs that count the active rows of one sequence
SEQUENCES = tl.constexpr(64)  # whose counts are summed at a time
SUMMED = tl.constexpr(2048)  # losses that are summed at a time


@triton.jit
def outer_denominator(counts, S, normalizer, normalizer_at, REDUCTION: tl.constexpr):
    """The normaliser where one is given, else active rows (token_mean), sequences that have one (sequence_*), or 1."""
    outer = 1.0
    if normalizer is not None:
        outer = normalizer
    elif normalizer_at is not None:
        outer = tl.load(normalizer_at)
    elif REDUCTION != SUM:
        total = tl.zeros((), tl.int32)
        counter = tl.arange(0, COUNTERS)[None, :]
        for start in range(0, S, SEQUENCES):
            s = start + tl.arange(0, SEQUENCES)
            lengths = tl.sum(tl.load(counts + s[:, None] * COUNTERS + counter, mask=s[:, None] < S, other=0), 1)
            if REDUCTION != TOKEN_MEAN:
                lengths = (lengths > 0).to(tl.int32)
            total += tl.sum(lengths, 0)
        outer = tl.maximum(total, 1).to(tl.float32)
    return outer


@triton.jit
def row_weight(n, weights, sequences, counts, outer, REDUCTION: tl.constexpr):
    """The weight of row n's loss: its own, or 1 / (outer inner); inner: the active rows of its sequence, or 1."""
    if weights is not None:
        weight = tl.load(weights + n)
    elif REDUCTION == SEQUENCE_MEAN:
        lengths = tl.load(counts + tl.load(sequences + n) * COUNTERS + tl.arange(0, COUNTERS))
        weight = 1.0 / (outer * tl.maximum(tl.sum(lengths, 0), 1).to(tl.float32))
    else:
        weight = 1.0 / outer
    return weight


@triton.jit
def ordered_sum(losses, N, ticket, total):
    """The last program to finish sums all losses in float64, in an order that depends on N only."""
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        lane = tl.arange(0, SUMMED)
        lanes = tl.zeros((SUMMED,), tl.float64)
        for start in range(0, N, SUMMED):
            lanes += tl.load(losses + start + lane, mask=start + lane < N, other=0.0, cache_modifier=".cg").to(
                tl.float64
            )
        tl.store(total, tl.sum(lanes, 0).to(tl.float32))

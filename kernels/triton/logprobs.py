"""Log-probability of each label and entropy of each row, and their gradient.

Mirrors ppg_fast/reference/logprobs.py and csrc/*/logprobs.*
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .plan import loop_shape, number_or_off, on_device, row_shape, strides
from .row import (
    LOG2E,
    block_gradient,
    entropy_of,
    held_row,
    label_logit,
    logprob_of,
    row_offset,
    score_norm_of,
    swept_row,
    temperature_of,
    zero_row,
)

THREADS = 256  # per program: several share an SM, so that one loads while another reduces

# lengths, counts and per-row pointers change from call to call: a kernel specialised on them would be compiled again
PER_CALL = ["L", "labels", "temperatures", "lse", "entropy", "logprob", "d_logprob", "d_entropy", "d_lse", "score_norm"]


@triton.jit(do_not_specialize=PER_CALL)
def logprobs_fwd_kernel(
    logits, labels, temperatures,  # (N,); temperatures may be None
    logprob, entropy, lse, score_norm,  # (N,) out, lse (N, 2); entropy and score_norm may be None
    L, V: tl.int32, batch_stride: tl.int64, row_stride: tl.int64, temperature, logit_softcap,
    ONE_BLOCK: tl.constexpr, KEEP_EXP: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program per row, which is read once, in the shape that `policy_loss` reads it in: both get the same bits."""
    n = tl.program_id(0)
    label = tl.load(labels + n)
    if label < 0:
        tl.store(logprob + n, 0.0)
        tl.store(lse + 2 * n, 0.0)
        tl.store(lse + 2 * n + 1, 0.0)
        if entropy is not None:
            tl.store(entropy + n, 0.0)
        if score_norm is not None:
            tl.store(score_norm + n, 0.0)
    else:
        row = logits + row_offset(n, L, batch_stride, row_stride)
        factor = 1.0 / temperature_of(n, temperatures, temperature) * LOG2E
        z_label = label_logit(row, label, V, logit_softcap)
        if ONE_BLOCK:
            cols = tl.arange(0, BLOCK_V)
            x = tl.load(row + cols, mask=cols < V, other=float("-inf"))
            m, s, sd, ss, _ = held_row(x, cols < V, factor, logit_softcap, entropy is not None, score_norm is not None)
        else:
            m, s, sd, ss = swept_row(
                row, V, factor, logit_softcap, entropy is not None, score_norm is not None, BLOCK_V, LANES
            )
        tl.store(logprob + n, logprob_of(z_label, m, s, factor))
        tl.store(lse + 2 * n, m)
        tl.store(lse + 2 * n + 1, s)
        if entropy is not None:
            tl.store(entropy + n, entropy_of(s, sd))
        if score_norm is not None:
            tl.store(score_norm + n, score_norm_of(z_label, m, s, ss, factor))


@triton.jit(do_not_specialize=PER_CALL)
def logprobs_bwd_kernel(
    # (N,), lse (N, 2); d_entropy, d_lse and temperatures may be None
    logits, labels, lse, entropy, d_logprob, d_entropy, d_lse, temperatures,
    dlogits,  # out, may be the logits themselves
    L, V: tl.int32, batch_stride: tl.int64, row_stride: tl.int64, d_batch_stride: tl.int64, d_row_stride: tl.int64,
    temperature, logit_softcap,
    BLOCK_V: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One program per row: one read and one write, or no read where there is no gradient."""
    n = tl.program_id(0)
    label = tl.load(labels + n)
    d_row = dlogits + row_offset(n, L, d_batch_stride, d_row_stride)
    g = tl.load(d_logprob + n)
    wanted = g != 0.0
    if d_entropy is not None:
        wanted = wanted | (tl.load(d_entropy + n) != 0.0)
    if d_lse is not None:
        wanted = wanted | (tl.load(d_lse + n) != 0.0)
    if (label >= 0) & wanted:
        row = logits + row_offset(n, L, batch_stride, row_stride)
        cols = tl.arange(0, BLOCK_V)
        inverse_temperature = 1.0 / temperature_of(n, temperatures, temperature)
        factor = inverse_temperature * LOG2E
        m = tl.load(lse + 2 * n)
        log2_s = tl.log2(tl.load(lse + 2 * n + 1))
        g *= inverse_temperature
        pull = g
        if d_lse is not None:
            pull = g - tl.load(d_lse + n) * inverse_temperature
        h = None
        entropy_ = 0.0
        if d_entropy is not None:
            h = tl.load(d_entropy + n) * inverse_temperature
            entropy_ = tl.load(entropy + n)
        for start in range(0, V, BLOCK_V):
            at = start + cols
            x = tl.load(row + at, mask=at < V, other=float("-inf"))
            dz = block_gradient(x, at, label, m, log2_s, entropy_, g, pull, h, factor, logit_softcap)
            tl.store(d_row + at, dz.to(dlogits.dtype.element_ty), mask=at < V)
    else:
        zero_row(d_row, V, BLOCK_V)


def logprobs_fwd(
    logits: Tensor,  # (B, L, V)
    labels: Tensor,  # (N,) int64, negative: masked
    temperatures: Tensor | None,  # (N,) float32
    temperature: float,
    logit_softcap: float,
    entropy: bool,
    score_norm: Tensor | None = None,  # (N,) out
) -> tuple[Tensor, Tensor, Tensor]:
    """-> log-prob, entropy, (N,) float32, and maximum and sum of each row, (N, 2); entropy (0,) where not wanted.
    Contract: ppg_fast/backends.py"""
    B, L, V = logits.shape
    N, entropy = B * L, entropy or score_norm is not None
    shapes = (N,), (N if entropy else 0,), (N, 2)
    logprob, ent, lse = (torch.empty(shape, dtype=torch.float32, device=logits.device) for shape in shapes)
    if N:
        shape = row_shape(logits, bool(logit_softcap))
        with on_device(logits):
            logprobs_fwd_kernel[(N,)](
                logits, labels, temperatures, logprob, ent if entropy else None, lse, score_norm,
                L, V, *strides(logits), float(temperature), number_or_off(logit_softcap), **shape,
            )  # fmt: skip
    return logprob, ent, lse


def unit_of_maximum(logit_softcap: float) -> float:
    """Contract: ppg_fast/backends.py"""
    return 1.0


def logprobs_bwd(
    logits: Tensor,  # (B, L, V)
    labels: Tensor,  # (N,) int64, negative: masked
    lse: Tensor,  # (N, 2) float32
    entropy: Tensor,  # (N,) float32, as the rest
    d_logprob: Tensor,
    d_entropy: Tensor | None,
    d_lse: Tensor | None,
    temperatures: Tensor | None,
    temperature: float,
    logit_softcap: float,
    dlogits: Tensor,  # (B, L, V) out, may be the logits themselves
) -> None:
    """Write d_logprob (1[v = label] - p) - d_entropy p (log p + H) + d_lse p into ``dlogits``. Contract:
    ppg_fast/backends.py"""
    B, L, V = logits.shape
    if B * L:
        shape = loop_shape(V, THREADS, logits.element_size(), bool(logit_softcap), False)
        with on_device(logits):
            logprobs_bwd_kernel[(B * L,)](
                logits, labels, lse, None if d_entropy is None else entropy, d_logprob, d_entropy, d_lse,
                temperatures, dlogits,
                L, V, *strides(logits), *strides(dlogits), float(temperature), number_or_off(logit_softcap), **shape,
            )  # fmt: skip

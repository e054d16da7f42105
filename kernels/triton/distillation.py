"""How far a teacher's row is from the student's, and the gradient by the student's logits.

Mirrors ppg_fast/reference/distillation.py and csrc/*/distillation.*
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppg_fast import spec

from .plan import WARP_SIZE, block_shape, number_or_off, on_device, programs, strides
from .row import LN2, LOG2E, capped, load_block, row_offset, swept_row, temperature_of, tile, zero_row

THREADS = 512  # per program, each with 32 bytes of either row at a time
LEAST = tl.constexpr(spec.LEAST_LOGPROB * LOG2E.value)  # in units of log 2, as all log-probs here
FORWARD, REVERSE, JSD = (tl.constexpr(i) for i in range(3))

PER_CALL = ["N", "L", "labels", "weights", "temperatures", "divergence"]


@triton.jit
def log2_probs(z, m, log2_s, factor):
    """log2 p of capped logits, at least LEAST, NaN kept."""
    log2_p = (z - m) * factor - log2_s
    return tl.where(log2_p < LEAST, LEAST, log2_p)


@triton.jit
def over_mixture(ratio, beta):
    """-> log2(p / m), log2(q / m) of m = beta q + (1 - beta) p from ``ratio`` = log2(p / q), by the larger of p and
    q."""
    student = ratio >= 0.0
    share = tl.where(student, 1.0 - beta, beta)
    larger = -tl.log2(share + (1.0 - share) * tl.exp2(-tl.abs(ratio)))
    return tl.where(student, larger, larger + ratio), tl.where(student, larger - ratio, larger)


@triton.jit
def block_terms(log2_p, log2_q, beta, KIND: tl.constexpr):
    """-> what each column adds to the divergence, and to KL(p, q) or KL(p, m), whose mean a gradient needs; in units
    of log 2."""
    ratio = log2_p - log2_q
    if KIND == FORWARD:
        of_student = -tl.exp2(log2_q) * ratio
        return of_student, of_student
    elif KIND == REVERSE:
        of_student = tl.exp2(log2_p) * ratio
        return of_student, of_student
    else:
        log2_p_m, log2_q_m = over_mixture(ratio, beta)
        of_student = tl.exp2(log2_p) * log2_p_m
        return beta * tl.exp2(log2_q) * log2_q_m + (1.0 - beta) * of_student, of_student


@triton.jit
def block_slope(z, log2_p, log2_q, mean, g, beta, logit_softcap, KIND: tl.constexpr):
    """g times the gradient of the divergence by the student's logits, through its softcap. ``mean``: of log2(p / q), or
    log2(p / m), under p; for all but the forward KL ``g`` turns them into nats."""
    if KIND == FORWARD:
        dz = g * (tl.exp2(log2_p) - tl.exp2(log2_q))
    elif KIND == REVERSE:
        dz = g * tl.exp2(log2_p) * (log2_p - log2_q - mean)
    else:
        log2_p_m, _ = over_mixture(log2_p - log2_q, beta)
        dz = g * tl.exp2(log2_p) * (log2_p_m - mean)
    if logit_softcap is not None:
        t = z / logit_softcap
        dz = dz * (1.0 - t * t)
    return dz


@triton.jit(do_not_specialize=PER_CALL)
def distillation_kernel(
    logits, teacher_logits,  # (B, L, V)
    labels, weights, temperatures,  # (N,); the last two may be None
    divergence, dlogits,  # out, (N,) and (B, L, V); the latter may be None, the logits or the teacher's
    N, L, V: tl.int32, batch_stride: tl.int64, row_stride: tl.int64,
    teacher_batch_stride: tl.int64, teacher_row_stride: tl.int64, d_batch_stride: tl.int64, d_row_stride: tl.int64,
    temperature, logit_softcap, teacher_softcap, beta,
    KIND: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Grid-stride loop over rows. Both are read for their statistics, then, from the end, for the divergence; the
    forward KL has its gradient from that sweep, the others from a third one, since theirs needs a sum over the row."""
    cols = tile(BLOCK_V, LANES)
    last = (V - 1) // BLOCK_V * BLOCK_V
    for n in tl.range(tl.program_id(0), N, tl.num_programs(0), disable_licm=True):
        weight = 1.0
        if weights is not None:
            weight = tl.load(weights + n)
        if (tl.load(labels + n) >= 0) & (weight != 0.0):
            row = logits + row_offset(n, L, batch_stride, row_stride)
            teacher = teacher_logits + row_offset(n, L, teacher_batch_stride, teacher_row_stride)
            inverse_temperature = 1.0 / temperature_of(n, temperatures, temperature)
            factor = inverse_temperature * LOG2E
            m, s, _, _ = swept_row(row, V, factor, logit_softcap, False, False, BLOCK_V, LANES)
            teacher_m, teacher_s, _, _ = swept_row(teacher, V, factor, teacher_softcap, False, False, BLOCK_V, LANES)
            log2_s = tl.log2(s)
            log2_teacher_s = tl.log2(teacher_s)
            g = weight * inverse_temperature
            if KIND != FORWARD:
                g *= LN2
            if KIND == JSD:
                g *= 1.0 - beta
            found = tl.zeros((LANES,), tl.float32)
            of_student = tl.zeros((LANES,), tl.float32)
            for done in range(0, V, BLOCK_V):
                at = last - done + cols
                z = capped(load_block(row, at, V), at < V, logit_softcap)
                teacher_z = capped(load_block(teacher, at, V), at < V, teacher_softcap)
                log2_p = log2_probs(z, m, log2_s, factor)
                log2_q = log2_probs(teacher_z, teacher_m, log2_teacher_s, factor)
                of_both, of_one = block_terms(log2_p, log2_q, beta, KIND)
                found += tl.sum(of_both, 0)
                of_student += tl.sum(of_one, 0)
                if KIND == FORWARD and dlogits is not None:
                    d_row = dlogits + row_offset(n, L, d_batch_stride, d_row_stride)
                    dz = block_slope(z, log2_p, log2_q, 0.0, g, beta, logit_softcap, KIND)
                    tl.store(d_row + at, dz.to(dlogits.dtype.element_ty), mask=at < V)
            tl.store(divergence + n, tl.sum(found) * LN2)
            if KIND != FORWARD and dlogits is not None:
                d_row = dlogits + row_offset(n, L, d_batch_stride, d_row_stride)
                mean = tl.sum(of_student)
                for start in range(0, V, BLOCK_V):
                    at = start + cols
                    z = capped(load_block(row, at, V), at < V, logit_softcap)
                    teacher_z = capped(load_block(teacher, at, V), at < V, teacher_softcap)
                    log2_p = log2_probs(z, m, log2_s, factor)
                    log2_q = log2_probs(teacher_z, teacher_m, log2_teacher_s, factor)
                    dz = block_slope(z, log2_p, log2_q, mean, g, beta, logit_softcap, KIND)
                    tl.store(d_row + at, dz.to(dlogits.dtype.element_ty), mask=at < V)
        else:
            tl.store(divergence + n, 0.0)
            if dlogits is not None:
                zero_row(dlogits + row_offset(n, L, d_batch_stride, d_row_stride), V, BLOCK_V)


def distillation(
    logits: Tensor,  # (B, L, V)
    teacher_logits: Tensor,  # (B, L, V)
    labels: Tensor,  # (N,) int64, negative: masked
    weights: Tensor | None,  # (N,) float32, as the temperatures
    temperatures: Tensor | None,
    temperature: float,
    logit_softcap: float,
    teacher_softcap: float,
    beta: float,
    dlogits: Tensor | None,  # (B, L, V) out, may be the logits or the teacher's
) -> Tensor:
    """-> the divergence of each row, (N,) float32; writes ``dlogits`` where given. Contract: ppg_fast/backends.py"""
    B, L, V = logits.shape
    N, size = B * L, logits.element_size()
    divergence = torch.empty(N, dtype=torch.float32, device=logits.device)
    if N:
        shape = block_shape(V, THREADS, 32 // size, size)
        count = programs(logits.device, shape["num_warps"] * WARP_SIZE, 2 * V * size)
        places = (*strides(logits), *strides(teacher_logits), *strides(logits if dlogits is None else dlogits))
        kind = FORWARD if beta == 0 else REVERSE if beta == 1 else JSD
        with on_device(logits):
            distillation_kernel[(min(N, count),)](
                logits, teacher_logits, labels, weights, temperatures, divergence, dlogits, N, L, V, *places,
                float(temperature), number_or_off(logit_softcap), number_or_off(teacher_softcap), float(beta),
                KIND=kind.value, **shape,
            )  # fmt: skip
    return divergence

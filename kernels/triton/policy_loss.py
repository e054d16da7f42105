"""The fused policy loss: one read of the logits, one write of their gradient.

Mirrors ppg_fast/reference/policy_loss.py and csrc/*/policy_loss.*
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppg_fast.spec import KLEstimator, LossType, PolicyLossSpec

from .policy_term import importance_weight, policy_term
from .row import (
    LN2,
    LOG2E,
    LOWEST,
    block_gradient,
    block_shape,
    entropy_of,
    fold_block,
    loop_shape,
    narrow,
    number_or_off,
    on_device,
    row_offset,
    row_statistics,
    softcapped,
    strides,
    temperature_of,
    zero_row,
)

# lengths, counts and per-row pointers change from call to call: a kernel specialised on them would be compiled again
PER_CALL = ["L", "labels", "advantages", "weights", "old_logprobs", "ref_logprobs", "rollout_logprobs", "temperatures"]
PER_CALL += ["losses", "logprobs", "entropies"]


@triton.jit(do_not_specialize=PER_CALL)
def policy_loss_kernel(
    logits, labels, advantages, weights, old_logprobs, ref_logprobs, rollout_logprobs, temperatures,  # labels and on: (N,), or None
    losses, logprobs, entropies, dlogits,  # out; entropies and dlogits may be None
    L, V: tl.int32, batch_stride: tl.int64, row_stride: tl.int64, d_batch_stride: tl.int64, d_row_stride: tl.int64,
    temperature, logit_softcap, clip_low, clip_high, dual_clip, kl_coef, entropy_coef, importance_cap,  # softcap and coefs None: off
    LOSS_TYPE: tl.constexpr, KL_ESTIMATOR: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One program a row.

    ONE_BLOCK: the row stays in registers. Else it is read twice, backwards the second time: what was read last is still in the L2.
    """
    n = tl.program_id(0)
    label = tl.load(labels + n)
    if label < 0:
        if dlogits is not None:
            zero_row(dlogits + row_offset(n, L, d_batch_stride, d_row_stride), V, BLOCK_V)
        tl.store(losses + n, 0.0)
        tl.store(logprobs + n, 0.0)
        if entropies is not None:
            tl.store(entropies + n, 0.0)
    else:
        row = logits + row_offset(n, L, batch_stride, row_stride)
        cols = tl.arange(0, BLOCK_V)
        inverse_temperature = 1.0 / temperature_of(n, temperatures, temperature)
        factor = inverse_temperature * LOG2E
        # every thread has the label's logit before the barrier of the first reduction, so no store in place can overtake it
        z_label = softcapped(tl.load(row + label), logit_softcap)
        if ONE_BLOCK:
            x = tl.load(row + cols, mask=cols < V, other=float("-inf"))
            lowest = tl.full((), LOWEST, tl.float32)
            none = tl.zeros((BLOCK_V,), tl.float32)
            m, s_lanes, sd_lanes = fold_block(lowest, none, none, x, cols < V, factor, logit_softcap, entropies is not None)
            s = tl.sum(s_lanes)
            sd = tl.sum(sd_lanes)
        else:
            m, s, sd = row_statistics(row, V, factor, logit_softcap, entropies is not None, BLOCK_V)
        log2_s = tl.log2(s)
        logprob = ((z_label - m) * factor - log2_s) * LN2
        entropy = 0.0
        if entropies is not None:
            entropy = entropy_of(s, sd)
            tl.store(entropies + n, entropy)

        old_logprob = logprob
        if old_logprobs is not None:
            old_logprob = tl.load(old_logprobs + n)
        ref_logprob = logprob
        if ref_logprobs is not None:
            ref_logprob = tl.load(ref_logprobs + n)
        importance = 1.0
        if rollout_logprobs is not None:
            importance = importance_weight(old_logprob, tl.load(rollout_logprobs + n), importance_cap)
        advantage = tl.load(advantages + n)
        loss, d_logprob = policy_term(
            logprob, entropy, old_logprob, ref_logprob, importance, advantage,
            clip_low, clip_high, dual_clip, kl_coef, entropy_coef, LOSS_TYPE, KL_ESTIMATOR,
        )  # fmt: skip
        weight = 1.0
        if weights is not None:
            weight = tl.load(weights + n)
        tl.store(losses + n, loss * weight)
        tl.store(logprobs + n, logprob)

        if dlogits is not None:
            d_row = dlogits + row_offset(n, L, d_batch_stride, d_row_stride)
            weight *= inverse_temperature
            g = d_logprob * weight
            h = None
            full = True
            if entropy_coef is not None:
                h = -entropy_coef * weight
            elif kl_coef is None:
                full = advantage != 0.0
            if ONE_BLOCK:
                dz = block_gradient(x, cols, label, m, log2_s, entropy, g, h, factor, logit_softcap)
                tl.store(d_row + cols, tl.where(full, dz, 0.0).to(dlogits.dtype.element_ty), mask=cols < V)
            elif full:
                last = (V - 1) // BLOCK_V * BLOCK_V
                for done in range(0, V, BLOCK_V):
                    back = last - done + cols
                    x = tl.load(row + back, mask=back < V, other=float("-inf"), eviction_policy="evict_first")
                    dz = block_gradient(x, back, label, m, log2_s, entropy, g, h, factor, logit_softcap)
                    tl.store(d_row + back, dz.to(dlogits.dtype.element_ty), mask=back < V, eviction_policy="evict_first")
            else:
                zero_row(d_row, V, BLOCK_V)


def launch_shape(V: int, element_size: int, softcap: bool, entropy: bool) -> dict[str, int]:
    """How a row is held: whole in the registers of 1024 threads while that needs no spill (test_triton_compile.py), else in blocks.

    A thread has 64 registers then: 32 columns fit, 16 where a softcap, an entropy of float32 logits or a narrow access keeps a second
    value of each alive. In blocks, 512 threads fill an SM: few rows are in flight, and the L2 still holds them when they are read again.
    """
    per_thread = 16 if softcap or narrow(V) or (entropy and element_size == 4) else 32
    one_block = 1024 * per_thread >= V
    shape = block_shape(V, 1024, per_thread) if one_block else loop_shape(V, 512, element_size, softcap, entropy)
    return {"ONE_BLOCK": one_block, **shape}


def policy_loss(
    logits: Tensor,  # (B, L, V)
    labels: Tensor,  # (N,) int64, negative: masked
    advantages: Tensor,  # (N,) float32, as the rest
    weights: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    temperatures: Tensor | None,
    spec: PolicyLossSpec,
    entropy: bool,
    dlogits: Tensor | None,  # (B, L, V) out, may be the logits themselves
) -> tuple[Tensor, Tensor, Tensor]:
    """-> weighted loss, log-prob and entropy of each row, (N,) float32; writes ``dlogits`` where given. Contract: ppg_fast/backends.py"""
    B, L, V = logits.shape
    N = B * L
    loss, logprob = (torch.empty(N, dtype=torch.float32, device=logits.device) for _ in range(2))
    ent = torch.empty(N if entropy or spec.entropy_coef else 0, dtype=torch.float32, device=logits.device)
    rollout_logprobs = rollout_logprobs if spec.importance_cap else None
    shape = launch_shape(V, logits.element_size(), bool(spec.logit_softcap), ent.numel() > 0)
    with on_device(logits):
        if N:
            policy_loss_kernel[(N,)](
                logits, labels, advantages, weights, old_logprobs, ref_logprobs, rollout_logprobs, temperatures,
                loss, logprob, ent if ent.numel() else None, dlogits,
                L, V, *strides(logits), *(strides(logits) if dlogits is None else strides(dlogits)),
                float(spec.temperature) if temperatures is None else 1.0, number_or_off(spec.logit_softcap),
                float(spec.clip_low), float(spec.clip_high), float(spec.dual_clip),
                number_or_off(spec.kl_coef), number_or_off(spec.entropy_coef), float(spec.importance_cap),
                LOSS_TYPE=int(LossType[spec.loss_type.upper()]),
                KL_ESTIMATOR=int(KLEstimator[spec.kl_estimator.upper()]) if spec.kl_coef else 0,
                **shape,
            )  # fmt: skip
    return loss, logprob, ent

"""The fused policy loss: one read of the logits, one write of their gradient.

Mirrors ppg_fast/reference/policy_loss.py and csrc/*/policy_loss.*
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ppg_fast.spec import PolicyLossSpec

from .plan import WARP_SIZE, number_or_off, on_device, programs, row_shape, strides
from .policy_term import ONE, importance_weight, policy_term
from .row import (
    LOG2E,
    block_gradient,
    entropy_of,
    held_row,
    label_logit,
    log_sum_exp_of,
    logprob_of,
    score_norm_of,
    swept_row,
    tile,
    zero_row,
)
from .weights import SUM, ordered_sum, outer_denominator, row_weight

# lengths, counts, strides of columns and per-row pointers change from call to call: a kernel specialised on them would
# be compiled again
COLUMNS = ("advantages", "old_logprobs", "ref_logprobs", "rollout_logprobs", "temperatures", "nll_weights")
PER_CALL = ["N", "L", "S", "labels", "weights", "slots", "sequences", "counts", "normalizer_at", "ticket", "total"]
PER_CALL += ["losses", "logprobs", "entropies", "score_norms", *COLUMNS]
PER_CALL += [f"{column}_{of}" for column in COLUMNS for of in ("batch", "row")]


@triton.jit
def store_row(losses, logprobs, entropies, score_norms, n, loss, logprob, entropy, norm):
    """Store the outputs of row n; the last two where they are wanted."""
    tl.store(losses + n, loss)
    tl.store(logprobs + n, logprob)
    if entropies is not None:
        tl.store(entropies + n, entropy)
    if score_norms is not None:
        tl.store(score_norms + n, norm)


@triton.jit
def swept_gradient(
    row, d_row, V, label, m, s, entropy, g, pull, h, factor, logit_softcap, BLOCK_V: tl.constexpr, LANES: tl.constexpr
):
    """Write the gradient of a row that is read again, from its end, which is still in L2; see `block_gradient`."""
    cols = tile(BLOCK_V, LANES)
    last = (V - 1) // BLOCK_V * BLOCK_V
    log2_s = tl.log2(s)
    for done in range(0, V, BLOCK_V):
        at = last - done + cols
        x = tl.load(row + at, mask=at < V, other=float("-inf"), eviction_policy="evict_first")
        dz = block_gradient(x, at, label, m, log2_s, entropy, g, pull, h, factor, logit_softcap)
        tl.store(d_row + at, dz.to(d_row.dtype.element_ty), mask=at < V, eviction_policy="evict_first")


@triton.jit(do_not_specialize=PER_CALL)
def policy_loss_kernel(
    logits, labels,  # (B, L, V), (N,)
    # (B, L) of any strides, all but the advantages may be None
    advantages, old_logprobs, ref_logprobs, rollout_logprobs, temperatures, nll_weights,
    weights,  # (N,) or None
    # where given: `credit`'s advantages (S T,), and what weights are made of
    slots, sequences, counts, normalizer, normalizer_at,
    losses, logprobs, entropies, score_norms, dlogits,  # out; the last three may be None
    ticket, total,  # () int32, 0, and out: the sum of the losses; or None
    advantages_batch: tl.int64, advantages_row: tl.int64, old_logprobs_batch: tl.int64, old_logprobs_row: tl.int64,
    ref_logprobs_batch: tl.int64, ref_logprobs_row: tl.int64, rollout_logprobs_batch: tl.int64,
    rollout_logprobs_row: tl.int64,
    temperatures_batch: tl.int64, temperatures_row: tl.int64, nll_weights_batch: tl.int64, nll_weights_row: tl.int64,
    N, L, S, V: tl.int32, batch_stride: tl.int64, row_stride: tl.int64, d_batch_stride: tl.int64,
    d_row_stride: tl.int64,
    # what is None is off; low, high, cap: the numbers of the loss, see `surrogate`
    temperature, logit_softcap, low, high, cap, log_ratio_coef, kl_coef, kl_cap, entropy_coef, z_coef,
    importance_floor, importance_cap, max_log_ratio,
    LOSS_TYPE: tl.constexpr, KL_ESTIMATOR: tl.constexpr, NAN_ROLLOUT: tl.constexpr, IMPORTANCE_MODE: tl.constexpr,
    REDUCTION: tl.constexpr, SKIP_ZERO: tl.constexpr,
    ONE_BLOCK: tl.constexpr, KEEP_EXP: tl.constexpr, BLOCK_V: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Grid-stride loop over rows.

    ONE_BLOCK: a row stays in registers between its statistics and its gradient. Else it is read twice.
    """
    outer = outer_denominator(counts, S, normalizer, normalizer_at, REDUCTION)
    # no loop-invariant code motion: hoisted constants would take registers that hold the row
    for n in tl.range(tl.program_id(0), N, tl.num_programs(0), disable_licm=True):
        b = (n // L).to(tl.int64)
        l = (n % L).to(tl.int64)
        label = tl.minimum(tl.load(labels + n), V).to(tl.int32)  # any label out of range is V
        if slots is not None:
            slot = tl.load(slots + n)
            advantage = tl.load(advantages + slot, mask=slot >= 0, other=0.0)
        else:
            advantage = tl.load(advantages + b * advantages_batch + l * advantages_row)
        wanted = label >= 0
        live = advantage != 0.0
        if nll_weights is not None:
            nll = tl.load(nll_weights + b * nll_weights_batch + l * nll_weights_row)
            live = live | (nll != 0.0)
        if SKIP_ZERO:
            wanted = wanted & live
        if wanted:
            # loaded before the logits, so that their latencies overlap
            if old_logprobs is not None:
                old = tl.load(old_logprobs + b * old_logprobs_batch + l * old_logprobs_row)
            if ref_logprobs is not None:
                ref = tl.load(ref_logprobs + b * ref_logprobs_batch + l * ref_logprobs_row)
            if rollout_logprobs is not None:
                rollout = tl.load(rollout_logprobs + b * rollout_logprobs_batch + l * rollout_logprobs_row)
            weight = row_weight(n, weights, sequences, counts, outer, REDUCTION)
            row = logits + b * batch_stride + l * row_stride
            if temperatures is not None:
                inverse_temperature = 1.0 / tl.load(temperatures + b * temperatures_batch + l * temperatures_row)
            else:
                inverse_temperature = 1.0 / temperature
            factor = inverse_temperature * LOG2E
            z_label = label_logit(row, label, V, logit_softcap)
            if ONE_BLOCK:
                cols = tl.arange(0, BLOCK_V)
                x = tl.load(row + cols, mask=cols < V, other=float("-inf"))
                m, s, sd, ss, e = held_row(
                    x, cols < V, factor, logit_softcap, entropies is not None, score_norms is not None
                )
            else:
                m, s, sd, ss = swept_row(
                    row, V, factor, logit_softcap, entropies is not None, score_norms is not None, BLOCK_V, LANES
                )  # fmt: skip
            logprob = logprob_of(z_label, m, s, factor)
            entropy = 0.0
            if entropies is not None:
                entropy = entropy_of(s, sd)
            norm = 0.0
            if score_norms is not None:
                norm = score_norm_of(z_label, m, s, ss, factor)
            old_logprob = logprob if old_logprobs is None else old
            ref_logprob = logprob if ref_logprobs is None else ref
            rollout_logprob = old_logprob
            importance = 1.0
            if rollout_logprobs is not None:
                rollout_logprob = rollout
                if NAN_ROLLOUT == ONE:
                    rollout_logprob = tl.where(rollout != rollout, old_logprob, rollout)
                if importance_floor is not None or importance_cap is not None:
                    importance = importance_weight(
                        old_logprob, rollout, importance_floor, importance_cap, max_log_ratio, NAN_ROLLOUT,
                        IMPORTANCE_MODE,
                    )  # fmt: skip
            lse = 0.0
            if z_coef is not None:
                lse = log_sum_exp_of(m, s, factor)
            loss, d_logprob = policy_term(
                logprob, entropy, lse, old_logprob, ref_logprob, rollout_logprob, importance, advantage,
                low, high, cap, log_ratio_coef, kl_coef, kl_cap, entropy_coef, z_coef, max_log_ratio,
                LOSS_TYPE, KL_ESTIMATOR,
            )  # fmt: skip
            loss *= weight
            if nll_weights is not None:
                loss -= nll * logprob
            store_row(losses, logprobs, entropies, score_norms, n, loss, logprob, entropy, norm)

            if dlogits is not None:
                d_row = dlogits + b * d_batch_stride + l * d_row_stride
                weight *= inverse_temperature
                g = d_logprob * weight
                if nll_weights is not None:
                    g -= nll * inverse_temperature
                pull = g
                h = None
                full = True
                if entropy_coef is not None:
                    h = -entropy_coef * weight
                    if z_coef is not None:  # in the entropy's place: no register more while the row is held
                        entropy += 2.0 * z_coef * lse / entropy_coef
                elif z_coef is not None:
                    pull = g - 2.0 * z_coef * lse * weight
                elif kl_coef is None and log_ratio_coef is None:
                    full = live
                if ONE_BLOCK:
                    if KEEP_EXP and entropy_coef is None and logit_softcap is None:
                        dz = tl.where(cols == label, g, 0.0) - e * (pull / s)
                    else:
                        dz = block_gradient(x, cols, label, m, tl.log2(s), entropy, g, pull, h, factor, logit_softcap)
                    tl.store(d_row + cols, tl.where(full, dz, 0.0).to(dlogits.dtype.element_ty), mask=cols < V)
                elif full:
                    swept_gradient(
                        row, d_row, V, label, m, s, entropy, g, pull, h, factor, logit_softcap, BLOCK_V, LANES
                    )  # fmt: skip
                else:
                    zero_row(d_row, V, BLOCK_V)
        else:
            if dlogits is not None:
                zero_row(dlogits + b * d_batch_stride + l * d_row_stride, V, BLOCK_V)
            store_row(losses, logprobs, entropies, score_norms, n, 0.0, 0.0, 0.0, 0.0)
    if ticket is not None:
        ordered_sum(losses, N, ticket, total)


OFF_AT_0 = ("log_ratio_coef", "kl_coef", "kl_cap", "entropy_coef", "z_coef", "importance_floor", "importance_cap")


def own_numbers(spec: PolicyLossSpec) -> tuple[float, float, float | None]:
    """``low``, ``high`` and ``cap`` of `surrogate`; a number that the loss does not use is what it is without one."""
    if spec.loss_type == "sapo":
        return float(spec.tau_positive), float(spec.tau_negative), None
    return float(spec.clip_low), float(spec.clip_high), number_or_off(spec.dual_clip or spec.ratio_cap)


def sweep(
    logits: Tensor, labels: Tensor, advantages: Tensor, weights: Tensor | None,
    old_logprobs: Tensor | None, ref_logprobs: Tensor | None, rollout_logprobs: Tensor | None,
    temperatures: Tensor | None, nll_weights: Tensor | None,
    spec: PolicyLossSpec, losses: Tensor, logprobs: Tensor, entropies: Tensor, dlogits: Tensor | None, *,
    slots: Tensor | None = None, sequences: Tensor | None = None, counts: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    kind: int = SUM.value, sequence_count: int = 0, skip_zero: bool = False, ticket: Tensor | None = None,
    total: Tensor | None = None,
    score_norms: Tensor | None = None,
) -> None:  # fmt: skip
    """Launch the sweep over N > 0 rows. Per-row tensors are (B, L) of any strides, or (N,); the keywords are those of
    `credit`."""
    B, L, V = logits.shape
    rollout_logprobs = rollout_logprobs if spec.reads_rollout else None
    columns = advantages, old_logprobs, ref_logprobs, rollout_logprobs, temperatures, nll_weights
    column_strides = ((L, 1) if c is None or c.dim() < 2 else c.stride() for c in columns)
    shape = row_shape(logits, bool(spec.logit_softcap))
    threads = shape["num_warps"] * WARP_SIZE * shape["num_ctas"]
    count = programs(logits.device, threads, 0 if shape["ONE_BLOCK"] or dlogits is None else V * logits.element_size())
    by_pointer = isinstance(normalizer, Tensor)
    loss_type, kl_estimator, nan_rollout, importance_mode = spec.choices
    policy_loss_kernel[(min(B * L, count),)](
        logits, labels, *columns, weights,
        slots, sequences, counts, None if by_pointer or normalizer is None else float(normalizer),
        normalizer if by_pointer else None,
        losses, logprobs, entropies if entropies.numel() else None, score_norms, dlogits,
        ticket if total is not None else None, total,
        *(s for pair in column_strides for s in pair),
        B * L, L, sequence_count, V, *strides(logits), *(strides(logits) if dlogits is None else strides(dlogits)),
        float(spec.temperature) if temperatures is None else 1.0, number_or_off(spec.logit_softcap),
        *own_numbers(spec), *(number_or_off(getattr(spec, name)) for name in OFF_AT_0), float(spec.max_log_ratio),
        LOSS_TYPE=loss_type, KL_ESTIMATOR=kl_estimator if spec.kl_coef else 0,
        NAN_ROLLOUT=nan_rollout if spec.reads_rollout else 0, IMPORTANCE_MODE=importance_mode,
        REDUCTION=kind, SKIP_ZERO=skip_zero, **shape,
    )  # fmt: skip


def policy_loss(
    logits: Tensor,  # (B, L, V)
    labels: Tensor,  # (N,) int64, negative: masked
    advantages: Tensor,  # (N,) float32, as the rest
    weights: Tensor | None,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    rollout_logprobs: Tensor | None,
    temperatures: Tensor | None,
    nll_weights: Tensor | None,
    spec: PolicyLossSpec,
    entropy: bool,
    dlogits: Tensor | None,  # (B, L, V) out, may be the logits themselves
    score_norm: Tensor | None = None,  # (N,) out
) -> tuple[Tensor, Tensor, Tensor]:
    """-> weighted loss, log-prob and entropy of each row, (N,) float32; writes ``dlogits`` where given. Contract:
    ppg_fast/backends.py"""
    N = logits.shape[0] * logits.shape[1]
    losses, logprobs = (torch.empty(N, dtype=torch.float32, device=logits.device) for _ in range(2))
    entropies = torch.empty(
        N if entropy or spec.entropy_coef or score_norm is not None else 0, dtype=torch.float32, device=logits.device
    )
    if N:
        rows = old_logprobs, ref_logprobs, rollout_logprobs, temperatures, nll_weights
        with on_device(logits):
            sweep(
                logits,
                labels,
                advantages,
                weights,
                *rows,
                spec,
                losses,
                logprobs,
                entropies,
                dlogits,
                score_norms=score_norm,
            )
    return losses, logprobs, entropies

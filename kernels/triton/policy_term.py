"""The scalar loss of one token and its two derivatives. Mirrors ppg_fast/reference/policy_term.py and
csrc/policy_term.h.

Called once per row, outside of the loops over the vocabulary. A number that is None is off and costs nothing.
"""

import triton
import triton.language as tl

from ppg_fast import spec
from ppg_fast.losses import KLEstimator, LossType

REINFORCE = tl.constexpr(int(LossType.REINFORCE))
CISPO = tl.constexpr(int(LossType.CISPO))
IPO = tl.constexpr(int(LossType.IPO))
ICEPOP = tl.constexpr(int(LossType.ICEPOP))
DPPO_TV = tl.constexpr(int(LossType.DPPO_TV))
DPPO_KL = tl.constexpr(int(LossType.DPPO_KL))
SAPO = tl.constexpr(int(LossType.SAPO))
TOPR = tl.constexpr(int(LossType.TOPR))
K1 = tl.constexpr(int(KLEstimator.K1))
K2 = tl.constexpr(int(KLEstimator.K2))
K3_UNBIASED = tl.constexpr(int(KLEstimator.K3_UNBIASED))
K3_PLUS = tl.constexpr(int(KLEstimator.K3_PLUS))
ABS = tl.constexpr(int(KLEstimator.ABS))
ONE = tl.constexpr(spec.NAN_ROLLOUT.index("one"))
MASK = tl.constexpr(spec.IMPORTANCE_MODES.index("mask"))
LEAST = tl.constexpr(1e-8)  # added to 1 - p in dppo_kl, as verl does


@triton.jit
def minimum(a, b):
    """The smaller; NaN where either is one, which `tl.minimum` drops on a GPU and keeps in the interpreter."""
    return tl.where((a < b) | (a != a), a, b)


@triton.jit
def maximum(a, b):
    """The larger; NaN where either is one."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def k3_of(delta):
    """exp(delta) - delta - 1; by its series near 0, where the subtraction would cancel."""
    series = 1.0 / 362880.0
    series = series * delta + 1.0 / 40320.0
    series = series * delta + 1.0 / 5040.0
    series = series * delta + 1.0 / 720.0
    series = series * delta + 1.0 / 120.0
    series = series * delta + 1.0 / 24.0
    series = series * delta + 1.0 / 6.0
    series = series * delta + 0.5
    return tl.where(tl.abs(delta) < 0.5, series * delta * delta, tl.exp(delta) - delta - 1.0)


@triton.jit
def complement(logprob):
    """1 - exp(l), which keeps its digits where the probability is near 1."""
    return tl.where(tl.abs(logprob) < 0.5, -(k3_of(logprob) + logprob), 1.0 - tl.exp(logprob))


@triton.jit
def importance_weight(
    old_logprob, rollout_logprob, importance_floor, importance_cap, max_log_ratio,
    NAN_ROLLOUT: tl.constexpr, IMPORTANCE_MODE: tl.constexpr,
):  # fmt: skip
    """exp(old - rollout) within [importance_floor, importance_cap], or 0 outside of them where masked: corrects for a
    sampler that is not the trainer's policy. 1 where the rollout log-prob is NaN and NAN_ROLLOUT says so."""
    weight = tl.exp(minimum(old_logprob - rollout_logprob, max_log_ratio))
    if importance_floor is not None:
        if IMPORTANCE_MODE == MASK:
            weight = tl.where(weight < importance_floor, 0.0, weight)
        else:
            weight = maximum(weight, importance_floor)
    if importance_cap is not None:
        if IMPORTANCE_MODE == MASK:
            weight = tl.where(weight > importance_cap, 0.0, weight)
        else:
            weight = minimum(weight, importance_cap)
    if NAN_ROLLOUT == ONE:
        weight = tl.where(rollout_logprob != rollout_logprob, 1.0, weight)
    return weight


@triton.jit
def gate(logprob, old_logprob, rollout_logprob, advantage, low, high, max_log_ratio, LOSS_TYPE: tl.constexpr):
    """1 inside of the bounds, 0 outside, NaN where what is compared is NaN."""
    if LOSS_TYPE == IPO:
        compared = logprob - rollout_logprob
        moved = tl.exp(logprob) - tl.exp(rollout_logprob)
        outside = (moved < -low) | (moved > high)
    elif LOSS_TYPE == ICEPOP:
        compared = logprob - rollout_logprob
        ratio = tl.exp(minimum(compared, max_log_ratio))
        outside = (ratio < 1.0 - low) | (ratio > 1.0 + high)
    else:
        compared = logprob - old_logprob
        old = tl.exp(old_logprob)
        moved = tl.exp(logprob) - old
        if LOSS_TYPE == DPPO_TV:
            outside = tl.where(advantage > 0.0, moved > high, moved < -low)
        else:
            old_rest = complement(old_logprob)
            kl = old_rest * tl.log((old_rest + LEAST) / (complement(logprob) + LEAST)) - old * compared
            outside = tl.where(advantage > 0.0, (moved > 0.0) & (kl > high), (moved < 0.0) & (kl > low))
    return tl.where(compared != compared, compared, tl.where(outside, 0.0, 1.0))


@triton.jit
def surrogate(logprob, old_logprob, rollout_logprob, advantage, low, high, cap, max_log_ratio, LOSS_TYPE: tl.constexpr):
    """-> value of the token by LOSS_TYPE, its derivative in the log-prob: the table `ppg_fast.losses.LOSSES`.

    ``low``, ``high``: bounds of the clip or gate; of sapo tau where the advantage is positive and where it is not.
    ``cap``: of a ratio, the dual clip or ratio_cap; None: off.
    """
    log_ratio = logprob - old_logprob
    ratio = tl.exp(minimum(log_ratio, max_log_ratio))
    if LOSS_TYPE == REINFORCE:
        d_logprob = -advantage
        loss = d_logprob * logprob
    elif LOSS_TYPE == CISPO:
        d_logprob = -minimum(maximum(ratio, 1.0 - low), 1.0 + high) * advantage
        loss = d_logprob * logprob
    elif LOSS_TYPE == TOPR:
        clipped = minimum(maximum(ratio, 1.0 - low), 1.0 + high)
        d_logprob = -tl.where((advantage > 0.0) & (clipped == clipped), 1.0, clipped) * advantage
        loss = d_logprob * logprob
    elif LOSS_TYPE == SAPO:
        tau = tl.where(advantage > 0.0, low, high)
        t = tau * (ratio - 1.0)
        e = tl.exp(-tl.abs(t))
        s = tl.where(t < 0.0, e, 1.0) / (1.0 + e)
        loss = -4.0 / tau * s * advantage
        slope = -4.0 * e / ((1.0 + e) * (1.0 + e)) * ratio * advantage
        d_logprob = tl.where(log_ratio <= max_log_ratio, slope, 0.0)
    elif LOSS_TYPE == IPO or LOSS_TYPE == ICEPOP:  # noqa: SIM109 (Triton knows no `in`)
        inside = gate(logprob, old_logprob, rollout_logprob, advantage, low, high, max_log_ratio, LOSS_TYPE)
        loss = -inside * ratio * advantage
        d_logprob = tl.where(log_ratio <= max_log_ratio, loss, 0.0)
    elif LOSS_TYPE == DPPO_TV or LOSS_TYPE == DPPO_KL:  # noqa: SIM109
        weight = ratio
        if cap is not None:
            weight = minimum(ratio, cap)
        inside = gate(logprob, old_logprob, rollout_logprob, advantage, low, high, max_log_ratio, LOSS_TYPE)
        d_logprob = -inside * weight * advantage
        loss = d_logprob * logprob
    else:
        clipped = minimum(maximum(ratio, 1.0 - low), 1.0 + high)
        loss = -minimum(ratio * advantage, clipped * advantage)
        taken = (ratio * advantage <= clipped * advantage) & (log_ratio <= max_log_ratio)
        d_logprob = tl.where(taken, -ratio * advantage, 0.0)
        if cap is not None:
            bound = -cap * advantage
            beyond = (advantage < 0.0) & (loss > bound)
            loss = tl.where(beyond, bound, loss)
            d_logprob = tl.where(beyond, 0.0, d_logprob)
    return loss, d_logprob


@triton.jit
def kl_term(logprob, old_logprob, ref_logprob, kl_cap, max_log_ratio, KL_ESTIMATOR: tl.constexpr):
    """-> KL(policy, reference) of the token by KL_ESTIMATOR, within kl_cap, and its derivative in the log-prob."""
    delta = ref_logprob - logprob
    if KL_ESTIMATOR == K1:
        kl = -delta
        d_kl = 1.0
    elif KL_ESTIMATOR == ABS:
        kl = tl.abs(delta)
        d_kl = tl.where(delta > 0.0, -1.0, tl.where(delta < 0.0, 1.0, 0.0))
    elif KL_ESTIMATOR == K2:
        kl = 0.5 * delta * delta
        d_kl = -delta
    else:
        bounded = minimum(delta, max_log_ratio)
        kl = k3_of(bounded)
        d_kl = tl.where(delta > max_log_ratio, 0.0, -(kl + bounded))
    if KL_ESTIMATOR == K3_UNBIASED:
        log_ratio = logprob - old_logprob
        ratio = tl.exp(minimum(log_ratio, max_log_ratio))
        # k3 - (k3 + delta) would cancel
        both = tl.where(delta > max_log_ratio, kl, -delta)
        d_kl = ratio * tl.where(log_ratio > max_log_ratio, d_kl, both)
        kl = ratio * kl
    if kl_cap is not None:
        d_kl = tl.where(tl.abs(kl) > kl_cap, 0.0, d_kl)
        kl = maximum(minimum(kl, kl_cap), -kl_cap)
    if KL_ESTIMATOR == K3_PLUS:
        d_kl = -delta
    return kl, d_kl


@triton.jit
def policy_term(
    logprob, entropy, lse, old_logprob, ref_logprob, rollout_logprob, importance, advantage,
    low, high, cap, log_ratio_coef, kl_coef, kl_cap, entropy_coef, z_coef, max_log_ratio,
    LOSS_TYPE: tl.constexpr, KL_ESTIMATOR: tl.constexpr,
):  # fmt: skip
    """-> loss, d_loss/d_logprob, both float32; d_loss/d_entropy is -entropy_coef, d_loss/d_lse 2 z_coef lse.

    ``old_logprob`` is the log-prob itself where the caller has none (on-policy), ``ref_logprob`` likewise,
    ``rollout_logprob`` the old one, ``importance`` 1. ``low``, ``high``, ``cap``: see `surrogate`; ``cap``, ``kl_cap``
    and the coefficients are None where they are off.
    """
    loss, d_logprob = surrogate(
        logprob, old_logprob, rollout_logprob, advantage, low, high, cap, max_log_ratio, LOSS_TYPE
    )
    loss *= importance
    d_logprob *= importance
    if log_ratio_coef is not None:
        log_ratio = logprob - old_logprob
        loss += log_ratio_coef * log_ratio * log_ratio
        d_logprob += 2.0 * log_ratio_coef * log_ratio
    if kl_coef is not None:
        kl, d_kl = kl_term(logprob, old_logprob, ref_logprob, kl_cap, max_log_ratio, KL_ESTIMATOR)
        loss += kl_coef * kl
        d_logprob += kl_coef * d_kl
    if entropy_coef is not None:
        loss -= entropy_coef * entropy
    if z_coef is not None:
        loss += z_coef * lse * lse
    return loss, tl.where(loss != loss, loss, d_logprob)  # a clip would give 0

"""The scalar loss of one token and its two derivatives. Mirrors ppg_fast/reference/policy_term.py and
csrc/policy_term.h.

Called once per row, outside of the loops over the vocabulary.
"""

import triton
import triton.language as tl

from ppg_fast import spec
from ppg_fast.losses import KLEstimator, LossType

REINFORCE = tl.constexpr(int(LossType.REINFORCE))
CISPO = tl.constexpr(int(LossType.CISPO))
K1 = tl.constexpr(int(KLEstimator.K1))
K2 = tl.constexpr(int(KLEstimator.K2))
ONE = tl.constexpr(spec.NAN_ROLLOUT.index("one"))
MAX_LOG_RATIO = tl.constexpr(spec.MAX_LOG_RATIO)


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
def importance_weight(old_logprob, rollout_logprob, importance_cap, NAN_ROLLOUT: tl.constexpr):
    """min(exp(old - rollout), importance_cap): corrects for a sampler that is not the trainer's policy. 1 where the
    rollout log-prob is NaN and NAN_ROLLOUT says so."""
    weight = minimum(tl.exp(minimum(old_logprob - rollout_logprob, MAX_LOG_RATIO)), importance_cap)
    if NAN_ROLLOUT == ONE:
        weight = tl.where(rollout_logprob != rollout_logprob, 1.0, weight)
    return weight


@triton.jit
def policy_term(
    logprob, entropy, old_logprob, ref_logprob, importance, advantage, clip_low, clip_high, dual_clip, kl_coef,
    entropy_coef,
    LOSS_TYPE: tl.constexpr, KL_ESTIMATOR: tl.constexpr,
):  # fmt: skip
    """-> loss, d_loss/d_logprob, both float32; d_loss/d_entropy is -entropy_coef.

    ``old_logprob`` is the log-prob itself where the caller has none (on-policy), ``ref_logprob`` likewise,
    ``importance`` 1. ``kl_coef`` and ``entropy_coef`` are None where their terms are off.
    """
    log_ratio = logprob - old_logprob
    ratio = tl.exp(minimum(log_ratio, MAX_LOG_RATIO))
    if LOSS_TYPE == REINFORCE:
        d_logprob = -advantage
        loss = d_logprob * logprob
    elif LOSS_TYPE == CISPO:
        d_logprob = -minimum(ratio, 1.0 + clip_high) * advantage
        loss = d_logprob * logprob
    else:
        clipped = minimum(maximum(ratio, 1.0 - clip_low), 1.0 + clip_high)
        loss = -minimum(ratio * advantage, clipped * advantage)
        taken = (ratio * advantage <= clipped * advantage) & (log_ratio <= MAX_LOG_RATIO)
        d_logprob = tl.where(taken, -ratio * advantage, 0.0)
        bound = -dual_clip * advantage
        beyond = (dual_clip != 0.0) & (advantage < 0.0) & (loss > bound)
        loss = tl.where(beyond, bound, loss)
        d_logprob = tl.where(beyond, 0.0, d_logprob)
    loss *= importance
    d_logprob *= importance
    if kl_coef is not None:
        delta = ref_logprob - logprob
        if KL_ESTIMATOR == K1:
            kl = -delta
            d_kl = 1.0
        elif KL_ESTIMATOR == K2:
            kl = 0.5 * delta * delta
            d_kl = -delta
        else:
            bounded = minimum(delta, MAX_LOG_RATIO)
            kl = k3_of(bounded)
            d_kl = tl.where(delta > MAX_LOG_RATIO, 0.0, -(kl + bounded))
        loss += kl_coef * kl
        d_logprob += kl_coef * d_kl
    if entropy_coef is not None:
        loss -= entropy_coef * entropy
    return loss, tl.where(loss != loss, loss, d_logprob)  # a clip would give 0

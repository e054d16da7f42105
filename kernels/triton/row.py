"""The two parts of every sweep over the vocabulary: the statistics of a row and its gradient.

Exponents are in base 2, as in hardware: with z = softcap(x) and factor = log2(e) / temperature, a logit weighs
2^((z - max z) factor). One exponential per element and sweep (two with a softcap), none for a rescale.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.402823466e38)  # unlike -inf it can be subtracted from itself
# 2^FAR is 0 in float32: exponents are clamped here before they multiply, because 0 * -inf is NaN
FAR = tl.constexpr(-256.0)


@triton.jit
def row_offset(n, L, batch_stride, row_stride):
    """Elements before row n = b L + l; 64 bits, because B L V does not fit into 32."""
    return (n // L).to(tl.int64) * batch_stride + (n % L).to(tl.int64) * row_stride


@triton.jit
def tanh(x):
    """tanh to 4e-7 relative: (1 - e) / (1 + e), e = exp(-2|x|), and a polynomial for small x, where that cancels.

    Source of the polynomial: Cephes, tanhf.c
    """
    size = tl.abs(x)
    square = x * x
    small = -5.70498872745e-3
    small = small * square + 2.06390887954e-2
    small = small * square - 5.37397155531e-2
    small = small * square + 1.33314422036e-1
    small = small * square - 3.33332819422e-1
    small = small * square * size + size
    e = tl.exp2(size * LOG2E * -2.0)
    magnitude = tl.where(size < 0.625, small, (1.0 - e) / (1.0 + e))
    return tl.where(x < 0.0, -magnitude, magnitude)


@triton.jit
def softcapped(x, logit_softcap):
    """z = softcap tanh(x / softcap) in float32, or x where the softcap is None."""
    z = x.to(tl.float32)
    if logit_softcap is not None:
        z = logit_softcap * tanh(z / logit_softcap)
    return z


@triton.jit
def temperature_of(n, temperatures, temperature):
    """The temperature of row n: its own, or that of all rows."""
    if temperatures is not None:
        temperature = tl.load(temperatures + n)
    return temperature


@triton.jit
def tile(BLOCK_V: tl.constexpr, LANES: tl.constexpr):
    """The columns of a block, (BLOCK_V / LANES, LANES): a thread holds all rows of its lanes, so a sum over rows stays
    inside a thread."""
    return tl.arange(0, BLOCK_V // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]


@triton.jit
def load_block(row, at, V):
    """Columns ``at`` of a row that will be read again; -inf beyond its end."""
    return tl.load(row + at, mask=at < V, other=float("-inf"), eviction_policy="evict_last")


@triton.jit
def capped(x, inside, logit_softcap):
    """`softcapped`, and -inf beyond the end of the row, where a softcapped -inf would be finite."""
    z = softcapped(x, logit_softcap)
    if logit_softcap is not None:
        z = tl.where(inside, z, float("-inf"))
    return z


@triton.jit
def held_row(x, inside, factor, logit_softcap, ENTROPY: tl.constexpr, SCORE_NORM: tl.constexpr):
    """-> m, s, sd, ss, e of a row that is held in registers: m = max z, e = 2^d with d = (z - m) factor, s = sum e,
    sd = sum e d, ss = sum e^2."""
    z = capped(x, inside, logit_softcap)
    m = tl.maximum(tl.max(z, 0), LOWEST)
    d = (z - m) * factor
    e = tl.exp2(d)
    sd = 0.0
    if ENTROPY:
        sd = tl.sum(e * tl.maximum(d, FAR), 0)
    ss = 0.0
    if SCORE_NORM:
        ss = tl.sum(e * e, 0)
    return m, tl.sum(e, 0), sd, ss, e


@triton.jit
def fold_block(m, s, sd, ss, x, inside, factor, logit_softcap, ENTROPY: tl.constexpr, SCORE_NORM: tl.constexpr):
    """Fold a tile of logits into the running statistics: m = max z, and per lane the sums of `held_row`.

    Lanes are summed by the caller at the end, so that a block costs one reduction and one rescaling factor.
    """
    z = capped(x, inside, logit_softcap)
    m_new = tl.maximum(m, tl.max(tl.max(z, 0), 0))
    shift = tl.maximum((m - m_new) * factor, FAR)
    rescale = tl.exp2(shift)
    d = (z - m_new) * factor
    e = tl.exp2(d)
    if ENTROPY:
        sd = (sd + s * shift) * rescale + tl.sum(e * tl.maximum(d, FAR), 0)
    s = s * rescale + tl.sum(e, 0)
    if SCORE_NORM:
        ss = ss * (rescale * rescale) + tl.sum(e * e, 0)
    return m_new, s, sd, ss


@triton.jit
def swept_row(
    row,
    V,
    factor,
    logit_softcap,
    ENTROPY: tl.constexpr,
    SCORE_NORM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    """-> m, s, sd, ss of the row at ``row``, see `fold_block`, in one read; a block is loaded while the previous one is
    folded."""
    cols = tile(BLOCK_V, LANES)
    m = tl.full((), LOWEST, tl.float32)
    s = tl.zeros((LANES,), tl.float32)
    sd = tl.zeros((LANES,), tl.float32)
    ss = tl.zeros((LANES,), tl.float32)
    x = load_block(row, cols, V)
    for start in range(0, V, BLOCK_V):
        x_after = load_block(row, start + BLOCK_V + cols, V)
        m, s, sd, ss = fold_block(m, s, sd, ss, x, start + cols < V, factor, logit_softcap, ENTROPY, SCORE_NORM)
        x = x_after
    return m, tl.sum(s), tl.sum(sd), tl.sum(ss)


@triton.jit
def label_logit(row, label, V, logit_softcap):
    """The label's logit after the softcap; NaN for a label beyond the vocabulary, so that an unchecked error shows.

    Called before the first reduction, whose barrier orders this load before any in-place store.
    """
    return softcapped(tl.load(row + label, mask=label < V, other=float("nan")), logit_softcap)


@triton.jit
def logprob_of(z_label, m, s, factor):
    """log p of the label in nats from the statistics of its row. In nats at once: in units of log 2 the distance of a
    logit of finfo.min would be infinite."""
    return (z_label - m) * (factor * LN2) - tl.log2(s) * LN2


@triton.jit
def log_sum_exp_of(m, s, factor):
    """log of the sum of exp(z / temperature) in nats from the statistics of a row."""
    return m * (factor * LN2) + tl.log2(s) * LN2


@triton.jit
def entropy_of(s, sd):
    """H = -sum p log p in nats from the statistics of a row; p = 2^d / s."""
    return (tl.log2(s) - sd / s) * LN2


@triton.jit
def score_norm_of(z_label, m, s, ss, factor):
    """|d log p[label] / d z|^2 = sum p^2 - 2 p[label] + 1 from the statistics of a row, never below 0; NaN stays
    NaN."""
    norm = ss / (s * s) - 2.0 * tl.exp2((z_label - m) * factor) / s + 1.0
    return tl.where(norm < 0.0, 0.0, norm)


@triton.jit
def block_gradient(x, cols, label, m, log2_s, entropy, g, pull, h, factor, logit_softcap):
    """g 1[v = label] - p pull - h p (log p + H) through the softcap, for the columns ``cols``; p = 2^((z - m) factor) /
    s. ``pull`` is g, minus the derivative in the log-sum-exp where that has one.

    All are already divided by the temperature; ``h`` None: no entropy term. The label's column is found by
    comparison, since a separate store to it would race with those of the row.
    """
    z = softcapped(x, logit_softcap)
    log2_p = (z - m) * factor - log2_s
    if h is not None:
        pull = pull + h * (tl.maximum(log2_p, FAR) * LN2 + entropy)
    dz = tl.where(cols == label, g, 0.0) - tl.exp2(log2_p) * pull
    if logit_softcap is not None:
        t = z / logit_softcap
        dz = dz * (1.0 - t * t)
    return dz


@triton.jit
def zero_row(row, V, BLOCK_V: tl.constexpr):
    """Write exact zeros into a row, without reading it."""
    cols = tl.arange(0, BLOCK_V)
    zeros = tl.zeros((BLOCK_V,), row.dtype.element_ty)
    for start in range(0, V, BLOCK_V):
        tl.store(row + start + cols, zeros, mask=start + cols < V)

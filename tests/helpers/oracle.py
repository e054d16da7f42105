"""The public contract a second time, in numpy float64 and plain loops, from the formulas alone: no autograd, no code of
the package.

A loss has detached parts (a sequence's ratio, CISPO's weight, an old log-prob that is missing). They are read from
``frozen``, the log-probs where the gradient is taken, so that every gradient here can be checked against differences of
the loss with ``frozen`` held.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

IGNORE = -100


def window(policy_class, turn, turns, ids):
    """The list S_t of a dialogue of ``turns`` turns.

    ``policy_class``: "greedy", "full", ("lookahead", K), ("segment", length or (B, T) ids), ("mask", (T, T)) or
        ("lags", weights). ``ids``: of this dialogue.
    """
    kind, number = policy_class if isinstance(policy_class, tuple) else (policy_class, None)
    later = range(turn, turns)
    if kind == "greedy":
        return [turn]
    if kind == "full":
        return list(later)
    if kind == "lookahead":
        return [k for k in later if k - turn < number]
    if kind == "lags":
        return [k for k in later if k - turn < len(number)]
    if kind == "mask":
        return [k for k in range(turns) if number[turn][k]]
    if isinstance(number, int):
        return [k for k in later if k // number == turn // number]
    return [k for k in later if ids[k] == ids[turn]]


def partial_returns(rewards, policy_class, gamma=1.0, turn_counts=None):
    """R_t = sum over k in S_t of gamma^(k - t) r_k, each times the weight of its lag where there are such; 0 beyond the
    dialogue's turns. (B, T)"""
    B, T = np.shape(rewards)
    weights = policy_class[1] if policy_class[0] == "lags" else np.ones(T)
    out = np.zeros((B, T))
    for b in range(B):
        turns = T if turn_counts is None else int(turn_counts[b])
        ids = policy_class[1][b] if policy_class[0] == "segment" and not isinstance(policy_class[1], int) else None
        for t in range(turns):
            out[b, t] = math.fsum(
                float(gamma) ** (k - t) * float(weights[k - t]) * float(rewards[b][k])
                for k in window(policy_class, t, turns, ids)
            )
    return out


def turn_advantages(returns, group_ids, baseline="leave_one_out", turn_counts=None):
    """A = R - baseline over the group's members that reached the turn; (R - mean) / (std + 1e-6); alone there, A = R.
    (B, T)"""
    B, T = np.shape(returns)
    counts = [T] * B if turn_counts is None else [int(n) for n in turn_counts]
    out = np.zeros((B, T))
    for b in range(B):
        for t in range(counts[b]):
            own = float(returns[b][t])
            group = (
                [] if baseline == "none" else [c for c in range(B) if group_ids[c] == group_ids[b] and counts[c] > t]
            )
            here = [float(returns[c][t]) for c in group]
            if len(here) < 2:
                out[b, t] = own
                continue
            mean = math.fsum(here) / len(here)
            if baseline == "leave_one_out":
                out[b, t] = own - math.fsum(float(returns[c][t]) for c in group if c != b) / (len(here) - 1)
            elif baseline == "group_mean":
                out[b, t] = own - mean
            else:
                std = math.sqrt(math.fsum((r - mean) ** 2 for r in here) / (len(here) - 1))
                out[b, t] = (own - mean) / (std + 1e-6)
    return out


def row_statistics(z, label, temperature, softcap):
    """log p_label, H, and p, log p of softmax(x), x = softcap(z) / temperature, softcap(z) = c tanh(z / c)."""
    x = (softcap * np.tanh(z / softcap) if softcap else z) / temperature
    x = x - x.max()
    log_p = x - math.log(np.exp(x).sum())
    p = np.exp(log_p)
    return log_p[label], -float((p * np.maximum(log_p, -1e300)).sum()), p, np.maximum(log_p, -1e300)  # 0 log 0 = 0


def row_gradient(z, label, g, h, temperature, softcap, b=0.0):
    """dL/dz_v for g = dL/dlogprob, h = dL/dH and b = dL/dlse: (g (1[v = y] - p_v) - h p_v (log p_v + H) + b p_v) /
    temperature * (1 - tanh(z_v / c)^2)."""
    _, entropy, p, log_p = row_statistics(z, label, temperature, softcap)
    d = -g * p - h * p * (log_p + entropy) + b * p
    d[label] += g
    return d / temperature * (1 - np.tanh(z / softcap) ** 2 if softcap else 1.0)


def token_logprobs(logits, labels, active, temperature=1.0, softcap=0.0):
    """(log-probs, entropies) of rows (N, V); rows that are not active read 0."""
    temperature = np.broadcast_to(np.asarray(temperature, np.float64), (len(labels),))
    out = np.zeros((2, len(labels)))
    for i in np.flatnonzero(active):
        out[:, i] = row_statistics(logits[i], labels[i], temperature[i], softcap)[:2]
    return out


def token_logprobs_gradient(logits, labels, active, g, h, temperature=1.0, softcap=0.0, b=None):
    """dlogits (N, V) for upstream gradients g of the log-probs, h of the entropies and b of the log-sum-exps."""
    temperature = np.broadcast_to(np.asarray(temperature, np.float64), (len(labels),))
    out, b = np.zeros(np.shape(logits)), np.zeros(len(labels)) if b is None else b
    for i in np.flatnonzero(active):
        out[i] = row_gradient(logits[i], labels[i], g[i], h[i], temperature[i], softcap, b[i])
    return out


def log_sum_exps(logits, active, temperature, softcap):
    """log sum_v exp(x_v), (N,); rows that are not active read 0."""
    temperature = np.broadcast_to(np.asarray(temperature, np.float64), (len(logits),))
    out = np.zeros(len(logits))
    for i in np.flatnonzero(active):
        x = (softcap * np.tanh(logits[i] / softcap) if softcap else logits[i]) / temperature[i]
        out[i] = x.max() + math.log(np.exp(x - x.max()).sum())
    return out


@dataclass
class Batch:
    """The tokens of one call, flattened to (N,), and what the loss is. ``sequence``, ``turn``: the one of each
    token."""

    labels: np.ndarray
    advantages: np.ndarray
    active: np.ndarray
    sequence: np.ndarray
    turn: np.ndarray | None
    old: np.ndarray | None
    ref: np.ndarray | None
    rollout: np.ndarray | None
    spec: object
    reduction: str = "token_mean"
    normalizer: float | None = None
    nll: np.ndarray | None = None  # weights of -l, over the number of active tokens that have one

    @property
    def live(self):
        """Tokens with an advantage or a weight of -l."""
        return (self.advantages != 0) | (0 if self.nll is None else self.nll != 0)


def sequences(shape, cu_seqlens=None):
    """The sequence of each token: the rows of (B, L), the runs of cu_seqlens for (N,), else one."""
    out = np.zeros(shape, np.int64)
    if cu_seqlens is not None:
        for i, (start, stop) in enumerate(pairwise(cu_seqlens)):
            out[int(start) : int(stop)] = i
    elif len(shape) == 2:
        out[:] = np.arange(shape[0])[:, None]
    return out.reshape(-1)


def reduction_weights(batch):
    """w with loss = sum_i w_i loss_i ("none": w = 1)."""
    active, sequence = batch.active, batch.sequence
    live = sorted(set(sequence[active].tolist()))
    outer = {"token_mean": int(active.sum()), "sum": 1, "none": 1}.get(batch.reduction, len(live))
    outer = outer if batch.normalizer is None else batch.normalizer
    w = np.zeros(len(active))
    for i in np.flatnonzero(active):
        inner = int((active & (sequence == sequence[i])).sum()) if batch.reduction == "sequence_mean" else 1
        w[i] = 1.0 / inner / outer
    return w


def peers_of(batch, i):
    """The active tokens that share a ratio with token i: of its sequence, of its turn in it, or itself."""
    kind, peers = batch.spec.loss_type, batch.active & (batch.sequence == batch.sequence[i])
    if kind not in ("gspo", "gspo_turn", "gmpo", "gmpo_turn", "vespo"):
        return [i]
    return np.flatnonzero(peers & (batch.turn == batch.turn[i]) if kind.endswith("_turn") else peers)


def log_ratio(batch, j, frozen):
    """(l - old of token j, in gmpo clipped on the side that its advantage rewards; whether it is inside)."""
    value, spec, A = frozen[j] - batch.old[j], batch.spec, batch.advantages[j]
    if not spec.loss_type.startswith("gmpo"):
        return value, True
    kept = min(value, spec.clip_high) if A > 0 else max(value, -spec.clip_low) if A < 0 else value
    return kept, kept == value


def ratio(batch, i, frozen):
    """The detached policy ratio of token i, or of those that share one; 1 without old log-probs."""
    if batch.old is None:
        return 1.0
    values = [log_ratio(batch, j, frozen)[0] for j in peers_of(batch, i)]
    return math.exp(math.fsum(values) / (len(values) if batch.spec.ratio_reduction == "mean" else 1))


def vespo_weight(batch, i, frozen):
    """exp(lambda (1 - w) + k log w), w the ratio of the whole sequence with its importance weights."""
    peers, spec = peers_of(batch, i), batch.spec
    log_w = math.fsum(frozen[j] - batch.old[j] for j in peers) if batch.old is not None else 0.0
    log_w += math.fsum(math.log(max(importance(batch, j, frozen), 1e-8)) for j in peers)
    log_w = min(max(log_w, math.log(1e-8)), spec.max_log_ratio)
    side = "positive" if batch.advantages[i] >= 0 else "negative"
    k, scale = getattr(spec, f"k_{side}"), getattr(spec, f"lambda_{side}")
    return math.exp(scale * (1 - math.exp(log_w)) + k * log_w)


def binary_kl(p, q):
    """KL(Bernoulli(p), Bernoulli(q)), with verl's 1e-8; NaN for a p beyond 1, which is no probability."""
    if p >= 1:
        return math.nan
    return p * math.log(p / q) + (1 - p) * math.log((1 - p + 1e-8) / (1 - q + 1e-8))


def stopped(batch, i, frozen):
    """Whether the gate of token i is shut."""
    spec, A, l = batch.spec, batch.advantages[i], frozen[i]
    old = l if batch.old is None else batch.old[i]
    b = old if batch.rollout is None else batch.rollout[i]
    if spec.loss_type == "ipo":
        return not -spec.clip_low <= math.exp(l) - math.exp(b) <= spec.clip_high
    if spec.loss_type == "icepop":
        return not 1 - spec.clip_low <= math.exp(l - b) <= 1 + spec.clip_high
    toward = math.exp(l) > math.exp(old) if A > 0 else math.exp(l) < math.exp(old)
    tv = abs(math.exp(l) - math.exp(old))
    far = tv if spec.loss_type == "dppo_tv" else binary_kl(math.exp(old), math.exp(l))
    return toward and far > (spec.clip_high if A > 0 else spec.clip_low)


def surrogate(batch, i, l, frozen):
    """(the surrogate of token i, its derivative in l); only the derivative is by hand."""
    spec, A, r0 = batch.spec, batch.advantages[i], ratio(batch, i, frozen)
    bounded = min(max(r0, 1 - spec.clip_low), 1 + spec.clip_high)
    fixed = {
        "cispo": lambda: bounded,
        "topr": lambda: 1.0 if A > 0 else bounded,
        "dppo_tv": lambda: 0.0 if stopped(batch, i, frozen) else min(r0, spec.ratio_cap or math.inf),
    }
    fixed["dppo_kl"] = fixed["dppo_tv"]
    if spec.loss_type in fixed:
        w = fixed[spec.loss_type]()
        return -w * A * l, -w * A
    if spec.loss_type == "reinforce":
        return -A * l, -A
    if spec.loss_type == "vespo":
        phi = vespo_weight(batch, i, frozen)
        return -phi * A * l, -phi * A
    if spec.loss_type.startswith("gmpo"):
        moves = batch.old is None or log_ratio(batch, i, frozen)[1]
        r = r0 * math.exp(l - frozen[i]) if moves else r0
        return -r * A, -r * A if moves else 0.0
    r = r0 * math.exp(l - frozen[i])
    if spec.loss_type in ("ipo", "icepop"):
        value = 0.0 if stopped(batch, i, frozen) else -r * A
        return value, value
    if spec.loss_type == "sapo":
        tau = spec.tau_positive if A > 0 else spec.tau_negative
        s = 1 / (1 + math.exp(-tau * (r - 1)))
        return -4 / tau * s * A, -4 * s * (1 - s) * r * A
    low, high = 1 - spec.clip_low, 1 + spec.clip_high
    gain = min(r * A, min(max(r, low), high) * A)
    if spec.dual_clip and A < 0:
        gain = max(gain, spec.dual_clip * A)
    moves = r <= high if A > 0 else r >= low and (not spec.dual_clip or r <= spec.dual_clip)
    return -gain, -r * A if moves else 0.0


def penalty(batch, i, l, frozen):
    """(kl_coef * KL estimator + log_ratio_coef (l - old)^2, its derivative in l); k3_unbiased is weighed with the
    ratio, whose slope is its own."""
    spec, value, slope = batch.spec, 0.0, 0.0
    if spec.kl_coef:
        d, d0 = batch.ref[i] - l, batch.ref[i] - frozen[i]
        k3 = math.exp(d) - d - 1
        shared = "" if batch.old is None or spec.loss_type == "vespo" else spec.loss_type
        moves = not shared.startswith("gmpo") or log_ratio(batch, i, frozen)[1]
        own = math.exp(frozen[i] - batch.old[i]) if batch.old is not None else 1.0
        r = (ratio(batch, i, frozen) if shared else own) * (math.exp(l - frozen[i]) if moves else 1.0)
        value, slope = {
            "k1": (-d, 1.0), "k2": (d * d / 2, -d), "k3": (k3, 1 - math.exp(d)), "abs": (abs(d), -np.sign(d)),
            "k3_unbiased": (r * k3, r * ((k3 if moves else 0.0) + 1 - math.exp(d))),
            "k3_plus": (math.exp(d0) - d0 - 1, 0.0),
        }[spec.kl_estimator]  # fmt: skip
        if spec.kl_cap and abs(value) > spec.kl_cap:
            value, slope = math.copysign(spec.kl_cap, value), 0.0
        if spec.kl_estimator == "k3_plus":
            value, slope = value + (d * d - d0 * d0) / 2, -d
    moved = l - (frozen[i] if batch.old is None else batch.old[i])
    value, slope = spec.kl_coef * value, spec.kl_coef * slope
    return value + spec.log_ratio_coef * moved**2, slope + 2 * spec.log_ratio_coef * moved


def importance(batch, i, frozen):
    """exp(old - rollout) within [floor, cap], or 0 outside of them, detached, on the surrogate only."""
    spec = batch.spec
    if not (spec.importance_cap or spec.importance_floor) or batch.rollout is None:
        return 1.0
    weight = math.exp((frozen[i] if batch.old is None else batch.old[i]) - batch.rollout[i])
    kept = min(max(weight, spec.importance_floor), spec.importance_cap or math.inf)
    return weight if kept == weight else 0.0 if spec.importance_mode == "mask" else kept


def token_terms(batch, logprobs, entropies, lses, frozen):
    """Per token: (loss, g = dloss/dlogprob, h = dloss/dentropy, b = dloss/dlse), (4, N)."""
    out, spec = np.zeros((4, len(logprobs))), batch.spec
    for i in np.flatnonzero(batch.active):
        (s, ds), (k, dk), c = (
            surrogate(batch, i, logprobs[i], frozen),
            penalty(batch, i, logprobs[i], frozen),
            1.0 if batch.spec.loss_type == "vespo" else importance(batch, i, frozen),
        )
        value = c * s + k - spec.entropy_coef * entropies[i] + spec.z_coef * lses[i] ** 2
        out[:, i] = value, c * ds + dk, -spec.entropy_coef, 2 * spec.z_coef * lses[i]
    return out


def likelihood_weights(batch):
    """The weight of -l of each token beside the reduction."""
    if batch.nll is None:
        return np.zeros(len(batch.active))
    weights = np.where(batch.active, batch.nll, 0.0)
    return weights / max((weights != 0).sum(), 1)


def policy_loss(logits, batch, upstream=1.0, frozen=None):
    """(loss, log-probs, entropies, dlogits) of logits (N, V); ``upstream``: dL/dloss, (N,) for reduction "none"."""
    spec, active = batch.spec, batch.active
    temperature = np.asarray(spec.temperature, np.float64).reshape(-1)
    scale = temperature, spec.logit_softcap
    logprobs, entropies = token_logprobs(logits, batch.labels, active, *scale)
    lses = log_sum_exps(logits, active, *scale)
    loss, g, h, b = token_terms(batch, logprobs, entropies, lses, logprobs if frozen is None else frozen)
    w, nll = reduction_weights(batch), likelihood_weights(batch)
    slopes = upstream * (w * g - nll), upstream * w * h
    dlogits = token_logprobs_gradient(logits, batch.labels, active, *slopes, *scale, upstream * w * b)
    loss = w * loss - nll * logprobs
    return (loss if batch.reduction == "none" else float(loss.sum())), logprobs, entropies, dlogits


def linear_logits(hidden, weight, bias=None):
    """(N, D), (V, D), (V,) to (N, V)."""
    return hidden @ weight.T + (0 if bias is None else bias)


def linear_gradients(dlogits, hidden, weight, active):
    """(dhidden, dweight, dbias), from the active rows alone."""
    dhidden = np.where(active[:, None], dlogits @ weight, 0.0)
    return dhidden, dlogits[active].T @ hidden[active], dlogits[active].sum(0)


# ---- cases -----------------------------------------------------------------------------------------------------------
# one sequence; runs of which one is empty and one is masked whole; a batch; three leading dimensions; and its
# cu_seqlens
LAYOUTS = {
    "flat": ((23,), None),
    "packed": ((23,), (0, 2, 2, 15, 23)),
    "padded": ((4, 6), None),
    "cube": ((2, 3, 4), None),
}
HIDDEN = 8


@dataclass
class Case:
    """One call. ``rows``: logits (N, V) or, where there is a ``weight``, hidden states (N, D), multiples of 1/16 that
    every dtype holds."""

    layout: str
    batch: Batch
    rows: np.ndarray
    weight: np.ndarray | None = None
    bias: np.ndarray | None = None

    @property
    def logits(self):
        return self.rows if self.weight is None else linear_logits(self.rows, self.weight, self.bias)

    def gradients(self, dlogits):
        if self.weight is None:
            return {"rows": dlogits}
        return dict(
            zip(
                ("rows", "weight", "bias"),
                linear_gradients(dlogits, self.rows, self.weight, self.batch.active),
                strict=True,
            )
        )


def draw(
    seed, layout, spec, reduction="token_mean", *, linear=False, on_policy=False, normalizer=None, vocabulary=None
):
    """30% of the rows masked, 25% of the advantages 0, log-ratios near 0.5 and 0.05 of either sign, alike in a ratio
    group."""
    rng = np.random.default_rng(seed)
    shape, cu = LAYOUTS[layout]
    N, V = math.prod(shape), vocabulary or int(rng.choice([2, 17, 130]))
    sequence, turn = sequences(shape, cu), np.arange(N) // 3 % 2
    active, labels = rng.random(N) < 0.7, rng.integers(V, size=N)
    active[:2] = layout != "packed", False
    advantages = _float32(rng.normal(size=N) * (rng.random(N) < 0.75))
    rows, weight, bias = (
        rng.integers(-lim, lim + 1, s) / 16 for lim, s in ((80, (N, V)), (16, (V, HIDDEN)), (16, (V,)))
    )
    if linear:
        rows = rng.integers(-24, 25, (N, HIDDEN)) / 16
    head = (weight, bias if seed % 2 else None) if linear else (None, None)
    case = Case(
        layout,
        Batch(labels, advantages, active, sequence, turn, None, None, None, spec, reduction, normalizer),
        rows,
        *head,
    )
    logprobs = token_logprobs(
        case.logits, labels, active, np.asarray(spec.temperature).reshape(-1), spec.logit_softcap
    )[0]
    groups = {"gspo": sequence, "gspo_turn": sequence * 2 + turn, "gmpo_turn": sequence * 2 + turn}
    group = groups.get(spec.loss_type, np.arange(N))
    offsets = rng.choice([-0.5, -0.05, 0.05, 0.5], (3, N))
    old = _float32(logprobs - offsets[0, group] - 0.02 * rng.random(N))
    case.batch.old = None if on_policy else old
    if seed % 3 == 0:
        case.batch.nll = _float32(rng.random(N) * (rng.random(N) < 0.4))
    case.batch.ref, case.batch.rollout = (
        _float32(logprobs - offsets[1]),
        _float32((logprobs if on_policy else old) - offsets[2]),
    )
    return case


def _float32(values):
    return np.asarray(values, np.float32).astype(np.float64)

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

    ``policy_class``: "greedy", "full", ("lookahead", K), ("segment", length or (B, T) ids) or ("mask", (T, T)).
        ``ids``: of this dialogue.
    """
    kind, number = policy_class if isinstance(policy_class, tuple) else (policy_class, None)
    later = range(turn, turns)
    if kind == "greedy":
        return [turn]
    if kind == "full":
        return list(later)
    if kind == "lookahead":
        return [k for k in later if k - turn < number]
    if kind == "mask":
        return [k for k in range(turns) if number[turn][k]]
    if isinstance(number, int):
        return [k for k in later if k // number == turn // number]
    return [k for k in later if ids[k] == ids[turn]]


def partial_returns(rewards, policy_class, gamma=1.0, turn_counts=None):
    """R_t = sum over k in S_t of gamma^(k - t) r_k; 0 beyond the dialogue's turns. (B, T)"""
    B, T = np.shape(rewards)
    out = np.zeros((B, T))
    for b in range(B):
        turns = T if turn_counts is None else int(turn_counts[b])
        ids = policy_class[1][b] if policy_class[0] == "segment" and not isinstance(policy_class[1], int) else None
        for t in range(turns):
            out[b, t] = math.fsum(
                float(gamma) ** (k - t) * float(rewards[b][k]) for k in window(policy_class, t, turns, ids)
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


def row_gradient(z, label, g, h, temperature, softcap):
    """dL/dz_v for g = dL/dlogprob and h = dL/dH: (g (1[v = y] - p_v) - h p_v (log p_v + H)) / temperature * (1 -
    tanh(z_v / c)^2)."""
    _, entropy, p, log_p = row_statistics(z, label, temperature, softcap)
    d = -g * p - h * p * (log_p + entropy)
    d[label] += g
    return d / temperature * (1 - np.tanh(z / softcap) ** 2 if softcap else 1.0)


def token_logprobs(logits, labels, active, temperature=1.0, softcap=0.0):
    """(log-probs, entropies) of rows (N, V); rows that are not active read 0."""
    temperature = np.broadcast_to(np.asarray(temperature, np.float64), (len(labels),))
    out = np.zeros((2, len(labels)))
    for i in np.flatnonzero(active):
        out[:, i] = row_statistics(logits[i], labels[i], temperature[i], softcap)[:2]
    return out


def token_logprobs_gradient(logits, labels, active, g, h, temperature=1.0, softcap=0.0):
    """dlogits (N, V) for upstream gradients g of the log-probs and h of the entropies."""
    temperature = np.broadcast_to(np.asarray(temperature, np.float64), (len(labels),))
    out = np.zeros(np.shape(logits))
    for i in np.flatnonzero(active):
        out[i] = row_gradient(logits[i], labels[i], g[i], h[i], temperature[i], softcap)
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


def ratio(batch, i, frozen):
    """The detached policy ratio of token i: of the token, of its sequence, or of its turn in its sequence; 1 without
    old log-probs."""
    if batch.old is None:
        return 1.0
    peers = batch.active & (batch.sequence == batch.sequence[i])
    if batch.spec.loss_type == "gspo_turn":
        peers = peers & (batch.turn == batch.turn[i])
    elif batch.spec.loss_type != "gspo":
        peers = np.arange(len(peers)) == i
    return math.exp(math.fsum(frozen[j] - batch.old[j] for j in np.flatnonzero(peers)) / int(peers.sum()))


def surrogate(batch, i, l, frozen):
    """(the surrogate of token i, its derivative in l); only the derivative is by hand."""
    spec, A, r0 = batch.spec, batch.advantages[i], ratio(batch, i, frozen)
    if spec.loss_type == "reinforce":
        return -A * l, -A
    if spec.loss_type == "cispo":
        w = min(max(r0, 1 - spec.clip_low), 1 + spec.clip_high)
        return -w * A * l, -w * A
    r = r0 * math.exp(l - frozen[i])
    low, high = 1 - spec.clip_low, 1 + spec.clip_high
    gain = min(r * A, min(max(r, low), high) * A)
    if spec.dual_clip and A < 0:
        gain = max(gain, spec.dual_clip * A)
    moves = r <= high if A > 0 else r >= low and (not spec.dual_clip or r <= spec.dual_clip)
    return -gain, -r * A if moves else 0.0


def penalty(batch, i, l):
    """(kl_coef * KL estimator, its derivative in l)."""
    if not batch.spec.kl_coef:
        return 0.0, 0.0
    d = batch.ref[i] - l
    value, slope = {"k1": (-d, 1.0), "k2": (d * d / 2, -d), "k3": (math.exp(d) - d - 1, 1 - math.exp(d))}[
        batch.spec.kl_estimator
    ]
    return batch.spec.kl_coef * value, batch.spec.kl_coef * slope


def importance(batch, i, frozen):
    """min(exp(old - rollout), cap), detached, on the surrogate only."""
    if not batch.spec.importance_cap or batch.rollout is None:
        return 1.0
    old = frozen[i] if batch.old is None else batch.old[i]
    return min(math.exp(old - batch.rollout[i]), batch.spec.importance_cap)


def token_terms(batch, logprobs, entropies, frozen):
    """Per token: (loss, g = dloss/dlogprob, h = dloss/dentropy), (3, N)."""
    out = np.zeros((3, len(logprobs)))
    for i in np.flatnonzero(batch.active):
        (s, ds), (k, dk), c = (
            surrogate(batch, i, logprobs[i], frozen),
            penalty(batch, i, logprobs[i]),
            importance(batch, i, frozen),
        )
        out[:, i] = c * s + k - batch.spec.entropy_coef * entropies[i], c * ds + dk, -batch.spec.entropy_coef
    return out


def policy_loss(logits, batch, upstream=1.0, frozen=None):
    """(loss, log-probs, entropies, dlogits) of logits (N, V); ``upstream``: dL/dloss, (N,) for reduction "none"."""
    spec, active = batch.spec, batch.active
    temperature = np.asarray(spec.temperature, np.float64).reshape(-1)
    logprobs, entropies = token_logprobs(logits, batch.labels, active, temperature, spec.logit_softcap)
    loss, g, h = token_terms(batch, logprobs, entropies, logprobs if frozen is None else frozen)
    w = reduction_weights(batch)
    dlogits = token_logprobs_gradient(
        logits, batch.labels, active, upstream * w * g, upstream * w * h, temperature, spec.logit_softcap
    )
    return (w * loss if batch.reduction == "none" else float((w * loss).sum())), logprobs, entropies, dlogits


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
    group = {"gspo": sequence, "gspo_turn": sequence * 2 + turn}.get(spec.loss_type, np.arange(N))
    offsets = rng.choice([-0.5, -0.05, 0.05, 0.5], (3, N))
    old = _float32(logprobs - offsets[0, group] - 0.02 * rng.random(N))
    case.batch.old = None if on_policy else old
    case.batch.ref, case.batch.rollout = (
        _float32(logprobs - offsets[1]),
        _float32((logprobs if on_policy else old) - offsets[2]),
    )
    return case


def _float32(values):
    return np.asarray(values, np.float32).astype(np.float64)

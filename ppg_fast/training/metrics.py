"""Metrics of a training step: token means of the loss, its dialogues turn by turn, computed rows, peak memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppg_fast.dialogues.packing import CONTEXT, PackedBatch, Sample
from ppg_fast.functional import PolicyLossOutput
from ppg_fast.spec import PolicyLossSpec
from ppg_fast.training.objective import turns_with_gradient
from ppg_fast.training.token_share import kept_of_turns

TOKEN_MEANS = {  # ours: TRL's
    "entropy": "entropy",
    "kl": "kl",
    "approx_kl": "approx_kl",
    "clip_fraction": "clip_ratio/region_mean",
    "clip_fraction_low": "clip_ratio/low_mean",
    "clip_fraction_high": "clip_ratio/high_mean",
    "importance_weight": "sampling/importance_sampling_ratio/mean",
}
DIFFERENCE, LARGEST = (f"sampling/sampling_logp_difference/{what}" for what in ("mean", "max"))
DIVERGENCE = "distillation/divergence"  # of the teacher from the policy, nats a token
SINGLE_TURNS = 16  # turn indices with a metric of their own; those after them share one in ranges that double


class TokenMeans:
    """Loss and token means of a step, over its micro-batches."""

    def __init__(self) -> None:
        self.loss, self.tokens, self.totals = 0.0, 0, {"logprob": 0.0}
        self.largest_difference: float | None = None
        self.unread: list[dict[str, Tensor]] = []  # of each micro-batch, 0-d on its device

    def add(
        self, out: PolicyLossOutput, rollout_logprobs: Tensor | None = None, old_logprobs: Tensor | None = None
    ) -> None:
        """One micro-batch; a GPU goes on with the next. With the sampler's log-probs (N,): how far they are from the
        trainer's, before its first update."""
        seen = out.logprobs != 0
        figures = {"loss": out.loss.detach(), "tokens": seen.sum(), "logprob": out.logprobs.sum()}
        figures |= {name: out.metrics[ours] for ours, name in TOKEN_MEANS.items() if ours in out.metrics}
        if "divergences" in out.metrics:
            figures[DIVERGENCE] = out.metrics["divergences"].sum(dtype=torch.float64)
        if rollout_logprobs is not None:
            own = out.logprobs if old_logprobs is None else old_logprobs
            difference = torch.where(seen & rollout_logprobs.isfinite(), (own - rollout_logprobs).abs(), 0.0)
            figures |= {DIFFERENCE: difference.sum(dtype=torch.float64), LARGEST: difference.max()}
        self.unread.append(figures)

    def read(self) -> "TokenMeans":
        """The same with its numbers on the host: one wait for all micro-batches."""
        unread, self.unread = self.unread, []
        if not unread:
            return self
        values = iter(torch.stack([value.double() for figures in unread for value in figures.values()]).tolist())
        for figures in ({name: next(values) for name in names} for names in unread):
            read, largest = int(figures.pop("tokens")), figures.pop(LARGEST, None)
            self.loss += figures.pop("loss")
            self.tokens += read
            if not read:
                figures.pop(DIFFERENCE, None)
            elif largest is not None:
                self.largest_difference = max(self.largest_difference or 0.0, largest)
            for name, value in figures.items():
                whole = value if name in ("logprob", DIFFERENCE, DIVERGENCE) else value * read
                self.totals[name] = self.totals.get(name, 0.0) + whole
        return self

    @classmethod
    def total(cls, parts: Sequence["TokenMeans"]) -> "TokenMeans":
        """Those of several ranks together; a single one as it is."""
        if len(parts) == 1:
            return parts[0].read()
        whole = cls()
        for part in parts:
            part.read()
            whole.loss += part.loss
            whole.tokens += part.tokens
            for name, value in part.totals.items():
                whole.totals[name] = whole.totals.get(name, 0.0) + value
            found = [d for d in (whole.largest_difference, part.largest_difference) if d is not None]
            whole.largest_difference = max(found, default=None)
        return whole

    def means(self) -> dict[str, Any]:
        """The loss and each mean under its name."""
        self.read()
        largest = {} if self.largest_difference is None else {LARGEST: self.largest_difference}
        return {
            "loss": self.loss,
            **{name: total / max(1, self.tokens) for name, total in self.totals.items()},
            **largest,
        }


def describe(
    samples: Sequence[Sample],
    batch: PackedBatch,
    returns: Tensor,
    advantages: Tensor,
    spec: PolicyLossSpec | None = None,
    shared_ratios: bool = False,
    live: Tensor | None = None,
    share: float = 1.0,
) -> dict[str, Any]:
    """What the dialogues of a step were like, in the names that TRL uses where it has one.

    ``batch`` holds ``samples``; ``returns``, ``advantages`` (S, T) are those of its turns. ``spec`` with
    ``shared_ratios`` (its ratios are taken, of more than one token each) says which rows it reads: see `row_shares`,
    for turns that are ``live``: by default those with an advantage; of an answer's tokens a ``share`` is trained.
    """
    totals = batch.rewards.sum(1)
    groups = [totals[batch.group_ids == g] for g in batch.group_ids.unique()]
    return {
        "reward": float(totals.mean()) if len(totals) else 0.0,
        "reward_std": float(totals.std(correction=0)) if len(totals) else 0.0,
        "frac_reward_zero_std": sum(bool((g == g[0]).all()) for g in groups) / max(1, len(groups)),
        **completion_lengths(samples),
        "turns/mean_count": float(batch.turn_counts.float().mean()) if len(totals) else 0.0,
        "turns/adv_abs_mean": float(advantages.abs().sum() / batch.turn_counts.sum().clamp(min=1)),
        "active_turns": int((advantages != 0).sum()),
        **row_shares(batch, advantages if live is None else live, spec or PolicyLossSpec(), shared_ratios, share),
        **by_turn("turns/return", returns, batch.turn_mask),
        **by_turn("turns/advantage", advantages, batch.turn_mask),
    }


def completion_lengths(samples: Sequence[Sample]) -> dict[str, float]:
    """Tokens of the answers, one a turn, under TRL's names; how many were cut off and how long the others are where a
    sampler said so.

    Turns without a token (a dialogue that was read in part keeps all its rewards) are no answers.
    """
    lengths: list[int] = []
    terminated: list[int] = []
    known = 0
    for sample in samples:
        turn_ids = torch.tensor(sample.turn_ids)
        counts = turn_ids[turn_ids != CONTEXT].bincount(minlength=len(sample.rewards)).tolist()
        lengths += [n for n in counts if n]
        if sample.cut_off is not None:
            pairs = [(n, cut) for n, cut in zip(counts, sample.cut_off, strict=True) if n]
            known += len(pairs)
            terminated += [n for n, cut in pairs if not cut]
    found = _mean_min_max("completions/{}_length", lengths)
    if known:
        found |= {
            "completions/clipped_ratio": 1 - len(terminated) / known,
            **_mean_min_max("completions/{}_terminated_length", terminated),
        }
    return found


def _mean_min_max(name: str, values: Sequence[int]) -> dict[str, float]:
    mean = sum(values) / max(1, len(values))
    return {
        name.format("mean"): mean,
        name.format("min"): min(values, default=0),
        name.format("max"): max(values, default=0),
    }


def row_shares(
    batch: PackedBatch, advantages: Tensor, spec: PolicyLossSpec, shared_ratios: bool = False, share: float = 1.0
) -> dict[str, float]:
    """Shares of the batch's tokens by what the head does for them: loss and gradient, log-prob alone, nothing.

    Nothing for context, for what a ``share`` of an answer's tokens leaves out and for turns of advantage zero, unless
    KL or entropy terms want every row of the policy's; a turn of advantage zero in a sequence whose other turns have
    one is read for the ratio that gspo shares.
    """
    credited = turns_with_gradient(batch, advantages, spec)
    read = credited
    if shared_ratios and spec.shared == "sequence":
        read = credited.any(1, keepdim=True).expand_as(credited)
    kept = kept_of_turns(batch, share)
    full, read = (int(kept[turns].sum()) for turns in (credited, read))
    tokens = max(1, len(batch.tokens))
    return {
        "rows/full_share": full / tokens,
        "rows/forward_only_share": (read - full) / tokens,
        "rows/skip_share": 1 - read / tokens,
    }


def reading(
    batch: PackedBatch, advantages: Tensor, spec: PolicyLossSpec, lengths: Tensor, share: float = 1.0
) -> dict[str, float]:
    """How much of the dialogues a step reads: tokens that go through the model, ``lengths`` (S,) of each, and the share
    of assistant tokens with a gradient."""
    labels = batch.labels >= 0
    live = kept_of_turns(batch, share)[turns_with_gradient(batch, advantages, spec)]
    return {
        "perf/tokens_read": int(lengths.sum()),
        "perf/active_row_share": int(live.sum()) / max(1, int(labels.sum())),
    }


def turn_ranges(count: int) -> list[tuple[str, int, int]]:
    """(label, first, end) of the turn indices below ``count``: 0 to 15 each by itself, then 16-31, 32-63, 64-127,
    ..."""
    ranges = [(str(turn), turn, turn + 1) for turn in range(min(count, SINGLE_TURNS))]
    first = SINGLE_TURNS
    while first < count:
        ranges.append((f"{first}-{2 * first - 1}", first, 2 * first))
        first *= 2
    return ranges


def by_turn(name: str, values: Tensor, turn_mask: Tensor) -> dict[str, float]:
    """Mean and standard deviation of ``values`` (S, T) over the dialogues that reach a turn: ``name``/<t> and
    ``name``_std/<t>.

    ``turn_mask`` (S, T) bool. Turn indices as `turn_ranges` labels them, those that some dialogue reaches.
    """
    reached = turn_mask.any(0).nonzero()
    count = int(reached[-1]) + 1 if len(reached) else 0
    kept = torch.where(turn_mask, values, 0.0).double()
    sums = torch.stack([turn_mask.sum(0).double(), kept.sum(0), kept.square().sum(0)])
    found: dict[str, float] = {}
    for label, first, end in turn_ranges(count):
        number, total, squares = sums[:, first:end].sum(1).tolist()
        if number:
            mean = total / number
            found |= {f"{name}/{label}": mean, f"{name}_std/{label}": max(0.0, squares / number - mean * mean) ** 0.5}
    return found


def peak_memory_mb(model: Any) -> float:
    """Peak of allocated CUDA memory where the model is on a GPU, else of the process's resident memory, in MB (10^6
    bytes)."""
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device) / 1e6
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # bytes there, KiB elsewhere

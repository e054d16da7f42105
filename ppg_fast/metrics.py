"""What a step says of itself: token means of the loss, the dialogues it saw, the memory it took."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppg_fast.data import CONTEXT, PackedBatch, Sample
from ppg_fast.functional import PolicyLossOutput

TOKEN_MEANS = {"entropy": "entropy", "kl": "kl", "approx_kl": "approx_kl", "clip_fraction": "clip_ratio/region_mean"}  # ours: TRL's


class TokenMeans:
    """Loss and token means of a step, over its micro-batches."""

    def __init__(self) -> None:
        self.loss, self.tokens, self.totals = 0.0, 0, {"logprob": 0.0}

    def add(self, out: PolicyLossOutput) -> None:
        read = int((out.logprobs != 0).sum())
        self.loss += float(out.loss.detach())
        self.tokens += read
        self.totals["logprob"] += float(out.logprobs.sum())
        for ours, name in TOKEN_MEANS.items():
            if ours in out.metrics:
                self.totals[name] = self.totals.get(name, 0.0) + float(out.metrics[ours]) * read

    def means(self) -> dict[str, Any]:
        return {"loss": self.loss, **{name: total / max(1, self.tokens) for name, total in self.totals.items()}}


def describe(samples: Sequence[Sample], batch: PackedBatch, returns: Tensor, advantages: Tensor) -> dict[str, Any]:
    """What the dialogues of a step were like, in the names that TRL uses where it has one."""
    totals = batch.rewards.sum(1)
    lengths = [sum(turn != CONTEXT for turn in s.turn_ids) / max(1, len(s.rewards)) for s in samples]
    groups = [totals[batch.group_ids == g] for g in batch.group_ids.unique()]
    metrics = {
        "reward": float(totals.mean()) if len(totals) else 0.0,
        "reward_std": float(totals.std(correction=0)) if len(totals) else 0.0,
        "frac_reward_zero_std": sum(bool((g == g[0]).all()) for g in groups) / max(1, len(groups)),
        "completions/mean_length": sum(lengths) / max(1, len(lengths)),
        "turns/mean_count": float(batch.turn_counts.float().mean()) if len(totals) else 0.0,
        "turns/adv_abs_mean": float(advantages.abs().sum() / batch.turn_counts.sum().clamp(min=1)),
        "active_turns": int((advantages != 0).sum()),
    }
    for turn in range(int(batch.turn_counts.max()) if len(totals) else 0):
        metrics[f"turns/return/{turn}"] = float(returns[batch.turn_counts > turn, turn].mean())
    return metrics


def peak_memory_mb(model: Any) -> float:
    """Peak of allocated CUDA memory where the model is on a GPU, else of the process's resident memory, in MB (10^6 bytes)."""
    if model.device.type == "cuda":
        return torch.cuda.max_memory_allocated(model.device) / 1e6
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6  # bytes there, KiB elsewhere

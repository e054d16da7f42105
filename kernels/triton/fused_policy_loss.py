"""From rewards, masks and logits to the reduced loss and its gradient in two launches. Contract:
ppg_fast/backends.py"""

import torch
from torch import Tensor

from ppg_fast.contract import Columns, Reduction, Turns
from ppg_fast.spec import PolicyLossSpec

from .credit import credit
from .plan import on_device
from .policy_loss import sweep
from .weights import SEQUENCE_MEAN, SEQUENCE_SUM, SUM, TOKEN_MEAN

REDUCTIONS = {
    "token_mean": TOKEN_MEAN,
    "sequence_mean": SEQUENCE_MEAN,
    "sequence_sum": SEQUENCE_SUM,
    "sum": SUM,
    "none": SUM,
}


def fused_policy_loss(
    logits: Tensor,  # (B, L, V)
    columns: Columns,
    turns: Turns | None,
    reduction: Reduction,
    spec: PolicyLossSpec,
    skip_zero_advantages: bool,
    entropy: bool,
    dlogits: Tensor | None,  # (B, L, V) out, may be the logits themselves
    score_norm: Tensor | None = None,  # (B, L) out
) -> tuple[Tensor, Tensor, Tensor]:
    """-> reduced loss, log-prob and entropy of each row (B, L) float32; writes ``dlogits`` where given. Contract:
    ppg_fast/backends.py"""
    B, L, _ = logits.shape
    N, each, shape = B * L, reduction.kind == "none", columns.labels.shape
    losses, logprobs = (torch.empty(shape, dtype=torch.float32, device=logits.device) for _ in range(2))
    entropy = entropy or spec.entropy_coef != 0 or score_norm is not None
    entropies = torch.empty(shape if entropy else (0,), dtype=torch.float32, device=logits.device)
    if N == 0:
        return losses if each else torch.zeros((), dtype=torch.float32, device=logits.device), logprobs, entropies
    total = None if each else torch.empty((), dtype=torch.float32, device=logits.device)
    with on_device(logits):
        credited = credit(logits, columns, turns, reduction)
        sweep(
            logits, credited.pop("labels"), credited.pop("advantages"), None, *columns[4:], spec, losses, logprobs,
            entropies, dlogits,
            normalizer=reduction.normalizer, kind=REDUCTIONS[reduction.kind].value, sequence_count=reduction.sequences,
            total=total,
            skip_zero=skip_zero_advantages and not spec.needs_every_row, score_norms=score_norm, **credited,
        )  # fmt: skip
    return losses if total is None else total, logprobs, entropies

"""What a label says of the rewards of turns: one loss per label, with R the sum of a dialogue's rewards r_t.

    pairs           -log sigmoid(R_chosen - R_rejected - margin) + center (R_chosen + R_rejected)^2
    scores          (R - y)^2
    ratings         mean over the rated turns of (r_t - y_t)^2
    demonstrations  -log sigmoid(R) for a demonstration, -log sigmoid(-R) for an own rollout, + center R^2

A pair that is a tie counts half each way. Sources: Bradley-Terry as in TRL's RewardTrainer, which is the case of one
turn; return decomposition, arXiv:1806.07857; a classifier of demonstrations, arXiv:1606.03476.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

KINDS = ("pairs", "scores", "ratings", "demonstrations")
Target = float | None | Sequence[float | None]  # the margin, None for a tie; a score; one rating a turn; 1 or -1


def link_loss(kind: str, rewards: Sequence[Tensor], target: Target, center: float) -> Tensor:
    """The loss of one label, 0-d. ``rewards``: (T,) of its dialogue, of a pair those of chosen and rejected."""
    if kind == "ratings":
        assert isinstance(target, Sequence)
        errors = [(r - y).square() for r, y in zip(rewards[0], target, strict=True) if y is not None]
        return torch.stack(errors).mean()
    assert not isinstance(target, Sequence)
    returns = [row.sum() for row in rewards]
    if kind == "pairs":
        difference = returns[0] - returns[1]
        won = -logsigmoid(difference - (target or 0.0))
        loss = won if target is not None else 0.5 * (won - logsigmoid(-difference))
        return loss + center * (returns[0] + returns[1]).square()
    assert target is not None
    if kind == "scores":
        return (returns[0] - target).square()
    return -logsigmoid(target * returns[0]) + center * returns[0].square()

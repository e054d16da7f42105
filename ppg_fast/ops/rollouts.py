"""What a rollout log-prob that is NaN means, where a caller has said so."""

import torch
from torch import Tensor

from ppg_fast.ops.tracing import traced
from ppg_fast.spec import IGNORE, PolicyLossSpec


def _refused(missing: Tensor, active: Tensor) -> Tensor:
    """``missing`` again, or ValueError where an active token is among them. Reads values: on a GPU, one sync."""
    bad = (missing & active).reshape(-1)
    count = int(bad.sum())
    if count:
        raise ValueError(
            'rollout_logprobs must not be NaN for an active token (nan_rollout="error"; "one" and "drop" take it), got '
            f"{count} NaN of {int(active.sum())} active tokens, the first at row {int(bad.nonzero()[0])}"
        )
    return missing.clone()


refused_op = torch.library.custom_op("ppg_fast::refused_rollouts", _refused, mutates_args=())


@refused_op.register_fake
def _(missing, active):
    return torch.empty_like(missing)


def mask_of_rollouts(
    spec: PolicyLossSpec,
    rollout_logprobs: Tensor | None,
    labels: Tensor,
    loss_mask: Tensor | None,
    turn_ids: Tensor | None = None,
) -> Tensor | None:
    """The loss mask without the tokens that ``spec.nan_rollout`` drops; ValueError where it refuses one. All of the
    labels' shape; tokens whose turn id is negative are not active."""
    if rollout_logprobs is None or spec.nan_rollout in ("keep", "one"):
        return loss_mask
    missing = rollout_logprobs.isnan()
    if spec.nan_rollout == "error":
        active = labels != IGNORE
        if loss_mask is not None:
            active = active & (loss_mask != 0)
        if turn_ids is not None:
            active = active & (turn_ids >= 0)
        if not traced(rollout_logprobs, labels):
            _refused(missing, active)
            return loss_mask
        missing = refused_op(missing, active)
    return ~missing if loss_mask is None else loss_mask.masked_fill(missing, 0)

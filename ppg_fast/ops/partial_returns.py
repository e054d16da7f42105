"""partial_returns: windowed returns as a custom op."""

import torch
from torch import Tensor

from ppg_fast import backends, reference
from ppg_fast.ops.checks import check_rewards


@torch.library.custom_op("ppg_fast::partial_returns", mutates_args=())
def partial_returns_op(
    rewards: Tensor, segment_ids: Tensor | None, turn_counts: Tensor | None, mask: Tensor | None, lookahead: int,
    segment_length: int,
    gamma: float, validate: bool, backend: str,
) -> Tensor:  # fmt: skip
    """-> windowed returns (B, T) float32; ``mask`` (T, T) bool takes the place of the window where it is given."""
    if rewards.is_cpu or validate:
        check_rewards(rewards, turn_counts, segment_ids)
    if mask is not None:
        return reference.masked_returns(rewards, mask, turn_counts, gamma)
    return backends.load(backend).partial_returns(rewards, segment_ids, turn_counts, lookahead, segment_length, gamma)


@partial_returns_op.register_fake
def _(rewards, *_):
    return torch.empty_like(rewards)

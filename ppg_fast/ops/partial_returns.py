"""partial_returns: windowed returns as a custom op."""

import torch
from torch import Tensor

from ppg_fast import backends, reference
from ppg_fast.contract import Turns
from ppg_fast.ops.checks import check_rewards
from ppg_fast.ops.tracing import traced


def _returns(
    rewards: Tensor,
    segment_ids: Tensor | None,
    turn_counts: Tensor | None,
    mask: Tensor | None,
    window: list[int],
    gamma: float,
    validate: bool,
    backend: str,
) -> Tensor:
    """Windowed returns (B, T) float32; ``mask`` (T, T) bool takes the place of the window where it is given.

    ``window``: lookahead and segment length.
    """
    if mask is not None:
        if rewards.is_cpu or validate:
            check_rewards(rewards, turn_counts, segment_ids)
        return reference.masked_returns(rewards, mask, turn_counts, gamma)
    if validate or (rewards.is_cpu and backend != "cpu"):
        check_rewards(rewards, turn_counts, segment_ids)
    returns = backends.load(backend).partial_returns(rewards, segment_ids, turn_counts, *window, gamma)
    if returns is None:  # a value breaks a rule, and nothing was computed
        check_rewards(rewards, turn_counts, segment_ids)
        raise RuntimeError("the kernels refused values in which the checks find no fault: please report it")
    return returns


partial_returns_op = torch.library.custom_op("ppg_fast::partial_returns", _returns, mutates_args=())


@partial_returns_op.register_fake
def _(rewards, segment_ids, turn_counts, mask, window, gamma, validate, backend):
    return torch.empty_like(rewards)


def partial_returns(turns: Turns, validate: bool, backend: str) -> Tensor:
    """The returns of ``turns``, (B, T) float32. ValueError where a value breaks a rule."""
    rewards, counts = turns.rewards, turns.turn_counts
    counts = None if counts is None else counts.long()
    window = [turns.lookahead, turns.segment_length]
    call = partial_returns_op if traced(rewards) else _returns
    return call(rewards, turns.segment_ids, counts, turns.reward_mask, window, turns.gamma, validate, backend)

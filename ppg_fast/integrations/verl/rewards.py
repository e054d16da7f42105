"""Rewards of turns for verl: on the last token of each turn, where the estimators read them."""

from typing import Any

import torch
from torch import Tensor
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput  # pyright: ignore[reportMissingImports]

from ppg_fast.integrations.turns import place_turn_rewards, turn_ids_of_mask

__all__ = ["TurnRewardOutput", "place_turn_rewards", "rm_scores", "turn_ids_of_mask"]


def rm_scores(turn_rewards: list[list[float | None]], response_mask: Tensor) -> Tensor:
    """``rm_scores`` (bs, response_length) float32: r_k on the last token of turn k, turns being the runs of
    ``response_mask``.

    ValueError where a row has another number of rewards than turns.
    """
    return place_turn_rewards(turn_rewards, turn_ids_of_mask(response_mask))


class TurnRewardOutput(AgentLoopOutput):
    """The output of an agent loop that has a reward for every turn, in place of AgentLoopOutput.

    ``turn_rewards``: one number per run of ``response_mask``, None for a turn without score. Their sum is the
    ``reward_score`` unless one is given, so that verl calls no reward function; it is only logged and used by filters.
    """

    turn_rewards: list[float | None]

    def model_post_init(self, context: Any, /) -> None:
        if self.reward_score is None:
            self.reward_score = float(sum(reward or 0.0 for reward in self.turn_rewards))

    def as_dict(self) -> dict[str, Any]:
        """The fields as verl stores them, ``rm_scores`` with every reward at the end of its turn."""
        fields = super().as_dict()
        fields["rm_scores"] = rm_scores([fields.pop("turn_rewards")], torch.as_tensor(fields["response_mask"])[None])[0]
        return fields

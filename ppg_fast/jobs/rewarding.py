"""Rewards of the answers that a policy has just given, and what is said of answers that nobody could score."""

import warnings
from collections.abc import Sequence

from ppg_fast import stopping
from ppg_fast.rewards import Reward, Scores, Transcript, score
from ppg_fast.rollouts.rollout import Rollout, finite_reward
from ppg_fast.training.objective import Objective, require_targets


class Rewarding:
    """``rewards`` of new answers, for training by ``objective``."""

    def __init__(self, rewards: Sequence[Reward], objective: Objective) -> None:
        self.rewards, self.objective = list(rewards), objective
        self.warned = False

    @property
    def formula(self) -> str:
        """Weights, names and scopes."""
        return " + ".join(f"{r.weight:g}*{r.name}@{r.scope}" for r in self.rewards)

    def give(self, rollouts: Sequence[Rollout], transcripts: Sequence[Transcript]) -> Scores:
        """Give every turn of ``rollouts``, which the transcripts are of, its reward, 0 where none could be had.
        ValueError for one that float32 cannot hold."""
        with stopping.interruptible():  # a partial rollout is thrown away
            scores = score(self.rewards, transcripts).without_calls(transcripts)
        for rollout, row in zip(rollouts, scores.totals, strict=True):
            rollout.sample.rewards = [finite_reward(v or 0.0, rollout.name, turn) for turn, v in enumerate(row)]
            require_targets(rollout.sample, rollout.name, self.objective)
        return scores

    def require_scored(self, scores: Scores) -> None:
        """Of all ranks together: ValueError where no turn has a reward, a warning, once, where some have not."""
        turns = sum(map(len, scores.totals))
        if turns and scores.unscored == turns:
            names = ", ".join(r.name for r in self.rewards)
            raise ValueError(f"no turn of {len(scores.totals)} dialogues could be scored by {names}")
        if scores.unscored and not self.warned:
            self.warned = True
            seen = f"{scores.unscored} of {turns} turns could not be scored"
            warnings.warn(
                f"{seen}; they count as reward 0, and rewards/unscored in the metrics counts them", stacklevel=2
            )

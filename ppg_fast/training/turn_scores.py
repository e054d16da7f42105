"""Scores of a step's turns, read on the way of its backward passes: what `ppg_fast.training.auto` learns from."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ppg_fast.dialogues.packing import PackedBatch
from ppg_fast.distributed import Ranks
from ppg_fast.functional import turn_advantages
from ppg_fast.models.score_sketch import ScoreSketch
from ppg_fast.training.auto import StepSignals
from ppg_fast.training.passes import Pass, of_all

SIZE = 512  # numbers that keep the score of a turn
LEAST = 1e-2  # of the root mean square of the advantages: below it rounding and other terms of the loss are most of it


class TurnScores:
    """Collects, pass by pass, a sketch of each turn's score at the head's input: the gradient of the loss there, over
    the turn's advantage. So it costs no pass of its own, and is the gradient that training has, ratios and all; a term
    that has nothing to do with the advantages, as of KL or entropy, is noise in it. ``batch``: the whole step's."""

    def __init__(self, batch: PackedBatch) -> None:
        self.batch = batch
        self.gradients: dict[int, Tensor] = {}  # of each pass, by its place in the step, and
        self.advantages: dict[int, Tensor] = {}  # what it trained with
        self.sketch: ScoreSketch | None = None

    def watch(self, number: int, one: Pass) -> Callable[[Tensor], None] | None:
        """What reads pass ``number`` of its hidden states (N, D) once their gradient is there; None for a dummy. It
        asks nothing of a GPU that the CPU would wait for."""
        if not one.dialogues:
            return None

        def on_hidden(hidden: Tensor) -> None:
            x, self.advantages[number] = hidden.detach(), one.advantages
            if self.sketch is None:
                self.sketch = ScoreSketch(x.shape[1], SIZE, seed=0)
            sketch, (S, T) = self.sketch, one.advantages.shape
            places = one.batch.dialogue_ids * T + one.batch.turn_ids.clamp(min=0)  # context has no gradient

            def read(gradient: Tensor) -> None:
                self.gradients[number] = sketch.sums(gradient.float(), x.float(), places, S * T).view(S, T, -1)

            hidden.register_hook(read)

        return on_hidden

    def measure(self, passes: Sequence[Pass], ranks: Ranks) -> StepSignals:
        """Of the passes of all ranks."""
        batch, counts = self.batch, self.batch.turn_counts
        of = lambda found, *size: of_all(passes, [found.get(i) for i in range(len(passes))], batch, ranks, *size)  # noqa: E731
        gradients, advantages = of(self.gradients, SIZE), of(self.advantages)
        least = LEAST * advantages[batch.turn_mask].square().mean().sqrt()
        read = batch.turn_mask & (advantages.abs() > least) & gradients.any(-1)
        scores = -gradients / torch.where(read, advantages, torch.inf)[..., None].float()
        centred = turn_advantages(batch.rewards, batch.group_ids, "leave_one_out", counts, alone="other_groups")
        centred = torch.where(batch.turn_mask, centred, 0.0).double()
        ahead = centred.abs().flip(1).cumsum(1).flip(1) > 0
        wanted = ahead & (batch.sum_of_turns(torch.ones(len(batch.tokens))) > 0)
        coverage = int((read & wanted).sum()) / max(1, int(wanted.sum()))
        return StepSignals(scores, centred, coverage)

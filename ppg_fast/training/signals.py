"""Signals of a training step: what `ppg_fast.training.auto` reads of its tokens, collected pass by pass."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ppg_fast.dialogues.packing import PackedBatch
from ppg_fast.distributed import Ranks
from ppg_fast.functional import PolicyLossOutput
from ppg_fast.reference.turns import of_tokens
from ppg_fast.training.auto import Signals, context_ids, measure_signals
from ppg_fast.training.objective import Objective, credit


class SignalTokens:
    """Collects, pass by pass, what the signals of all candidate classes are made of. ``batch``: the whole step's."""

    def __init__(self, batch: PackedBatch, objective: Objective) -> None:
        classes = (replace(objective, policy_class=c, scale=1.0) for c in objective.candidates)
        self.advantages = [credit(batch, of_class)[1] for of_class in classes]
        self.passes: list[tuple[PackedBatch, Sequence[int], Tensor]] = []

    def add(self, batch: PackedBatch, dialogues: Sequence[int], out: PolicyLossOutput) -> None:
        """The tokens of a pass over ``dialogues`` of the step's batch, with the score norms that its loss gave; a GPU
        goes on with the next."""
        if dialogues:
            self.passes.append((batch, dialogues, out.metrics["score_norms"]))

    def measure(self, ranks: Ranks) -> Signals | None:
        """Of all tokens of all ranks together; None where there are none."""
        own = [_columns(batch.to("cpu"), dialogues, norms.cpu()) for batch, dialogues, norms in self.passes]
        parts = [part for of_rank in ranks.gather(own) for part in of_rank]
        if not parts:
            return None
        contexts, dialogues, labels, turn_ids, norms = map(torch.cat, zip(*parts, strict=True))
        advantages = torch.stack([of_tokens(a, turn_ids, dialogues) for a in self.advantages])
        return measure_signals(contexts, dialogues, labels, norms, advantages, len(self.advantages[0]))


def _columns(batch: PackedBatch, dialogues: Sequence[int], norms: Tensor) -> list[Tensor]:
    """Context, dialogue of the step, label, turn and score norm of each token that the policy said in a pass."""
    own, chosen = torch.tensor(dialogues)[batch.dialogue_ids], batch.labels >= 0
    return [column[chosen] for column in (context_ids(batch), own, batch.labels, batch.turn_ids, norms)]

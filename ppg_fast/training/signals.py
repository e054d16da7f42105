"""What one step shows of every policy class: the tokens, norms and advantages that `ppg_fast.training.auto` reads,
collected pass by pass."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ppg_fast.dialogues.packing import PackedBatch, Sample
from ppg_fast.distributed import Ranks
from ppg_fast.functional import PolicyLossOutput
from ppg_fast.models.causal_lm import token_advantages
from ppg_fast.training.auto import Signals, context_ids, measure_signals
from ppg_fast.training.objective import Objective, credit


class SignalTokens:
    """Collects, micro-batch by micro-batch, what the signals of all candidate classes are made of."""

    def __init__(self, samples: Sequence[Sample], everything: PackedBatch, objective: Objective) -> None:
        self.count = len(samples)
        self.advantages = torch.stack(
            [credit(everything, replace(objective, policy_class=c, scale=1.0))[1] for c in objective.candidates]
        )
        self.parts: list[tuple[Tensor, ...]] = []

    def add(self, batch: PackedBatch, rows: Sequence[int], out: PolicyLossOutput) -> None:
        """The tokens of a pass over the dialogues ``rows``, with the score norms that its loss gave."""
        if not rows:
            return
        device = batch.tokens.device
        by_token = torch.stack([token_advantages(batch, a) for a in self.advantages[:, list(rows)].to(device)])
        dialogue = torch.tensor(rows, device=device)[batch.dialogue_ids]
        columns = context_ids(batch).to(device), dialogue, batch.labels, out.metrics["score_norms"]
        taken = batch.labels >= 0
        self.parts.append(tuple(c[..., taken].cpu() for c in (*columns, by_token)))

    def measure(self, ranks: Ranks) -> Signals | None:
        """Of all tokens of all ranks together; None where there are none."""
        parts = [part for of_rank in ranks.gather(self.parts) for part in of_rank]
        if not parts:
            return None
        contexts, rows, labels, norms, advantages = (torch.cat(c, -1) for c in zip(*parts, strict=True))
        return measure_signals(contexts, rows, labels, norms, advantages, self.count)

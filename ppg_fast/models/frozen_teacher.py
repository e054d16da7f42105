"""A frozen causal LM that a policy learns from, read over the same packed batch."""

from typing import Any

import torch

from ppg_fast.dialogues.packing import PackedBatch
from ppg_fast.functional.teacher import Teacher
from ppg_fast.models.causal_lm import policy_hidden
from ppg_fast.models.output_head import Head
from ppg_fast.spec import require


class FrozenTeacher:
    """``model`` without gradients and dropout; ``distance``: divergence, beta, coef and top_k of `ppg.Teacher`.

    Its head may have more rows than the policy's ``vocab_size`` (padding beyond the tokenizer, of which families of
    models differ): those are left out. ValueError where it has fewer.
    """

    def __init__(self, model: Any, vocab_size: int, **distance: Any) -> None:
        self.model, self.vocab_size, self.distance = model.eval().requires_grad_(False), vocab_size, distance
        rows = Head.of(model).weight.shape[0]
        require(rows >= vocab_size, f"the teacher's head must have the {vocab_size} rows of the policy's", rows)

    @torch.no_grad()
    def of(self, batch: PackedBatch, scale: float = 1.0) -> Teacher:
        """What it says of a batch (N tokens): hidden states (N, D') and head, for a policy whose logits are multiplied
        by ``scale`` after its own: softcap(s x; c) = scale softcap(s x / scale; c / scale)."""
        head, hidden = Head.of(self.model), policy_hidden(self.model, batch)
        bias = None if head.bias is None else head.bias[: self.vocab_size]
        if head.scale != scale:
            hidden, bias = hidden * (head.scale / scale), None if bias is None else bias * (head.scale / scale)
        weight = head.weight[: self.vocab_size]
        return Teacher(hidden, weight, bias, logit_softcap=head.softcap / scale, **self.distance)


def require_same_vocabulary(setting: str, folder: str, teacher: Any, policy: Any) -> None:
    """ValueError, with an example, unless two tokenizers give every token the same id."""
    theirs, ours = teacher.get_vocab(), policy.get_vocab()
    if theirs == ours:
        return
    other = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    example = f"{other[0]!r} is {theirs.get(other[0])} there and {ours.get(other[0])} here"
    rule = f"{setting} must have the vocabulary of the model beside it, and {folder!r} differs in {len(other)} tokens"
    raise ValueError(f"{rule}: {example}")

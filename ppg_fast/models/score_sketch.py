"""The score of a turn, the gradient of its log-prob, in a few numbers that keep inner products."""

from typing import Any

import torch
from torch import Tensor

from ppg_fast.dialogues.packing import PackedBatch
from ppg_fast.functional import linear_token_logprobs
from ppg_fast.models.causal_lm import policy_hidden
from ppg_fast.models.output_head import Head
from ppg_fast.reference.groups import group_sum

COLUMNS = 256  # of a sketch made at once: memory only


class ScoreSketch:
    """Random projections of turns' scores at the head's input, into ``size`` numbers each.

    With x the hidden state that a token is predicted from and u = d log pi(token) / dx, the score of a turn with
    respect to a linear map before the head, at the identity, is the matrix G = sum over its tokens of u x^T. Its sketch
    is s_m = sum over its tokens of (p_m . u) (q_m . x) / sqrt(size), with p_m and q_m of random signs, so that E<s, s'>
    = <G, G'> over the signs, for any turns of any dialogues: they need share no words. Same seed, same signs.
    """

    def __init__(self, width: int, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (2, width, size), generator=generator).float() * 2 - 1
        self.of_gradients, self.of_states = signs[0] / size**0.5, signs[1]

    @torch.no_grad()
    def of_turns(self, model: Any, batch: PackedBatch, temperature: float = 1.0) -> Tensor:
        """(S, T, size) float32 on the CPU: the sketch of each turn of a packed batch, 0 where there is none. One
        forward pass; the model takes no gradient and is left as it was."""
        was_training = model.training
        model.eval()
        try:
            x = policy_hidden(model, batch)
        finally:
            model.train(was_training)
        u, chosen = self._gradients(Head.of(model), x, batch, temperature), batch.labels >= 0
        S, T = batch.rewards.shape
        places = (batch.dialogue_ids * T + batch.turn_ids)[chosen]
        return self.sums(u[chosen].float(), x[chosen].float(), places, S * T).cpu().view(S, T, -1)

    @torch.no_grad()
    def sums(self, u: Tensor, x: Tensor, places: Tensor, count: int) -> Tensor:
        """(count, size) float32 on the device of u and x, both (N, D) float32: the sketches of u x^T, added up over the
        tokens of each of ``places`` (N,)."""
        parts = []
        for first in range(0, self.of_states.shape[1], COLUMNS):
            p, q = (signs[:, first : first + COLUMNS].to(x.device) for signs in (self.of_gradients, self.of_states))
            parts.append(group_sum((u @ p) * (x @ q), places, count))
        return torch.cat(parts, 1)

    def _gradients(self, head: Head, x: Tensor, batch: PackedBatch, temperature: float) -> Tensor:
        """(N, D): d log pi(label) / d hidden state, 0 at context; a token's log-prob depends on its own state only."""
        weight, bias = head.weight.detach(), None if head.bias is None else head.bias.detach()
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            options: dict[str, Any] = {"bias": bias, "kept": batch.kept, **head.fold(temperature)}
            logprobs = linear_token_logprobs(leaf, weight, batch.labels, **options)
            assert isinstance(logprobs, Tensor)
            return torch.autograd.grad(logprobs.sum(), leaf)[0]

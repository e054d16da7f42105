"""Answers of a model in this process, all dialogues in lockstep over one KV cache."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppg_fast import stopping
from ppg_fast.rollouts.generation.answers import Answer, Request
from ppg_fast.rollouts.generation.lockstep import Lockstep

# probabilities as 64-bit integers: their sums are exact, so the same token is drawn whatever the order of summation
MASS = 2.0**61


class LocalSampler:
    """Samples from softmax(logits / temperature) without the ``banned`` tokens; temperature 0 takes the most likely
    token.

    Log-probs are those over the whole vocabulary, banned tokens included, and so are the ``entropies``. Nucleus and
    top-k sampling are left out on purpose: what they sample from is not the policy that is trained, so the kept
    log-probs would be those of another distribution.
    """

    def __init__(
        self,
        model: Any,
        end_ids: int | Sequence[int],
        banned: Sequence[int],
        temperature: float,
        entropies: bool = False,
    ) -> None:
        if temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {temperature}")
        self.model, self.temperature, self.entropies = model, temperature, entropies
        self.end_ids = (end_ids,) if isinstance(end_ids, int) else tuple(end_ids)
        self.banned = torch.tensor(list(banned), dtype=torch.int64, device=model.device)
        self.lockstep: Lockstep | None = None
        self.dialogues: list[int] = []
        self.read: dict[int, int] = {}  # tokens of each dialogue that the cache holds

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """The last token of an answer is left for the next turn's first pass: one pass saved a turn."""
        names = [request.dialogue for request in requests]
        if self.lockstep is None:
            self.lockstep, self.read = Lockstep(self.model, len(names)), dict.fromkeys(names, 0)
        else:
            self.lockstep.keep([self.dialogues.index(name) for name in names])
        self.dialogues = names
        answers = [Answer() for _ in requests]
        uniform = [1.0 - torch.rand(r.limit, dtype=torch.float64, generator=r.random) for r in requests]  # in (0, 1]
        draws = torch.nn.utils.rnn.pad_sequence(uniform, batch_first=True, padding_value=1.0).T
        feed = [request.tokens[self.read[request.dialogue] :] for request in requests]
        unfinished = list(range(len(requests)))
        for draw in draws:
            stopping.check()
            tokens, logprobs, entropies = self._sample(self.lockstep.read(feed), draw)
            for i in unfinished:
                answers[i].tokens.append(tokens[i])
                answers[i].logprobs.append(logprobs[i])
                answers[i].entropies += entropies[i : i + 1]
                answers[i].ended = tokens[i] in self.end_ids
            unfinished = [i for i in unfinished if not answers[i].ended and len(answers[i].tokens) < requests[i].limit]
            if not unfinished:
                break
            feed = [[] for _ in requests]
            for i in unfinished:
                feed[i] = [tokens[i]]
        for request, answer in zip(requests, answers, strict=True):
            self.read[request.dialogue] = len(request.tokens) + len(answer.tokens) - 1
        return answers

    def _sample(self, logits: Tensor, draws: Tensor) -> tuple[list[int], list[float], list[float]]:
        """A token of each row of logits (B, V) by its draw (B,) in (0, 1], its log-prob, and the entropies where they
        are wanted."""
        logp = (logits.float() / (self.temperature or 1.0)).log_softmax(-1)
        p = logp.exp()
        allowed = p.index_fill(-1, self.banned, 0.0)
        if self.temperature:
            below = (allowed * MASS).long().cumsum(-1)
            total = below[:, -1:]
            target = (draws.to(total.device)[:, None] * total.double()).long().clamp(min=1)
            token = torch.searchsorted(below, torch.minimum(target, total))
            if bool((total <= 0).any()):  # NaN too: it casts to a negative number or zero
                raise FloatingPointError(
                    "the policy's logits must be finite and leave an answer some probability, got none"
                )
        else:
            token = allowed.argmax(-1, keepdim=True)
        # a logit of -inf counts nothing: 0 times the least number is 0
        entropies = -(p * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1) if self.entropies else logp.new_empty(0)
        return token[:, 0].tolist(), logp.gather(-1, token)[:, 0].tolist(), entropies.tolist()

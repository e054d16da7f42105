"""Answers of a model in this process, all dialogues in lockstep over one KV cache."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ppg_fast import stopping
from ppg_fast.rollouts.generation.answers import Answer, Request
from ppg_fast.rollouts.generation.lockstep import Lockstep
from ppg_fast.rules import require_integer, require_number

MOST_KEPT = 512  # tokens of a kept set: what top_p leaves beyond them is not drawn
# probabilities as 64-bit integers: their sums are exact, so the same token is drawn whatever the order of summation
MASS = 2.0**61


class LocalSampler:
    """Samples from softmax(logits / temperature) without the ``banned`` tokens; temperature 0 takes the most likely
    token.

    Log-probs are those over the whole vocabulary, banned tokens included. With ``top_k`` > 0 or ``top_p`` < 1 a token
    is drawn from a kept set: the ``top_k`` likeliest tokens, or of them, in falling order, as few as hold ``top_p`` of
    their probability; at most `MOST_KEPT`. Its log-prob is then that over the set, which its answer names, and the
    policy that is trained is softmax over the same sets (`ppg.Kept`). ``entropies``: those of the distribution of the
    log-probs are told too.
    """

    def __init__(
        self,
        model: Any,
        end_ids: int | Sequence[int],
        banned: Sequence[int],
        temperature: float,
        top_p: float = 1.0,
        top_k: int = 0,
        entropies: bool = False,
    ) -> None:
        if temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {temperature}")
        require_number("top_p", top_p, 0.0, 1.0, open_low=True)
        require_integer("top_k", top_k, 0)
        self.model, self.temperature, self.top_p, self.top_k = model, temperature, top_p, top_k
        self.entropies = entropies
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
        answers = [Answer(kept=[] if self.truncates else None) for _ in requests]
        uniform = [1.0 - torch.rand(r.limit, dtype=torch.float64, generator=r.random) for r in requests]  # in (0, 1]
        draws = torch.nn.utils.rnn.pad_sequence(uniform, batch_first=True, padding_value=1.0).T
        feed = [request.tokens[self.read[request.dialogue] :] for request in requests]
        unfinished = list(range(len(requests)))
        for draw in draws:
            stopping.check()
            logits = self.lockstep.read(feed)
            kept: list[list[int]] = []
            if self.truncates:
                tokens, logprobs, entropies, kept = self._sample_kept(logits, draw)
            else:
                tokens, logprobs, entropies = self._sample(logits, draw)
            for i in unfinished:
                if (sets := answers[i].kept) is not None:
                    sets.append(kept[i])
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

    @property
    def truncates(self) -> bool:
        """Whether a token is drawn from less than the vocabulary."""
        return self.top_p < 1 or self.top_k > 0

    def _sample(self, logits: Tensor, draws: Tensor) -> tuple[list[int], list[float], list[float]]:
        """A token of each row of logits (B, V) by its draw (B,) in (0, 1], its log-prob, and the entropies where they
        are wanted."""
        logp = (logits.float() / (self.temperature or 1.0)).log_softmax(-1)
        p = logp.exp()
        token = self._draw(p.index_fill(-1, self.banned, 0.0), draws)
        return token[:, 0].tolist(), logp.gather(-1, token)[:, 0].tolist(), self._entropies(p, logp)

    def _entropies(self, p: Tensor, logp: Tensor) -> list[float]:
        """Of each row, where they are wanted; a logit of -inf counts nothing: 0 times the least number is 0."""
        if not self.entropies:
            return []
        return (-p * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1).tolist()

    def _sample_kept(
        self, logits: Tensor, draws: Tensor
    ) -> tuple[list[int], list[float], list[float], list[list[int]]]:
        """As `_sample` from the kept set of each row, and those sets."""
        z = (logits.float() / (self.temperature or 1.0)).index_fill(-1, self.banned, -torch.inf)
        top, ids = z.topk(min(self.top_k or MOST_KEPT, MOST_KEPT, z.shape[-1]))
        mass = top if self.top_k else z
        p = (top.double() - mass.double().logsumexp(-1, keepdim=True)).exp()
        # NaN is kept, so that it is drawn from, and refused there
        out = (p.cumsum(-1) - p >= self.top_p) | (top == -torch.inf)
        logp = top.masked_fill(out, -torch.inf).log_softmax(-1)
        p = logp.exp()
        place = self._draw(p, draws)
        kept = [row[stays].tolist() for row, stays in zip(ids.cpu(), (~out).cpu(), strict=True)]
        tokens, logprobs = (values.gather(-1, place)[:, 0].tolist() for values in (ids, logp))
        return tokens, logprobs, self._entropies(p, logp), kept

    def _draw(self, allowed: Tensor, draws: Tensor) -> Tensor:
        """The column (B, 1) that each draw falls to among probabilities (B, V) that need not sum to 1."""
        if not self.temperature:
            return allowed.argmax(-1, keepdim=True)
        below = (allowed * MASS).long().cumsum(-1)
        total = below[:, -1:]
        target = (draws.to(total.device)[:, None] * total.double()).long().clamp(min=1)
        token = torch.searchsorted(below, torch.minimum(target, total))
        if bool((total <= 0).any()):  # NaN too: it casts to a negative number or zero
            raise FloatingPointError(
                "the policy's logits must be finite and leave an answer some probability, got none"
            )
        return token

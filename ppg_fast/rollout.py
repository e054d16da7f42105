"""Many dialogues at once between a model and its environments: batched, turn by turn, token-in token-out.

All dialogues share one KV cache in lockstep. One that has nothing to say while others speak leaves a hole: masked, and not counted in
the positions. What was sampled is what is trained on; no token is ever decoded and encoded again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ppg_fast.chat_format import ChatFormat
from ppg_fast.data import CONTEXT, Sample
from ppg_fast.dialogue import Message
from ppg_fast.environment import Environment
from ppg_fast.model import decoder, head_of


@dataclass
class Rollout:
    """One finished dialogue.

    ``sample`` is what training reads; its ``rollout_logprobs`` are the sampler's, log softmax(logits / temperature) over the whole
    vocabulary. ``cut_off`` has one entry a turn: whether the answer failed to end by itself.
    """

    environment: Environment
    sample: Sample
    messages: list[Message] = field(default_factory=list)
    cut_off: list[bool] = field(default_factory=list)
    done: bool = False

    def __post_init__(self) -> None:
        self.sample.cut_off = self.cut_off  # one list, for the metrics of a step

    @property
    def total_reward(self) -> float:
        """The undiscounted return of the dialogue."""
        return sum(self.sample.rewards)


def collect_groups(
    model: Any,
    chat: ChatFormat,
    make_environment: Callable[[], Environment],
    seeds: Sequence[int],
    group_size: int,
    *,
    generator: torch.Generator | Sequence[torch.Generator],
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    max_turns: int = 64,
) -> list[Rollout]:
    """``group_size`` rollouts of each seed, which share the partner and ``group_id``. Same weights, seeds and generator: same rollouts.

    ``generator`` lives on the model's device; or one on the CPU for each rollout, which then does not depend on who is sampled with it,
    but for the rounding of a batch. Temperature 0 takes the most likely token. A dialogue stops when its environment is done
    or at ``max_turns``; an answer at the end token or at ``max_new_tokens``. Special tokens other than the end are never sampled.
    """
    rollouts = []
    for group, seed in enumerate(seeds):
        for _ in range(group_size):
            environment = make_environment()
            rollout = Rollout(environment, Sample([], [], [], group, rollout_logprobs=[]))
            rollout.messages = list(environment.reset(seed))
            rollouts.append(rollout)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            _run(model, chat, rollouts, _Sampler(model, chat, generator, temperature), max_new_tokens, max_turns)
    finally:
        model.train(was_training)
    return rollouts


def _run(model: Any, chat: ChatFormat, rollouts: list[Rollout], sampler: "_Sampler", max_new_tokens: int, max_turns: int) -> None:
    """Turn after turn until every dialogue is done. ``unread`` holds the tokens that a dialogue's cache has not seen yet."""
    cache = _Lockstep(model, len(rollouts))
    unread = [chat.opening(r.messages) for r in rollouts]
    for rollout, tokens in zip(rollouts, unread, strict=True):
        _append(rollout, tokens, CONTEXT)
    for turn in range(max_turns):
        live = [i for i, r in enumerate(rollouts) if not r.done]
        if not live:
            return
        answers = _answer(cache, unread, live, sampler, chat.end_id, max_new_tokens)
        for i, answer in zip(live, answers, strict=True):
            unread[i] = answer.tokens[-1:] + _take_turn(rollouts[i], chat, turn, answer)


@dataclass
class _Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)


def _answer(cache: "_Lockstep", unread: list[list[int]], live: list[int], sampler: "_Sampler", end_id: int, limit: int) -> list[_Answer]:
    """One answer for each live dialogue. The last token of an answer is left for the next turn's first pass: one pass saved a turn."""
    answers = {i: _Answer() for i in live}
    speaking, feed = list(live), unread
    for _ in range(limit):
        tokens, logprobs = sampler(cache.read(feed), speaking)
        feed = [[] for _ in unread]
        for i in speaking:
            answers[i].tokens.append(tokens[i])
            answers[i].logprobs.append(logprobs[i])
            feed[i] = [tokens[i]]
        speaking = [i for i in speaking if tokens[i] != end_id]
        feed = [row if row != [end_id] else [] for row in feed]
        if not speaking:
            break
    return [answers[i] for i in live]


def _take_turn(rollout: Rollout, chat: ChatFormat, turn: int, answer: _Answer) -> list[int]:
    """Let the environment settle the answer; return the tokens of its reply."""
    ended = answer.tokens[-1] == chat.end_id
    text = chat.decode(answer.tokens[:-1] if ended else answer.tokens)
    _append(rollout, answer.tokens, turn, answer.logprobs)
    rollout.messages.append(Message("assistant", text))
    rollout.cut_off.append(not ended)
    reply, reward, rollout.done = rollout.environment.step(text)
    rollout.sample.rewards.append(float(reward))
    if rollout.done or reply is None:
        rollout.done = True
        return []
    rollout.messages.append(reply)
    said = chat.reply(reply)
    _append(rollout, said, CONTEXT)
    return said


def _append(rollout: Rollout, tokens: list[int], turn: int, logprobs: list[float] | None = None) -> None:
    rollout.sample.tokens.extend(tokens)
    rollout.sample.turn_ids.extend([turn] * len(tokens))
    assert rollout.sample.rollout_logprobs is not None
    rollout.sample.rollout_logprobs.extend(logprobs or [0.0] * len(tokens))


class _Sampler:
    """Logits (B, V) to a token and its log-prob, one of each a row."""

    def __init__(self, model: Any, chat: ChatFormat, generator: torch.Generator | Sequence[torch.Generator], temperature: float) -> None:
        if temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {temperature}")
        vocab_size = model.get_output_embeddings().weight.shape[0]
        self.banned = torch.tensor(chat.unsayable(vocab_size), dtype=torch.int64, device=model.device)
        self.generator, self.temperature = generator, temperature

    def __call__(self, logits: Tensor, speaking: Sequence[int]) -> tuple[list[int], list[float]]:
        logp = (logits.float() / (self.temperature or 1.0)).log_softmax(-1)
        allowed = logp.exp().index_fill(-1, self.banned, 0.0)
        if not self.temperature:
            token = allowed.argmax(-1, keepdim=True)
        elif isinstance(self.generator, torch.Generator):
            token = torch.multinomial(allowed, 1, generator=self.generator)
        else:
            token = _invert(allowed, self.generator, speaking)
        return token[:, 0].tolist(), logp.gather(-1, token)[:, 0].tolist()


def _invert(weights: Tensor, generators: Sequence[torch.Generator], rows: Sequence[int]) -> Tensor:
    """One draw (B, 1) from each row of ``weights`` (B, V): where its cumulative sum passes a uniform number of the row's own generator.

    Those of other ``rows`` do not move on: how many numbers a dialogue has taken is then its own affair.
    """
    uniform = torch.zeros(len(weights), 1, dtype=torch.float64)
    for row in rows:
        uniform[row] = torch.rand((), generator=generators[row], dtype=torch.float64)
    sums = weights.double().cumsum(-1)
    return torch.searchsorted(sums, uniform.to(sums.device) * sums[:, -1:], right=True).clamp(max=weights.shape[1] - 1)


class _Lockstep:
    """One KV cache for all dialogues; columns that a dialogue does not use are holes."""

    def __init__(self, model: Any, size: int) -> None:
        from transformers.cache_utils import DynamicCache

        self.model, self.cache = model, DynamicCache()
        config = model.config.get_text_config()
        self.layer_types = set(getattr(config, "layer_types", None) or ())
        self.window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        self.kept = torch.zeros(size, 0, dtype=torch.bool, device=model.device)
        self.weight, self.bias, self.scale, self.softcap = head_of(model)

    def read(self, rows: list[list[int]]) -> Tensor:
        """Append one run of tokens a dialogue, right-aligned, some of them empty; return the logits (B, V) after the last column."""
        width = max(map(len, rows))
        padded = torch.tensor([[0] * (width - len(r)) + r for r in rows], device=self.kept.device)
        here = torch.tensor([[False] * (width - len(r)) + [True] * len(r) for r in rows], device=self.kept.device)
        self.kept = torch.cat([self.kept, here], 1)
        positions = (self.kept.cumsum(1) - 1).clamp(min=0)
        out = decoder(self.model)(
            input_ids=padded,
            attention_mask=self._mask(positions, width),
            position_ids=positions[:, -width:],
            past_key_values=self.cache,
            use_cache=True,
        )
        hidden = out.last_hidden_state[:, -1]
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias) * self.scale
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def _mask(self, positions: Tensor, width: int) -> Tensor | dict[str, Tensor]:
        """(B, 1, W, past + W): earlier kept columns. A hole sees itself, so that no row is empty. One mask a layer type where needed."""
        total = positions.shape[1]
        causal = torch.ones(width, total, dtype=torch.bool, device=positions.device).tril(total - width)
        itself = torch.eye(total, dtype=torch.bool, device=positions.device)[total - width :]
        full = (self.kept[:, None, None, :] & causal) | itself
        if self.window is None:
            return {"full_attention": full} if "sliding_attention" in self.layer_types else full
        distance = positions[:, None, -width:, None] - positions[:, None, None, :]
        sliding = (full & (distance < self.window)) | itself
        return {"full_attention": full, "sliding_attention": sliding} if "sliding_attention" in self.layer_types else sliding

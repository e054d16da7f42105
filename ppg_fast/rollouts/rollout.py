"""Many dialogues at once between a policy and its environments: batched, turn by turn, token-in token-out.

What was sampled is what is trained on; no token is ever decoded and encoded again. Where the answers come from is
`ppg_fast.rollouts.generation`: the model in this process or a server.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ppg_fast import stopping
from ppg_fast.dialogues.chat_format import ChatFormat
from ppg_fast.dialogues.message import Message
from ppg_fast.dialogues.packing import CONTEXT, Sample
from ppg_fast.rollouts.environment import Environment
from ppg_fast.rollouts.generation import Answer, EndpointSampler, LocalSampler, Request, Sampler
from ppg_fast.rules import FLOAT32_MAX

Stepped = tuple[Message | None, float, bool]  # what `Environment.step` returns
StepAll = Callable[[Sequence[Environment], Sequence[str]], Sequence[Stepped]]


@dataclass
class Rollout:
    """One finished dialogue.

    ``sample`` is what training reads; its ``rollout_logprobs`` are the sampler's, log softmax(logits / temperature)
    over the whole vocabulary. ``cut_off`` has one entry a turn: whether the answer failed to end by itself.
    """

    environment: Environment
    sample: Sample
    messages: list[Message] = field(default_factory=list)
    cut_off: list[bool] = field(default_factory=list)
    done: bool = False

    name: str = ""  # of the dialogue, for errors

    def __post_init__(self) -> None:
        self.sample.cut_off = self.cut_off  # one list, for the metrics of a step

    @property
    def total_reward(self) -> float:
        """The undiscounted return of the dialogue."""
        return sum(self.sample.rewards)


def step_each(environments: Sequence[Environment], answers: Sequence[str]) -> list[Stepped]:
    """Every environment steps by itself, one after the other."""
    return [environment.step(answer) for environment, answer in zip(environments, answers, strict=True)]


def finite_reward(reward: float, dialogue: str, turn: int) -> float:
    """``reward`` itself. ValueError that names dialogue and turn where float32, in which returns are computed, has no
    finite number for it."""
    number = float(reward)
    if not abs(number) <= FLOAT32_MAX:  # NaN too
        rule = f"a reward must be a finite float32, at most {FLOAT32_MAX:.3g} in size"
        raise ValueError(f"{rule}, got {number:g} for turn {turn} of dialogue {dialogue!r}")
    return number


def collect_groups(
    model: Any,
    chat: ChatFormat,
    make_environment: Callable[[], Environment],
    seeds: Sequence[int],
    group_size: int,
    *,
    generator: torch.Generator,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    max_turns: int = 64,
    max_dialogue_tokens: int = 0,
    batch_size: int = 64,
    step_all: StepAll = step_each,
    only: range | None = None,
) -> list[Rollout]:
    """``group_size`` rollouts of each seed, which share the partner and ``group_id``. Same weights, seeds and
    generator: same rollouts.

    ``model``: a causal LM, or an `EndpointSampler`, whose own temperature counts. ``generator`` lives on the model's
    device and gives every dialogue its own randomness, so that ``batch_size``, the dialogues generated at once, decides
    memory and speed only, up to rounding. Temperature 0 takes the most likely token. A dialogue stops when its
    environment is done, at ``max_turns``, or where its next answer would not fit ``max_dialogue_tokens`` or the
    model's positions; an answer at the end token or at ``max_new_tokens``. Special tokens other than
    the end are never sampled. ``step_all`` takes the answers of a turn to their environments, all at once. ``only``:
    which of the rollouts, numbered in order, are wanted; they are what they would be among all. ValueError for an
    opening that leaves no room for an answer, and for a reward that is not finite in float32.
    """
    total = len(seeds) * group_size
    draws = torch.randint(2**62, (total,), generator=generator, device=generator.device).tolist()
    rollouts, streams = [], []
    for number in range(total) if only is None else only:
        environment, group = make_environment(), number // group_size
        rollout = Rollout(environment, Sample([], [], [], group, rollout_logprobs=[]), name=f"of seed {seeds[group]}")
        with stopping.interruptible():
            rollout.messages = list(environment.reset(seeds[group]))
        rollout.name = getattr(getattr(environment, "prompt", None), "id", rollout.name)
        rollouts.append(rollout)
        streams.append(torch.Generator().manual_seed(draws[number]))
    limits = _Limits(max_new_tokens, max_turns, min(max_dialogue_tokens or 2**62, _most_positions(model)))
    if isinstance(model, EndpointSampler):
        _run(model, chat, rollouts, streams, limits, step_all)
        return rollouts
    vocab_size = model.get_output_embeddings().weight.shape[0]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(rollouts), batch_size):
                part = slice(start, start + batch_size)
                sampler = LocalSampler(model, chat.end_ids, chat.banned_token_ids(vocab_size), temperature)
                _run(sampler, chat, rollouts[part], streams[part], limits, step_all)
    finally:
        model.train(was_training)
    return rollouts


@dataclass(frozen=True)
class _Limits:
    new_tokens: int
    turns: int
    dialogue_tokens: int

    def room(self, rollout: Rollout) -> int:
        """Tokens that the next answer may have."""
        return min(self.new_tokens, self.dialogue_tokens - len(rollout.sample.tokens))


def _most_positions(model: Any) -> int:
    if isinstance(model, EndpointSampler):
        return model.positions
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**62


def _run(
    sampler: Sampler,
    chat: ChatFormat,
    rollouts: list[Rollout],
    streams: list[torch.Generator],
    limits: _Limits,
    step_all: StepAll,
) -> None:
    """Turn after turn until every dialogue is done; those that are leave the batch."""
    for rollout in rollouts:
        _append(rollout, chat.opening(rollout.messages), CONTEXT)
        if limits.room(rollout) < 1:
            said = "".join(m.content for m in rollout.messages[-1:])[:60]
            seen = f"{len(rollout.sample.tokens)} tokens in {said!r}"
            raise ValueError(
                f"an opening must be shorter than the {limits.dialogue_tokens} tokens of a dialogue, got {seen}"
            )
    for turn in range(limits.turns):
        live = [i for i, r in enumerate(rollouts) if not r.done]
        if not live:
            return
        asked = [Request(i, rollouts[i].sample.tokens, limits.room(rollouts[i]), streams[i]) for i in live]
        answers = sampler.answer(asked)
        texts = [_append_answer(rollouts[i], chat, turn, answer) for i, answer in zip(live, answers, strict=True)]
        with stopping.interruptible():
            stepped = step_all([rollouts[i].environment for i in live], texts)
        for i, (reply, reward, done) in zip(live, stepped, strict=True):
            rollouts[i].sample.rewards.append(finite_reward(reward, rollouts[i].name, turn))
            rollouts[i].done = done or reply is None
            if not rollouts[i].done:
                assert reply is not None
                _append_reply(rollouts[i], chat, reply, limits)


def _append_answer(rollout: Rollout, chat: ChatFormat, turn: int, answer: Answer) -> str:
    """Append the answer to the sample and its text to the messages; return the text."""
    text = chat.decode(answer.tokens)
    _append(rollout, answer.tokens, turn, answer.logprobs)
    rollout.messages.append(Message("assistant", text))
    rollout.cut_off.append(not answer.ended)
    return text


def _append_reply(rollout: Rollout, chat: ChatFormat, reply: Message, limits: _Limits) -> None:
    """Append the partner's reply, if an answer to it still fits; else the dialogue is done."""
    tokens = chat.reply(reply)
    if limits.dialogue_tokens - len(rollout.sample.tokens) - len(tokens) < 1:
        rollout.done = True
        return
    rollout.messages.append(reply)
    _append(rollout, tokens, CONTEXT)


def _append(rollout: Rollout, tokens: list[int], turn: int, logprobs: list[float] | None = None) -> None:
    rollout.sample.tokens.extend(tokens)
    rollout.sample.turn_ids.extend([turn] * len(tokens))
    assert rollout.sample.rollout_logprobs is not None
    rollout.sample.rollout_logprobs.extend(logprobs or [0.0] * len(tokens))

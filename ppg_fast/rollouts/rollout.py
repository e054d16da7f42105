"""Many dialogues at once between a policy and its environments: batched, turn by turn, token-in token-out.

What was sampled is what is trained on; no token is ever decoded and encoded again. Where the answers come from is
`ppg_fast.rollouts.generation`: the model in this process or a server.
"""

from collections.abc import Callable, Mapping, Sequence
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

Stepped = tuple[Message | Sequence[Message] | None, float, bool]  # what `Environment.step` returns
StepAll = Callable[[Sequence[Environment], Sequence[Any]], Sequence[Stepped]]  # answers: texts, or what a Read makes
# an answer's tokens, those before it, its turn and the tools -> the message that it is
Read = Callable[[Sequence[int], Sequence[int], int, Sequence[Mapping[str, Any]]], Message]


@dataclass
class Rollout:
    """One finished dialogue.

    ``sample`` is what training reads; its ``rollout_logprobs`` are the sampler's, log softmax(logits / temperature)
    over the whole vocabulary, or over the sample's kept sets, its ``entropies`` those of that distribution where they
    were asked for. ``cut_off`` has one entry a turn: whether the answer failed to end by itself.
    """

    environment: Environment
    sample: Sample
    messages: list[Message] = field(default_factory=list)
    cut_off: list[bool] = field(default_factory=list)
    done: bool = False
    tools: Sequence[Mapping[str, Any]] = ()

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
    top_p: float = 1.0,
    top_k: int = 0,
    max_turns: int = 64,
    max_dialogue_tokens: int = 0,
    batch_size: int = 64,
    step_all: StepAll = step_each,
    read: Read | None = None,
    only: range | None = None,
    entropies: bool = False,
) -> list[Rollout]:
    """``group_size`` rollouts of each seed, which share the partner and ``group_id``. Same weights, seeds and
    generator: same rollouts.

    ``model``: a causal LM, or an `EndpointSampler`, whose own settings count. ``generator`` lives on the model's
    device and gives every dialogue its own randomness, so that ``batch_size``, the dialogues generated at once, decides
    memory and speed only, up to rounding. Temperature 0 takes the most likely token; ``top_p`` and ``top_k`` as
    `LocalSampler` has them. A dialogue stops when its environment is done, at ``max_turns``, or where its next answer
    would not fit ``max_dialogue_tokens`` or the model's positions; an answer at the end token or at ``max_new_tokens``.
    Special tokens other than the end are never sampled. ``step_all`` takes the answers of a turn to their environments,
    all at once: their texts, or the messages that ``read`` makes of them where it is given. ``only``: which of the
    rollouts, numbered in order, are wanted; they are what they would be among all. ``entropies``: of what each token
    was sampled from are kept too, where the model is in this process. ValueError for an opening that leaves no room for
    an answer, and for a reward that is not finite in float32.
    """
    total = len(seeds) * group_size
    draws = torch.randint(2**62, (total,), generator=generator, device=generator.device).tolist()
    rollouts, streams = [], []
    for number in range(total) if only is None else only:
        environment, group = make_environment(), number // group_size
        rollout = Rollout(environment, Sample([], [], [], group, rollout_logprobs=[]), name=f"of seed {seeds[group]}")
        with stopping.interruptible():
            rollout.messages = list(environment.reset(seeds[group]))
        if entropies and not isinstance(model, EndpointSampler):
            rollout.sample.entropies = []
        rollout.tools = getattr(environment, "tools", ())
        rollout.name = getattr(getattr(environment, "prompt", None), "id", rollout.name)
        rollouts.append(rollout)
        streams.append(torch.Generator().manual_seed(draws[number]))
    limits = _Limits(max_new_tokens, max_turns, min(max_dialogue_tokens or 2**62, _most_positions(model)))
    talk = _Talk(chat, limits, step_all, read)
    if isinstance(model, EndpointSampler):
        _run(model, rollouts, streams, talk)
        return rollouts
    vocab_size = model.get_output_embeddings().weight.shape[0]
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, len(rollouts), batch_size):
                part = slice(start, start + batch_size)
                banned = chat.banned_token_ids(vocab_size)
                sampler = LocalSampler(model, chat.end_ids, banned, temperature, top_p, top_k, entropies)
                _run(sampler, rollouts[part], streams[part], talk)
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


@dataclass(frozen=True)
class _Talk:
    """How answers and replies are read, written and taken to environments."""

    chat: ChatFormat
    limits: _Limits
    step_all: StepAll
    read: Read | None

    def begin(self, rollout: Rollout) -> None:
        """Append the opening. ValueError where no answer has room after it."""
        _append(rollout, self.chat.opening(rollout.messages, rollout.tools), CONTEXT)
        if self.limits.room(rollout) < 1:
            said = "".join(m.content for m in rollout.messages[-1:])[:60]
            seen = f"{len(rollout.sample.tokens)} tokens in {said!r}"
            rule = f"an opening must be shorter than the {self.limits.dialogue_tokens} tokens of a dialogue"
            raise ValueError(f"{rule}, got {seen}")

    def answer(self, rollout: Rollout, turn: int, answer: Answer) -> str | Message:
        """Append the answer to the sample, and as a message; return what `step_all` takes."""
        before = rollout.sample.tokens
        if self.read:
            message = self.read(answer.tokens, before, turn, rollout.tools)
        else:
            message = Message("assistant", self.chat.decode(answer.tokens))
        _append(rollout, answer.tokens, turn, answer)
        if answer.kept is not None:
            sample = rollout.sample
            context = len(sample.tokens) - len(answer.tokens) - len(sample.kept or ())
            sample.kept = [*(sample.kept or ()), *([[]] * context), *answer.kept]
        rollout.messages.append(message)
        rollout.cut_off.append(not answer.ended)
        return message if self.read else message.content

    def reply(self, rollout: Rollout, reply: Message | Sequence[Message]) -> None:
        """Append the reply, if an answer to it still fits; else the dialogue is done."""
        messages = [reply] if isinstance(reply, Message) else list(reply)
        tokens = self.chat.reply(messages, rollout.tools)
        if self.limits.dialogue_tokens - len(rollout.sample.tokens) - len(tokens) < 1:
            rollout.done = True
            return
        rollout.messages += messages
        _append(rollout, tokens, CONTEXT)


def _most_positions(model: Any) -> int:
    if isinstance(model, EndpointSampler):
        return model.positions
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**62


def _run(sampler: Sampler, rollouts: list[Rollout], streams: list[torch.Generator], talk: _Talk) -> None:
    """Turn after turn until every dialogue is done; those that are leave the batch."""
    for rollout in rollouts:
        talk.begin(rollout)
    for turn in range(talk.limits.turns):
        live = [i for i, r in enumerate(rollouts) if not r.done]
        if not live:
            return
        asked = [Request(i, rollouts[i].sample.tokens, talk.limits.room(rollouts[i]), streams[i]) for i in live]
        answers = sampler.answer(asked)
        said = [talk.answer(rollouts[i], turn, answer) for i, answer in zip(live, answers, strict=True)]
        with stopping.interruptible():
            stepped = talk.step_all([rollouts[i].environment for i in live], said)
        for i, (reply, reward, done) in zip(live, stepped, strict=True):
            rollouts[i].sample.rewards.append(finite_reward(reward, rollouts[i].name, turn))
            rollouts[i].done = done or not reply
            if not rollouts[i].done:
                assert reply
                talk.reply(rollouts[i], reply)


def _append(rollout: Rollout, tokens: list[int], turn: int, answer: Answer | None = None) -> None:
    sample, nothing = rollout.sample, [0.0] * len(tokens)
    sample.tokens.extend(tokens)
    sample.turn_ids.extend([turn] * len(tokens))
    assert sample.rollout_logprobs is not None
    sample.rollout_logprobs.extend(answer.logprobs if answer else nothing)
    if sample.entropies is not None:
        sample.entropies.extend(answer.entropies if answer else nothing)

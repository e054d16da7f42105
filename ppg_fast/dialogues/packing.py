"""Dialogues as tokens: one sample per dialogue with explicit turn ids, packed end to end into one row without
padding."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ppg_fast.dialogues.dialogue import Dialogue, Message
from ppg_fast.spec import IGNORE, require

CONTEXT = -1  # turn id of a token the policy did not choose
LARGEST_REWARD = torch.finfo(torch.float32).max
# of tokenizers without a chat template; <tool> only if there are tool messages
CONTROL = ("<system>", "<user>", "<assistant>", "<end>")


@dataclass
class Sample:
    """One dialogue as tokens; all lists but ``rewards`` have one entry per token.

    ``turn_ids``: the assistant's turn that a token belongs to, its end-of-turn token included, -1 for context.
        ``rewards``: one per turn.
    ``group_id``: dialogues of one prompt share it. ``rollout_logprobs``: the sampler's log-probability of the token
        itself, in nats,
    not read at context tokens. ``cut_off``: one per turn, whether a sampler stopped the answer before it ended by
    itself.
    """

    tokens: list[int]
    turn_ids: list[int]
    rewards: list[float]
    group_id: int
    rollout_logprobs: list[float] | None = None
    cut_off: list[bool] | None = None


# a dialogue to pass through a model for company: its gradient is zero
NOTHING = Sample([0], [CONTEXT], [], 0, rollout_logprobs=[0.0])


@dataclass
class PackedBatch:
    """S dialogues end to end, N tokens. Position i predicts token i + 1 of its own dialogue: ``labels``, ``turn_ids``
    and ``rollout_logprobs`` are those of the predicted token, so they go to the loss functions as they are.
    """

    tokens: Tensor  # (N,) int64
    labels: Tensor  # (N,) int64, -100 where the next token is not the assistant's or there is none
    turn_ids: Tensor  # (N,) int64 of the predicted token, -1 = context
    cu_seqlens: Tensor  # (S + 1,) int32, starts at 0
    position_ids: Tensor  # (N,) int64, restarts with each dialogue
    rewards: Tensor  # (S, T) float32, zero beyond a dialogue's turns; T >= 1
    turn_counts: Tensor  # (S,) int64
    group_ids: Tensor  # (S,) int64
    rollout_logprobs: Tensor | None = None  # (N,) float32 in nats, 0 at context

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The same batch on ``device``."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {
            name: tensor.to(device, non_blocking=non_blocking) for name, tensor in tensors.items() if tensor is not None
        }
        return PackedBatch(**moved)


def pack(samples: Sequence[Sample]) -> PackedBatch:
    """Put samples end to end. No samples give a batch without tokens.

    ValueError names the sample and the value: lists of unequal length, a turn id outside -1 .. turns - 1, a reward or a
    log-prob of an assistant token that is not finite, no tokens, log-probs in some samples only.
    """
    for index, sample in enumerate(samples):
        _check_sample(sample, index)
    with_logprobs = {sample.rollout_logprobs is not None for sample in samples}
    require(
        len(with_logprobs) < 2,
        "rollout_logprobs must be given for all samples or for none",
        "some with and some without",
    )
    lengths = torch.tensor([len(sample.tokens) for sample in samples], dtype=torch.int64)
    ends = lengths.cumsum(0)
    count = int(lengths.sum())
    require(count < 2**31, "a packed batch must have fewer than 2^31 tokens", count)
    tokens = torch.tensor([token for sample in samples for token in sample.tokens], dtype=torch.int64)
    own_turns = torch.tensor([turn for sample in samples for turn in sample.turn_ids], dtype=torch.int64)

    def of_next_token(values: Tensor, at_last: float) -> Tensor:
        shifted = values.roll(-1)
        shifted[ends - 1] = at_last
        return shifted

    turn_ids = of_next_token(own_turns, CONTEXT)
    labels = of_next_token(tokens, IGNORE).masked_fill_(turn_ids == CONTEXT, IGNORE)
    logprobs = None
    if with_logprobs == {True}:
        values = [value for sample in samples for value in sample.rollout_logprobs or ()]
        own_logprobs = torch.tensor(values, dtype=torch.float32)
        logprobs = of_next_token(own_logprobs, 0.0).masked_fill_(turn_ids == CONTEXT, 0.0)
    turn_counts = torch.tensor([len(sample.rewards) for sample in samples], dtype=torch.int64)
    rewards = torch.zeros(
        len(samples), max([len(sample.rewards) for sample in samples], default=0) or 1, dtype=torch.float32
    )
    for row, sample in zip(rewards, samples, strict=True):
        row[: len(sample.rewards)] = torch.tensor(sample.rewards, dtype=torch.float32)
    return PackedBatch(
        tokens=tokens,
        labels=labels,
        turn_ids=turn_ids,
        cu_seqlens=torch.cat([ends.new_zeros(1), ends]).to(torch.int32),
        position_ids=torch.arange(count) - (ends - lengths).repeat_interleave(lengths),
        rewards=rewards,
        turn_counts=turn_counts,
        group_ids=torch.tensor([sample.group_id for sample in samples], dtype=torch.int64),
        rollout_logprobs=logprobs,
    )


def micro_batches(samples: Iterable[Sample], max_tokens: int) -> Iterator[list[Sample]]:
    """Batches of at most ``max_tokens`` tokens, as few and then as even as two greedy rules make them; the fullest
    comes first.

    Longest first, into the fullest batch with room (best fit), decides how many; longest first into the emptiest
    spreads them evenly
    where that needs no more. A batch keeps the order of ``samples``. A sample longer than the budget comes alone: a
    turn is credited through all that came before it, so it is never cut, and dropping it would change the gradient.
    ValueError if max_tokens < 1.
    """
    is_count = isinstance(max_tokens, int) and not isinstance(max_tokens, bool) and max_tokens >= 1
    require(is_count, "max_tokens must be an integer >= 1", max_tokens)
    samples = list(samples)
    sizes = [len(sample.tokens) for sample in samples]
    tight = _fill(sizes, max_tokens, [], fullest=True) or []
    even = _fill(sizes, max_tokens, [[] for _ in tight], fullest=False) or tight
    for batch in sorted(even, key=lambda batch: (-sum(sizes[i] for i in batch), min(batch))):
        yield [samples[i] for i in sorted(batch)]


def _fill(sizes: list[int], budget: int, batches: list[list[int]], fullest: bool) -> list[list[int]] | None:
    """Positions of ``sizes`` put into ``batches``, longest first; None where they do not hold all and new ones are not
    to be opened."""
    totals = [0] * len(batches)
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        room = [b for b, total in enumerate(totals) if total == 0 or total + sizes[i] <= budget]
        if not room and not fullest:
            return None
        if not room:
            room = [len(batches)]
            batches.append([])
            totals.append(0)
        best = max(room, key=totals.__getitem__) if fullest else min(room, key=totals.__getitem__)
        batches[best].append(i)
        totals[best] += sizes[i]
    return batches


def trim_after_last_turn(sample: Sample, turns: Collection[int] | None = None) -> Sample:
    """The sample without what follows its last assistant token, or the last one of ``turns``: no loss is predicted from
    it.

    Rewards stay whole. Without tokens where no such token has another before it that could predict it.
    """
    turns = range(len(sample.rewards)) if turns is None else turns
    end = max((position + 1 for position, turn in enumerate(sample.turn_ids) if position and turn in turns), default=0)
    logprobs = None if sample.rollout_logprobs is None else sample.rollout_logprobs[:end]
    return Sample(
        sample.tokens[:end], sample.turn_ids[:end], list(sample.rewards), sample.group_id, logprobs, sample.cut_off
    )


def encode_dialogue(tokenizer: Any, dialogue: Dialogue) -> Sample:
    """Tokens and turn ids of a logged dialogue. A turn without a reward gets 0.

    A tokenizer with a chat template: the tokens of apply_chat_template on the whole, a turn being what the template
    adds to the generation prompt up to its end-of-turn token. Without one: role token, content, <end>, with <system>,
    <user>, <assistant> (<tool> if there are tool messages) and <end> in the vocabulary. ValueError names the dialogue,
    the message and what is wrong: a template that rewrites earlier messages, a token across a turn's bound, a control
    token inside a content.
    """
    require(bool(dialogue.messages), f"dialogue {dialogue.id!r} must have messages", dialogue.messages)
    pieces = _template_pieces if getattr(tokenizer, "chat_template", None) else _role_token_pieces
    try:
        parts = pieces(tokenizer, dialogue.messages)
    except ValueError as error:
        raise ValueError(f"dialogue {dialogue.id!r}, {error}") from error
    return Sample(
        tokens=[token for tokens, _ in parts for token in tokens],
        turn_ids=[turn for tokens, turn in parts for _ in tokens],
        rewards=[0.0 if reward is None else reward for reward in dialogue.turn_rewards],
        group_id=stable_group_id(dialogue.group_id),
    )


def stable_group_id(name: str) -> int:
    """A 63-bit number for a group's name: the same in every process and run."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


_Pieces = list[tuple[list[int], int]]  # tokens and the turn they belong to


def _encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []


def _reject_control(message: Message, index: int, control: Iterable[str]) -> None:
    """A content that holds a control token would end its message early or speak for another role."""
    for token in control:
        require(
            token not in message.content,
            f"message {index}: content must not hold a control token of the tokenizer",
            token,
        )


def _role_token_pieces(tokenizer: Any, messages: Sequence[Message]) -> _Pieces:
    """Role token, content, <end> of every message; content and <end> of an assistant message are a turn."""
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in CONTROL if token not in vocabulary]
    require(
        not missing,
        f"message 0: a tokenizer without a chat template must have the tokens {' '.join(CONTROL)}; missing",
        missing,
    )
    pieces: _Pieces = []
    turn = 0
    for index, message in enumerate(messages):
        role = f"<{message.role}>"
        require(role in vocabulary, f"message {index}: the tokenizer must have a token for the role", role)
        _reject_control(message, index, (*CONTROL, "<tool>"))
        content = _encode(tokenizer, message.content)
        kept = bool(content) or not message.content.strip()
        require(kept, f"message {index}: the tokenizer must give tokens for the content", message.content[:40])
        pieces.append(([vocabulary[role]], CONTEXT))
        is_turn = message.role == "assistant"
        pieces.append(([*content, vocabulary["<end>"]], turn if is_turn else CONTEXT))
        turn += is_turn
    return pieces


def _template_pieces(tokenizer: Any, messages: Sequence[Message]) -> _Pieces:
    """The chat template's text cut at every turn's bounds, each part encoded, and checked against the whole."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special = {**dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)), **added}
    for index, message in enumerate(messages):
        _reject_control(message, index, special.keys() - {tokenizer.unk_token, tokenizer.pad_token})
    texts = _template_texts(tokenizer, messages)
    whole = _encode(tokenizer, "".join(text for text, _, _ in texts))
    parts = [_encode(tokenizer, text) for text, _, _ in texts]
    if [token for part in parts for token in part] != whole:
        # a tokenizer may treat the beginning of any text in its own way, so ask again for the parts as they stand in
        # the whole
        parts = _parts_in_place(tokenizer, texts, whole)
    ends = set(special.values())
    pieces: _Pieces = []
    for part, (_, turn, _) in zip(parts, texts, strict=True):
        # what a template writes after the end-of-turn token, such as a line break, the policy never chose
        end = max((n + 1 for n, token in enumerate(part) if token in ends), default=len(part))
        end = end if not tokenizer.decode(part[end:]).strip() else len(part)
        pieces += [(part[:end], turn), (part[end:], CONTEXT)]
    return pieces


def _template_texts(tokenizer: Any, messages: Sequence[Message]) -> list[tuple[str, int, int]]:
    """(text, turn, message index) of the whole rendering: context up to each generation prompt's end, then the turn
    itself."""
    conversation = [{"role": message.role, "content": message.content} for message in messages]
    texts: list[tuple[str, int, int]] = []
    done, turn = "", 0

    def extend(index: int, stop: int, turn_id: int, generation_prompt: bool) -> None:
        nonlocal done
        try:
            text = tokenizer.apply_chat_template(
                conversation[:stop], tokenize=False, add_generation_prompt=generation_prompt
            )
        except Exception as error:  # a template refuses a conversation with an error class of its own
            raise ValueError(f"message {index}: the chat template refuses it: {error}") from error
        if not text.startswith(done):
            changed = done[_first_difference(text, done) :][:60]
            rule = "the chat template must only append (a training template keeps what earlier messages had)"
            raise ValueError(f"message {index}: {rule}, but it no longer writes {changed!r}")
        texts.append((text[len(done) :], turn_id, index))
        done = text

    for index, message in enumerate(messages):
        if message.role == "assistant":
            extend(index, index, CONTEXT, True)
            extend(index, index + 1, turn, False)
            turn += 1
    extend(len(messages) - 1, len(messages), CONTEXT, False)
    return texts


def _parts_in_place(tokenizer: Any, texts: list[tuple[str, int, int]], whole: list[int]) -> list[list[int]]:
    """Tokens of each part as the growing prefixes of the whole show them; ValueError where a token crosses a bound."""
    parts: list[list[int]] = []
    prefix, done = "", 0
    for text, _, index in texts:
        prefix += text
        tokens = _encode(tokenizer, prefix)
        if whole[: len(tokens)] != tokens:
            crossing = tokenizer.convert_ids_to_tokens(whole[_first_difference(whole, tokens)])
            raise ValueError(f"message {index}: a token must not cross the bound of a turn, got {crossing!r} across it")
        parts.append(tokens[done:])
        done = len(tokens)
    return parts


def _first_difference(one: Sequence[Any], other: Sequence[Any]) -> int:
    """First position at which the two differ; the last common one if either is the beginning of the other."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)) - 1)


def _check_sample(sample: Sample, index: int) -> None:
    name, turns = f"sample {index}", len(sample.rewards)
    require(bool(sample.tokens), f"{name} must have tokens", sample.tokens)
    given = len(sample.turn_ids)
    require(given == len(sample.tokens), f"{name} must have one turn id per token: {len(sample.tokens)}", given)
    for turn_id in (min(sample.turn_ids), max(sample.turn_ids)):
        require(
            CONTEXT <= turn_id < turns, f"{name}: a turn id must be -1 or below the number of rewards {turns}", turn_id
        )
    for turn, reward in enumerate(sample.rewards):
        # NaN fails it too
        require(abs(reward) <= LARGEST_REWARD, f"{name}, turn {turn}: a reward must be finite in float32", reward)
    if sample.rollout_logprobs is not None:
        given = len(sample.rollout_logprobs)
        require(
            given == len(sample.tokens), f"{name} must have one rollout log-prob per token: {len(sample.tokens)}", given
        )
        for position, (value, turn) in enumerate(zip(sample.rollout_logprobs, sample.turn_ids, strict=True)):
            require(
                turn == CONTEXT or math.isfinite(value),
                f"{name}, token {position}: a rollout log-prob must be finite",
                value,
            )

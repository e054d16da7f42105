"""A logged dialogue as tokens, each with the turn it belongs to: the renderer's text, cut at the bounds of turns."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from ppg_fast.dialogues.chat_format import ChatFormat
from ppg_fast.dialogues.dialogue import Dialogue
from ppg_fast.dialogues.message import Message
from ppg_fast.dialogues.packing import CONTEXT, Sample, cut_tokens
from ppg_fast.dialogues.renderer import Renderer, first_difference, in_message
from ppg_fast.spec import require

SLACK = 64  # tokens by which parts encoded alone may differ from the same within the whole


def encode_dialogue(tokenizer: Any, dialogue: Dialogue, max_tokens: int = 0) -> Sample:
    """Tokens and turn ids of a logged dialogue. A turn without a reward gets 0.

    ``tokenizer``: one, or the `ChatFormat` of one (which knows the ends of the model's generation config too). With a
    chat template: the tokens of apply_chat_template on the whole, a turn being what the template adds to the generation
    prompt up to the first token that ends an answer. Without one: role token, content, <end>, with <system>, <user>,
    <assistant> (<tool> if there are tool messages) and <end> in the vocabulary. ``max_tokens``: the turns that end
    within it (`cut_tokens`), and no more is rendered or encoded than that takes; rewards stay whole; 0: all. ValueError
    names the dialogue, the message and what is wrong: a template that refuses, rewrites or leaves out a
    message, a token across a turn's bound, a special token inside a content.
    """
    chat = tokenizer if isinstance(tokenizer, ChatFormat) else ChatFormat(tokenizer)
    try:
        parts = _parts(chat, dialogue.messages, max_tokens)
    except ValueError as error:
        raise ValueError(f"dialogue {dialogue.id!r}, {error}") from error
    sample = Sample(
        tokens=[token for tokens, _ in parts for token in tokens],
        turn_ids=[turn for tokens, turn in parts for _ in tokens],
        rewards=[0.0 if reward is None else reward for reward in dialogue.turn_rewards],
        group_id=stable_group_id(dialogue.group_id),
    )
    return cut_tokens(sample, max_tokens)


def stable_group_id(name: str) -> int:
    """A 63-bit number for a group's name: the same in every process and run."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


class _Span(NamedTuple):
    """A part of the rendering: context up to the end of a generation prompt, or the turn that follows it."""

    text: str
    turn: int
    message: int  # index of the message that it ends with, for errors


def _parts(chat: ChatFormat, messages: Sequence[Message], max_tokens: int) -> list[tuple[list[int], int]]:
    """(tokens, turn) of each part: the rendered text cut at every turn's bounds, encoded, checked against the whole."""
    renderer = chat.renderer
    every = _spans(chat, messages)
    spans = _within(renderer, every, max_tokens) if max_tokens else list(every)
    renderer.require_written(messages[: spans[-1].message + 1])
    whole = renderer.encode("".join(span.text for span in spans))
    encoded = [renderer.encode(span.text) for span in spans]
    if [token for tokens in encoded for token in tokens] != whole:
        # a tokenizer may treat the beginning of any text in its own way: ask for the parts as they stand in the whole
        encoded = _encode_in_place(renderer, spans, whole)
    return [(tokens, span.turn) for tokens, span in zip(encoded, spans, strict=True)]


def _spans(chat: ChatFormat, messages: Sequence[Message]) -> Iterator[_Span]:
    """The whole rendering, part by part: context up to each generation prompt's end, then the turn up to and with the
    token that ends it. What a template writes behind that it may change as the dialogue goes on."""
    renderer, before, turn, checked = chat.renderer, "", 0, 0

    def part(index: int, stop: int, turn_id: int, text: str | None = None) -> _Span:
        nonlocal before, checked
        for number in range(checked, stop):
            with in_message(number):
                renderer.check(messages[number])
        checked = max(checked, stop)
        added = renderer.added_text(before, messages[:stop]) if text is None else text
        added = chat.up_to_the_end(added) if turn_id != CONTEXT else added
        before += added
        return _Span(added, turn_id, index)

    for index, message in enumerate(messages):
        if message.role == "assistant":
            yield part(index, index, CONTEXT, _prompt(renderer, before, messages[:index]))
            yield part(index, index + 1, turn)
            turn += 1
    yield part(len(messages) - 1, len(messages), CONTEXT)


def _prompt(renderer: Renderer, before: str, messages: Sequence[Message]) -> str:
    """The context of the next turn: what ``messages`` and the generation prompt add to ``before``."""
    if before:
        return renderer.added_text(before, messages, answer_next=True)
    return renderer.before_answer(messages)


def _within(renderer: Renderer, spans: Iterator[_Span], max_tokens: int) -> list[_Span]:
    """The spans up to the last turn that ends within about ``max_tokens``, and no more encoded than tells it.

    ValueError where the first answer does not begin within them, or is more than twice as long.
    """
    kept: list[_Span] = []
    context: list[_Span] = []
    total = 0
    for span in spans:
        left = max(max_tokens - total, 0)
        total += len(renderer.encode(span.text[: 64 * left + 4096]))  # what is cut off here is over the bound anyway
        context.append(span)
        if not kept:
            bound = 2 * max_tokens + SLACK if span.turn != CONTEXT else max_tokens
            rule = f"message {span.message}: a dialogue's first answer must begin within the {max_tokens} tokens "
            rule += "(max_dialogue_tokens) that are read of it, and not be more than twice as long"
            require(total < bound, rule, f"at least {total}")
        elif total > max_tokens + SLACK:
            break
        if span.turn != CONTEXT:
            kept, context = [*kept, *context], []
    return kept


def _encode_in_place(renderer: Renderer, spans: Sequence[_Span], whole: list[int]) -> list[list[int]]:
    """Tokens of each span as the growing prefixes of the whole show them; ValueError where a token crosses a bound."""
    encoded: list[list[int]] = []
    prefix, done = "", 0
    for text, _, index in spans:
        prefix += text
        tokens = renderer.encode(prefix)
        if whole[: len(tokens)] != tokens:
            crossing = renderer.tokenizer.convert_ids_to_tokens(whole[first_difference(whole, tokens)])
            raise ValueError(f"message {index}: a token must not cross the bound of a turn, got {crossing!r} across it")
        encoded.append(tokens[done:])
        done = len(tokens)
    return encoded

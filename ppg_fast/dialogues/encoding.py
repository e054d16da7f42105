"""A logged dialogue as tokens, each with the turn it belongs to: the renderer's text, cut at the bounds of turns."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from ppg_fast.dialogues.dialogue import Dialogue, Message
from ppg_fast.dialogues.packing import CONTEXT, Sample
from ppg_fast.dialogues.renderer import Renderer, first_difference


def encode_dialogue(tokenizer: Any, dialogue: Dialogue) -> Sample:
    """Tokens and turn ids of a logged dialogue. A turn without a reward gets 0.

    A tokenizer with a chat template: the tokens of apply_chat_template on the whole, a turn being what the template
    adds to the generation prompt up to its end-of-turn token. Without one: role token, content, <end>, with <system>,
    <user>, <assistant> (<tool> if there are tool messages) and <end> in the vocabulary. ValueError names the dialogue,
    the message and what is wrong: a template that rewrites earlier messages, a token across a turn's bound, a special
    token inside a content.
    """
    renderer = Renderer(tokenizer)
    try:
        parts = _parts(renderer, dialogue.messages)
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


class _Span(NamedTuple):
    """A part of the rendering: context up to the end of a generation prompt, or the turn that follows it."""

    text: str
    turn: int
    message: int  # index of the message that it ends with, for errors


def _parts(renderer: Renderer, messages: Sequence[Message]) -> list[tuple[list[int], int]]:
    """(tokens, turn) of each part: the rendered text cut at every turn's bounds, encoded, checked against the whole."""
    for index, message in enumerate(messages):
        with _in_message(index):
            renderer.check(message)
    spans = _spans(renderer, messages)
    whole = renderer.encode("".join(span.text for span in spans))
    encoded = [renderer.encode(span.text) for span in spans]
    if [token for tokens in encoded for token in tokens] != whole:
        # a tokenizer may treat the beginning of any text in its own way: ask for the parts as they stand in the whole
        encoded = _encode_in_place(renderer, spans, whole)
    parts: list[tuple[list[int], int]] = []
    for tokens, span in zip(encoded, spans, strict=True):
        end = renderer.end_of_turn(tokens) or len(tokens)
        parts += [(tokens[:end], span.turn), (tokens[end:], CONTEXT)]
    return parts


def _spans(renderer: Renderer, messages: Sequence[Message]) -> list[_Span]:
    """The whole rendering: context up to each generation prompt's end, then the turn itself."""
    spans: list[_Span] = []
    before, turn = "", 0

    def extend(index: int, stop: int, turn_id: int, answer_next: bool) -> None:
        nonlocal before
        with _in_message(index):
            text = renderer.added(before, messages[:stop], answer_next)
        spans.append(_Span(text, turn_id, index))
        before += text

    for index, message in enumerate(messages):
        if message.role == "assistant":
            extend(index, index, CONTEXT, True)
            extend(index, index + 1, turn, False)
            turn += 1
    extend(len(messages) - 1, len(messages), CONTEXT, False)
    return spans


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


@contextmanager
def _in_message(index: int) -> Iterator[None]:
    """A ValueError inside names the message."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"message {index}: {error}") from error

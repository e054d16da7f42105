"""A logged dialogue as tokens, each with the turn it belongs to: the renderer's text, cut at the bounds of turns."""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

from ppg_fast.dialogues.chat_format import ChatFormat
from ppg_fast.dialogues.conversation import Tools
from ppg_fast.dialogues.dialogue import Dialogue
from ppg_fast.dialogues.message import Message
from ppg_fast.dialogues.packing import CONTEXT, Sample, cut_tokens
from ppg_fast.dialogues.renderer import Renderer, first_difference
from ppg_fast.dialogues.views import Span, spans
from ppg_fast.dialogues.written import require_written
from ppg_fast.spec import require

SLACK = 64  # tokens by which parts encoded alone may differ from the same within the whole


def encode_dialogue(tokenizer: Any, dialogue: Dialogue, max_tokens: int = 0) -> Sample:
    """Tokens and turn ids of a logged dialogue. A turn without a reward gets 0.

    ``tokenizer``: one, or the `ChatFormat` of one (which knows the ends of the model's generation config too). With a
    chat template each turn is trained on what the model would see: the template's text of the messages before it with
    the generation prompt, then the answer as the template writes the last one, up to the first token that ends one.
    Where that begins with all of the turn before, the two share one part, else another begins (`Sample.starts`); a
    template that only appends gives the tokens of apply_chat_template on the whole. Without a template: role token,
    content, <end>, with <system>, <user>, <assistant> (<tool> if there are tool messages) and <end> in the vocabulary.
    An answer that is not trained is context. ``max_tokens``: the turns that end within so many of their part
    (`cut_tokens`), and no more is rendered or encoded than that takes; rewards stay whole; 0: all. ValueError names
    the dialogue, the message and what is wrong: a template that refuses or leaves out a message or what it carries, a
    token across a turn's bound, a special token inside a message, no answer that is trained.
    """
    chat = tokenizer if isinstance(tokenizer, ChatFormat) else ChatFormat(tokenizer)
    try:
        parts = _parts(chat, dialogue.messages, dialogue.tools, max_tokens)
    except ValueError as error:
        raise ValueError(f"dialogue {dialogue.id!r}, {error}") from error
    written = [span for part in parts for span in part]
    lengths = [sum(len(tokens) for tokens, _ in part) for part in parts]
    sample = Sample(
        tokens=[token for tokens, _ in written for token in tokens],
        turn_ids=[turn for tokens, turn in written for _ in tokens],
        rewards=[0.0 if reward is None else reward for reward in dialogue.turn_rewards],
        group_id=stable_group_id(dialogue.group_id),
        starts=[0, *accumulate(lengths[:-1])],
    )
    return cut_tokens(sample, max_tokens)


def stable_group_id(name: str) -> int:
    """A 63-bit number for a group's name: the same in every process and run."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


def _parts(
    chat: ChatFormat, messages: Sequence[Message], tools: Tools, max_tokens: int
) -> list[list[tuple[list[int], int]]]:
    """(tokens, turn) of each span of each part: the rendered text cut at every turn's bounds, encoded, checked against
    the whole."""
    every = spans(chat, messages, tools)
    read = _within(chat.renderer, every, max_tokens) if max_tokens else list(every)
    require_written(chat.renderer, messages[: read[-1].message + 1], tools)
    begins = [*(place for place, span in enumerate(read) if span.begins), len(read)]
    return [_encoded(chat.renderer, read[start:stop]) for start, stop in pairwise(begins)]


def _encoded(renderer: Renderer, part: Sequence[Span]) -> list[tuple[list[int], int]]:
    """(tokens, turn) of each span of one part."""
    whole = renderer.encode("".join(span.text for span in part))
    encoded = [renderer.encode(span.text) for span in part]
    if [token for tokens in encoded for token in tokens] != whole:
        # a tokenizer may treat the beginning of any text in its own way: ask for the spans as they stand in the whole
        encoded = _encode_in_place(renderer, part, whole)
    return [(tokens, span.turn) for tokens, span in zip(encoded, part, strict=True)]


def _within(renderer: Renderer, every: Iterator[Span], max_tokens: int) -> list[Span]:
    """The spans up to the last turn that ends within about ``max_tokens`` of its part, and no more encoded than tells
    it.

    ValueError where the first answer does not begin within them, or is more than twice as long.
    """
    kept: list[Span] = []
    context: list[Span] = []
    total = 0
    for span in every:
        total = 0 if span.begins else total
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


def _encode_in_place(renderer: Renderer, part: Sequence[Span], whole: list[int]) -> list[list[int]]:
    """Tokens of each span as the growing prefixes of the whole show them; ValueError where a token crosses a bound."""
    encoded: list[list[int]] = []
    prefix, done = "", 0
    for text, _, index, _ in part:
        prefix += text
        tokens = renderer.encode(prefix)
        if whole[: len(tokens)] != tokens:
            crossing = renderer.tokenizer.convert_ids_to_tokens(whole[first_difference(whole, tokens)])
            raise ValueError(f"message {index}: a token must not cross the bound of a turn, got {crossing!r} across it")
        encoded.append(tokens[done:])
        done = len(tokens)
    return encoded

"""Where an answer begins in a chat template's text: behind the generation prompt and what the template adds to it."""

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

from ppg_fast.dialogues.conversation import ANSWER, ASK, STAND_IN, Tools
from ppg_fast.dialogues.message import REASONING, Message
from ppg_fast.dialogues.renderer import Renderer, shared_start

THOUGHT = Message("assistant", "a", dict.fromkeys(REASONING, STAND_IN))


class Begun(NamedTuple):
    """``context``: what the model sees before an answer. ``start``: where in the template's text that begins."""

    context: str
    start: int


class Beginnings:
    """Beginnings of answers in the template of ``renderer``."""

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer

    def of(self, messages: Sequence[Message], tools: Tools, prompt: str, whole: str) -> Begun:
        """The beginning of the answer that ``whole``, the text of ``messages``, ends with; ``prompt``: the text of
        those before it with the generation prompt.

        It stands behind the prompt, or as much of it as the template writes before the answer, and behind what is not
        the model's choice: the role's header once more, an empty block of thoughts. A plain answer keeps to the whole
        prompt; thoughts stand in the block that they open themselves.
        """
        own = self._own(messages, tools, whole)
        message, history, start = messages[-1], prompt, len(prompt)
        place = start - len(self.renderer.header) * prompt.endswith(self.renderer.header)
        if not whole.startswith(prompt):
            opened = self._opened(messages, tools, prompt)
            place, size = self._find(opened, messages, whole[:own])
            if not size:
                header = self.renderer.header if whole[:own].endswith(self.renderer.header) else ""
                return Begun(prompt + header, own)
            start = place + size
            kept = opened[:size] if message.reasoning else opened
            history = prompt[: len(prompt) - len(opened)] + kept
        behind = self._behind_its_own(message, whole, place, start, own)
        return Begun(history + whole[start:behind], behind)

    def _behind_its_own(self, message: Message, whole: str, place: int, start: int, own: int) -> int:
        """Behind the header once more, and behind an empty block of thoughts that begins from ``place`` on."""
        if self.renderer.header and whole.startswith(self.renderer.header, start):
            start += len(self.renderer.header)
        for pattern, space in [] if message.reasoning else self._empty_thoughts:
            for empty in pattern.finditer(whole, place):
                if empty.start() <= start < empty.end():
                    behind = own if message.content else empty.start(1) + space
                    return min(max(behind, empty.start(1)), empty.end())
        return start

    def _own(self, messages: Sequence[Message], tools: Tools, whole: str) -> int:
        """Where the first text of the answer itself stands: thoughts, content, name of a call."""
        message = messages[-1]
        if message.reasoning:
            other = replace(message, more={**message.more, **dict.fromkeys(REASONING, STAND_IN)})
        elif message.tool_calls and not message.content:
            first, *rest = message.tool_calls
            named = {**first, "function": {**first["function"], "name": STAND_IN}}
            other = replace(message, more={**message.more, "tool_calls": [named, *rest]})
        else:
            other = replace(message, content=STAND_IN)
        try:
            text = self.renderer.text([*messages[:-1], other], tools=tools)
        except ValueError:
            return len(whole)
        return len(shared_start(text[: text.rfind(STAND_IN)], whole)) if STAND_IN in text else len(whole)

    def _opened(self, messages: Sequence[Message], tools: Tools, prompt: str) -> str:
        """The generation prompt, of ``prompt``; where the template has none, what it ends with from its last added
        token on."""
        if len(messages) == 1:
            return self.renderer.header
        try:
            before = self.renderer.text(messages[:-1], tools=tools)
        except ValueError:
            return self.renderer.header if prompt.endswith(self.renderer.header) else ""
        tokens = [token.start() for token in self.renderer.token_pattern.finditer(prompt)]
        return prompt[self.renderer.common(prompt, before) :] or prompt[max(tokens, default=len(prompt)) :]

    def _find(self, opened: str, messages: Sequence[Message], text: str) -> tuple[int, int]:
        """Where ``opened``, or its longest beginning of whole tokens, stands last in ``text``, and the length of that;
        0 where none does, or the template joins the answer to the message before it."""
        inside = {n for token in self.renderer.token_pattern.finditer(opened) for n in range(*token.span())}
        inside -= {token.start() for token in self.renderer.token_pattern.finditer(opened)}
        before = next((m.content.strip() for m in reversed(messages[:-1]) if m.content.strip()), "")
        for size in range(len(opened), 0, -1):
            place = -1 if size in inside else text.rfind(opened[:size])
            if place >= 0:
                joined = bool(before) and before in text[place + size :]
                return place, 0 if joined else size
        return 0, 0

    @cached_property
    def _empty_thoughts(self) -> list[tuple[re.Pattern[str], int]]:
        """Patterns of a block of thoughts that holds none, and how much space the template puts behind it."""
        tags = [("<think>", "</think>")]
        try:
            before, _, after = self.renderer.text([ASK, THOUGHT]).partition(STAND_IN)
            plain = self.renderer.text([ASK, ANSWER])
            asked = self.renderer.text([ASK], answer_next=True)
        except ValueError:
            before = after = plain = asked = ""
        opening, closing = before[self.renderer.common(before, asked) :].strip(), after.partition("a")[0].strip()
        tags += [(opening, closing)] * bool(opening and closing and (opening, closing) not in tags)
        patterns = [re.compile(rf"\s*{re.escape(one)}\s*{re.escape(other)}(\s*)") for one, other in tags]
        return [(p, len(found[1]) if (found := p.search(plain)) else 0) for p in patterns]

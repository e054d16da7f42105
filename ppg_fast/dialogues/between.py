"""What a chat template writes between two answers, as tokens: found behind a stand-in answer, not the sampled one."""

import json
import re
from collections.abc import Sequence
from typing import Any

from ppg_fast.dialogues.answer_form import AnswerForm
from ppg_fast.dialogues.conversation import ANSWER, ASK, STAND_IN, Tools, function_of
from ppg_fast.dialogues.message import Message
from ppg_fast.dialogues.renderer import Renderer
from ppg_fast.dialogues.written import require_written
from ppg_fast.spec import require

KEPT = 1024  # replies whose tokens are kept: more than a step has
IN_MESSAGE = re.compile(r"message (-?\d+): (.*)", re.DOTALL)


class Unnamed(ValueError):
    """A tool's result without the name that the template writes with it."""


class Replies:
    """Replies in the template of ``renderer`` whose answers have ``form``; ``ends`` matches the tokens that end one.

    Each is rendered once: a group of rollouts shares its questions.
    """

    def __init__(self, renderer: Renderer, form: AnswerForm, ends: re.Pattern[str]) -> None:
        self.renderer, self.form, self.ends = renderer, form, ends
        self._known: dict[tuple[tuple[Message, ...], str], list[int]] = {}

    def tokens(self, messages: Sequence[Message], tools: Tools) -> list[int]:
        """The tokens behind an answer's end, up to where the next answer begins."""
        key = tuple(messages), json.dumps(list(tools), sort_keys=True) if tools else ""
        if key not in self._known:
            require(bool(messages), "a reply must have a message", list(messages))
            if len(self._known) >= KEPT:  # partners and tools say ever new things
                self._known.clear()
            self._known[key] = self._written(messages, tools)
        return self._known[key]

    def _written(self, messages: Sequence[Message], tools: Tools) -> list[int]:
        self.renderer.check_tools(tools)
        for message in messages:
            self.renderer.check(message)
        if not self.renderer.by_role and messages[0].role == "tool":
            try:  # the results of calls follow calls; a template that knows none may take results all the same
                return self._after_the_calls(messages, tools)
            except Unnamed:
                raise
            except ValueError:
                pass
        try:
            text = self._text(ANSWER, messages, tools, STAND_IN)
        except ValueError as error:
            raise _in_reply(error, messages) from error
        return self._after_the_end(text)

    def _text(self, answer: Message, messages: Sequence[Message], tools: Tools, last: str) -> str:
        """What follows ``last``, of the stand-in answer, up to the next answer."""
        talk = [ASK, answer, *messages]
        text = self.renderer.text(talk, answer_next=True, tools=tools)
        require_written(self.renderer, talk, tools, after=last)
        return text.partition(last)[2]

    def _after_the_calls(self, messages: Sequence[Message], tools: Tools) -> list[int]:
        results = [message for message in messages if message.role == "tool"]
        calls = [_call(message, number, tools) for number, message in enumerate(results)]
        last = calls[-1]["function"]["arguments"]["x"]
        text = self._text(Message("assistant", "", {"tool_calls": calls}), messages, tools, last)
        names = self.renderer.tokenizer.convert_ids_to_tokens(self.renderer.encode(self.form.closed_before)[-1:])
        end = re.search("|".join([*filter(None, [self.ends.pattern]), *map(re.escape, names)]), text)
        if end is None:
            raise ValueError(
                f"the chat template must end an answer that calls a tool, got {text[:60]!r} after the call"
            )
        if STAND_IN in text[end.end() :]:
            raise Unnamed("the chat template writes the name of the tool with its result, so that must have a name")
        return self._behind(text, end.end())

    def _after_the_end(self, text: str) -> list[int]:
        closed = self.form.closed_before
        require(text.startswith(closed), "the chat template must close every answer alike", text[:60])
        return self._behind(text, len(closed))

    def _behind(self, text: str, end: int) -> list[int]:
        """The tokens of what follows an answer's end, as they stand behind it."""
        closed, whole = self.renderer.encode(text[:end]), self.renderer.encode(text)
        return whole[len(closed) :] if whole[: len(closed)] == closed else self.renderer.encode(text[end:])


def _call(result: Message, number: int, tools: Tools) -> dict[str, Any]:
    """The call that ``result`` would be the result of: of the tool that it names, or of the only one."""
    only = function_of(tools[0]).get("name") if len(tools) == 1 else None
    name, arguments = result.more.get("name") or only or f"{STAND_IN}f", {"x": f"{STAND_IN}{number}x"}
    given = result.more.get("tool_call_id", f"call0000{number}")
    return {"type": "function", "id": given, "function": {"name": name, "arguments": arguments}}


def _in_reply(error: ValueError, messages: Sequence[Message]) -> ValueError:
    """The error of a rendering with a stand-in question and answer before ``messages``, about these."""
    found = IN_MESSAGE.fullmatch(str(error))
    if not found:
        return error
    place = min(max(int(found[1]) - 2, 0), len(messages) - 1)
    which = f" (message {place} of {len(messages)})" if len(messages) > 1 else ""
    return ValueError(f"a message of the {messages[place].role} after an answer{which}: {found[2]}")

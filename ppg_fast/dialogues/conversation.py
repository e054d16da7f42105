"""Messages as one chat template or another wants to be given them: arguments, reasoning, ids and tools in its form."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ppg_fast.dialogues.message import REASONING, Message

STAND_IN = "Zq7standin"  # a content that no template writes by itself
ASK, ANSWER = Message("user", "a"), Message("assistant", STAND_IN)
CALL_ID = "call00001"  # nine letters and digits, as Mistral's templates want them
PROBE = {"type": "function", "id": CALL_ID, "function": {"name": f"{STAND_IN}f", "arguments": {"x": f"{STAND_IN}y"}}}

Tools = Sequence[Mapping[str, Any]]
Render = Callable[[list[dict[str, Any]]], str]


class Form(NamedTuple):
    """``object_arguments``: arguments of calls as an object, else as JSON text. ``empty``: the content of a message
    that only calls. ``reasoning``: the keys that reasoning is given under. ``parts``: content as a list of one part of
    text, as templates of models that see want it."""

    object_arguments: bool = True
    empty: str | None = ""
    reasoning: tuple[str, ...] = REASONING
    parts: bool = False

    def conversation(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """The messages in this form."""
        return [self._message(message) for message in messages]

    def _message(self, message: Message) -> dict[str, Any]:
        given = message.as_dict()
        if message.reasoning:
            given = {key: value for key, value in given.items() if key not in REASONING}
            given |= dict.fromkeys(self.reasoning, message.reasoning)
        if message.tool_calls:
            given["content"] = message.content or self.empty
            given["tool_calls"] = [self._call(call) for call in message.tool_calls]
        if self.parts and isinstance(given["content"], str):
            given["content"] = [{"type": "text", "text": given["content"]}]
        return given

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        function = dict(call["function"])
        given = function.get("arguments", {})
        function["arguments"] = as_object(given) if self.object_arguments else as_text(given)
        return {"type": "function", **call, "function": function}


def form_of(render: Render) -> Form:
    """The form in which the template behind ``render`` writes a call with its arguments, and reasoning once; the usual
    one where it writes none."""
    plain = [Form(), Form(parts=True)]
    plain_form = next((form for form in plain if _count(render, form.conversation([ASK, ANSWER]), STAND_IN)), Form())
    calls = [ASK, Message("assistant", "", {"tool_calls": [PROBE]})]
    forms = [plain_form._replace(object_arguments=o, empty=empty) for empty in ("", None) for o in (True, False)]
    form = next((form for form in forms if _writes_call(render, form.conversation(calls))), plain_form)
    thought = [ASK, replace(ANSWER, more={"reasoning_content": f"{STAND_IN}r"})]
    named = [form._replace(reasoning=names) for names in (REASONING, *((name,) for name in REASONING))]
    once = (one for one in named if _count(render, one.conversation(thought), f"{STAND_IN}r") == 1)
    return next(once, form)


def _writes_call(render: Render, conversation: list[dict[str, Any]]) -> bool:
    function = PROBE["function"]
    try:
        text = render(conversation)
    except Exception:  # in another form it may be written
        return False
    return all(part in text for part in (function["name"], function["arguments"]["x"])) and (
        repr(function["arguments"]) not in text  # an object that was written as text is one in Python's notation
    )


def _count(render: Render, conversation: list[dict[str, Any]], mark: str) -> int:
    try:
        return render(conversation).count(mark)
    except Exception:  # under another name it may be written
        return 0


def as_object(arguments: str | Mapping[str, Any]) -> Any:
    """Arguments of a call as an object; the text itself where it is none."""
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def as_text(arguments: str | Mapping[str, Any]) -> str:
    """Arguments of a call as JSON text."""
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def completed(conversation: list[dict[str, Any]], tools: Tools) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The same with everything that some templates demand: ids of nine letters and digits, names of tool results,
    descriptions and parameters of tools."""
    waiting: list[tuple[str, str]] = []  # id and function of calls without a result
    made: list[dict[str, Any]] = []
    for place, message in enumerate(conversation):
        message = dict(message)
        if message.get("tool_calls"):
            message["tool_calls"] = [
                {**call, "id": short_id(call.get("id") or f"{place} {number}")}
                for number, call in enumerate(message["tool_calls"])
            ]
            waiting = [(call["id"], call["function"]["name"]) for call in message["tool_calls"]]
        elif message["role"] == "tool":
            given = short_id(message["tool_call_id"]) if message.get("tool_call_id") else ""
            answered = next((one for one in waiting if one[0] == given or not given), None)
            if answered:
                waiting.remove(answered)
                message = {"name": answered[1], **message}
            message["tool_call_id"] = answered[0] if answered else given or short_id(str(place))
        made.append(message)
    return made, [_whole_tool(tool) for tool in tools]


def function_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a tool's schema that names and describes the function."""
    function = tool.get("function", tool)
    return function if isinstance(function, Mapping) else {}


def _whole_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(function_of(tool))
    if isinstance(function.get("parameters"), Mapping) and function["parameters"]:
        parameters = {"type": "object", "properties": {}, **function["parameters"]}
    else:
        parameters = {"type": "object", "properties": {}}
    function = {"description": "", **function, "parameters": parameters}
    return {"type": "function", **{k: v for k, v in tool.items() if "function" in tool}, "function": function}


def short_id(name: str) -> str:
    """``name`` where it has nine letters and digits, else nine that stand for it."""
    if len(name) == 9 and name.isascii() and name.isalnum():
        return name
    return hashlib.sha256(name.encode()).hexdigest()[:9]


def strings(value: Any) -> Iterator[str]:
    """Every text in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield str(key)
            yield from strings(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from strings(one)


def with_strings(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with every text in it changed, keys included."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(str(key)): with_strings(one, change) for key, one in value.items()}
    return [with_strings(one, change) for one in value] if isinstance(value, (list, tuple)) else value

"""One call: its arguments checked, its function run, and whatever comes of it as a text that the policy can read."""

import asyncio
import copy
import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ppg_fast.dialogues.conversation import function_of
from ppg_fast.rewards.python import is_users, said_by
from ppg_fast.rollouts.tools.answer_reader import properties_of
from ppg_fast.rollouts.tools.reading import types_of

ERROR = 300  # most characters of what went wrong
RESULT = 16_384  # most characters of a result; the rest is cut off, and says so
KINDS = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
}


class Outcome(NamedTuple):
    """``text``: what the policy reads. ``failed``: whether it is an error; ``raised``: what the function raised, with
    the user's line, for the user."""

    text: str
    failed: bool = False
    raised: str = ""


def outcome(
    call: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]], tools: Mapping[str, Mapping[str, Any]]
) -> Outcome:
    """What comes of a call of the OpenAI format, ``tools`` being the schemas of the functions that may be called. Never
    an exception but that of a signal."""
    name, arguments = call["function"]["name"], call["function"].get("arguments", {})
    if not isinstance(arguments, dict):
        got = repr(str(arguments)[:100])
        return an_error(f"the call cannot be read: name and arguments (a JSON object) are expected, got {got}")
    if name not in tools:
        return an_error(f"there is no function {name[:60]!r}, there is {', '.join(tools)}")
    try:
        inspect.signature(functions[name]).bind(**arguments)
    except (TypeError, ValueError) as error:
        return an_error(f"{name}: {error}")
    if wrong := wrong_type(arguments, function_of(tools[name])):
        return an_error(f"{name}: {wrong}")
    try:
        text = text_of(now(functions[name](**copy.deepcopy(arguments))))  # the message keeps its own
    except BaseException as error:  # whatever the user's function raises, SystemExit too
        if not is_users(error):
            raise
        return an_error(f"{name}: {_named(error)}")._replace(raised=said_by(error))
    return Outcome(text)


def an_error(said: str) -> Outcome:
    """What the policy reads of a call that went wrong."""
    return Outcome(json.dumps({"error": said[:ERROR]}, ensure_ascii=False).encode("utf-8", "replace").decode(), True)


def wrong_type(arguments: Mapping[str, Any], function: Mapping[str, Any]) -> str:
    """What is wrong with the first argument whose JSON type, or value among those listed, is another; "" where none
    is."""
    properties = properties_of(function)
    for name, value in arguments.items():
        schema = properties.get(name) or {}
        types, choices = types_of(schema), schema.get("enum")
        if types and not any(_is(value, kind) for kind in types):
            return f"{name} must be of type {' or '.join(types)}, got {json.dumps(value, ensure_ascii=False)[:60]}"
        if isinstance(choices, list) and value not in choices and value is not None:
            return f"{name} must be one of {json.dumps(choices, ensure_ascii=False)[:100]}, got {str(value)[:60]!r}"
    return ""


def text_of(value: Any) -> str:
    """A result as text: a text as it is, parts of text joined, lists and objects as JSON, anything else as it prints;
    at most `RESULT` characters. TypeError for parts that are no text."""
    if isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        if not all(part["type"] == "text" and isinstance(part.get("text"), str) for part in value):
            raise TypeError("a result must be text: of its parts one is not")
        value = "".join(part["text"] for part in value)
    if isinstance(value, dict | list | tuple):
        value = json.dumps(value, ensure_ascii=False, default=str)
    text = str(value).encode("utf-8", "replace").decode()
    if len(text) <= RESULT:
        return text
    return f"{text[:RESULT]} ... (cut off: {RESULT} of {len(text)} characters)"


def now(value: Any) -> Any:
    """What an async function gives, once it is done; of any other the value itself."""
    return asyncio.run(_awaited(value)) if inspect.isawaitable(value) else value


def plain_name(name: str) -> str:
    """A function's name as a tool message may carry it: the policy made it up, perhaps."""
    return re.sub(r"[^\w.-]", "", name)[:64] or "unknown"


def _is(value: Any, kind: str) -> bool:
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    if isinstance(value, bool) and kind in ("integer", "number"):
        return False
    return isinstance(value, KINDS.get(kind, (object,)))


def _named(error: BaseException) -> str:
    try:
        text = " ".join(str(error).split())
    except Exception:  # the exception's own __str__
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


async def _awaited(value: Any) -> Any:
    return await value

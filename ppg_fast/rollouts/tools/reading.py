"""What an answer says: its text, its thoughts, and the calls in it, each read or kept as the text that it is."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

DEEPEST = 32  # arguments within arguments; what is deeper is no call that a tool could be meant by
NAME = re.compile(r'"name"\s*:\s*"([^"\\]{1,64})"')
CONSTANTS = {"True": True, "False": False, "None": None}  # as Python writes them


class Call(NamedTuple):
    """``arguments``: an object, or as text what cannot be read as one. ``id``: where the answer names it."""

    name: str
    arguments: dict[str, Any] | str
    id: str = ""


class Reading(NamedTuple):
    """An answer in its parts."""

    content: str
    reasoning: str = ""
    calls: tuple[Call, ...] = ()


def json_value(text: str) -> Any:
    """The JSON value that ``text`` is, as a message can hold it. ValueError for any other text: NaN and infinite
    numbers, halves of surrogate pairs, what is nested too deep."""
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_finite)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if _depth(value) > DEEPEST:
        raise ValueError("nested too deep")
    return value


def json_calls(text: str) -> list[Call]:
    """The calls that a JSON object, or a list of them, describes: name, and arguments (or parameters) as an object or
    as its text. What is none is one call with the text as its arguments."""
    try:
        value = json_value(text.strip())
    except ValueError:
        return [unread(text)]
    calls = [json_call(item) for item in (value if isinstance(value, list) else [value])]
    return [call for call in calls if call] if calls and all(calls) else [unread(text)]


def json_call(value: Any) -> Call | None:
    """The call that one JSON value describes; None where it describes none."""
    if isinstance(value, dict) and isinstance(value.get("function"), dict):
        value = value["function"] | ({"id": value["id"]} if "id" in value else {})
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    given = value.get("arguments", value.get("parameters", {}))
    if isinstance(given, str):
        given = _object(given)
    named = value.get("id")
    if given is None or not isinstance(given, dict | str):
        return None
    return Call(value["name"], given, named if isinstance(named, str) else "")


def unread(text: str, name: str = "") -> Call:
    """A call that cannot be read: its text, under the name that it seems to have."""
    found = NAME.search(text)
    return Call(name or (found[1] if found else ""), text.strip())


def named_call(name: str, text: str) -> Call:
    """A call whose arguments are the JSON object ``text``, or cannot be read."""
    return Call(name, _object(text))


def value_of(text: str, schema: Mapping[str, Any] | None) -> Any:
    """The value that a format without types writes as ``text``: a text where the schema says string, else JSON where it
    is JSON."""
    types = types_of(schema or {})
    if types == ("string",):
        return text
    try:
        return CONSTANTS[text.strip()] if text.strip() in CONSTANTS else json_value(text)
    except ValueError:
        return text


def types_of(schema: Mapping[str, Any]) -> tuple[str, ...]:
    """The JSON types that a parameter's schema allows; () where it says none."""
    said = schema.get("type", ())
    types = [one for one in (said if isinstance(said, list | tuple) else [said]) if isinstance(one, str)]
    unions = [choices for name in ("anyOf", "oneOf") if isinstance(choices := schema.get(name), list)]
    for choice in (choice for choices in unions for choice in choices):
        found = types_of(choice) if isinstance(choice, Mapping) else ()
        if not found:
            return ()
        types += found
    return tuple(dict.fromkeys([*types, "null"] if types and schema.get("nullable") else types))


def _object(text: str) -> dict[str, Any] | str:
    try:
        value = json_value(text.strip()) if text.strip() else {}
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is no finite number")
    return number


def _depth(value: Any, so_far: int = 0) -> int:
    """How deep lists and objects are nested; no deeper than one more than what is allowed."""
    if so_far > DEEPEST or not isinstance(value, dict | list):
        return so_far
    return max((_depth(v, so_far + 1) for v in (value.values() if isinstance(value, dict) else value)), default=so_far)

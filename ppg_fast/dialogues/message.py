"""One message of a dialogue as the OpenAI format has it: role, text, and whatever else it carries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
REASONING = ("reasoning_content", "reasoning", "thinking")  # the names that templates have for it
CARRIED = ("tool_calls", "tool_call_id", "name", *REASONING)  # what chat templates write beside role and content
SHOWN = 60  # characters of the input in a message
WEIGHTS = ("weight", "loss_weight", "train", "loss")  # say whether an answer is trained
# what no chat template of text writes, and what a tokenizer's tokens could not carry
UNWRITTEN = ("function_call", "refusal", "audio", "images", "tools")
SAID_AS = {  # names that others have for the roles
    **dict.fromkeys(("developer",), "system"),
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "model"), "assistant"),
    **dict.fromkeys(("function", "function_response", "observation", "ipython"), "tool"),
}


@dataclass(frozen=True)
class Message:
    """One message. ``role``: system, user, assistant or tool. ``content``: its text.

    ``more``: what else it carries, by the keys of the OpenAI format (``tool_calls``, ``tool_call_id``, ``name``,
    ``reasoning_content`` or another of its names), for the chat template. ``trained``: whether an answer is trained.
    ``source``: the object that it was read from, further keys and all, for `as_line`.
    """

    role: str
    content: str
    more: Mapping[str, Any] = field(default_factory=dict)
    trained: bool = True
    source: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, got {repr(self.role)[:60]}")
        if not isinstance(self.content, str):
            raise ValueError(f"content must be a string, got {brief(self.content)}")
        require_encodable("content", self.content)
        if self.more:
            require_encodable("the message", json.dumps(self.more, ensure_ascii=False))

    def __hash__(self) -> int:
        return hash((self.role, self.content, json.dumps(self.more, sort_keys=True), self.trained))

    @property
    def tool_calls(self) -> Sequence[Mapping[str, Any]]:
        """The calls of an answer, each ``{"type": "function", "id": ..., "function": {"name": ..., "arguments":
        ...}}``."""
        return self.more.get("tool_calls") or ()

    @property
    def reasoning(self) -> str:
        """What was thought before an answer, by whatever name it came."""
        return next((self.more[name] for name in REASONING if self.more.get(name)), "")

    def as_dict(self) -> dict[str, Any]:
        """``{"role": ..., "content": ..., ...}``: the message as chat templates and endpoints have it."""
        return {"role": self.role, "content": self.content, **self.more}

    def as_json(self) -> dict[str, Any]:
        """The same as JSON lines have it: an answer that is not trained says so."""
        return self.as_dict() | ({} if self.trained else {"weight": 0})

    def as_line(self) -> dict[str, Any]:
        """The same as it was read, where that still says it; else with the keys that say nothing of it."""
        if self.source and message_of(self.source, "message") == self:
            return dict(self.source)
        read = ("role", "content", *CARRIED, *WEIGHTS)
        return self.as_json() | {key: value for key, value in self.source.items() if key not in read}


def message_of(value: object, where: str) -> Message:
    """The message that one JSON value describes; ``where`` begins the ValueError for one that is none.

    A content of text parts is their text; null is none, where the message carries something else.
    """
    if not isinstance(value, dict) or "role" not in value or not ({"content", "tool_calls"} & value.keys()):
        raise ValueError(f"{where}: must be an object with role and content, got {brief(value)}")
    refuse_meaning(value, UNWRITTEN, where)
    more = {key: value[key] for key in CARRIED if value.get(key) not in (None, "", [], {})}
    try:
        _require_calls(more.get("tool_calls", []))
        for key in more.keys() - {"tool_calls"}:
            if not isinstance(more[key], str):
                raise ValueError(f"{key} must be a string, got {brief(more[key])}")
        return Message(role_of(value["role"]), _text(value.get("content"), more), more, _trained(value), value)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def role_of(name: Any) -> Any:
    """The role that is meant by ``name``; anything else as it is."""
    return SAID_AS.get(name, name) if isinstance(name, str) else name


def refuse_meaning(value: Mapping[str, Any], keys: Sequence[str], where: str) -> None:
    """ValueError for the first of ``keys`` that ``value`` says something with: dropped, it would change what is
    trained.

    A weight of 1 and a None, an empty list or text say nothing.
    """
    for key in keys:
        said = value.get(key)
        if said not in (None, True, "", [], {}):  # 1 and 1.0 are True
            rule = f"{key} would be lost (nothing here writes it): write it into the content, or remove the key"
            raise ValueError(f"{where}: {rule}; got {brief(said)}")


def _text(content: object, more: Mapping[str, Any]) -> Any:
    """The text of a message's content."""
    if content is None and more:
        return ""
    if not isinstance(content, list):
        return content
    for number, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(f"content must be text: its part {number} is {short(kind)}")
    return "".join(part if isinstance(part, str) else part["text"] for part in content)


def _trained(value: Mapping[str, Any]) -> bool:
    """What the keys say that say what to train; all of them must allow it."""
    for key in WEIGHTS:
        said = value.get(key)
        if said not in (None, 0, 1):
            raise ValueError(f"{key} must be 0 or 1 (an answer is trained or is not), got {brief(said)}")
    return all(value.get(key) in (None, 1) for key in WEIGHTS)


def _require_calls(calls: object) -> None:
    if not isinstance(calls, list):
        raise ValueError(f"tool_calls must be a list, got {brief(calls)}")
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"tool_calls[{number}] must have a function with a name, got {brief(call)}")
        if not isinstance(function.get("arguments", {}), (str, dict)):
            rule = f"the arguments of tool_calls[{number}] must be an object, or one as JSON text"
            raise ValueError(f"{rule}, got {brief(function['arguments'])}")


def require_encodable(name: str, text: str) -> None:
    """ValueError for half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has an unpaired surrogate at character {error.start}: {text[error.start]!r}"
        ) from None


def brief(value: object) -> str:
    """Type and beginning of a value, for a message."""
    return f"{type(value).__name__} {short(value)}"


def short(value: object) -> str:
    """The beginning of a value, for a message."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."

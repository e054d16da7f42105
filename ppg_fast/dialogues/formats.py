"""Dialogues of other formats, told by their content, as the objects of our JSONL. docs/data.md has a table of them."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ppg_fast.dialogues.files import RECIPES
from ppg_fast.dialogues.message import SAID_AS, brief, role_of, short

CHATS = ("conversations", "conversation", "dialogue", "dialog", "turns", "chat", "trajectory", "traj")
ROLE, CONTENT = ("role", "from"), ("content", "value", "text")
ASKED = ("prompt", "instruction", "question", "query", "input")
ANSWERED = ("completion", "response", "output", "answer")
CHOSEN = ("chosen", "rejected")
_HUMAN = re.compile(r"\n\n(Human|Assistant):")


class Found(NamedTuple):
    """What one object of a file is: the format's name, and an object of ours for each dialogue that it holds; of two,
    ``sides`` says which is which. ``opening``: messages of the prompt, where the format has one."""

    format: str
    records: list[dict[str, Any]]
    sides: Sequence[str] = ("",)
    opening: int | None = None


def translated(value: object, answered: bool = True) -> Found:
    """``value`` in our format: messages, ShareGPT and its kin, chosen and rejected, prompt and completion. Keys that
    are no part of the dialogue stay.

    ``answered``: whether a prompt without an answer is refused. ValueError says what is wrong, or which keys were
    found where they make no dialogue.
    """
    if isinstance(value, list) and value and all(isinstance(message, dict) for message in value):
        value = {"messages": value}
    if not isinstance(value, dict):
        raise ValueError(f"a dialogue must be a JSON object, got {brief(value)}")
    given = {key for key, inner in value.items() if inner is not None}
    if set(CHOSEN) <= given and "turn_rewards" not in given:
        return _both_sides(value)
    if "messages" in given:
        return Found("messages", [_plain(value)])
    chat = next((key for key in CHATS if _is_chat(value.get(key))), "")
    if chat:
        return Found(f"{chat} (ShareGPT)", [_one_chat(value, chat)])
    if given & set(ASKED):
        return _one_answer(value, answered)
    raise ValueError(_unknown(value))


def _unknown(value: Mapping[str, Any]) -> str:
    keys = ", ".join(short(key) for key in list(value)[:8])
    if {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys():
        return "is one message; the messages of a dialogue belong into one line, as a list under the key messages"
    said = f"with the keys {keys}" if keys else "without keys"
    return f"is an object {said}: no dialogue in a format known here (messages, ShareGPT, ...); {RECIPES}"


def _plain(value: dict[str, Any]) -> dict[str, Any]:
    """The object itself, with messages of from and value as role and content, and a system text among them."""
    messages = value["messages"]
    if not isinstance(messages, list):
        return value
    if any(isinstance(m, dict) and "from" in m for m in messages):
        messages = [_message(m) if isinstance(m, dict) else m for m in messages]
    first = messages[0].get("role") if messages and isinstance(messages[0], dict) else None
    if isinstance(value.get("system"), str) and value["system"] and first != "system":
        return {**_without(value, "system"), "messages": _with_system(messages, value)}
    return {**value, "messages": messages}


def _is_chat(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and any(key in m for key in ROLE) for m in value)
    )


def _one_chat(value: dict[str, Any], key: str) -> dict[str, Any]:
    """ShareGPT and LLaMA-Factory: the system text may stand beside the conversation."""
    messages = _with_system([_message(m) for m in value[key]], value)
    return {**_without(value, key, "system"), "messages": messages}


def _message(value: dict[str, Any]) -> dict[str, Any]:
    """One message of role or from, and content, value or text; a function_call is an answer that calls."""
    if "role" in value and "from" not in value and ("content" in value or "tool_calls" in value):
        return value
    role = next((value[key] for key in ROLE if key in value), None)
    key = next((key for key in CONTENT if key in value), "content")
    rest = _without(value, *ROLE, key)
    if role == "function_call":
        return {"role": "assistant", "content": None, "tool_calls": _calls(value.get(key)), **rest}
    known = role.strip().lower() if isinstance(role, str) else role
    role = known if known in SAID_AS or known in SAID_AS.values() else role
    return {"role": role_of(role), "content": value.get(key), **rest}


def _calls(text: object) -> list[dict[str, Any]]:
    """The calls that the text of a function_call names, as JSON."""
    try:
        called = json.loads(text) if isinstance(text, str) else text
    except (ValueError, RecursionError):
        called = None
    called = called if isinstance(called, list) else [called]
    if not called or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in called):
        raise ValueError(f"a function_call must be JSON with name and arguments, got {brief(text)}")
    return [{"type": "function", "function": call} for call in called]


def _with_system(messages: list[dict[str, Any]], value: Mapping[str, Any]) -> list[dict[str, Any]]:
    system = value.get("system")
    if system in (None, ""):
        return messages
    if not isinstance(system, str):
        raise ValueError(f"system must be a text, got {brief(system)}")
    if messages and messages[0].get("role") == "system":
        raise ValueError("must have one system message, got the key system and one among the messages")
    return [{"role": "system", "content": system}, *messages]


def _one_answer(value: dict[str, Any], answered: bool) -> Found:
    """Prompt and completion, each text or messages; Alpaca's instruction with its input and history."""
    asked, key = _asked(value)
    said = next((key for key in ANSWERED if value.get(key) is not None), "")
    if not said and answered:
        rule = f"holds {key!r} without an answer ({', '.join(ANSWERED)}): nothing to train on"
        raise ValueError(f"{rule}; it is one for --prompts")
    opening = _with_system([*_history(value), *_opening(value, asked)], value)
    answer = _turn(value[said], "assistant", said) if said else []
    record = {**_without(value, *asked, said, "system", "history"), "messages": [*opening, *answer]}
    return Found("prompt and completion", [record], opening=len(opening))


def _asked(value: Mapping[str, Any]) -> tuple[list[str], str]:
    """The keys of what is asked, and their first."""
    key = next(key for key in ASKED if value.get(key) is not None)
    more = key == "instruction" and isinstance(value.get("input"), str)
    return [key, "input"] if more else [key], key


def _opening(value: Mapping[str, Any], keys: Sequence[str]) -> list[dict[str, Any]]:
    if len(keys) == 1:
        return _turn(value[keys[0]], "user", keys[0])
    return [{"role": "user", "content": "\n\n".join(value[key] for key in keys if value[key])}]


def _history(value: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Earlier question and answer pairs, as Alpaca's history has them."""
    pairs = value.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(p, list) and len(p) == 2 for p in pairs):
        raise ValueError(f"history must be a list of pairs of question and answer, got {brief(pairs)}")
    return [{"role": role, "content": text} for p in pairs for role, text in zip(("user", "assistant"), p, strict=True)]


def _turn(value: object, role: str, key: str) -> list[dict[str, Any]]:
    """One side's text as a message, or its messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not _is_chat(messages):
        raise ValueError(f"{key} must be a text or a list of messages, got {brief(value)}")
    return [_message(message) for message in messages]


def _both_sides(value: dict[str, Any]) -> Found:
    """The chosen dialogue with reward 1 and the rejected one with reward 0 on the last turn, of one group."""
    whole = {_is_whole(value[side]) for side in CHOSEN}
    if len(whole) == 2:
        raise ValueError("chosen and rejected must both be whole dialogues, or both be answers to a prompt")
    chat = next((key for key in ("messages", *CHATS) if _is_chat(value.get(key))), "")
    asked = _asked(value)[0] if any(value.get(key) is not None for key in ASKED) else []
    if True in whole:
        before = []
    elif chat:
        before = [_message(message) for message in value[chat]]
    elif asked:
        before = [*_history(value), *_opening(value, asked)]
    else:
        rule = "chosen and rejected without a prompt must be whole dialogues: lists of messages that a user begins"
        raise ValueError(f"{rule}, got {brief(value['chosen'])}")
    rest = _without(value, *CHOSEN, chat, *asked, "system", "history")
    sides = {side: _with_system([*before, *_side(value[side], side)], value) for side in CHOSEN}
    records = [{**rest, **_last_rewarded(messages, side)} for side, messages in sides.items()]
    prompt = _with_system(before, value) if before else sides["chosen"][:-1]
    return Found("chosen and rejected", records, CHOSEN, len(prompt))


def _last_rewarded(messages: list[dict[str, Any]], side: str) -> dict[str, Any]:
    last = messages[-1].get("role")
    if last != "assistant":
        raise ValueError(f"{side} must end with an answer of the assistant, got {short(last)}")
    turns = sum(message.get("role") == "assistant" for message in messages)
    return {"messages": messages, "turn_rewards": [*[None] * (turns - 1), float(side == "chosen")]}


def _is_whole(value: object) -> bool:
    """Whether one side holds the prompt too."""
    if isinstance(value, str):
        return value.startswith("\n\nHuman:")
    return isinstance(value, list) and _is_chat(value) and _message(value[0])["role"] != "assistant"


def _side(value: object, side: str) -> list[dict[str, Any]]:
    """The messages of one side; a text may hold a whole dialogue, as Anthropic's do."""
    if not isinstance(value, str) or not _is_whole(value):
        return _turn(value, "assistant", side)
    _, *parts = _HUMAN.split(value)
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[name], "content": text.strip()} for name, text in zip(parts[::2], parts[1::2], strict=True)]


def _without(value: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: inner for key, inner in value.items() if key not in keys}

"""Openings of dialogues to train on, from a JSONL. docs/data.md describes the format."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppg_fast.dialogues import consistent_llms
from ppg_fast.dialogues.dialogue import DIALOGUE_MEANING, Dialogue, read_dialogues, tools_of
from ppg_fast.dialogues.message import Message, message_of, refuse_meaning
from ppg_fast.dialogues.records import Problems, json_lines

KNOWN = ("id", "messages", "partner", "turn_rewards", "tools")


@dataclass(frozen=True)
class Prompt:
    """The beginning of a dialogue, up to the message that the assistant answers first.

    ``partner``: who the partner is, for a partner that is a model. ``logged``: what the partner said next, where the
    prompt is a logged dialogue. ``info``: what else its line holds, for reward functions. ``tools``: the JSON schemas
    of the functions that the assistant may call.
    """

    id: str
    messages: tuple[Message, ...]
    partner: str = ""
    logged: tuple[Message, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()


def read_prompts(path: str | os.PathLike[str], strict: bool = False) -> list[Prompt]:
    """Read a prompts file, our dialogues or a Consistent-LLMs file; of a dialogue the opening before the first answer
    is taken.

    What cannot be read is a warning that names file, line and prompt, and the rest is kept; with ``strict`` it is a
    ValueError. Always a ValueError: a file without any prompt.
    """
    raw = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    problems = Problems(str(path), strict)
    if not raw.strip():
        raise ValueError(f"{path} is empty")
    if raw.lstrip()[:1] == b"[" or _is_family(raw):
        return [prompt_of(d) for d in read_dialogues(path, strict)]
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for number, where, value in json_lines(raw, problems):
        try:
            prompt = _prompt(value, f"line {number}")
            if prompt.id in seen:
                raise ValueError(f"prompt id {prompt.id!r} was used before")
        except ValueError as error:
            problems.add(f"{where}: {error}")
            continue
        seen.add(prompt.id)
        prompts.append(prompt)
    problems.close(len(prompts))
    return prompts


def prompt_of(dialogue: Dialogue) -> Prompt:
    """The beginning of a logged dialogue; no messages where its first one is the assistant's, which opens it then."""
    return _split(dialogue.id, dialogue.messages, "", {"group_id": dialogue.group_id}, dialogue.tools)


def _is_family(raw: bytes) -> bool:
    """Whether the first line is a dialogue of the Consistent-LLMs family."""
    try:
        return consistent_llms.is_family_record(json.loads(raw.lstrip().split(b"\n", 1)[0]))
    except (ValueError, RecursionError):
        return False


def _prompt(record: object, unnamed: str) -> Prompt:
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise ValueError(f"a prompt must be a JSON object with a list of messages, got {str(record)[:60]}")
    name, partner = record.get("id", unnamed), record.get("partner", "")
    if not isinstance(name, str) or not name or not isinstance(partner, str):
        raise ValueError(f"id must be a non-empty string and partner a string, got {name!r} and {partner!r}")
    refuse_meaning(record, DIALOGUE_MEANING, f"prompt {name!r}")
    messages = [
        message_of(message, f"prompt {name!r}, message {index}") for index, message in enumerate(record["messages"])
    ]
    last = messages[-1].role if messages else "nothing"
    if last not in ("user", "tool") and not any(message.role == "assistant" for message in messages):
        raise ValueError(f"prompt {name!r} must end with a message of the user or a tool, got {last}")
    info = {key: value for key, value in record.items() if key not in KNOWN}
    return _split(name, messages, partner, info, tools_of(record.get("tools"), f"prompt {name!r}"))


def _split(
    name: str,
    messages: Sequence[Message],
    partner: str,
    info: Mapping[str, Any],
    tools: tuple[Mapping[str, Any], ...],
) -> Prompt:
    """The opening, and what others than the assistant say after it."""
    first = next((i for i, m in enumerate(messages) if m.role == "assistant"), len(messages))
    logged = tuple(m for m in messages[first:] if m.role != "assistant")
    return Prompt(name, tuple(messages[:first]), partner, logged, info, tools)

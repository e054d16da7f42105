"""Openings of dialogues to train on, from any file of dialogues or prompts. docs/data.md describes the format."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ppg_fast.dialogues import consistent_llms, formats
from ppg_fast.dialogues.dialogue import judged_dialogues, made_id
from ppg_fast.dialogues.logged import DIALOGUE_MEANING, Dialogue, plain_name, require_name, tools_of
from ppg_fast.dialogues.message import Message, brief, message_of, refuse_meaning
from ppg_fast.dialogues.records import Problems, Record, read_records

KNOWN = ("id", "messages", "partner", "turn_rewards", "tools")
Turn = Message | Sequence[Message]  # what is heard at once, before an answer


@dataclass(frozen=True)
class Prompt:
    """The beginning of a dialogue, up to the message that the assistant answers first.

    ``partner``: who the partner is, for a partner that is a model. ``logged``: where the prompt is a logged dialogue,
    what was said after each answer and before the next, one entry an answer, of one message or more (given as a
    `Message` or several). ``info``: what else its line holds, for reward functions. ``tools``: the JSON schemas of the
    functions that the assistant may call. ``where``: file and line that it was read from.
    """

    id: str
    messages: tuple[Message, ...]
    partner: str = ""
    logged: tuple[tuple[Message, ...], ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
    tools: tuple[Mapping[str, Any], ...] = ()
    where: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        turns: Sequence[Turn] = self.logged
        logged = tuple((turn,) if isinstance(turn, Message) else tuple(turn) for turn in turns)
        object.__setattr__(self, "logged", logged)

    def replies(self) -> list[Turn]:
        """What was logged after each answer: a message by itself, or several."""
        return [turn[0] if len(turn) == 1 else turn for turn in self.logged]


def read_prompts(path: str | os.PathLike[str], strict: bool = False) -> list[Prompt]:
    """Read a prompts file, or a file of dialogues in any format of `read_dialogues`; of a dialogue the opening before
    the first answer is taken. Rewards are not looked at.

    What cannot be read is a warning that names file, line and prompt, and the rest is kept; with ``strict`` it is a
    ValueError. Always a ValueError: a file without any prompt.
    """
    problems = Problems(str(path), strict)
    prompts: list[Prompt] = []
    seen: set[str] = set()
    for where, value, unnamed, opening in _openings(Path(path), problems):
        try:
            prompt = _prompt(value, unnamed, opening)
            if prompt.id in seen:
                raise ValueError(f"prompt id {prompt.id!r} was used before")
        except ValueError as error:
            problems.add(f"{where}: {error}")
            continue
        seen.add(prompt.id)
        prompts.append(replace(prompt, where=where))
    problems.close(len(prompts))
    return prompts


def prompt_of(dialogue: Dialogue) -> Prompt:
    """The beginning of a logged dialogue; no messages where its first one is the assistant's, which opens it then."""
    info = {**dialogue.more, "group_id": dialogue.group_id}
    return _split(dialogue.id, dialogue.messages, "", info, dialogue.tools)


def _openings(path: Path, problems: Problems) -> Iterator[tuple[str, object, str, int | None]]:
    """Where each prompt of the file stands, an object of ours for it, what it is called where it has no id, and the
    messages of its opening where its format says."""
    records = read_records(path, problems)
    judged = judged_dialogues(records, problems)
    for record in records:
        if record.number in judged:
            name = made_id(path, record.number)
            value = consistent_llms.to_record(judged[record.number], None, name)
            yield record.where, value, name, None
        elif not consistent_llms.is_family_record(record.value):
            yield from _translated(record, problems)


def _translated(record: Record, problems: Problems) -> Iterator[tuple[str, object, str, int | None]]:
    """The one prompt of an object of another format; its answers are there for reward functions."""
    try:
        found = formats.translated(record.value, answered=False)
    except ValueError as error:
        problems.add(f"{record.where}: {error}")
        return
    given = record.value if isinstance(record.value, dict) else {}
    told = {key: given[key] for key in (*formats.ANSWERED, *formats.CHOSEN) if key in given}
    yield record.where, {**told, **found.records[0]}, f"{record.unit} {record.number}", found.opening


def _prompt(record: object, unnamed: str, opening: int | None) -> Prompt:
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise ValueError(f"a prompt must be a JSON object with a list of messages, got {brief(record)}")
    given, partner = plain_name(record.get("id")), record.get("partner", "")
    name = unnamed if given is None else given
    require_name("id", name)
    if not isinstance(partner, str):
        raise ValueError(f"prompt {name!r}: partner must be a string, got {brief(partner)}")
    refuse_meaning(record, DIALOGUE_MEANING, f"prompt {name!r}")
    messages = [
        message_of(message, f"prompt {name!r}, message {index}") for index, message in enumerate(record["messages"])
    ]
    asked = messages[:opening]
    last = asked[-1].role if asked else "nothing"
    if last not in ("user", "tool") and (opening is not None or not any(m.role == "assistant" for m in asked)):
        raise ValueError(f"prompt {name!r} must end with a message of the user or a tool, got {last}")
    info = {key: value for key, value in record.items() if key not in KNOWN}
    return _split(name, messages, partner, info, tools_of(record.get("tools"), f"prompt {name!r}"), opening)


def _split(
    name: str,
    messages: Sequence[Message],
    partner: str,
    info: Mapping[str, Any],
    tools: tuple[Mapping[str, Any], ...],
    asked: int | None = None,
) -> Prompt:
    """The opening, of ``asked`` messages or up to the first answer, and what others than the assistant say after each
    answer; answers in a row are one."""
    turns: list[list[Message]] = [list(messages[:asked])] if asked else [[]]
    for message in messages[asked or 0 :]:
        if message.role != "assistant":
            turns[-1].append(message)
        elif turns[-1] or len(turns) == 1:
            turns.append([])
    opening, *logged = turns
    return Prompt(name, tuple(opening), partner, tuple(tuple(turn) for turn in logged if turn), info, tools)

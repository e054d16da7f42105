"""Logged dialogues with one reward per assistant message, from and to disk. docs/data.md describes the formats."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppg_fast.dialogues import consistent_llms
from ppg_fast.dialogues.message import Message, brief, message_of, refuse_meaning, require_encodable
from ppg_fast.dialogues.records import Problems, Record, json_records
from ppg_fast.rules import FLOAT32_MAX
from ppg_fast.writing import opened

KEYS = ("id", "group_id", "messages", "turn_rewards")
DIALOGUE_MEANING = ("functions", "documents", "chat_template_kwargs", "weight", "loss_weight", "train")


@dataclass(frozen=True)
class Dialogue:
    """A dialogue and its rewards; dialogues of one prompt share ``group_id``.

    ``turn_rewards``: one finite number per assistant message, None where it was not scored. ``tools``: the JSON schemas
    of the functions that the assistant may call, for the chat template. ValueError names dialogue, turn and value.
    """

    id: str
    group_id: str
    messages: tuple[Message, ...]
    turn_rewards: tuple[float | None, ...]
    tools: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        for name, value in (("id", self.id), ("group_id", self.group_id)):
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name} must be a non-empty string, got {value!r}")
            require_encodable(name, value)
        rewards = tuple(
            _reward(value, f"dialogue {self.id!r}, turn {turn}") for turn, value in enumerate(self.turn_rewards)
        )
        object.__setattr__(self, "messages", tuple(self.messages))
        object.__setattr__(self, "turn_rewards", rewards)
        turns = sum(message.role == "assistant" for message in self.messages)
        if turns == 0:
            raise ValueError(f"dialogue {self.id!r} has no assistant message among its {len(self.messages)} messages")
        if turns != len(rewards):
            raise ValueError(f"dialogue {self.id!r} has {turns} assistant messages but {len(rewards)} turn_rewards")

    @property
    def unscored(self) -> int:
        """Number of turns without a reward; they count as reward 0."""
        return self.turn_rewards.count(None)


def read_dialogues(path: str | os.PathLike[str], strict: bool = False) -> list[Dialogue]:
    """Read our JSONL, one dialogue a line, or a Consistent-LLMs file; which of the two is found from the content.

    What cannot be read is a warning that names file, line, dialogue and value, and the rest is kept; with ``strict`` it
    is a ValueError. Always a ValueError: a file without any valid dialogue, and a Consistent-LLMs file whose YES/NO
    cannot be calibrated. Turns without a reward are counted in one warning.
    """
    problems = Problems(str(path), strict)
    raw = Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not raw.strip():
        raise ValueError(f"{path} is empty")
    records = list(json_records(raw, problems))
    dialogues: list[Dialogue] = []
    seen: dict[str, str] = {}
    for _, where, value in _translated(records, Path(path), problems):
        try:
            dialogue = _dialogue(value)
            if dialogue.id in seen:
                raise ValueError(f"dialogue id {dialogue.id!r} was used before, in {seen[dialogue.id]}")
        except ValueError as error:
            problems.add(f"{where}: {error}")
            continue
        seen[dialogue.id] = where
        dialogues.append(dialogue)
    problems.close(len(dialogues))
    _warn_of_unscored(path, dialogues)
    return dialogues


def write_dialogues(path: str | os.PathLike[str], dialogues: Iterable[Dialogue]) -> None:
    """Write one JSON line per dialogue; `read_dialogues` gives back equal dialogues. The file appears whole or not at
    all; one that is there keeps its permissions, a link leads where it led, a device or pipe is written through.

    ValueError if there is no dialogue or an id stands twice.
    """
    seen: set[str] = set()
    with opened(Path(path)) as file:
        for dialogue in dialogues:
            if dialogue.id in seen:
                raise ValueError(f"dialogue id {dialogue.id!r} stands twice")
            seen.add(dialogue.id)
            file.write(json.dumps(as_json(dialogue), ensure_ascii=False, allow_nan=False) + "\n")
        if not seen:
            raise ValueError(f"no dialogues to write to {path}")


def as_json(dialogue: Dialogue) -> dict[str, Any]:
    """The dialogue as one line of our JSONL has it."""
    messages = [message.as_json() for message in dialogue.messages]
    values = (dialogue.id, dialogue.group_id, messages, dialogue.turn_rewards)
    return dict(zip(KEYS, values, strict=True)) | ({"tools": list(dialogue.tools)} if dialogue.tools else {})


def convert_to_jsonl(source: str | os.PathLike[str], target: str | os.PathLike[str], strict: bool = False) -> int:
    """Read any file that `read_dialogues` reads and write it as our JSONL; return the number of dialogues."""
    dialogues = read_dialogues(source, strict)
    write_dialogues(target, dialogues)
    return len(dialogues)


def _translated(records: list[Record], path: Path, problems: Problems) -> Iterator[Record]:
    """The records, those of the Consistent-LLMs family translated to ours with the file's own polarity."""
    judged: dict[int, consistent_llms.JudgedDialogue] = {}
    for record in records:
        if consistent_llms.is_family_record(record.value):
            try:
                judged[record.number] = consistent_llms.parse_record(record.value, record.where)
            except ValueError as error:
                problems.add(str(error))
    consistent = consistent_llms.calibrate(judged.values())
    for record in records:
        if record.number in judged:
            yield record._replace(
                value=consistent_llms.to_record(judged[record.number], consistent, f"{path.stem}/{record.number}")
            )
        elif not consistent_llms.is_family_record(record.value):
            yield record


def _dialogue(record: object) -> Dialogue:
    """The dialogue that one JSON object describes; further keys are ignored. ValueError says what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError(f"a dialogue must be a JSON object, got {brief(record)}")
    name = f"dialogue {record['id']!r}" if "id" in record else "a dialogue"
    missing = [key for key in KEYS if key not in record]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}")
    for key in ("messages", "turn_rewards"):
        if not isinstance(record[key], list):
            raise ValueError(f"{name}: {key} must be a list, got {brief(record[key])}")
    refuse_meaning(record, DIALOGUE_MEANING, name)
    messages = tuple(
        message_of(message, f"{name}, message {index}") for index, message in enumerate(record["messages"])
    )
    tools = tools_of(record.get("tools"), name)
    return Dialogue(record["id"], record["group_id"], messages, tuple(record["turn_rewards"]), tools)


def tools_of(value: object, where: str) -> tuple[Mapping[str, Any], ...]:
    """The tools that one JSON value lists, each an object; ``where`` begins the ValueError for one that is none."""
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f"{where}: tools must be a list of JSON schemas of functions, got {brief(value)}")
    return tuple(value)


def _reward(value: object, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where}: a reward must be a number or null, got {brief(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= FLOAT32_MAX:  # in which rewards train
        raise ValueError(f"{where}: a reward must be finite in float32, got {number}")
    return number


def _warn_of_unscored(path: str | os.PathLike[str], dialogues: list[Dialogue]) -> None:
    unscored, turns = sum(d.unscored for d in dialogues), sum(len(d.turn_rewards) for d in dialogues)
    if unscored:
        warnings.warn(f"{path}: {unscored} of {turns} assistant messages have no reward; they count as 0", stacklevel=3)

"""Files of logged dialogues, read and written. docs/data.md describes the formats."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ppg_fast.dialogues import consistent_llms, formats
from ppg_fast.dialogues.logged import KEYS, Dialogue, dialogue_of, plain_name
from ppg_fast.dialogues.message import Message
from ppg_fast.dialogues.records import Problems, Record, read_records
from ppg_fast.writing import opened

__all__ = [
    "Dialogue",
    "Message",
    "Reading",
    "as_json",
    "as_line",
    "as_text",
    "convert_to_jsonl",
    "read_dialogues",
    "read_file",
    "write_dialogues",
]


def read_dialogues(path: str | os.PathLike[str], strict: bool = False) -> list[Dialogue]:
    """Read our JSONL, a Consistent-LLMs file, or another format that docs/data.md lists; which is found from the
    content.

    Keys that a file lacks are made where they can be: id from its name and the line, group_id from the opening, rewards
    from one for the dialogue. What cannot be read is a warning that names file, line, dialogue and value, and the rest
    is kept; with ``strict`` it is a ValueError. Always a ValueError: a file without any valid dialogue, and a
    Consistent-LLMs file whose YES/NO cannot be calibrated. Turns without a reward are counted in one warning.
    """
    return read_file(path, strict).dialogues


READ_AS = "read as messages and rewards, or another question to the judge"


@dataclass
class Reading:
    """What a file gave: dialogues, how many of which format, what was left out, and how many keys had to be made."""

    dialogues: list[Dialogue] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    left_out: list[str] = field(default_factory=list)
    ids: int = 0  # made of file and line
    groups: int = 0  # of the opening
    whole: Counter[str] = field(default_factory=Counter)  # dialogues with one reward, by its key
    unscored: int = 0  # turns of the others that have none
    dropped: Sequence[str] = ()  # keys that no dialogue holds any more, and why


def read_file(path: str | os.PathLike[str], strict: bool = False, scored: bool = True) -> Reading:
    """`read_dialogues`, and how the file was understood; without ``scored`` the rewards in it are not looked at."""
    problems = Problems(str(path), strict)
    read = Reading(left_out=problems.messages)
    seen: dict[str, str] = {}
    for found in _found(Path(path), problems, scored):
        try:
            made = dialogue_of(found.value, scored)
            if made.dialogue.id in seen:
                raise ValueError(f"dialogue id {made.dialogue.id!r} was used before, in {seen[made.dialogue.id]}")
        except ValueError as error:
            problems.add(f"{found.where}: {error}")
            continue
        seen[made.dialogue.id] = found.where
        read.dialogues.append(replace(made.dialogue, where=found.where))
        read.formats[found.format] += 1
        read.ids += found.named
        read.groups += made.grouped
        read.whole.update([made.rewarded] if made.rewarded else [])
        read.unscored += 0 if made.rewarded else made.dialogue.unscored
    problems.close(len(read.dialogues))
    read.dropped = [f"{key} ({reason})" for key, reason in problems.dropped.items()]
    if scored:
        _warn_of_rewards(path, read)
    return read


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
            file.write(as_text(dialogue) + "\n")
        if not seen:
            raise ValueError(f"no dialogues to write to {path}")


def as_json(dialogue: Dialogue) -> dict[str, Any]:
    """What is trained on of the dialogue, as one line of our JSONL has it."""
    messages = [message.as_json() for message in dialogue.messages]
    values = (dialogue.id, dialogue.group_id, messages, dialogue.turn_rewards)
    return dict(zip(KEYS, values, strict=True)) | ({"tools": list(dialogue.tools)} if dialogue.tools else {})


def as_line(dialogue: Dialogue) -> dict[str, Any]:
    """The whole line: everything that the dialogue was read with."""
    return {**as_json(dialogue), "messages": [m.as_line() for m in dialogue.messages], **dialogue.more}


def as_text(dialogue: Dialogue) -> str:
    """`as_line` as JSON."""
    line = as_line(dialogue)
    text = json.dumps(line, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, in a key that is none of ours
        return json.dumps(line)
    return text


def convert_to_jsonl(source: str | os.PathLike[str], target: str | os.PathLike[str], strict: bool = False) -> int:
    """Read any file that `read_dialogues` reads and write it as our JSONL; return the number of dialogues."""
    dialogues = read_dialogues(source, strict)
    write_dialogues(target, dialogues)
    return len(dialogues)


@dataclass(frozen=True)
class _Found:
    """An object of ours for one dialogue of a file, whose id was ``named`` by us or not."""

    format: str
    where: str
    value: dict[str, Any]
    named: bool


def _found(path: Path, problems: Problems, scored: bool) -> Iterator[_Found]:
    """Each dialogue of the file; those of the Consistent-LLMs family with the file's own polarity."""
    records = read_records(path, problems)
    judged = judged_dialogues(records, problems)
    consistent, fit = consistent_llms.calibrate(judged.values(), problems.add) if scored else (None, set(judged))
    for record in records:
        name = made_id(path, record.number)
        if record.number in fit:
            value = consistent_llms.to_record(judged[record.number], consistent, name)
            problems.dropped |= dict.fromkeys((k for k in record.value if k not in value), READ_AS)
            yield _Found("Consistent-LLMs", record.where, value, True)
        if not consistent_llms.is_family_record(record.value):
            yield from _translated(record, name, problems)


def _translated(record: Record, name: str, problems: Problems) -> Iterator[_Found]:
    """The dialogues that an object of another format holds, ``name`` for one without an id."""
    try:
        found = formats.translated(record.value)
    except ValueError as error:
        problems.add(f"{record.where}: {error}")
        return
    for value, side in zip(found.records, found.sides, strict=True):
        given = plain_name(value.get("id"))
        unnamed = given is None
        identity = f"{name if unnamed else given}/{side}" if side else name if unnamed else given
        yield _Found(found.format, record.where, {**value, "id": identity}, unnamed)


def judged_dialogues(records: Sequence[Record], problems: Problems) -> dict[int, consistent_llms.JudgedDialogue]:
    """The Consistent-LLMs dialogues among the records, by their number."""
    judged: dict[int, consistent_llms.JudgedDialogue] = {}
    for record in records:
        if consistent_llms.is_family_record(record.value):
            try:
                judged[record.number] = consistent_llms.parse_record(record.value, record.number, record.where)
            except ValueError as error:
                problems.add(str(error))
    return judged


def made_id(path: Path, number: int) -> str:
    """The id of a dialogue that has none: file and number."""
    stem = path.stem
    while stem.endswith((".json", ".jsonl", ".ndjson")):
        stem = stem.rpartition(".")[0]
    return f"{stem}/{number}"


def _warn_of_rewards(path: str | os.PathLike[str], read: Reading) -> None:
    """That turns have no reward; that some dialogues have one, which is the last turn's."""
    turns = sum(len(d.turn_rewards) for d in read.dialogues)
    if read.whole and turns > len(read.dialogues):
        named = ", ".join(f"{key!r} of {count}" for key, count in read.whole.items())
        rule = "is that of its last turn; the turns before have none and count as 0"
        warnings.warn(f"{path}: the one reward a dialogue ({named} dialogues) {rule}", stacklevel=4)
    if read.unscored:
        seen = f"{read.unscored} of {turns} assistant messages have no reward"
        warnings.warn(f"{path}: {seen}; they count as 0", stacklevel=4)

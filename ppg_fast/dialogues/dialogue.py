"""Logged dialogues with one reward per assistant message, from and to disk. docs/data.md describes the formats."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ppg_fast.dialogues import consistent_llms

ROLES = ("system", "user", "assistant", "tool")
KEYS = ("id", "group_id", "messages", "turn_rewards")
MAX_WARNINGS = 20  # of one file; the rest is counted


@dataclass(frozen=True)
class Message:
    """One message. ``role``: system, user, assistant or tool."""

    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, got {self.role!r}")
        if not isinstance(self.content, str):
            raise ValueError(f"content must be a string, got {self.content!r}")
        _require_encodable("content", self.content)

    def as_dict(self) -> dict[str, str]:
        """``{"role": ..., "content": ...}``: the message as chat templates, endpoints and JSON lines have it."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True)
class Dialogue:
    """A dialogue and its rewards; dialogues of one prompt share ``group_id``.

    ``turn_rewards``: one finite number per assistant message, None where it was not scored. ValueError names dialogue,
    turn and value.
    """

    id: str
    group_id: str
    messages: tuple[Message, ...]
    turn_rewards: tuple[float | None, ...]

    def __post_init__(self) -> None:
        for name, value in (("id", self.id), ("group_id", self.group_id)):
            if not isinstance(value, str) or not value:
                raise ValueError(f"{name} must be a non-empty string, got {value!r}")
            _require_encodable(name, value)
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
    records = list(_list_elements(raw, problems) if raw.lstrip()[:1] == b"[" else json_lines(raw, problems))
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
    all.

    ValueError if there is no dialogue or an id stands twice.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    seen: set[str] = set()
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            for dialogue in dialogues:
                if dialogue.id in seen:
                    raise ValueError(f"dialogue id {dialogue.id!r} stands twice")
                seen.add(dialogue.id)
                messages = [message.as_dict() for message in dialogue.messages]
                values = (dialogue.id, dialogue.group_id, messages, dialogue.turn_rewards)
                file.write(json.dumps(dict(zip(KEYS, values, strict=True)), ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if not seen:
            raise ValueError(f"no dialogues to write to {path}")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def convert_to_jsonl(source: str | os.PathLike[str], target: str | os.PathLike[str], strict: bool = False) -> int:
    """Read any file that `read_dialogues` reads and write it as our JSONL; return the number of dialogues."""
    dialogues = read_dialogues(source, strict)
    write_dialogues(target, dialogues)
    return len(dialogues)


class _Record(NamedTuple):
    """One JSON value of a file, with its number in the file and the words that say where it stands."""

    number: int
    where: str
    value: Any


class Problems:
    """What was wrong with one file: raised at once if strict, else warned of, the first few in full."""

    def __init__(self, path: str, strict: bool) -> None:
        self.path, self.strict, self.messages = path, strict, []

    def add(self, message: str) -> None:
        """One thing that was wrong."""
        if self.strict:
            raise ValueError(message)
        self.messages.append(message)
        if len(self.messages) <= MAX_WARNINGS:
            warnings.warn(f"{message}; left out", stacklevel=3)

    def close(self, kept: int) -> None:
        """At the end of the file: ValueError where nothing was kept."""
        if not kept:
            raise ValueError(
                f"{self.path} has no valid dialogue; first problem: "
                f"{self.messages[0] if self.messages else 'an empty list'}"
            )
        if len(self.messages) > MAX_WARNINGS:
            warnings.warn(f"{self.path}: {len(self.messages)} dialogues left out, {kept} kept", stacklevel=3)


def json_lines(raw: bytes, problems: Problems) -> Iterator[_Record]:
    """Each line that is JSON. Blank lines are skipped."""
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{problems.path}, line {number}"
        try:
            yield _Record(number, where, json.loads(line.decode("utf-8")))
        except UnicodeDecodeError as error:
            problems.add(f"{where} is not UTF-8: {error.reason} at byte {error.start}")
        except json.JSONDecodeError as error:
            problems.add(f"{where} is not JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets thousands deep
            problems.add(f"{where} is not JSON that can be read: {error}")


def _list_elements(raw: bytes, problems: Problems) -> Iterator[_Record]:
    """Each element of a JSON list as far as it can be read, so that a truncated file still gives its whole
    dialogues."""
    text = raw.decode("utf-8", "surrogateescape")  # a byte that is not UTF-8 spoils its own dialogue only
    decoder, end, line, index = json.JSONDecoder(), text.index("[") + 1, 1, 0

    def skip(position: int) -> int:
        while position < len(text) and text[position] in " \t\r\n":
            position += 1
        return position

    while text[(start := skip(end)) : start + 1] != "]":
        if index:
            start = skip(start + 1) if text[start : start + 1] == "," else len(text)
        line = 1 + text.count("\n", 0, start)
        where = f"{problems.path}, dialogue {index} (line {line})"
        try:
            record, end = decoder.raw_decode(text, start)
            text[start:end].encode("utf-8")
            yield _Record(index, where, record)
        except UnicodeEncodeError as error:
            problems.add(f"{where} is not UTF-8 at its character {error.start}")
        except (ValueError, RecursionError) as error:
            wrong_line = getattr(error, "lineno", line)
            problems.add(f"{where} is not JSON or cut short, at line {wrong_line}: {error}")
            return
        index += 1
    if text[skip(start + 1) :]:
        problems.add(
            f"{problems.path}, line {1 + text.count(chr(10), 0, skip(start + 1))}: text after the end of the list"
        )


def _translated(records: list[_Record], path: Path, problems: Problems) -> Iterator[_Record]:
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
        raise ValueError(f"a dialogue must be a JSON object, got {_brief(record)}")
    name = f"dialogue {record['id']!r}" if "id" in record else "a dialogue"
    missing = [key for key in KEYS if key not in record]
    if missing:
        raise ValueError(f"{name} lacks {', '.join(missing)}")
    for key in ("messages", "turn_rewards"):
        if not isinstance(record[key], list):
            raise ValueError(f"{name}: {key} must be a list, got {_brief(record[key])}")
    messages = tuple(
        message_of(message, f"{name}, message {index}") for index, message in enumerate(record["messages"])
    )
    return Dialogue(record["id"], record["group_id"], messages, tuple(record["turn_rewards"]))


def message_of(value: object, where: str) -> Message:
    """The message that one JSON value describes; ``where`` begins the ValueError for one that is none."""
    if not isinstance(value, dict) or not {"role", "content"} <= value.keys():
        raise ValueError(f"{where}: must be an object with role and content, got {_brief(value)}")
    try:
        return Message(value["role"], value["content"])
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _reward(value: object, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where}: a reward must be a number or null, got {_brief(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{where}: a reward must be finite, got {number}")
    return number


def _require_encodable(name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has an unpaired surrogate at character {error.start}: {text[error.start]!r}"
        ) from None


def _brief(value: object) -> str:
    """Type and beginning of a value, for a message."""
    return f"{type(value).__name__} {repr(value)[:60]}"


def _warn_of_unscored(path: str | os.PathLike[str], dialogues: list[Dialogue]) -> None:
    unscored, turns = sum(d.unscored for d in dialogues), sum(len(d.turn_rewards) for d in dialogues)
    if unscored:
        warnings.warn(f"{path}: {unscored} of {turns} assistant messages have no reward; they count as 0", stacklevel=3)

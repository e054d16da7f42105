"""The JSON values of a file of dialogues, each with where it stands; what cannot be read is named and left out."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ppg_fast.dialogues import files

MAX_WARNINGS = 20  # of one file; the rest is counted
WRAPPERS = ("data", "rows", "train", "dialogues", "examples", "records", "items", "samples")


class Record(NamedTuple):
    """One JSON value of a file, with its number in the file and the words that say where it stands; ``unit``: what
    the number counts."""

    number: int
    where: str
    value: Any
    unit: str = "line"


class Problems:
    """What was wrong with one file: raised at once if strict, else warned of at the end, the first few in full.

    ``nothing``: what is said where nothing was kept.
    """

    def __init__(self, path: str, strict: bool, nothing: str = "") -> None:
        self.path, self.strict, self.messages = path, strict, []
        self.nothing = nothing or f"{path} has no valid dialogue"
        self.dropped: dict[str, str] = {}  # keys of the file that no dialogue holds, and why

    def add(self, message: str) -> None:
        """One thing that was wrong."""
        if self.strict:
            raise ValueError(message)
        self.messages.append(message)

    def close(self, kept: int) -> None:
        """At the end of the file: ValueError where nothing was kept, which names the first problem."""
        if not kept:
            first = self.messages[0] if self.messages else "an empty list"
            others = f" (and {len(self.messages) - 1} more)" if len(self.messages) > 1 else ""
            raise ValueError(f"{self.nothing}; first problem: {first}{others}")
        for message in self.messages[:MAX_WARNINGS]:
            warnings.warn(f"{message}; left out", stacklevel=3)
        if len(self.messages) > MAX_WARNINGS:
            warnings.warn(f"{self.path}: {len(self.messages)} dialogues left out, {kept} kept", stacklevel=3)


def read_records(path: Path, problems: Problems) -> list[Record]:
    """Each value of JSON lines, of a JSON list (also one inside of an object, as {"data": [...]}), of JSON objects one
    after the other, or each row of a parquet file. ValueError for a file that is empty or none of these."""
    raw = files.unpacked(path, problems.add)
    if files.is_parquet(raw):
        rows = files.parquet_rows(raw, path)
        return [Record(n, f"{path}, row {n}", row, "row") for n, row in enumerate(rows)]
    raw = files.as_utf8(raw, path)
    if not raw.strip():
        raise ValueError(f"{path} is empty")
    raw = raw if b"\n" in raw else raw.replace(b"\r", b"\n")  # no JSON holds a bare one in a text
    what = files.looks_like(raw)
    if what and not _holds_json_line(raw):
        raise ValueError(f"{path} holds no JSON: it looks like {what} ({files.RECIPES})")
    return _unwrapped(list(json_records(raw, problems)), problems)


def json_records(raw: bytes, problems: Problems) -> Iterator[Record]:
    """Each value of a JSON list, of JSON objects one after the other, or of JSON lines."""
    first, _, rest = raw.lstrip().partition(b"\n")
    if first[:1] == b"[" and not (rest.lstrip()[:1] == b"[" and _is_json(first)):
        return list_elements(raw, problems)
    return json_sequence(raw, problems) if _spans_lines(raw) else json_lines(raw, problems)


def json_lines(raw: bytes, problems: Problems) -> Iterator[Record]:
    """Each line that is JSON. Blank lines are skipped."""
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{problems.path}, line {number}"
        try:
            yield Record(number, where, json.loads(line.decode("utf-8")))
        except UnicodeDecodeError as error:
            problems.add(f"{where} is not UTF-8: {error.reason} at byte {error.start}")
        except json.JSONDecodeError as error:
            problems.add(f"{where} is not JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits, brackets thousands deep
            problems.add(f"{where} is not JSON that can be read: {error}")


def list_elements(raw: bytes, problems: Problems) -> Iterator[Record]:
    """Each element of a JSON list as far as it can be read, so that a truncated file still gives its whole
    dialogues."""
    text = raw.decode("utf-8", "surrogateescape")  # a byte that is not UTF-8 spoils its own dialogue only
    end = yield from _values(text, text.index("[") + 1, problems, ",", "]")
    if end is not None and text[end:].strip(SPACE):
        line = 1 + text.count("\n", 0, _skip(text, end))
        problems.add(f"{problems.path}, line {line}: text after the end of the list")


def json_sequence(raw: bytes, problems: Problems) -> Iterator[Record]:
    """Each of JSON objects that stand one after the other, as far as it can be read."""
    yield from _values(raw.decode("utf-8", "surrogateescape"), 0, problems, "", "")


SPACE = " \t\r\n"


def _skip(text: str, position: int) -> int:
    while position < len(text) and text[position] in SPACE:
        position += 1
    return position


def _values(text: str, end: int, problems: Problems, between: str, last: str) -> Iterator[Record]:
    """The values from ``end`` on, up to ``last``; gives the position after it, None where it was not reached."""
    decoder, index, line, counted = json.JSONDecoder(), 0, 1, 0
    while text[(start := _skip(text, end)) : start + 1] != last:
        if index and between:
            start = _skip(text, start + 1) if text[start : start + 1] == between else len(text)
        line, counted = line + text.count("\n", counted, start), start
        where = f"{problems.path}, dialogue {index} (line {line})"
        try:
            value, end = decoder.raw_decode(text, start)
            text[start:end].encode("utf-8")
            yield Record(index, where, value, "dialogue")
        except UnicodeEncodeError as error:
            problems.add(f"{where} is not UTF-8 at its character {error.start}")
        except (ValueError, RecursionError) as error:
            wrong_line = getattr(error, "lineno", line)
            problems.add(f"{where} is not JSON or cut short, at line {wrong_line}: {error}")
            return None
        index += 1
    return start + 1


def _spans_lines(raw: bytes) -> bool:
    """Whether the first JSON value is an object written over several lines."""
    text = raw.decode("utf-8", "surrogateescape").lstrip()
    if _is_json(text.partition("\n")[0]):
        return False
    try:
        return text[:1] == "{" and "\n" in text[: json.JSONDecoder().raw_decode(text)[1]]
    except (ValueError, RecursionError):
        return False


def _holds_json_line(raw: bytes) -> bool:
    """Whether any line is a JSON object: the others are then lines that are spoilt."""
    return any(line.lstrip()[:1] == b"{" and _is_json(line) for line in raw.split(b"\n"))


def _is_json(text: str | bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _unwrapped(records: list[Record], problems: Problems) -> list[Record]:
    """The elements of the one list of objects that a file's one object holds, where it is no dialogue itself; and one
    dialogue where the elements of a file's list are its messages."""
    if records and all(record.unit == "dialogue" and _is_message(record.value) for record in records):
        return [Record(0, problems.path, [record.value for record in records], "dialogue")]
    value = records[0].value if len(records) == 1 else None
    if not isinstance(value, dict):
        return records
    lists = {key: v for key, v in value.items() if isinstance(v, list) and v and all(isinstance(e, dict) for e in v)}
    key = next((key for key in WRAPPERS if key in lists), next(iter(lists), "") if len(value) == 1 else "")
    elements = lists.get(key, [])
    if not elements or "messages" in value or any(map(_is_message, elements)):
        return records
    for other in () if key == "rows" else lists.keys() - {key}:
        rule = f"{problems.path}: the {len(lists[other])} objects in {other!r} are not read, only those in {key!r}"
        warnings.warn(rule, stacklevel=2)
    problems.dropped |= {other: f"beside the dialogues in {key!r}" for other in value if other != key}
    inner = [e["row"] if isinstance(e.get("row"), dict) and "row_idx" in e else e for e in elements]
    return [
        Record(n, f"{problems.path}, dialogue {n} of {key!r}", element, "dialogue") for n, element in enumerate(inner)
    ]


def _is_message(value: object) -> bool:
    return (
        isinstance(value, dict) and bool({"role", "from"} & value.keys()) and not {"messages", "prompt"} & value.keys()
    )

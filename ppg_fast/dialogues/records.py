"""The JSON values of a file of dialogues, each with where it stands; what cannot be read is named and left out."""

import json
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

MAX_WARNINGS = 20  # of one file; the rest is counted


class Record(NamedTuple):
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


def json_records(raw: bytes, problems: Problems) -> Iterator[Record]:
    """Each value of a JSON list or of JSON lines."""
    return list_elements(raw, problems) if raw.lstrip()[:1] == b"[" else json_lines(raw, problems)


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
            yield Record(index, where, record)
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

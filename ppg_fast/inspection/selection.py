"""Which dialogues of a file are shown; and what is said while one is read."""

import warnings
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ppg_fast.dialogues.records import Problems, read_records

SHOWN_NAMES = 5  # of a file, where a name is not in it
MOST = 300  # characters of a message that repeats the file


def places_of(
    names: Sequence[str], count: int, ids: Sequence[str], path: str, others: Container[str] = ()
) -> list[int | str]:
    """The places in ``ids`` of what ``names`` say, each an id or a place from 0, and of the ``count`` - 1 after each;
    by default the first. A name that is among the ``others`` stays a name; ValueError for one that is none."""
    places = [place for name in names or ["0"] for place in _from(name, count, ids, path, others)]
    return list(dict.fromkeys(places))


def _from(name: str, count: int, ids: Sequence[str], path: str, others: Container[str]) -> Sequence[int | str]:
    if name in ids:
        place = ids.index(name)
    elif name in others:
        return [name]
    elif name.isdecimal() and int(name) < len(ids):
        place = int(name)
    else:
        some = ", ".join(map(repr, ids[:SHOWN_NAMES])) + (", ..." if len(ids) > SHOWN_NAMES else "")
        rule = f"{path} has no dialogue {name[:60]!r} among the {len(ids)} that are read"
        raise ValueError(f"{rule}, only {some[:MOST]}")
    return range(place, min(place + count, len(ids)))


class LeftOut(NamedTuple):
    """A dialogue that could not be read: why, and its messages as the file has them."""

    reason: str
    messages: tuple[tuple[str, str], ...]


def left_out_of(path: str, reasons: Sequence[str]) -> dict[str, LeftOut]:
    """The dialogues of our format whose id stands in one of ``reasons``, by id."""
    found: dict[str, LeftOut] = {}
    for record in read_records(Path(path), Problems(path, strict=False)) if reasons else ():
        value = record.value if isinstance(record.value, dict) else {}
        name, messages = str(value.get("id")), value.get("messages")
        reason = next((text for text in reasons if f"dialogue {name!r}" in text), "")
        if reason and isinstance(messages, list):
            found[name] = LeftOut(reason, tuple(_said(message) for message in messages))
    return found


def _said(message: object) -> tuple[str, str]:
    """Role and text of what may be a message."""
    if not isinstance(message, dict):
        return "?", str(message)[:MOST]
    content = message.get("content")
    return str(message.get("role", "?"))[:MOST], content if isinstance(content, str) else str(content)[:MOST]


def heard(act: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What ``act`` gives, and the warnings that it gives on the way; they are shown too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = act()
    for one in caught:
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return result, [str(one.message) for one in caught]

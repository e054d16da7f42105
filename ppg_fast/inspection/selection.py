"""Which dialogues of a file are shown; and what is said while one is read."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

SHOWN_NAMES = 5  # of a file, where a name is not in it
MOST = 300  # characters of a message that repeats the file


def places_of(names: Sequence[str], count: int, ids: Sequence[str], path: str, left_out: Sequence[str]) -> list[int]:
    """The places in ``ids`` of what ``names`` say, each an id or a place from 0, and of the ``count`` - 1 after each;
    by default the first. ``left_out``: what was said of the others. ValueError for a name that is none."""
    places = [place for name in names or ["0"] for place in _from(name, count, ids, path, left_out)]
    return list(dict.fromkeys(places))


def _from(name: str, count: int, ids: Sequence[str], path: str, left_out: Sequence[str]) -> range:
    if name in ids:
        place = ids.index(name)
    elif name.isdecimal() and int(name) < len(ids):
        place = int(name)
    else:
        said = next((text for text in left_out if repr(name) in text), "")
        some = ", ".join(map(repr, ids[:SHOWN_NAMES])) + (", ..." if len(ids) > SHOWN_NAMES else "")
        why = f": {said}" if said else f", only {some}"
        raise ValueError(f"{path} has no dialogue {name[:60]!r} among the {len(ids)} that are read{why[:MOST]}")
    return range(place, min(place + count, len(ids)))


def heard(act: Callable[[], Any]) -> tuple[Any, list[str]]:
    """What ``act`` gives, and the warnings that it gives on the way; they are shown too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = act()
    for one in caught:
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return result, [str(one.message) for one in caught]

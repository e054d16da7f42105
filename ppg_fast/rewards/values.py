"""What others hand us as a reward: read exactly or refused, in one place for every kind of reward."""

from collections.abc import Iterable, Mapping, Set, Sized
from decimal import Decimal
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any

from ppg_fast.rules import FLOAT32_MAX

RULE = "must be a finite number, at most 3.4e38 (float32), or None"
SHOWN = 60  # characters of a value in an error


def number_of(value: Any) -> float | None:
    """``value`` as a float, None for None: a real number of any library, a bool, or an array or tensor of no dimension.

    ValueError with the value for anything else: text, a list, a complex number, NaN, and what float32 cannot hold.
    """
    if value is None:
        return None
    if getattr(value, "shape", None) == () and not isinstance(value, Real) and hasattr(value, "tolist"):
        try:  # of numpy, torch, ...; what numpy masks is None
            value = value.tolist()
        except Exception as error:  # a tensor without data, say
            raise ValueError(f"{RULE}, got {shown(value)} ({type(error).__name__})") from error
        if value is None:
            return None
    if not isinstance(value, (Real, Decimal)):
        hint = " (one per turn wants @dialogue)" if _is_row(value) else ""
        raise ValueError(f"{RULE}{hint}, got {shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = float("inf")
    except Exception:  # Decimal("sNaN"), or the user's own __float__
        number = float("nan")
    if not abs(number) <= FLOAT32_MAX:  # in which rewards train
        raise ValueError(f"{RULE}, got {shown(value)}")
    return number


def numbers_of(value: Any, turns: int) -> list[float | None] | None:
    """One number a turn where ``value`` is a list, tuple, array, generator, ...; None where it is no row of values.

    ValueError for a row of another length, and for an entry that is no number, with its turn. A mapping, a set and text
    are no rows: what they hold has no order, or is no number.
    """
    if not _is_row(value):
        return None
    values = list(islice(iter(value), turns + 1))  # one more than wanted says that there are too many
    if len(values) != turns:
        got = len(value) if isinstance(value, Sized) else f"{turns + 1} or more" if len(values) > turns else len(values)
        raise ValueError(f"must give one number or one per turn, {turns}, got {got} numbers")
    return [_number_at(turn, entry) for turn, entry in enumerate(values)]


def shown(value: Any, length: int = SHOWN) -> str:
    """The beginning of a value on one line; its type where it cannot be printed."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an integer of 5,000 digits, lists a thousand deep, or the user's own __repr__
        text = f"<{type(value).__name__}>"
    return text if len(text) <= length else text[:length] + "..."


def read_text(path: str, what: str) -> str:
    """The text of a UTF-8 file. ValueError names what it is and where it is no text."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {path} must be UTF-8 text: {error.reason} at byte {error.start}") from error


def _number_at(turn: int, value: Any) -> float | None:
    try:
        return number_of(value)
    except ValueError as error:
        raise ValueError(f"at turn {turn} {error}") from error


def _is_row(value: Any) -> bool:
    if getattr(value, "shape", None) == () or isinstance(value, (str, bytes, bytearray, Mapping, Set)):
        return False
    return isinstance(value, Iterable)

"""What an argument has to be, in one line: the rule and the value that breaks it. No torch: a tensor is known by what
it has."""

import difflib
import math
import sys
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, NoReturn

FLOAT_MAX = sys.float_info.max
FLOAT32_MIN, FLOAT32_MAX = 2.0**-126, (2 - 2.0**-23) * 2.0**127


def require(condition: bool, rule: str, value: object) -> None:
    """Raise ValueError(rule, got value) unless ``condition``."""
    if not condition:
        fail(rule, value)


def fail(rule: str, value: object) -> NoReturn:
    """Raise ValueError(rule, got value). ``if not ok: fail(...)`` builds its message only where it is needed."""
    raise ValueError(f"{rule}, got {value!r}")


def require_one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        mean = did_you_mean(value, choices) if isinstance(value, str) else ""
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}{mean}")


def did_you_mean(text: str, known: Iterable[str]) -> str:
    """The nearest of ``known`` as the end of a message; nothing where none is near."""
    near = difflib.get_close_matches(text, list(known), 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def plain(value: Any) -> Any:
    """A `numbers.Real`, or a numpy scalar, 0-d array or 0-d tensor (whose value is read), as Python's int or float;
    None for what is no number, bool among it."""
    if type(value) is float or type(value) is int:
        return value
    if getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def require_number(name: str, value: object, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """``value`` as a Python number (`plain`); ValueError unless it is finite and in [low, high] (open at ``low`` when
    asked)."""
    number = plain(value)
    # by comparisons alone, which hold of a symbolic number under torch.compile too and are False of NaN
    if (
        number is None
        or not (low <= number <= high and -FLOAT_MAX <= number <= FLOAT_MAX)
        or (open_low and number == low)
    ):
        bounds = f"{'>' if open_low else '>='} {low}" + (f" and <= {high}" if high < math.inf else "")
        fail(f"{name} must be a finite number {bounds}", value)
    return number


def require_float32(name: str, value: object, low: float, high: float = math.inf, *, open_low: bool = False) -> float:
    """`require_number` for what the kernels take as float32: beyond its range it would become 0 or inf there."""
    number = require_number(name, value, low, high, open_low=open_low)
    if number != 0 and not FLOAT32_MIN <= abs(number) <= FLOAT32_MAX:
        fail(f"{name} must be a finite number in the range of float32, {FLOAT32_MIN:.2g} to {FLOAT32_MAX:.2g}", value)
    return number


def require_integer(name: str, value: object, low: int) -> int:
    """``value`` as a Python int (`plain`); ValueError unless it is an integer >= ``low``."""
    number = plain(value)
    if not isinstance(number, int) or number < low:
        fail(f"{name} must be an integer >= {low}", value)
    return number

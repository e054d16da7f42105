"""What the fuzz tests share: how long they look, JSON and text that nobody expects, and what an error must be."""

import json
import os
import re
import warnings
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

LONGER = int(os.environ.get("PPG_FAST_FUZZ") or 0)  # examples of each property, other ones every time: `make fuzz`
# what Python says of a bug, and not we of the input
INTERNAL = re.compile(
    r"unpack|'NoneType'|has no attribute|unsupported operand|not subscriptable|invalid literal|could not convert|"
    r"out of range|not supported between|unhashable|Traceback|positional argument|object is not"
)
# half an emoji, ends of line that only Python knows, what writes from right to left, what a tokenizer knows
ODD = "\ud800\udc00\u2028\x85\x0b\x00\u202e\u200b\ufeff\xad\U0001f389 \n\r\t\"'{}[]:,#<>&*!|%@`\\"
WORDS = [
    "<end>",
    "<user>",
    "<assistant>",
    "</s>",
    "{{x}}",
    "id",
    "null",
    "NaN",
    "1e999",
    "-",
    "turn_rewards",
    "e\u0301",
]


def fuzz(examples: int, *also: HealthCheck) -> Any:
    """``examples`` of a property, the same ones every time; as many as the environment says, new ones, in `make
    fuzz`."""
    slow = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large, *also)
    given = {"deadline": None, "suppress_health_check": slow}
    return (
        settings(max_examples=LONGER, **given)
        if LONGER
        else settings(max_examples=examples, derandomize=True, database=None, **given)
    )


texts = st.one_of(
    st.text(max_size=12),
    st.text(st.sampled_from(ODD), max_size=8),
    st.lists(st.sampled_from([*WORDS, *ODD]), max_size=5).map("".join),
)
numbers = st.one_of(
    st.integers(-3, 20),
    st.floats(),
    st.sampled_from([10**400, -(10**400), 2**63, 2**31, 0.5, 1e308, 5e-324, -0.0]),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)


def as_json(value: Any) -> str:
    """As a sloppy writer writes it: NaN, lone surrogates and all."""
    return json.dumps(value, ensure_ascii=bool(len(repr(value)) % 2))


def mangled(line: str) -> st.SearchStrategy[bytes]:
    """``line`` as it is, cut short, with bytes in between, deep, or something else."""
    raw = line.encode("utf-8", "surrogatepass")
    cut = st.integers(0, len(raw)).map(lambda n: raw[:n])
    spliced = st.tuples(st.integers(0, len(raw)), st.binary(max_size=4)).map(lambda p: raw[: p[0]] + p[1] + raw[p[0] :])
    return st.one_of(st.just(raw), st.just(raw), cut, spliced).map(lambda b: b.replace(b"\n", b" "))


def outcome(call: Callable[[], Any], *errors: type[BaseException]) -> tuple[Any, str, list[str]]:
    """(value, "", warnings), or (None, the error's text, warnings); any other error than ``errors`` is a bug."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            value, said = call(), ""
        except errors as error:
            value, said = None, str(error) or type(error).__name__
    return value, said, [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def assert_one_line(text: str, *places: str) -> None:
    """One line that names one of ``places`` and is about the input."""
    assert not re.search(r"[\n\r\x00]", text), repr(text)
    assert len(text) < 2000, f"{len(text)} characters: {text[:200]!r}"
    assert any(place in text for place in places), f"none of {places} in {text!r}"
    assert not INTERNAL.search(text), text

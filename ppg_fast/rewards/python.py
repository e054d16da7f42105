"""A user's own function as a reward, and what is said of one that fails."""

import inspect
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from ppg_fast.rewards.modules import import_file, import_module, imports_from
from ppg_fast.rewards.scoring import Transcript, Value

SAID, LINE = 300, 100  # characters of a user's exception, and of the line that raised it, in an error


def load_function(
    where: str, loaded: dict[str, ModuleType] | None = None, what: str = "reward function"
) -> Callable[..., Any]:
    """The function at ``module:function`` or ``file.py:function``. ValueError where there is none, with the user's line
    that failed.

    ``loaded``: modules by place that several functions share; without it a file is executed anew. ``what``: its name
    in errors.
    """
    place, _, name = where.rpartition(":")
    if not place or not name:
        raise ValueError(f"a {what} must be given as module:function or file.py:function, got {where!r}")
    module = load_module(place, {} if loaded is None else loaded, f"{what} {where}")
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{what} {where}: {place} has no function {name!r}")
    return function


def load_module(place: str, loaded: dict[str, ModuleType], what: str) -> ModuleType:
    """The module of a file (``file.py``) or of that name, from ``loaded`` where it is there. ValueError that begins
    with ``what``, with the user's line that failed."""
    key = str(Path(place).resolve()) if place.endswith(".py") else place
    if key not in loaded:
        try:
            loaded[key] = import_file(place) if place.endswith(".py") else import_module(place)
        except BaseException as error:  # whatever the user's file raises, SystemExit too
            if not is_users(error):
                raise
            raise ValueError(f"{what}: {place} cannot be loaded: {said_by(error)}") from error
    return loaded[key]


class PythonReward:
    """``function(messages, **info)`` for each dialogue: messages as [{"role", "content"}, ...], ``info`` by the names
    that it takes.

    ``info`` holds ``id`` and what the prompt's line says beside its messages; a function with ``**anything`` gets all
    of it. While it runs, its own folder comes first where it imports something. ValueError for a name that a dialogue
    has not, and for an exception of the function (SystemExit too), with dialogue, turn and line.
    """

    def __init__(self, function: Callable[..., Any], name: str, folder: str | None = None) -> None:
        self.function, self.name, self.folder = function, name, folder
        try:
            takes = list(inspect.signature(function).parameters.values())[1:]
        except (TypeError, ValueError) as error:  # some that are written in C
            raise ValueError(f"reward {name} must tell its arguments: {error}") from error
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in takes)
        named = [p for p in takes if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.names = {p.name for p in named}
        self.needed = [p.name for p in named if p.default is p.empty]

    @classmethod
    def at(cls, where: str, loaded: dict[str, ModuleType] | None = None) -> "PythonReward":
        """The reward at ``module:function`` or ``file.py:function``, as `load_function` finds it."""
        function, place = load_function(where, loaded), where.rpartition(":")[0]
        return cls(function, where, str(Path(place).resolve().parent) if place.endswith(".py") else None)

    def __call__(self, transcripts: Sequence[Transcript], /) -> list[Value]:
        """One value each."""
        with imports_from(self.folder) if self.folder else nullcontext():
            return [self._value(transcript) for transcript in transcripts]

    def _value(self, transcript: Transcript) -> Value:
        info = {**transcript.info, "id": transcript.id}
        where = f"dialogue {transcript.id!r}, turn {transcript.turns - 1}"
        missing = [name for name in self.needed if name not in info]
        if missing:
            raise ValueError(
                f"reward {self.name} asks for {', '.join(missing)}, which {where} has not (it has {', '.join(info)})"
            )
        given = info if self.takes_all else {name: value for name, value in info.items() if name in self.names}
        messages = [message.as_dict() for message in transcript.messages]
        try:
            value = self.function(messages, **given)
            if inspect.iscoroutine(value):
                value.close()  # Python would warn that nobody awaits it
                raise TypeError("a reward must be no async function")
            # a generator runs here, where its failure has a place; one more than wanted says that there are too many
            return list(islice(value, transcript.turns + 1)) if isinstance(value, Iterator) else value
        except BaseException as error:
            if not is_users(error):
                raise
            raise ValueError(f"reward {self.name} failed at {where}: {said_by(error)}") from error


def is_users(error: BaseException) -> bool:
    """Whether the user's code raised it, and not a signal that ends the run: Ctrl-C, or what our jobs make of one."""
    return not isinstance(error, KeyboardInterrupt) and not type(error).__module__.startswith("ppg_fast.jobs")


def said_by(error: BaseException) -> str:
    """The exception, on one line, with the last line of code that is the user's and not a library's."""
    try:
        text = " ".join(str(error).split())
    except Exception:  # the exception's own __str__
        text = ""
    text = type(error).__name__ + (f": {text[:SAID]}" if text else "")
    ours = str(Path(__file__).parent) + os.sep
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((ours, "<frozen"))]
    users = [f for f in frames if f"{os.sep}site-packages{os.sep}" not in f.filename and not _is_standard(f.filename)]
    if isinstance(error, SyntaxError) or not frames:  # it says itself where
        return text
    last = (users or frames)[-1]
    line = f": {last.line[:LINE]}" if last.line else ""
    return f"{text} ({Path(last.filename).name}, line {last.lineno}{line})"


def _is_standard(filename: str) -> bool:
    return filename.startswith(str(Path(os.__file__).parent) + os.sep)

"""A user's own function as a reward."""

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ppg_fast.rewards.scoring import Transcript, Value


def load_function(where: str) -> Callable[..., Any]:
    """The function at ``module:function`` or ``file.py:function``. ValueError where there is none."""
    place, _, name = where.rpartition(":")
    if not place or not name:
        raise ValueError(f"a reward function must be given as module:function or file.py:function, got {where!r}")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            if os.getcwd() not in sys.path:  # as `python -m` has it
                sys.path.append(os.getcwd())
            module = importlib.import_module(place)
    except Exception as error:  # whatever the user's file raises
        raise ValueError(f"reward function {where}: {place} cannot be loaded: {_said(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward function {where}: {place} has no function {name!r}")
    return function


class PythonReward:
    """``function(messages, **info)`` for each dialogue: messages as [{"role", "content"}, ...], ``info`` by the names
    that it takes.

    ``info`` holds ``id`` and what the prompt's line says beside its messages; a function with ``**anything`` gets all
    of it. ValueError for a name that a dialogue has not, and for an exception of the function, with dialogue, turn and
    line.
    """

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.function, self.name = function, name
        takes = list(inspect.signature(function).parameters.values())[1:]
        self.takes_all = any(p.kind is p.VAR_KEYWORD for p in takes)
        named = [p for p in takes if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        self.names = {p.name for p in named}
        self.needed = [p.name for p in named if p.default is p.empty]

    def __call__(self, transcripts: Sequence[Transcript], /) -> list[Value]:
        """One value each."""
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
            return self.function(messages, **given)
        except Exception as error:
            raise ValueError(f"reward {self.name} failed at {where}: {_said(error)}") from error


def _said(error: Exception) -> str:
    """The exception and the user's line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1] if frames else None
    return f"{type(error).__name__}: {error}" + (f" ({Path(last.filename).name}, line {last.lineno})" if last else "")

"""The command line's grammar: one parser for every command, and a flag for every setting."""

import argparse
import dataclasses
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn, get_type_hints

from ppg_fast.config.defaults import OFFLINE, PROMPTS, SECTIONS
from ppg_fast.config.sources import base_type
from ppg_fast.config.train import TrainConfig
from ppg_fast.rules import did_you_mean


class Parser(argparse.ArgumentParser):
    """Flags are written out in full, text is never empty, a value may begin with a minus, and bad usage is one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"allow_abbrev": False, **options})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:  # type: ignore[override]
        """As argparse's, but nothing stays unknown."""
        found, rest = super().parse_known_args(self._joined(list(sys.argv[1:] if args is None else args)), namespace)
        if rest:
            word = next((word for word in rest if word.startswith("-")), rest[0])
            flag = word.partition("=")[0]
            what = f"no flag {flag!r}" if word.startswith("-") else f"nothing is expected at {word!r}"
            self.error(what + did_you_mean(flag, self._option_string_actions))
        for action in self._actions:  # settings of training are checked where a file's are
            value = getattr(found, action.dest, None)
            unsaid = action.default is argparse.SUPPRESS or value == action.default
            if isinstance(value, str) and not value.strip() and not unsaid:
                self.error(f"{'/'.join(action.option_strings) or action.metavar or action.dest} must not be empty")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """One line instead of the whole usage."""
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help lists what there is)\n")

    def _joined(self, words: Sequence[str]) -> list[str]:
        """``--reward -0.1*x`` as ``--reward=-0.1*x``: what follows a flag that takes a value is its value, flags
        aside."""
        joined: list[str] = []
        for number, word in enumerate(words):
            if word == "--":
                return [*joined, *words[number:]]
            before = self._option_string_actions.get(joined[-1]) if joined else None
            short = len(word) > 1 and word[0] == "-" and word[1] != "-" and word[:2] not in self._option_string_actions
            if short and before is not None and before.nargs is None and joined[-1].startswith("--"):
                joined[-1] += f"={word}"
            else:
                joined.append(word)
        return joined


def add_flags(
    parser: argparse.ArgumentParser, only: Collection[str] = (), defaults: Mapping[str, Any] | None = None
) -> None:
    """One flag for every field, in the groups of `SECTIONS`, or for those in ``only``. ``defaults``: of a command that
    has others than train.

    A flag that is not given leaves no trace, so that a file's value survives.
    """
    types = get_type_hints(TrainConfig)
    group: Any = parser
    for field in dataclasses.fields(TrainConfig):
        if only and field.name not in only:
            continue
        group = parser.add_argument_group(SECTIONS[field.name]) if field.name in SECTIONS and not only else group
        usual = field.default if defaults is None else defaults.get(field.name, field.default)
        default = [] if usual is None else [str(usual)]
        jobs = (("data", OFFLINE), ("prompts", PROMPTS)) if defaults is None else ()
        default += [f"with {job} {others[field.name]}" for job, others in jobs if field.name in others]
        text = field.metadata["help"].replace("%", "%%") + (f" [{'; '.join(default)}]" if default else "")
        options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
        if types[field.name] is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options["metavar"] = base_type(types[field.name]).__name__.upper()
        group.add_argument("--" + field.name.replace("_", "-"), **options)

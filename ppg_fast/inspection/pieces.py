"""The text of each token, so that all of them in a row are the whole text; white space and what cannot be seen made
visible."""

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from ppg_fast.dialogues.renderer import Renderer

BROKEN = "\ufffd"  # what a decoder writes for a part of a character
LONGEST = 8  # tokens that may share a character before it is shown as it is
LONE_SPACE = re.compile(r"(?<=\S) (?=\S)")


class TokenTexts:
    """The texts of a tokenizer's tokens as they stand behind others; each is decoded once."""

    def __init__(self, renderer: Renderer) -> None:
        self.tokenizer: Any = renderer.tokenizer
        self.special = {number: name for name, number in renderer.added.items()}
        self._before = list(renderer.tokenizer("a", add_special_tokens=False)["input_ids"])[:1]
        self._texts: dict[int, str] = {}

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens`` behind another one: its first space is kept."""
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        before = self.tokenizer.decode(self._before, **options)
        both = self.tokenizer.decode([*self._before, *tokens], **options)
        return both[len(before) :] if both.startswith(before) else self.tokenizer.decode(list(tokens), **options)

    def text(self, token: int) -> str:
        """Of one token; of a part of a character `BROKEN`."""
        if token not in self._texts:
            self._texts[token] = self.special.get(token) or self.decode([token])
        return self._texts[token]

    def groups(self, tokens: Sequence[int]) -> list[tuple[list[int], str]]:
        """(tokens, text) of each group of ``tokens``: one, or those that share a character."""
        found: list[tuple[list[int], str]] = []
        pending: list[int] = []
        for token in tokens:
            text = self.text(token)
            if pending or (text.endswith(BROKEN) and token not in self.special):
                pending.append(token)
                text = self.decode(pending)
                if text.endswith(BROKEN) and len(pending) < LONGEST:
                    continue
            found.append((pending or [token], text))
            pending = []
        return [*found, *([(pending, self.decode(pending))] if pending else [])]


def visible(text: str, before: str = "", after: str = "", marks: tuple[str, str, str] = ("·", "↵\n", "→")) -> str:
    """``text`` with every space shown but a lone one between words, line breaks and tabs shown, and what does not print
    as an escape. ``before``, ``after``: its neighbours, "" for a bound. ``marks``: of space, line break and tab."""
    space, line, tab = marks
    whole = (before[-1:] or " ") + text + (after[:1] or " ")
    alone = {match.start() for match in LONE_SPACE.finditer(whole)}
    shown = []
    for place, character in enumerate(whole[1:-1], 1):
        if character == " ":
            shown.append(" " if place in alone else space)
        elif character in "\n\t":
            shown.append(line if character == "\n" else tab)
        else:
            shown.append(character if character.isprintable() else escaped(character))
    return "".join(shown)


def escaped(character: str) -> str:
    """``\\x1b``, ``\\u202e``: a character that a terminal would obey or a reader not see."""
    return character.encode("unicode_escape", "backslashreplace").decode("ascii")


def runs(values: Sequence[Any]) -> list[tuple[Any, int, int]]:
    """(value, start, end) of each run of equal ``values``."""
    found, start = [], 0
    for value, members in groupby(values):
        end = start + sum(1 for _ in members)
        found.append((value, start, end))
        start = end
    return found

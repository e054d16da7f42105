"""Views in a terminal: colours where it has them, brackets and words everywhere."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from ppg_fast.inspection.pieces import visible
from ppg_fast.inspection.view import ADVANTAGE, CONTEXT, Piece, View

TURNS = ("green", "cyan", "magenta", "yellow", "blue")  # colours, in turn
ANSWER = "the policy answers here"
SHOWN = 300  # characters of a message that is not read


class Glyphs(NamedTuple):
    """What stands for white space: of space, line break and tab, and whether they are plain ASCII."""

    marks: tuple[str, str, str]
    rule: str


SIGNS, PLAIN = Glyphs(("·", "↵\n", "→"), "─"), Glyphs(("_", "\\n\n", "\\t"), "-")


def glyphs_of(encoding: str | None) -> Glyphs:
    """Signs where the terminal's encoding has them."""
    try:
        "".join((*SIGNS.marks, SIGNS.rule)).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return PLAIN
    return SIGNS


def print_views(views: Iterable[View], notes: Sequence[str] = ()) -> None:
    """Print each view, and ``notes`` on the file. Colours only on a terminal, and none where NO_COLOR is set."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    glyphs = glyphs_of(console.encoding)
    for note in notes:
        console.print(f"note: {note}", style="yellow")
    for view in views:
        _print(console, view, glyphs)


def _print(console: Any, view: View, glyphs: Glyphs) -> None:
    from rich.text import Text

    console.print(view.title, style="bold")
    for name, value in view.facts:
        console.print(f"  {name:<10} {line(value)}")
    if view.refusal:
        console.print(f"  refused    {line(view.refusal)}", style="bold red")
    console.print()
    for part, pieces in groupby(view.pieces, key=lambda piece: piece.part):
        members = list(pieces)
        if view.pieces[-1].part:
            console.print(f"{glyphs.rule * 4} {part_title(part, members)}", style="bold")
        console.print(Text.assemble(*_spans(members, glyphs)))
    if view.tail:
        console.print(f"{glyphs.rule * 4} {view.why}", style="bold yellow")
        for role, content in view.tail:
            console.print(f"{role}: {line(content)}", style="dim strike")
    console.print()
    for colour, text in _table(view) if view.rows else ():
        console.print(text, style=colour)
    legend = _legend(view)
    if legend:
        console.print(f"\n{legend}", style="dim")
    console.print()


def _legend(view: View) -> str:
    """What the brackets mean that are there."""
    meanings = {
        "[n ...] trained tokens of turn n, with the token that ends it": any(p.ids and p.trained for p in view.pieces),
        "<n ...> an answer with weight 0": any(p.turn != CONTEXT and not p.trained for p in view.pieces),
        f"[n {ANSWER}] nothing is trained yet": any(not p.ids for p in view.pieces),
        "* the class that trains": bool(view.rows),
        "advantage: at the start, the residual moves it": view.weighed == ADVANTAGE,
    }
    return "; ".join(text for text, there in meanings.items() if there)


def line(text: str) -> str:
    """``text`` in one line, its end left out where it is long, nothing in it that a terminal would obey."""
    shown = visible(text.replace("\n", " "), "x", "x", (" ", " ", " "))
    return shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}... ({len(text):,} characters)"


def part_title(part: int, pieces: Sequence[Piece]) -> str:
    """What one of several parts is."""
    turns = list(dict.fromkeys(str(piece.turn) for piece in pieces if piece.trained))
    return f"part {part + 1}: what the model sees when it answers turn {', '.join(turns)}"


def _spans(pieces: Sequence[Piece], glyphs: Glyphs) -> Iterator[tuple[str, str]]:
    """(text, style) of every token and bracket of one part."""
    shown = texts_of(pieces, glyphs.marks)
    read, number, lost = True, 0, any(piece.trained and not piece.read for piece in pieces)
    for (turn, trained), members in groupby(pieces, key=lambda piece: (piece.turn, piece.trained)):
        opened, closed = ("[", "]") if trained else ("<", ">")
        colour = TURNS[turn % len(TURNS)]
        if turn != CONTEXT:
            yield f"{opened}{turn} ", f"bold {colour}"
        for piece in members:
            if read and not piece.read and lost:
                yield f"\n{glyphs.rule * 4} not read from here on: no later turn has a weight\n", "bold yellow"
            read = read and piece.read
            text = shown[number] if piece.ids else ANSWER
            yield text, _style(piece, colour, number)
            number += 1
        if turn != CONTEXT:
            yield closed, f"bold {colour}"


def _style(piece: Piece, colour: str, number: int) -> str:
    """Neighbours differ in brightness, so that tokens can be told apart."""
    if piece.turn == CONTEXT:
        return "bold grey62" if piece.special else ("grey62", "grey78")[number % 2]
    if not piece.trained:
        return "dim"
    style = (colour, f"bright_{colour}")[number % 2]
    return f"reverse {style}" if piece.ends else style if piece.read else f"dim {style}"


def texts_of(pieces: Sequence[Piece], marks: tuple[str, str, str]) -> list[str]:
    """What is shown of each piece, between its neighbours; special tokens are bounds."""
    bounds = [
        "" if not 0 <= place < len(pieces) or pieces[place].special or not pieces[place].ids else pieces[place].text
        for place in range(-1, len(pieces) + 1)
    ]
    return [visible(piece.text, bounds[place], bounds[place + 2], marks) for place, piece in enumerate(pieces)]


def columns_of(view: View) -> list[str]:
    """The names of the table's columns; the class that trains has a star."""
    parts = ["part"] if any(row.part for row in view.rows) else []
    classes = [f"{name}*" if name == view.chosen else name for name in view.rows[0].returns]
    based = ["baseline"] if view.baseline != "none" else []
    return ["turn", "tokens", *parts, "reward", *classes, *based, view.weighed, ""]


def cells_of(view: View) -> Iterator[list[str]]:
    """The table's rows, one a turn."""
    parts, based = any(row.part for row in view.rows), view.baseline != "none"
    for row in view.rows:
        part = ["-" if row.part is None else str(row.part + 1)] if parts else []
        reward = "-" if row.reward is None else number(row.reward)
        returns = [number(value) for value in row.returns.values()]
        baseline = [number(row.baseline)] if based else []
        yield [
            str(row.turn),
            str(row.tokens),
            *part,
            reward,
            *returns,
            *baseline,
            number(row.weight) if row.tokens else "-",
            "; ".join(row.notes),
        ]


def number(value: float) -> str:
    """Four digits, as short as they can be."""
    return f"{value:.4g}"


def _table(view: View) -> Iterator[tuple[str, str]]:
    """(style, text) of the table's head and of each turn's line."""
    columns, rows = columns_of(view), list(cells_of(view))
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for cells in (columns, *rows):
        aligned = [f"{cell:>{width}}" for cell, width in zip(cells[:-1], widths[:-1], strict=True)]
        style = "bold" if cells is columns else TURNS[int(cells[0]) % len(TURNS)]
        yield style, "  ".join([*aligned, cells[-1]]).rstrip()

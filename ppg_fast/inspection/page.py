"""Views as one page for a browser, which needs nothing but itself."""

import base64
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import groupby

from ppg_fast.inspection.assets import SCRIPT, STYLE
from ppg_fast.inspection.terminal import ANSWER, cells_of, columns_of, line, part_title, texts_of
from ppg_fast.inspection.view import CONTEXT, Piece, View

MARKS = ("·", "↵\n", "→\t")
HUES = (140, 195, 300, 45, 230, 15)  # of turns, in turn
LEGEND = (
    ("", "t", "context", "read, not trained"),
    ("turn", "t", "answer", "trained tokens of a turn; each turn has a colour and its number"),
    ("turn", "t e", "<end>", "the token that ends an answer, trained too"),
    ("turn off", "t", "answer", "an answer with weight 0: not trained"),
    ("", "t u", "later", "not read in training"),
    ("", "t s", "<|special|>", "a special token"),
)


def html_page(title: str, views: Iterable[View], notes: Sequence[str] = ()) -> Iterator[str]:
    """The page, piece by piece. Whatever comes from the data is escaped, and no script but ours would run."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    yield f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{_text(title)}</title>\n'
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    yield f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{_text(title)}</h1>\n"
    yield from (f'<p class="note">{_text(note)}</p>\n' for note in notes)
    yield from _legend()
    for number, view in enumerate(views):
        yield from _section(view, number)
    yield '</main>\n<div id="token" role="status" aria-live="polite"></div>\n'
    yield f"<script>{SCRIPT}</script>\n</body>\n</html>\n"


def _text(text: str) -> str:
    """``text`` in one line, whole where it is short, escaped."""
    return escape(line(text))


def _legend() -> Iterator[str]:
    yield '<details open><summary>Legend</summary>\n<ul class="key">\n'
    for outer, inner, sample, meaning in LEGEND:
        shown = f'<span class="{outer}" style="--h:{HUES[0]}"><span class="{inner}">{escape(sample)}</span></span>'
        yield f"<li>{shown}{escape(meaning)}</li>\n"
    yield "<li>· a space that is not between two words, ↵ a line break, → a tab</li>\n"
    yield "<li>Point at a token or tap it for its number; with the text focused, the arrow keys go from token to token "
    yield "(left, right) and from turn to turn (up, down).</li>\n</ul></details>\n"


def _section(view: View, number: int) -> Iterator[str]:
    yield f'<section aria-labelledby="d{number}">\n<h2 id="d{number}">{_text(view.title)}</h2>\n<dl>\n'
    yield from (f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>\n" for name, value in view.facts)
    yield "</dl>\n"
    if view.refusal:
        yield f'<p class="refused">refused: {_text(view.refusal)}</p>\n'
    for part, pieces in groupby(view.pieces, key=lambda piece: piece.part):
        members = list(pieces)
        if view.pieces[-1].part:
            yield f"<h3>{escape(part_title(part, members))}</h3>\n"
        label = f"tokens of part {part + 1}; arrow keys go from token to token"
        yield f'<div class="text" tabindex="0" role="group" aria-label="{label}">'
        yield from _tokens(members, f"d{number}")
        yield "</div>\n"
    if view.tail:
        yield f'<p class="cut">{_text(view.why)}</p>\n'
        yield from (f'<p class="tail">{_text(role)}: {_text(content)}</p>\n' for role, content in view.tail)
    if view.rows:
        yield from _table(view, f"d{number}")
    yield "</section>\n"


def _tokens(pieces: Sequence[Piece], name: str) -> Iterator[str]:
    shown, place, read = texts_of(pieces, MARKS), 0, True
    lost = any(piece.trained and not piece.read for piece in pieces)
    for (turn, trained), members in groupby(pieces, key=lambda piece: (piece.turn, piece.trained)):
        if turn != CONTEXT:
            kind = "turn" if trained else "turn off"
            yield f'<span class="{kind}" id="{name}t{turn}" style="--h:{HUES[turn % len(HUES)]}">'
            yield f'<b class="tag">{turn}</b>'
        for piece in members:
            if read and not piece.read and lost:
                yield '<i class="cut">not read from here on: no later turn has a weight</i>'
            read = read and piece.read
            yield _token(piece, shown[place]) if piece.ids else f'<i class="tag">{ANSWER}</i>'
            place += 1
        if turn != CONTEXT:
            yield "</span>"


def _token(piece: Piece, text: str) -> str:
    kinds = "t" + " s" * piece.special + " e" * piece.ends + " u" * (not piece.read)
    whose = "context" if piece.turn == CONTEXT else f"turn {piece.turn}" + ", not trained" * (not piece.trained)
    named = " ".join(f"{number} {line(str(name))!r}" for number, name in zip(piece.ids, piece.names, strict=True))
    title = escape(f"token {named}, position {piece.position}, {whose}")
    return f'<span class="{kinds}" title="{title}">{escape(text)}</span>'


def _table(view: View, name: str) -> Iterator[str]:
    columns = columns_of(view)
    yield '<div class="wide" tabindex="0" role="group" aria-label="table by turn"><table>\n<thead><tr>'
    for column in columns:
        kind = ' class="chosen"' if column == f"{view.chosen}*" else ""
        yield f'<th scope="col"{kind}>{escape(column)}</th>'
    yield "</tr></thead>\n<tbody>\n"
    for turn, *cells in cells_of(view):
        hue = HUES[int(turn) % len(HUES)]
        yield f'<tr><th scope="row"><a href="#{name}t{turn}" style="--h:{hue}">{turn}</a></th>'
        for column, cell in zip(columns[1:], cells, strict=True):
            kind = ' class="chosen"' if column == f"{view.chosen}*" else ""
            yield f"<td{kind}>{escape(cell)}</td>"
        yield "</tr>\n"
    yield "</tbody></table></div>\n"

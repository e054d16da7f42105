"""Charts of bars and lines as SVG text: the same bytes from the same numbers, whatever is installed."""

from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLOURS = {"ours": "#1a7f5a", "peer": "#8a94a6", "ceiling": "#d9a441"}
LEFT, BAR, ROW, WIDTH = 300, 400, 24, 800


@dataclass(frozen=True)
class Bar:
    """One line of the chart; ``text`` stands behind the bar."""

    label: str
    value: float
    kind: str
    text: str


def bars(title: str, lines: Sequence[Bar]) -> str:
    """Horizontal bars on a linear scale from zero."""
    longest = max(line.value for line in lines)
    height = 44 + ROW * len(lines)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="22" font-weight="600" fill="#1f2430">{escape(title)}</text>',
    ]
    for number, line in enumerate(lines):
        y = 36 + ROW * number
        width = max(1.0, BAR * line.value / longest)
        out.append(f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end" fill="#1f2430">{escape(line.label)}</text>')
        out.append(
            f'<rect x="{LEFT}" y="{y + 3}" width="{width:.1f}" height="{ROW - 8}" rx="2" fill="{COLOURS[line.kind]}"/>'
        )
        out.append(f'<text x="{LEFT + width + 6:.1f}" y="{y + 15}" fill="#1f2430">{escape(line.text)}</text>')
    return "\n".join([*out, "</svg>", ""])


@dataclass(frozen=True)
class Line:
    """One line of a panel: points (x, y), drawn in the colour of ``kind``. Lines of one label share it."""

    label: str
    points: Sequence[tuple[float, float]]
    kind: str


PANEL, HIGH = 360, 220  # of one panel, in pixels


def lines(panels: Sequence[tuple[str, Sequence[Line]]]) -> str:
    """Panels side by side, each with a title and axes of its own, from x = 0."""
    width, height = 24 + (PANEL + 40) * len(panels), HIGH + 96
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for number, (title, drawn) in enumerate(panels):
        out += _panel(title, drawn, 52 + (PANEL + 40) * number)
    named = {line.label: line.kind for _, drawn in panels for line in drawn}
    for number, (label, kind) in enumerate(named.items()):
        x = 24 + 265 * number
        out.append(f'<rect x="{x}" y="{height - 22}" width="18" height="4" fill="{COLOURS[kind]}"/>')
        out.append(f'<text x="{x + 24}" y="{height - 15}" fill="#1f2430">{escape(label)}</text>')
    return "\n".join([*out, "</svg>", ""])


def _panel(title: str, drawn: Sequence[Line], left: int) -> list[str]:
    """A frame with the least and the greatest value on its axes, and the lines."""
    points = [point for line in drawn for point in line.points]
    most, low, high = max(x for x, _ in points), min(y for _, y in points), max(y for _, y in points)
    span, wide = (high - low) or 1.0, PANEL - 24
    out = [
        f'<text x="{left}" y="22" font-weight="600" fill="#1f2430">{escape(title)}</text>',
        f'<rect x="{left}" y="36" width="{wide}" height="{HIGH}" fill="none" stroke="#8a94a6"/>',
    ]
    for y, value in ((36 + HIGH - 6, low), (46, high)):
        out.append(f'<text x="{left - 6}" y="{y}" text-anchor="end" fill="#1f2430">{value:.2f}</text>')
    for x, text, anchor in ((left, "0", "start"), (left + wide, f"step {most:g}", "end")):
        out.append(f'<text x="{x}" y="{HIGH + 54}" text-anchor="{anchor}" fill="#1f2430">{text}</text>')
    for line in drawn:
        places = (
            f"{left + wide * x / (most or 1):.1f},{36 + 8 + (HIGH - 16) * (high - y) / span:.1f}"
            for x, y in line.points
        )
        out.append(
            f'<polyline points="{" ".join(places)}" fill="none" stroke="{COLOURS[line.kind]}" stroke-width="2"/>'
        )
    return out

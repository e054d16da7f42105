"""Bar charts as SVG text: the same bytes from the same numbers, whatever is installed."""

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

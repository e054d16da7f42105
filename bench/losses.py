"""docs/losses.md from the code's own tables: the losses, their numbers, the presets, and the weight of each over the
ratio, as the float64 reference has it."""

from xml.sax.saxutils import escape

import torch

from ppg_fast.losses import LOSSES, PRESETS, SEQUENCE_LEVEL, LossType
from ppg_fast.reference import loss_from_logprobs
from ppg_fast.spec import PolicyLossSpec

from .tables import Results, table

CHART = "losses.weights.svg"
AS_OTHERS = ("gspo", "gspo_turn", "gmpo_turn")  # they weigh as ppo and gmpo
DRAWN = [kind for kind in LossType if kind.name.lower() not in AS_OTHERS]
OLD = (0.3, 0.02)  # probabilities of the token that acted: a likely one, a rare one
MOST = 3.0  # the highest weight that is drawn
WIDTH, HEIGHT, LEFT, TOP, GAP, COLUMNS = 200, 130, 40, 64, 46, 3
STYLES = {  # sign of the advantage, which of OLD -> how it is drawn
    (1.0, 0): 'stroke="#1a7f5a" stroke-width="2.2"',
    (-1.0, 0): 'stroke="#c0392b" stroke-width="2.2" stroke-dasharray="6 4"',
    (1.0, 1): 'stroke="#1a7f5a" stroke-width="1" opacity="0.75"',
    (-1.0, 1): 'stroke="#c0392b" stroke-width="1" stroke-dasharray="2 3" opacity="0.75"',
}


def _code(name: str) -> str:
    return f"`{name}`"


def _numbers(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in numbers.items())


def losses_section(_: Results) -> str:
    rows = [
        (_code(kind.name.lower()), loss.value, loss.weight, loss.corrects, loss.users, loss.source)
        for kind, loss in LOSSES.items()
    ]
    heads = ("loss_type", "of a token", "w: d/dl = -A w", "what it corrects", "who uses it", "source")
    return _of_text(heads, rows)


def numbers_section(_: Results) -> str:
    rows = []
    for kind, loss in LOSSES.items():
        name = kind.name.lower()
        sweeps = "2" if name in SEQUENCE_LEVEL else "1"
        rows.append((_code(name), _numbers(loss.uses) or "none", sweeps))
    return _of_text(("loss_type", "its numbers, with their defaults", "sweeps over the vocabulary"), rows)


def presets_section(_: Results) -> str:
    rows = []
    for name, preset in PRESETS.items():
        numbers = dict(preset.numbers)
        kind = numbers.pop("loss_type")
        rows.append((_code(name), _code(kind), _numbers(numbers) or "its defaults", preset.reduction, preset.source))
    return _of_text(("preset", "loss_type", "changed", "reduction that goes with it", "source"), rows)


def weights_section(_: Results) -> str:
    return f"![weights of the losses over the ratio](../bench/results/{CHART})\n"


SECTIONS = {
    "losses": losses_section,
    "loss_numbers": numbers_section,
    "loss_weights": weights_section,
    "loss_presets": presets_section,
}


def _of_text(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A table of words, aligned to the left; a bar inside of a cell would end it."""
    cells = [tuple(cell.replace("|", "\\|") for cell in row) for row in rows]
    return table(heads, cells).replace("---:", "---")


def weights(kind: LossType, ratios: list[float], advantage: float, old: float) -> list[float]:
    """w of a token at each ratio, minus the derivative of its loss in its log-prob over A; the sampler's log-prob is
    the old one, and NaN where the token would have a probability above 1."""
    at = torch.tensor(ratios, dtype=torch.float64)
    before = torch.full_like(at, old).log()
    l = (before + at.log()).requires_grad_()
    spec, alone = PolicyLossSpec(kind.name.lower()), (torch.arange(len(at)), len(at))  # a sequence of one token each
    A, active = torch.full_like(at, advantage), torch.ones(len(at), dtype=torch.bool)
    shared = alone if kind.name.lower() in SEQUENCE_LEVEL else None
    value = loss_from_logprobs(l, None, active, A, None, before, None, None, spec, shared)
    (slope,) = torch.autograd.grad(value.sum(), l)
    return (-slope / advantage).masked_fill(at * old > 1, torch.nan).tolist()


def chart() -> str:
    """One panel a loss: its weight over the ratio, by the sign of the advantage and the old probability."""
    ratios = [(n + 0.5) / 20 for n in range(120)]  # 0 to 6, between the round numbers that bounds are
    lines = -(-len(DRAWN) // COLUMNS)
    width, height = LEFT + COLUMNS * (WIDTH + GAP), TOP + lines * (HEIGHT + GAP)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *_legend(),
    ]
    for number, kind in enumerate(DRAWN):
        x, y = LEFT + number % COLUMNS * (WIDTH + GAP), TOP + number // COLUMNS * (HEIGHT + GAP)
        out += _panel(kind, ratios, x, y)
    return "\n".join([*out, "</svg>", ""])


def _legend() -> list[str]:
    names = [f"A {'>' if sign > 0 else '<'} 0, old probability {OLD[which]:g}" for sign, which in STYLES]
    out = []
    for number, (name, style) in enumerate(zip(names, STYLES.values(), strict=True)):
        x, y = LEFT + number % 2 * 330, 16 + number // 2 * 20
        out.append(f'<path d="M{x} {y}h40" fill="none" {style}/>')
        out.append(f'<text x="{x + 48}" y="{y + 4}" fill="#1f2430">{escape(name)}</text>')
    return out


def _panel(kind: LossType, ratios: list[float], x: int, y: int) -> list[str]:
    across, up = WIDTH / 6, HEIGHT / MOST
    out = [f'<rect x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#c9ced6"/>']
    out += [f'<text x="{x + 6}" y="{y + 16}" font-weight="600" fill="#1f2430">{kind.name.lower()}</text>']
    for mark in range(0, 7, 2):
        at = x + across * mark
        out.append(f'<text x="{at:.0f}" y="{y + HEIGHT + 15}" text-anchor="middle" fill="#5b6472">{mark}</text>')
    for mark in range(int(MOST) + 1):
        at = y + HEIGHT - up * mark
        out.append(f'<text x="{x - 6}" y="{at + 4:.0f}" text-anchor="end" fill="#5b6472">{mark}</text>')
    for (sign, which), style in STYLES.items():
        points = zip(ratios, weights(kind, ratios, sign, OLD[which]), strict=True)
        path, pen = "", "M"
        for ratio, weight in points:
            if not 0 <= weight <= MOST:  # NaN too
                pen = "M"
                continue
            path += f"{pen}{x + across * ratio:.1f} {y + HEIGHT - up * weight:.1f}"
            pen = "L"
        out.append(f'<path d="{path}" fill="none" {style}/>')
    return out

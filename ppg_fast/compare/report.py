"""The report of a comparison: one HTML file that needs nothing else."""

import base64
import html
from collections.abc import Iterable, Sequence
from typing import Any

from ppg_fast.compare import across, plots
from ppg_fast.rollouts.problems import DRAWN

STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:1150px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.7em 0}td,th{padding:.15em .7em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}tr.own{font-weight:600}img{max-width:100%}li.bad{color:#a00}small{color:#666}"""

READING = """Return: expected, without noise. Area: mean return over training. Level: 80 % of the way from the start
to the best return; the number is the median of the dialogues it took, where more than half of the seeds reached it.
± : standard deviation over seeds; bands: 95 % bootstrap intervals of the mean. Verdicts compare within seeds, by
standard errors of the paired difference; the rival is the best of the others after the fact, which favours it.
Gradient columns are at the start, for the mean over one step's dialogues: variance is the trace of the covariance;
bias the distance of the expected gradient from that of the true return; cosine the angle between the two; alignment
the expected cosine of ONE step's gradient with the true one, which bias and variance lower both. Tabular: exact, by
enumeration. Language model: measured on independent batches, in the space of all its parameters, a bias by two
standard errors to both sides of its square; beside it the alignment that auto estimates from score norms."""


def _number(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def table(heads: Sequence[str], rows: Iterable[tuple[Sequence[str], bool]]) -> str:
    """Rows with whether they are set off."""
    head = "".join(f"<th>{html.escape(h)}</th>" for h in heads)
    body = "".join(
        f"<tr{' class=own' if own else ''}>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row, own in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def class_row(name: str, c: dict[str, Any], g: dict[str, Any] | None) -> list[str]:
    """Cells of one class: see `HEADS`."""
    final, area = (f"{_number(c[k]['mean'])} ± {_number(c[k]['std'])}" for k in ("final", "area"))
    level = f"{c['level_samples']:,.0f}" if c["level_samples"] is not None else "not reached"
    row = [name, final, area, f"{level} ({c['level_reached']}/{len(c['seeds'])})"]
    g = g or {}
    row += [_number(g.get("variance"), 3), bias_text(g)]
    return [*row, *(_number(g.get(k), 3) for k in ("cosine", "alignment", "alignment_by_score_norms"))]


def bias_text(g: dict[str, Any]) -> str:
    """An exact bias, or the interval of a measured one."""
    if not g.get("bias_high"):  # exact, or the measure of all others
        return _number(g.get("bias"), 3)
    return f"{g['bias_low']:.1f} to {g['bias_high']:.1f}" if g["bias_low"] else f"below {g['bias_high']:.1f}"


HEADS = (
    "class",
    "final return",
    "area",
    "dialogues to level (seeds)",
    "variance",
    "bias",
    "cosine",
    "alignment",
    "the same by score norms",
)


def _image(svg: str) -> str:
    return f'<img alt="plot" src="data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}">'


def _problem(versions: list[dict[str, Any]]) -> str:
    first = versions[0]
    text = f"<h2>{first['problem']}: made for {first['policy_class']}</h2><p>{html.escape(first['why'])}. "
    text += f"Best return {first['best_return']:g}.</p>" + _image(plots.curves(versions))
    if any(p["gradient"] for p in versions):
        text += _image(plots.gradients(versions))
    for p in versions:
        rows = [
            (class_row(n, c, (p["gradient"] or {}).get(n)), n == p["policy_class"]) for n, c in p["classes"].items()
        ]
        text += f"<h3>{p['version']}</h3>" + table(HEADS, rows)
        items = (f"<li{' class=bad' if v.startswith('NOT') else ''}>{html.escape(v)}</li>" for v in p["verdict"])
        text += f"<ul>{''.join(items)}</ul>"
    return text


def _across(entry: dict[str, Any], problems: list[dict[str, Any]]) -> str:
    text = f"<h2>{html.escape(across.title(entry))}</h2>" + _image(plots.shares(entry))
    text += table(across.HEADS, ((row, row[0] == "auto") for row in across.rows(entry)))
    text += f"<p><small>{across.READING}</small></p>"
    if entry["drawn"]:
        facts = {
            p["problem"]: f"{p['problem']} ({p['why'].removeprefix('drawn: ')}, {p['policy_class']})" for p in problems
        }
        shares = zip(*(c["each"] for c in entry["classes"].values()), strict=True)
        rows = (
            ([facts[n], *(f"{x:.0%}" for x in each)], False) for n, each in zip(entry["problems"], shares, strict=True)
        )
        text += f"<details><summary>every one of them</summary>{table(('', *entry['classes']), rows)}</details>"
    return text


def _log(log: dict[str, Any]) -> str:
    credit = log["credits"]
    text = (
        f"<h2>{html.escape(log['data'])}</h2><p>{credit['dialogues']} dialogues, {credit['turns']} turns, mean reward "
    )
    text += (
        f"{credit['reward']:.3f} a turn{'; rewards decomposed: ' + log['decompose'] if log['decompose'] else ''}.</p>"
    )
    text += "".join(f"<p><small>warning: {html.escape(w)}</small></p>" for w in log["warnings"])
    text += _image(plots.credits(log))
    heads = ("class", "turns credited", "effective share", *(f"turn {t}" for t in credit["shown"]))
    rows = [
        (
            [
                n,
                f"{c['credited']:.0%}",
                f"{c['effective']:.0%}",
                *(_number(c["by_turn"][t - 1]) for t in credit["shown"]),
            ],
            False,
        )
        for n, c in credit["classes"].items()
    ]
    text += table(heads, rows)
    text += (
        "<p><small>Effective share: (sum w)&sup2; / (n sum w&sup2;) of the turns' weights, 100 % where all count "
        "alike.</small></p>"
    )
    text += _image(plots.scores(log))
    names = ("per_turn", "per_dialogue", "plain", "contrast")
    rows = [
        ([n, *(f"{c['final'][k]['mean']:.3f} ± {c['final'][k]['std']:.3f}" for k in names)], False)
        for n, c in log["classes"].items()
    ]
    text += table(("class", "weighted per turn", "weighted per dialogue", "plain", "paid minus unpaid"), rows)
    note = (
        "On dialogues kept apart, nats a token, over seeds (each its own split, weights and order). imitation: "
        "every turn counts 1. "
    )
    note += (
        "Larger is better; likelihood says how well paid answers are imitated, not what a partner would pay for "
        "new ones."
    )
    return text + f"<p><small>{note}</small></p>"


def render(summary: dict[str, Any]) -> str:
    """The page."""
    body = "<h1>Policy classes side by side</h1>"
    body += f"<p><small>{html.escape(summary['command'])}; {summary['cpu_seconds']:,.0f} s of computing</small></p>"
    body += "".join(_across(entry, summary["problems"]) for entry in summary["across"])
    names = list(dict.fromkeys(p["problem"] for p in summary["problems"] if not p["problem"].startswith(DRAWN)))
    body += "".join(_problem([p for p in summary["problems"] if p["problem"] == name]) for name in names)
    body += _log(summary["log"]) if summary.get("log") else ""
    body += f"<h2>How to read it</h2><p>{READING}</p>" if names else ""
    title = "<title>Policy classes side by side</title>"
    return (
        '<!doctype html><html lang="en"><meta '
        f'charset="utf-8">{title}<style>{STYLE}</style><body>{body}</body></html>\n'
    )

"""The report of a comparison as a page: one HTML file that needs nothing else."""

import base64
import html
from typing import Any

from ppg_fast.compare import across, plots
from ppg_fast.compare.columns import Table, across_table, class_table, credit_table, score_table, share_table
from ppg_fast.rollouts.problems import DRAWN

STYLE = """body{font:15px/1.45 system-ui,sans-serif;max-width:1150px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.7em 0}td,th{padding:.15em .7em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}tr.own{font-weight:600}img{max-width:100%}li.bad{color:#a00}small{color:#666}"""

READING = """Return: expected, without noise. Mean return: over training. Level: 80 % of the way from the start
to the best return; the number is the median of the dialogues it took, where more than half of the seeds reached it.
± : standard deviation over seeds; bands: 95 % bootstrap intervals of the mean. Verdicts compare within seeds, by
standard errors of the paired difference; the rival is the best of the others after the fact, which favours it.
Gradient columns are at the start, for the mean over one step's dialogues: variance is the trace of the covariance;
bias the distance of the expected gradient from that of the true return; cosine the angle between the two; alignment
the expected cosine of ONE step's gradient with the true one, which bias and variance lower both. Tabular: exact, by
enumeration. Language model: measured on independent batches, in the space of all its parameters, a bias by two
standard errors to both sides of its square."""

READING_CREDITS = """Effective share: (sum w)&sup2; / (n sum w&sup2;) of the turns' weights, 100 % where all count
alike."""
READING_SCORES = """On dialogues kept apart, nats a token, over seeds (each its own split, weights and order).
imitation: every turn counts 1. Larger is better; likelihood says how well paid answers are imitated, not what a partner
would pay for new ones."""


def table(given: Table, own: str = "") -> str:
    """In HTML, with the row named ``own`` set off."""
    lines = (
        f"<tr{' class=own' if row[0] == own else ''}>{''.join(f'<td>{html.escape(text)}</td>' for text in row)}</tr>"
        for row in given.rows
    )
    heads = "".join(f"<th>{html.escape(head)}</th>" for head in given.heads)
    return f"<table><tr>{heads}</tr>{''.join(lines)}</table>"


def image(svg: str) -> str:
    """A plot in HTML."""
    return f'<img alt="plot" src="data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}">'


def _problem(versions: list[dict[str, Any]]) -> str:
    first = versions[0]
    text = f"<h2>{first['problem']}: made for {first['policy_class']}</h2><p>{html.escape(first['why'])}. "
    text += f"Best return {first['best_return']:g}.</p>" + image(plots.curves(versions))
    if any(p["gradient"] for p in versions):
        text += image(plots.gradients(versions))
    for p in versions:
        text += f"<h3>{p['version']}</h3>" + table(class_table(p), p["policy_class"])
        items = (f"<li{' class=bad' if v.startswith('NOT') else ''}>{html.escape(v)}</li>" for v in p["verdict"])
        text += f"<ul>{''.join(items)}</ul>"
    return text


def _across(entry: dict[str, Any], problems: list[dict[str, Any]]) -> str:
    text = f"<h2>{html.escape(across.title(entry))}</h2>" + image(plots.shares(entry))
    text += table(across_table(entry), "auto") + f"<p><small>{across.READING}</small></p>"
    if entry["drawn"]:
        each = table(share_table(entry, problems))
        text += f"<details><summary>every one of them</summary>{each}</details>"
    return text


def _log(log: dict[str, Any]) -> str:
    credit, how = log["credits"], f"; rewards decomposed: {log['decompose']}" if log["decompose"] else ""
    counts = f"{credit['dialogues']} dialogues, {credit['turns']} turns, mean reward {credit['reward']:.3f} a turn"
    warned = "".join(f"<p><small>warning: {html.escape(w)}</small></p>" for w in log["warnings"])
    return (
        f"<h2>{html.escape(log['data'])}</h2><p>{counts}{how}.</p>{warned}"
        + image(plots.credits(log))
        + table(credit_table(log))
        + f"<p><small>{READING_CREDITS}</small></p>"
        + image(plots.scores(log))
        + table(score_table(log))
        + f"<p><small>{READING_SCORES}</small></p>"
    )


def render(summary: dict[str, Any]) -> str:
    """The page."""
    body = "<h1>Policy classes side by side</h1>"
    body += f"<p><small>{html.escape(summary['command'])}; {summary['cpu_seconds']:,.0f} s of computing</small></p>"
    body += "".join(_across(entry, summary["problems"]) for entry in summary["across"])
    names = list(dict.fromkeys(p["problem"] for p in summary["problems"] if not p["problem"].startswith(DRAWN)))
    body += "".join(_problem([p for p in summary["problems"] if p["problem"] == name]) for name in names)
    body += _log(summary["log"]) if summary.get("log") else ""
    body += f"<h2>How to read it</h2><p>{READING}</p>" if names else ""
    return whole("Policy classes side by side", body)


def whole(title: str, body: str) -> str:
    """A page of its own."""
    return (
        '<!doctype html><html lang="en"><meta '
        f'charset="utf-8"><title>{title}</title><style>{STYLE}</style><body>{body}</body></html>\n'
    )

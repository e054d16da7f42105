"""From result files to documents: every number between `<!-- bench:NAME -->` and `<!-- /bench -->` is written here and nowhere else."""

import json
import re
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from .chart import Bar, bars

Results = dict[str, dict[str, Any]]  # "policy_loss.cpu" -> the file
Entry = dict[str, Any]
MARKED = re.compile(r"(<!-- bench:(\w+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)
DOCUMENTS = ("docs/benchmarks.md", "README.md")
RESULTS = Path("bench/results")
NOT_MEASURED = "not measured yet\n"
DEVICES = ("cpu", "cuda")


def load(folder: Path) -> Results:
    """Every result file of a folder, by its stem."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def _of(results: Results, op: str) -> list[tuple[str, dict[str, Any]]]:
    return [(device, results[f"{op}.{device}"]) for device in DEVICES if f"{op}.{device}" in results]


# ---- one number ------------------------------------------------------------------------------------------------------------------------
def duration(seconds: float) -> str:
    """Three digits with their unit."""
    value, unit = (seconds * 1e6, "µs") if seconds < 1e-3 else (seconds * 1e3, "ms") if seconds < 10 else (seconds, "s")
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}" if value < 10 else f"{value:.1f} {unit}"


def _memory(info: dict[str, Any]) -> str:
    peak = info.get("peak_extra_bytes")
    return "" if peak is None else f"{peak / 2**20:,.0f} MiB"


def _share(info: dict[str, Any]) -> str:
    return f"{info['share_of_ceiling']:.0%} of {info['ceiling']}" if "share_of_ceiling" in info else ""


def _error(info: dict[str, Any]) -> str:
    return "" if not info.get("error") else f"{max(info['error'].values()):.1e}" + ("" if info["correct"] else " (wrong)")


def _spread(stats: dict[str, Any]) -> str:
    return f"{duration(stats['p20'])} to {duration(stats['p80'])}"


def best_of_ours(entries: Iterable[Entry]) -> Entry | None:
    """The fastest of ours whose result was right in this run."""
    ours = [e for e in entries if e["extra_info"]["kind"] == "ours" and e["extra_info"].get("correct")]
    return min(ours, key=lambda e: e["stats"]["median"], default=None)


def speedup(entry: Entry, ours: Entry | None) -> str:
    """How many times our time a peer needs; nothing where either result was wrong."""
    info = entry["extra_info"]
    if ours is None or info["kind"] != "peer" or not info.get("correct"):
        return ""
    return f"{entry['stats']['median'] / ours['stats']['median']:.2f} x"


# ---- tables ----------------------------------------------------------------------------------------------------------------------------
HEADINGS = ("", "median", "p20 to p80", "min", "rounds", "time / ours", "share of the ceiling", "peak extra memory", "error")


def table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, numbers to the right."""
    head = list(headings)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _ordered(entries: list[Entry]) -> list[Entry]:
    rank = {"ceiling": 0, "ours": 1, "peer": 2}
    return sorted(entries, key=lambda e: (rank[e["extra_info"]["kind"]], e["stats"]["median"]))


def group_table(entries: list[Entry]) -> str:
    """Everybody who took part in one case."""
    ours = best_of_ours(entries)
    rows = []
    for entry in _ordered(entries):
        info, stats = entry["extra_info"], entry["stats"]
        times = duration(stats["median"]), _spread(stats), duration(stats["min"]), str(stats["rounds"])
        rows.append((entry["param"], *times, speedup(entry, ours), _share(info), _memory(info), _error(info)))
    return table(HEADINGS, rows)


def _title(params: dict[str, Any]) -> str:
    names = {"partial_returns": ("dialogues", "turns")}.get(params["op"], ("N", "V"))
    parts = [f"{names[0]} {params['N']:,}", f"{names[1]} {params['V']:,}"] + ([f"D {params['D']:,}"] if params["D"] else [])
    parts += [params["variant"]] if params["variant"] else []
    parts += [params["dtype"]] if params["op"] != "partial_returns" else []
    parts += [f"{params['active']:.0%} of the rows active"] if params["active"] < 1 else []
    parts += [f"{params['zero']:.0%} of the turns with zero advantage"] if params["zero"] else []
    if params["device"] == "cpu":
        parts += [f"{params['threads']} thread{'s' * (params['threads'] > 1)}", f"{params['allocator']} allocator"]
    return ", ".join(parts)


def _groups(file: dict[str, Any]) -> list[list[Entry]]:
    return [list(entries) for _, entries in groupby(file["benchmarks"], key=lambda e: e["group"])]


def _absent(file: dict[str, Any]) -> str:
    return "".join(f"- {name}: {reason}\n" for name, reason in sorted(file["ppg_fast"]["missing"].items()))


def _op_section(op: str) -> Callable[[Results], str]:
    def section(results: Results) -> str:
        text = ""
        for device, file in _of(results, op):
            for entries in _groups(file):
                text += f"\n**{_title(entries[0]['params'])}** ({device})\n\n{group_table(entries)}"
            text += f"\nDid not take part ({device}):\n\n{_absent(file)}" if file["ppg_fast"]["missing"] else ""
            text += "".join(f"\n![{name}](../{RESULTS}/{name})\n" for name in sorted(_charts_of(op, device, file)))
        return text.lstrip("\n") or NOT_MEASURED

    return section


def _active_section(results: Results) -> str:
    """Time against the share of rows that count, one line a provider."""
    text = ""
    for device, file in _of(results, "linear"):

        def size(entry: Entry) -> tuple[Any, ...]:
            return tuple(entry["params"][name] for name in ("N", "V", "D", "dtype", "threads"))

        for shape in dict.fromkeys(map(size, file["benchmarks"])):
            entries = [e for e in file["benchmarks"] if size(e) == shape]
            columns = list(dict.fromkeys((e["params"]["active"], e["params"]["zero"]) for e in entries))
            if len(columns) < 2:
                continue
            cell = {(e["param"], e["params"]["active"], e["params"]["zero"]): e for e in _ordered(entries)}
            heads = [f"{active:.0%} active" + (f", {zero:.0%} zero" if zero else "") for active, zero in columns]
            rows = [[name, *(_right(cell.get((name, *column))) for column in columns)] for name in dict.fromkeys(name for name, *_ in cell)]
            N, V, D, dtype, threads = shape
            text += f"\n**N {N:,}, V {V:,}, D {D:,}, {dtype}** ({device}, {threads} threads; medians)\n\n{table(['', *heads], rows)}"
    return text.lstrip("\n") or NOT_MEASURED


def _right(entry: Entry | None) -> str:
    if entry is None:
        return ""
    return duration(entry["stats"]["median"]) + ("" if entry["extra_info"].get("correct", True) else " (wrong)")


def _step_section(results: Results) -> str:
    text = ""
    for device, file in _of(results, "training_step"):
        for entries in _groups(file):
            rows, ours = [], best_of_ours(entries)
            for entry in _ordered(entries):
                info = entry["extra_info"]
                step = duration(entry["stats"]["median"]), f"{info['tokens_per_second']:,.0f}", f"{info['loss_share']:.0%}"
                rows.append((entry["param"], *step, speedup(entry, ours), _memory(info), _error(info)))
            some = entries[0]["extra_info"]
            text += f"\n**{_title(entries[0]['params'])}** ({device}): "
            text += f"{some['tokens']:,} tokens, {some['active_tokens']:,} of them the policy's\n\n"
            text += table(("", "step", "tokens/s", "of it head and loss", "time / ours", "peak extra memory", "error"), rows)
        text += f"\nDid not take part ({device}):\n\n{_absent(file)}" if file["ppg_fast"]["missing"] else ""
    return text.lstrip("\n") or NOT_MEASURED


def _machine_section(results: Results) -> str:
    text = ""
    for name, file in results.items():
        info, ours = file["machine_info"], file["ppg_fast"]
        cpu, gpu = info["cpu"], info.get("gpu")
        place = f"{gpu['name']}, " if gpu else ""
        place += f"{cpu['brand_raw']}, {cpu['count']} cores, {cpu['last_level_cache'] / 2**20:.0f} MiB last-level cache, "
        place += f"{info['memory_bytes'] / 2**30:.0f} GiB"
        versions = ", ".join(f"{package} {version}" for package, version in ours["versions"].items())
        commit = file["commit_info"]["id"][:12] + (" with changes" if file["commit_info"]["dirty"] else "")
        text += f"- `{name}`: {place}; {info['system']} {info['release']}, {info['libc']}, Python {info['python_version']}; {versions}; "
        text += f"commit {commit}; {file['datetime']}; `{ours['command']}`; load before {ours['load_before']}\n"
    return text or NOT_MEASURED


def _summary_section(results: Results) -> str:
    """For the README: each op's largest setting, ours against the best of the others."""
    rows = []
    for op in ("policy_loss", "logprobs", "linear", "partial_returns", "training_step"):
        for device, file in _of(results, op):
            groups = [g for g in _groups(file) if g[0]["params"]["active"] == 1 and not g[0]["params"]["zero"]]
            most = max((g[0]["params"]["threads"] for g in groups), default=0)
            for entries in (g for g in groups if g[0]["params"]["threads"] == most):
                ours = best_of_ours(entries)
                peers = [e for e in _ordered(entries) if speedup(e, ours)]
                if ours is None or not peers:
                    continue
                info, first = ours["extra_info"], peers[0]
                other = f"{duration(first['stats']['median'])} ({first['param']})", speedup(first, ours)
                what, own = f"`{op}` {_title(ours['params'])} ({device})", duration(ours["stats"]["median"])
                rows.append((what, own, *other, _share(info), _memory(info)))
    heads = ("", "ppg_fast", "fastest other", "time / ours", "share of the ceiling", "peak extra memory")
    return table(heads, rows) if rows else NOT_MEASURED


def _learning_section(results: Results) -> str:
    """Held-out return of each seed while it trains, as a share of the highest there is."""
    text = ""
    for device, file in _of(results, "learning_curve"):
        curves = file["curves"]
        steps = [point["step"] for point in curves[0]["points"]]
        rows = []
        for c in curves:
            first, last = c["points"][0]["reward"], c["points"][-1]["reward"]
            shares = (f"{point['share']:.0%}" for point in c["points"])
            rows.append((f"seed {c['seed']}", *shares, f"{first:.2f}", f"{last:.2f}", duration(c["seconds"])))
        heads = (f"{curves[0]['policy_class']} ({device})", *(f"step {step}" for step in steps), "return before", "after", "all of it")
        text += table(heads, rows)
    return text or NOT_MEASURED


SECTIONS: dict[str, Callable[[Results], str]] = {
    "machine": _machine_section,
    "summary": _summary_section,
    "linear_active": _active_section,
    "training_step": _step_section,
    "learning_curve": _learning_section,
    **{op: _op_section(op) for op in ("policy_loss", "logprobs", "linear", "partial_returns")},
}


# ---- documents -------------------------------------------------------------------------------------------------------------------------
def _charts_of(op: str, device: str, file: dict[str, Any]) -> dict[str, str]:
    """Name -> SVG, one a dtype: every row active, the most threads, the last allocator measured."""
    if op not in ("policy_loss", "linear"):
        return {}
    chosen: dict[str, list[Entry]] = {}
    for entries in _groups(file):
        params = entries[0]["params"]
        if params["active"] == 1 and not params["zero"]:
            chosen[f"{op}.{device}.{params['V']}.{params['dtype']}.svg"] = entries

    def bar(entry: Entry) -> Bar:
        median = entry["stats"]["median"]
        return Bar(entry["param"], median, entry["extra_info"]["kind"], duration(median))

    return {name: bars(f"{op}: {_title(g[0]['params'])} ({device})", [bar(e) for e in _ordered(g)]) for name, g in chosen.items()}


def fill(text: str, results: Results) -> str:
    """A document with every marked part rendered anew; ValueError for a marker that names no section."""

    def part(match: re.Match[str]) -> str:
        if match[2] not in SECTIONS:
            raise ValueError(f"a marker must name one of {', '.join(SECTIONS)}, got {match[2]!r}")
        return f"{match[1]}\n{SECTIONS[match[2]](results)}\n{match[4]}"

    return MARKED.sub(part, text)


def expected(root: Path) -> dict[Path, str]:
    """What the documents and charts below ``root`` have to say, given its results."""
    results = load(root / RESULTS)
    found = {root / name: fill((root / name).read_text(), results) for name in DOCUMENTS if (root / name).exists()}
    for op in ("policy_loss", "linear"):
        for device, file in _of(results, op):
            found |= {root / RESULTS / name: svg for name, svg in _charts_of(op, device, file).items()}
    return found


def write(root: Path) -> list[Path]:
    """Bring every document below ``root`` up to date; the files that changed."""
    changed = {path: text for path, text in expected(root).items() if not path.exists() or path.read_text() != text}
    for path, text in changed.items():
        path.write_text(text)
    return list(changed)


def report(folder: Path) -> str:
    """Every section that has results, for the terminal."""
    results = load(folder)
    sections = ((name, SECTIONS[name](results)) for name in SECTIONS)
    return "\n".join(f"## {name}\n\n{text}" for name, text in sections if text != NOT_MEASURED)

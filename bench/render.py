"""From result files to documents: every number between `<!-- bench:NAME -->` and `<!-- /bench -->` is written here and
nowhere else."""

import re
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from . import learning_curve, losses, token_share
from .aims import aims_section
from .chart import Bar, bars
from .chat_templates import chat_templates_section
from .gpu.predicted import prediction_section
from .gpu.sections import gpu_section, summary_section
from .instructions import instructions_section
from .linear_tables import active_section, contributions_section
from .logits_dtype import logits_dtype_section
from .policy_classes import (
    across_section,
    limits_section,
    logs_section,
    losses_section,
    overview_section,
    problems_section,
    rivals_section,
)
from .real import sections as real
from .result_file import FOLDER, load, name_of
from .reward_scoring import scoring_section
from .rlhf import charts as rlhf_charts
from .rlhf import rlhf_section
from .server_tables import agreement_section, run_section
from .step_tables import steps_section
from .study_real import section as study_real
from .tables import (
    NOT_MEASURED,
    Entry,
    Results,
    absent,
    best_of_ours,
    by_case,
    duration,
    group_table,
    groups,
    memory,
    of,
    ordered,
    share,
    speedup,
    table,
    title,
)  # fmt: skip

MARKED = re.compile(r"(<!-- bench:(\w+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)
LOSSES = "docs/losses.md"
DOCUMENTS = (
    "docs/benchmarks.md",
    "docs/data.md",
    "docs/distillation.md",
    "docs/fused_loss.md",
    "docs/integrations.md",
    "docs/llama_cpp.md",
    LOSSES,
    "docs/policy_classes.md",
    "docs/real.md",
    "docs/reward_models.md",
    "docs/soft_q.md",
    "docs/soft_q_training.md",
    "docs/study_real.md",
    "README.md",
)


# ---- sections --------------------------------------------------------------------------------------------------------
def _op_section(op: str) -> Callable[[Results], str]:
    def section(results: Results) -> str:
        files, text = of(results, op), ""
        for where, entries in by_case(files):
            text += f"\n**{title(entries[0]['params'])}** ({where})\n\n{group_table(entries)}"
        for where, file in files:
            text += absent(where, file)
            text += "".join(f"\n![{name}](../{FOLDER}/{name})\n" for name in sorted(_charts_of(op, where, file)))
        return text.lstrip("\n") or NOT_MEASURED

    return section


def _hosts_summary_section(results: Results) -> str:
    """For the README: TRL's own head and ours."""
    text = ""
    for device, file in of(results, "hosts"):
        for entries in groups(file):
            trl = sorted((e for e in entries if e["param"].startswith("TRL")), key=lambda e: -e["stats"]["median"])
            rows = [(e["param"], duration(e["stats"]["median"]), memory(e["extra_info"])) for e in trl]
            heads = (f"{title(entries[0]['params'])} ({device})", "forward, loss, backward", "peak extra memory")
            text += table(heads, rows)
    return text or NOT_MEASURED


def _cores(entries: list[dict[str, Any]]) -> str:
    """How fast one core multiplied beside the calls of one thread, where that was seen."""
    one = [e["extra_info"].get("core_gflops", ()) for e in entries if e["params"].get("threads") == 1]
    speeds = [speed for calls in one for speed in calls]
    if not speeds:
        return ""
    return f"; a core gave {statistics.median(speeds):.0f} GFLOP/s, {max(speeds):.0f} at its best"


def _machine_section(results: Results) -> str:
    text = ""
    for name, file in results.items():
        info, ours = file["machine_info"], file["ppg_fast"]
        cpu, gpu = info["cpu"], info.get("gpu")
        place = f"{gpu['name']}, " if gpu else ""
        place += (
            f"{cpu['brand_raw']}, {cpu['count']} cores, {cpu['last_level_cache'] / 2**20:.0f} MiB last-level cache, "
        )
        place += f"{info['memory_bytes'] / 2**30:.0f} GiB"
        versions = ", ".join(f"{package} {version}" for package, version in ours["versions"].items())
        commit = file["commit_info"]["id"][:12] + (" with changes" if file["commit_info"]["dirty"] else "")
        text += (
            f"- `{name}`: {place}; {info['system']} {info['release']}, {info['libc']}, Python "
            f"{info['python_version']}; {versions}; "
        )
        text += f"commit {commit}; {file['datetime']}; `{ours['command']}`; load before {ours['load_before']}"
        text += f"{_cores(file['benchmarks'])}\n"
    return text or NOT_MEASURED


# One case of each kind on a CPU: of two allocators the one that PyTorch is faster with, of the head's two dtypes the
# one where we gain less. docs/benchmarks.md has them all.
FRONT_PAGE: tuple[dict[str, Any], ...] = (
    {"op": "policy_loss", "V": 32000, "dtype": "float32", "allocator": "tuned"},
    {"op": "policy_loss", "V": 32000, "dtype": "bfloat16", "allocator": "tuned"},
    {"op": "logprobs", "V": 32000, "dtype": "float32"},
    {"op": "linear", "N": 2048, "V": 50000, "dtype": "float32"},
    {"op": "partial_returns", "V": 500, "variant": "lookahead:100"},
    {"op": "training_step", "V": 32000},
)


def _summary_section(results: Results) -> str:
    """For the README: ours against the best of the others, every row active, with the most threads, on the processor
    where we gain least."""
    rows = []
    for wanted in FRONT_PAGE:
        case, found = {**wanted, "active": 1, "zero": 0}, []
        for where, file in of(results, wanted["op"], ("cpu",)):
            here = [g for g in groups(file) if _is(g[0], case)]
            entries = max(here, key=lambda g: g[0]["params"]["threads"], default=[])
            ours = best_of_ours(entries)
            peers = [e for e in ordered(entries) if speedup(e, ours)]
            if ours is not None and peers:
                found.append((peers[0]["stats"]["median"] / ours["stats"]["median"], where, ours, peers[0]))
        if not found:
            continue
        _, where, ours, first = min(found, key=lambda f: f[:2])
        other = f"{duration(first['stats']['median'])} ({first['param']})", speedup(first, ours)
        own = f"`{wanted['op']}` {title(ours['params'])}", duration(ours["stats"]["median"])
        rows.append((*own, *other, share(ours["extra_info"]), memory(ours["extra_info"]), where))
    heads = ("on a CPU", "ppg_fast", "fastest other", "time / ours", "share of the ceiling", "peak extra memory")
    return table((*heads, "processor"), rows) if rows else NOT_MEASURED


def _is(entry: Entry, case: dict[str, Any]) -> bool:
    return case.items() <= entry["params"].items()


SECTIONS: dict[str, Callable[[Results], str]] = {
    "machine": _machine_section,
    "aims": aims_section,
    "summary": _summary_section,
    "linear_active": active_section,
    "contributions": contributions_section,
    "logits_dtype": logits_dtype_section,
    "instructions": instructions_section,
    "training_step": partial(steps_section, op="training_step"),
    "hosts": partial(steps_section, op="hosts"),
    "hosts_summary": _hosts_summary_section,
    "learning_curve": learning_curve.section,
    "chat_templates": chat_templates_section,
    "llama_server": agreement_section,
    "llama_run": run_section,
    "gpu": gpu_section,
    "gpu_prediction": prediction_section,
    "gpu_summary": summary_section,
    "policy_classes": overview_section,
    "policy_class_across": across_section,
    "policy_class_problems": problems_section,
    "policy_class_logs": logs_section,
    "soft_q_study": losses_section,
    "soft_q_limits": limits_section,
    "credit_rivals": rivals_section,
    "rlhf": rlhf_section,
    "reward_scoring": scoring_section,
    **losses.SECTIONS,
    **token_share.SECTIONS,
    **real.SECTIONS,
    **study_real.SECTIONS,
    **{
        op: _op_section(op)
        for op in (
            "policy_loss",
            "logprobs",
            "linear",
            "linear_frozen",
            "linear_kept",
            "distillation",
            "soft_q",
            "partial_returns",
            "critic",
            "host_time",
        )
    },
}


# ---- documents -------------------------------------------------------------------------------------------------------
def _charts_of(op: str, where: str, file: dict[str, Any]) -> dict[str, str]:
    """Name -> SVG, one a dtype: every row active, the most threads, the last allocator measured."""
    if op not in ("policy_loss", "linear"):
        return {}
    chosen: dict[str, list[Entry]] = {}
    for entries in groups(file):
        params = entries[0]["params"]
        if params["active"] == 1 and not params["zero"]:
            name = name_of(op, params["device"], file["machine_info"])
            chosen[f"{name}.{params['V']}.{params['dtype']}.svg"] = entries

    def bar(entry: Entry) -> Bar:
        median = entry["stats"]["median"]
        return Bar(entry["param"], median, entry["extra_info"]["kind"], duration(median))

    return {
        name: bars(f"{op}: {title(g[0]['params'])} ({where})", [bar(e) for e in ordered(g)])
        for name, g in chosen.items()
    }


def fill(text: str, results: Results) -> str:
    """A document with every marked part rendered anew; ValueError for a marker that names no section."""

    def part(match: re.Match[str]) -> str:
        if match[2] not in SECTIONS:
            raise ValueError(f"a marker must name one of {', '.join(SECTIONS)}, got {match[2]!r}")
        text = SECTIONS[match[2]](results)
        return f"{match[1]}\n{text}\n{match[4]}" if text else match[1] + match[4]

    return MARKED.sub(part, text)


def expected(root: Path) -> dict[Path, str]:
    """What the documents and charts below ``root`` have to say, given its results."""
    results = load(root / FOLDER)
    found = {root / name: fill((root / name).read_text(), results) for name in DOCUMENTS if (root / name).exists()}
    for op in ("policy_loss", "linear"):
        for where, file in of(results, op):
            found |= {root / FOLDER / name: svg for name, svg in _charts_of(op, where, file).items()}
    found |= {root / FOLDER / name: svg for name, svg in rlhf_charts(results).items()}
    if (root / LOSSES).exists():
        found[root / FOLDER / losses.CHART] = losses.chart()
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
    sections = ((name, SECTIONS[name](results)) for name in SECTIONS if name not in losses.SECTIONS)
    return "\n".join(f"## {name}\n\n{text}" for name, text in sections if text not in (NOT_MEASURED, ""))

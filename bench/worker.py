"""One measuring process, `python -m ppg_fast.bench.worker PLAN`: threads and allocator are fixed when it starts."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .harness import OPS, PACES, Known, measure, peaks, public
from .problem import Case

TAKE_MEMORY = ("policy_loss", "linear", "linear_frozen", "distillation", "training_step")


def planned(plan: dict[str, Any], op: str) -> list[Case]:
    """The cases of one op under the plan's setting."""
    cases = [
        replace(c, threads=plan["threads"], allocator=plan["allocator"])
        for c in OPS[op].cases(plan["grid"], plan["device"])
    ]
    return [replace(c, variant=plan["dialogues"]) if op == "training_step" and plan["dialogues"] else c for c in cases]


def wants_memory(case: Case) -> bool:
    """Peaks are taken where every row is active, and inside hosts; they do not depend on the number of threads."""
    return case.op == "hosts" or (case.op in TAKE_MEMORY and case.active == 1 and not case.zero)


def run(plan: dict[str, Any]) -> dict[str, Any]:
    """Times, or peaks of memory, of the plan's ops."""
    results: dict[str, Any] = {"entries": [], "missing": {}, "peaks": []}
    if not plan["memory"]:
        torch.set_num_threads(plan["threads"])
    start = time.monotonic()
    # there one case of each op shows that the compilers run, and one that memory is seen
    quick = plan["grid"] == "quick"
    for op in plan["ops"]:
        known: Known = []
        for number, case in enumerate(planned(plan, op)):
            if plan["memory"] and (not wants_memory(case) or (quick and number)):
                continue
            what = "memory" if plan["memory"] else f"{plan['threads']} threads, {plan['allocator']} allocator"
            size = (
                f"N={case.N} V={case.V} D={case.D} {case.dtype} active={case.active} zero={case.zero} "
                f"{public(case)['variant']}"
            )
            print(f"  {time.monotonic() - start:4.0f} s  {op} {size}: {what}", file=sys.stderr, flush=True)
            if plan["memory"]:
                found, missing = peaks(case, not quick)
                results["peaks"].append({"case": public(case), "bytes": found})
            else:
                entries, missing = measure(case, PACES[plan["grid"]], not (quick and number), known)
                results["entries"] += entries
                known.append((case, {e["param"]: e["stats"]["median"] for e in entries}))
            results["missing"].setdefault(op, {}).update(missing)
    return results


if __name__ == "__main__":
    given = json.loads(Path(sys.argv[1]).read_text())
    Path(given["out"]).write_text(json.dumps(run(given)))

"""The tables of a real server beside the trainer."""

from typing import Any

from .tables import NOT_MEASURED, Results, duration, of, table


def agreement_section(results: Results) -> str:
    """How far the server's log-probs are from the trainer's, of the same tokens and weights."""
    text = ""
    for device, file in of(results, "llama_server"):
        rows = [
            (case["server"], case["tokens"], case["asked_one_by_one"], f"{case['mean']:.1e}", f"{case['max']:.1e}")
            for case in file["agreement"]
        ]
        heads = (f"llama.cpp ({device}, {file['ppg_fast']['server']}) serves", "tokens", "asked for by themselves")
        text += table((*heads, "mean difference, nats", "largest"), (map(str, row) for row in rows))
    return text or NOT_MEASURED


def run_section(results: Results) -> str:
    """What a run did while its server died again and again."""
    text = ""
    for device, file in of(results, "llama_run"):
        run, largest = file["run"], "" if file["run"]["difference"] is None else f"{file['run']['difference']:.1e}"
        rows = [
            ("the run", duration(run["seconds"])),
            ("times that the server was killed (SIGKILL)", str(len(run["killed"]))),
            ("the run was alive until it was asked to stop", "yes" if run["alive"] else f"**no**: {run['last_line']}"),
            ("steps taken, and the longest", f"{len(run['steps'])}, {duration(run['longest'] or 0)}"),
            ("no step was left out or taken twice", "yes" if _in_order(run["steps"]) else "**no**"),
            ("requests of sampler and partner that were sent again", str(_again(run))),
            ("largest difference of a log-prob to the trainer's, nats", largest),
        ]
        text += table((f"llama.cpp ({device}, {file['ppg_fast']['server']})", ""), rows)
    return text or NOT_MEASURED


def _in_order(steps: list[int]) -> bool:
    return steps == list(range(1, len(steps) + 1))


def _again(run: dict[str, Any]) -> int:
    return sum(run.get(f"{role}/retries", 0) for role in ("sampler", "partner"))

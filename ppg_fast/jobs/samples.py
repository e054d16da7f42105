"""Dialogues for people to read: one page of Markdown, and a table with one line an answer."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppg_fast.data import pack
from ppg_fast.objective import Objective, credit
from ppg_fast.rollout import Rollout

SAMPLES = "samples.jsonl"
SHOWN = 4  # dialogues of a page, and of a table's step


def answer_rows(phase: str, step: int, rollouts: Sequence[Rollout], objective: Objective, scored: bool = True) -> list[dict[str, Any]]:
    """One row an answer of the first `SHOWN` rollouts: what was said before it, the answer, what it earned and was credited for.

    Returns and advantages are those of all ``rollouts``, whose groups give the baseline. Without ``scored`` they are None.
    """
    returns, advantages = credit(pack([r.sample for r in rollouts]), objective) if rollouts else (None, None)
    rows = []
    for number, rollout in enumerate(rollouts[:SHOWN]):
        before, turn = "", 0
        for message in rollout.messages:
            if message.role == "assistant":
                tokens = sum(t == turn for t in rollout.sample.turn_ids)
                row = {"phase": phase, "step": step, "dialogue": number, "group_id": rollout.sample.group_id, "turn": turn}
                row |= {"prompt": before, "answer": message.content, "tokens": tokens, "cut_off": rollout.cut_off[turn]}
                row["reward"] = round(rollout.sample.rewards[turn], 6) if scored else None
                for name, values in (("return", returns), ("advantage", advantages)):
                    row[name] = round(float(values[number, turn]), 6) if scored and values is not None else None
                rows.append(row)
                turn += 1
            else:
                before = message.content
    return rows


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows at the end of a JSONL file."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def keep_rows(path: Path, last_steps: dict[str, int]) -> None:
    """Drop the rows after ``last_steps`` of their phase, and a line that was cut: they are written again by a run that goes on."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if row["step"] <= last_steps.get(row["phase"], -1):
            kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")


def page(when: str, rollouts: Sequence[Rollout], note: str, scored: bool = True) -> str:
    """Whole dialogues in Markdown, each answer with its reward if ``scored``."""
    lines = [f"# Dialogues {when} training", "", note, ""]
    for number, rollout in enumerate(rollouts, 1):
        lines += [f"## Dialogue {number}" + (f": return {rollout.total_reward:.2f}" if scored else ""), ""]
        rewards = iter(zip(rollout.sample.rewards, rollout.cut_off, strict=True))
        for message in rollout.messages:
            text = " ".join(message.content.split()) or "(silence)"
            if message.role == "assistant":
                reward, cut_off = next(rewards)
                text += (" (cut off)" if cut_off else "") + (f" `reward {reward:.2f}`" if scored else "")
            lines.append(f"- **{message.role}**: {text}")
        lines.append("")
    return "\n".join(lines)

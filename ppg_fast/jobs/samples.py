"""Dialogues for people to read: one page of Markdown, and a table with one line an answer."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from ppg_fast.dialogues.logged import Dialogue
from ppg_fast.dialogues.packing import CONTEXT, Sample, pack
from ppg_fast.rollouts.rollout import Rollout
from ppg_fast.training.objective import Objective, credit
from ppg_fast.writing import opened

SAMPLES = "samples.jsonl"
SHOWN = 4  # dialogues of a page, and of a table's step


def answer_rows(
    phase: str,
    step: int,
    samples: Sequence[Sample],
    decode: Callable[[list[int]], str],
    objective: Objective,
    scored: bool = True,
) -> list[dict[str, Any]]:
    """One row an answer of the first `SHOWN` dialogues: what was said before it, the answer, what it earned and was
    credited for.

    Returns and advantages are those of all ``samples``, whose groups give the baseline. Without ``scored`` they are
    None; so are advantages in soft Q-learning, where they depend on the policy.
    """
    returns, advantages = credit(pack(samples), objective) if scored else (None, None)
    advantages = None if objective.soft_q else advantages
    rows = []
    for number, sample in enumerate(samples[:SHOWN]):
        said: list[int] = []
        for turn, run in groupby(zip(sample.turn_ids, sample.tokens, strict=True), key=lambda pair: pair[0]):
            tokens = [token for _, token in run]
            if turn == CONTEXT:
                said = tokens
                continue
            row: dict[str, Any] = {
                "phase": phase,
                "step": step,
                "dialogue": number,
                "group_id": sample.group_id,
                "turn": turn,
            }
            row |= {"prompt": decode(said), "answer": decode(tokens), "tokens": len(tokens)}
            row["cut_off"] = sample.cut_off[turn] if sample.cut_off else None
            row["reward"] = round(sample.rewards[turn], 6) if scored else None
            for name, values in (("return", returns), ("advantage", advantages)):
                row[name] = None if values is None else round(float(values[number, turn]), 6)
            rows.append(row)
            said = []
    return rows


def rolled_out(step: int, said: Sequence[Mapping[str, Any]], samples: Sequence[Sample]) -> list[Dialogue]:
    """The first dialogues of a step as logged ones, with their rewards. An id names step, place and content: what a
    resumed run says once more has the same, and other words never have the ratings of these."""
    dialogues = []
    for number, (one, sample) in enumerate(zip(said, samples, strict=False)):
        content = json.dumps([message.as_json() for message in one["messages"]], sort_keys=True)
        name = f"step-{step:06d}/{number}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
        group, rewards = f"step-{step:06d}/{sample.group_id}", tuple(sample.rewards)
        dialogues.append(Dialogue(name, group, tuple(one["messages"]), rewards, one["tools"]))
    return dialogues


def append_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows at the end of a JSONL file."""
    append_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_whole(path: Path, text: str) -> None:
    """Write ``text`` at the end of a file, or nothing of it."""
    before = path.stat().st_size if path.exists() else 0
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError:  # a full disk takes a part of a line
        if path.is_file():
            os.truncate(path, before)
        raise


def keep_rows(path: Path, last_steps: dict[str, int]) -> None:
    """Drop the rows after ``last_steps`` of their phase, and a line that was cut: they are written again by a run that
    goes on."""
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")  # and nothing else ends a line: texts hold U+2028 and its like as they are
    with opened(path) as file:
        for line in filter(None, lines):
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row["step"] <= last_steps.get(row["phase"], -1):
                file.write(line.decode("utf-8") + "\n")


def page(when: str, rollouts: Sequence[Rollout], note: str, scored: bool = True) -> str:
    """Whole dialogues in Markdown, each answer with its reward if ``scored``."""
    lines = [f"# Dialogues {when} training", "", note, ""]
    for number, rollout in enumerate(rollouts, 1):
        lines += [f"## Dialogue {number}" + (f": return {rollout.total_reward:.2f}" if scored else ""), ""]
        rewards = iter(zip(rollout.sample.rewards, rollout.cut_off, strict=True))
        for message in rollout.messages:
            text = " ".join([*message.content.split(), *map(spoken_call, message.tool_calls)]) or "(silence)"
            if message.role == "assistant":
                reward, cut_off = next(rewards)
                text += (" (cut off)" if cut_off else "") + (f" `reward {reward:.2f}`" if scored else "")
            lines.append(f"- **{message.role}**: {text}")
        lines.append("")
    return "\n".join(lines)


def spoken_call(call: Mapping[str, Any]) -> str:
    """A call as Python writes one; what cannot be read, as it is."""
    name, arguments = call["function"]["name"], call["function"].get("arguments", {})
    if isinstance(arguments, str):
        return f"`{name}({' '.join(arguments.split())})`"
    return f"`{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})`"

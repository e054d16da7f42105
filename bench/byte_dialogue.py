"""One long dialogue of logged lines, a token a byte: of any length, and no tokenizer has to be downloaded."""

import functools
import random
import zlib
from collections.abc import Sequence
from typing import Any

from .providers import Unavailable

CONTROL = 8  # token ids kept for roles and the end of a message; bytes come after them
END = CONTROL - 1
LINES, BYTES_OF_A_LINE = 300, 120  # of the dialogue that stands in where no file is given
Line = tuple[str, str, float]  # role, text, reward of an assistant's line


@functools.lru_cache(maxsize=1)
def lines_of(path: str) -> list[Line]:
    """The lines of every dialogue in a file, one dialogue after the other; a synthetic one of the same form without a
    file."""
    if path:
        from ppg_fast.dialogues.dialogue import read_dialogues

        lines: list[Line] = []
        for dialogue in read_dialogues(path):
            rewards = iter(dialogue.turn_rewards)
            lines += [
                (m.role, m.content, (next(rewards) or 0.0) if m.role == "assistant" else 0.0) for m in dialogue.messages
            ]
        return lines
    draw = random.Random(0)
    words = ["".join(draw.choice("etaoinshrdlu") for _ in range(draw.randint(2, 9))) for _ in range(500)]
    lines = []
    for number in range(LINES):
        text = " ".join(draw.choice(words) for _ in range(BYTES_OF_A_LINE // 6))
        lines.append(("assistant", text, float(draw.random() < 0.7)) if number % 2 else ("user", text, 0.0))
    return lines


def byte_sample(lines: Sequence[Line], tokens: int) -> Any:
    """One dialogue of ``tokens`` tokens, a token a byte: ``lines`` from the front, again from the front if they do not
    reach."""
    from ppg_fast.dialogues.packing import CONTEXT, Sample

    found: list[int] = []
    turn_ids: list[int] = []
    rewards: list[float] = []
    number = 0
    while len(found) < tokens:
        role, text, reward = lines[number % len(lines)]
        written = [*(CONTROL + byte for byte in text.encode()), END]
        speaks = role == "assistant"
        found += [zlib.crc32(role.encode()) % END, *written]
        turn_ids += [CONTEXT] + [len(rewards) if speaks else CONTEXT] * len(written)
        rewards += [reward] if speaks else []
        number += 1
    kept = turn_ids[:tokens]
    if max(kept) < 0:
        raise Unavailable(f"no line of the assistant begins within the first {tokens:,} tokens of the dialogue")
    return Sample(found[:tokens], kept, rewards[: max(kept) + 1] or [0.0], 0)

"""Persona dialogues of the Consistent-LLMs family, translated to our records. Imports nothing of ours; docs/data.md has
the format.

Source: abdulhaim/consistent-LLMs, "Consistently Simulating Human Personas with Multi-Turn Reinforcement Learning"
(NeurIPS 2025)
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

SCORE, VERDICTS = "P2_prompt_consistency_score", "eval_prompt_consistency"
ROUNDING = 5e-4  # stored means may be rounded to three decimals
_PREFIX = re.compile(r"\s*([^:\n]{1,80}):")
_VERDICT = re.compile(r"\b(YES|NO)\b")
_LAST_WORD = re.compile(r"\b(yes|no)\W*$", re.IGNORECASE)


@dataclass(frozen=True)
class JudgedDialogue:
    """One dialogue before its file is calibrated: what was said, and the judge's word on each line of P2."""

    where: str  # file and dialogue, for messages
    messages: tuple[dict[str, str], ...]
    verdicts: tuple[str | None, ...]  # one per assistant message: "YES", "NO", or None where the judge gave none
    judged: int  # lines the judge was asked about
    score: float | None  # mean consistency as stored, None where it was not
    group: str  # dialogues of one prompt share it; "" where no persona is known

    def share(self, word: str) -> float:
        """Share of ``word`` among the lines that the judge was asked about."""
        return self.verdicts.count(word) / max(self.judged, 1)

    def reproduced_by(self, word: str) -> bool:
        """Whether the stored score is the share of consistent lines if ``word`` means consistent.

        A line without a verdict may have counted either way, or not at all.
        """
        if self.score is None:
            return True
        consistent = self.verdicts.count(word)
        decided = len(self.verdicts) - self.verdicts.count(None)
        for lines in {decided, self.judged, len(self.verdicts)}:
            count = round(self.score * lines)
            if (
                lines
                and abs(self.score - count / lines) <= ROUNDING
                and consistent <= count <= consistent + lines - decided
            ):
                return True
        return False

    def describe(self) -> str:
        """Stored score and both shares in words."""
        return (
            f"{self.where}: {SCORE} is {self.score}, the share of YES is {self.share('YES'):.4f}, of NO "
            f"{self.share('NO'):.4f}"
        )


def is_family_record(record: object) -> bool:
    """Whether ``record`` has the shape of a Consistent-LLMs dialogue."""
    return isinstance(record, dict) and "conversation" in record


def parse_record(record: dict[str, Any], where: str) -> JudgedDialogue:
    """Read one dialogue; raise ValueError naming the line that is wrong. P2 becomes the assistant, P1 the user, P2's
    persona the system."""
    lines = _numbered_lines(record["conversation"], where)
    texts = _verdict_texts(record.get(VERDICTS), lines, where)
    prefixes = Counter(match[1].strip() for text in lines.values() if (match := _PREFIX.match(text)))
    roles = [role for role, _ in prefixes.most_common(2)]
    speakers = {number: _speaker(text, roles, f"{where}, line {number}") for number, text in lines.items()}
    if not roles:
        raise ValueError(f"{where}: the conversation is empty")
    p2 = _assistant_role(record, list(speakers.values()), {speakers[number] for number in texts}, where)
    persona = record.get("P2") or ""
    if not isinstance(persona, str):
        raise ValueError(f"{where}: P2 must be a string, got {persona!r}")
    messages = [{"role": "system", "content": persona.strip()}] if persona.strip() else []
    for number, text in lines.items():
        # only the known name and its colon: a line may hold others
        content = text.lstrip()[len(speakers[number]) :].lstrip()[1:].strip()
        messages.append({"role": "assistant" if speakers[number] == p2 else "user", "content": content})
    own = [number for number in lines if speakers[number] == p2]
    judged = [number for number in own if number in texts]
    verdicts = tuple(verdict(texts[number]) if number in texts else None for number in own)
    return JudgedDialogue(where, tuple(messages), verdicts, len(judged), _score(record, where), _group(record))


def verdict(text: str | None) -> str | None:
    """The last YES or NO of the judge's text, "YES" or "NO"; in lower case it counts as the very last word only. None
    if there is none."""
    words = _VERDICT.findall(text or "") or _LAST_WORD.findall(text or "")
    return words[-1].upper() if words else None


def calibrate(dialogues: Iterable[JudgedDialogue]) -> str | None:
    """The word, "YES" or "NO", that means consistent in this file; None if no line has a verdict.

    It is the word whose share reproduces the stored score in every dialogue. ValueError with both shares if neither
    does, if two dialogues need different words, or if every dialogue fits both: files of the family differ in this, so
    there is nothing to assume.
    """
    judged = [d for d in dialogues if any(d.verdicts)]
    if not judged:
        return None
    needs: dict[str, JudgedDialogue] = {}
    for dialogue in judged:
        fitting = [word for word in ("YES", "NO") if dialogue.reproduced_by(word)]
        if not fitting:
            raise ValueError(
                f"neither YES nor NO as the word for consistent reproduces the stored score: {dialogue.describe()}"
            )
        if len(fitting) == 1:
            needs.setdefault(fitting[0], dialogue)
    if len(needs) == 2:
        raise ValueError(
            f"consistent is YES in one dialogue and NO in another: {needs['YES'].describe()}; "
            f"{needs['NO'].describe()}; split the file"
        )
    if not needs:
        raise ValueError(
            "cannot tell whether YES or NO means consistent, no dialogue of the file decides it: "
            f"{judged[0].describe()}"
        )
    return next(iter(needs))


def to_record(dialogue: JudgedDialogue, consistent: str | None, identity: str) -> dict[str, Any]:
    """Our on-disk record: reward 1.0 for a consistent line, 0.0 for another, None without a verdict."""
    rewards = [None if word is None else float(word == consistent) for word in dialogue.verdicts]
    group = dialogue.group or identity
    return {"id": identity, "group_id": group, "messages": list(dialogue.messages), "turn_rewards": rewards}


def _numbered_lines(conversation: object, where: str) -> dict[int, str]:
    """Line number -> text, in the order of the file. Numbers may have gaps."""
    if not isinstance(conversation, list):
        raise ValueError(f"{where}: conversation must be a list, got {type(conversation).__name__}")
    lines: dict[int, str] = {}
    for position, entry in enumerate(conversation):
        number, text = _numbered_text(entry, f"{where}, conversation entry {position}")
        if text is None:
            raise ValueError(f"{where}, line {number}: no text")
        if number in lines:
            raise ValueError(f"{where}: line number {number} stands twice in the conversation")
        lines[number] = text
    return lines


def _verdict_texts(entries: object, lines: dict[int, str], where: str) -> dict[int, str | None]:
    """Line number -> the judge's text on that line."""
    if entries is not None and not isinstance(entries, list):
        raise ValueError(f"{where}: {VERDICTS} must be a list, got {type(entries).__name__}")
    texts: dict[int, str | None] = {}
    for position, entry in enumerate(entries or []):
        number, text = _numbered_text(entry, f"{where}, {VERDICTS} entry {position}")
        if number not in lines:
            raise ValueError(f"{where}: a verdict on line {number}, which the conversation does not have")
        if texts.setdefault(number, text) != text:
            raise ValueError(f"{where}: two verdicts on line {number}")
    return texts


def _numbered_text(entry: object, where: str) -> tuple[int, str | None]:
    if isinstance(entry, list) and len(entry) == 2:
        number, text = entry
        if isinstance(number, int) and not isinstance(number, bool) and (text is None or isinstance(text, str)):
            return number, text
    raise ValueError(f"{where} must be [line number, text], got {str(entry)[:80]!r}")


def _speaker(text: str, roles: list[str], where: str) -> str:
    match = _PREFIX.match(text)
    if match is None or match[1].strip() not in roles:
        raise ValueError(f"{where} does not begin with one of the two speakers {roles}: {text[:80]!r}")
    return match[1].strip()


def _assistant_role(record: dict[str, Any], speakers: list[str], judged: set[str], where: str) -> str:
    """P2's role name: the one that was judged; else, as the family's own code has it, the second to speak (the first if
    pturn is 2)."""
    names = list(dict.fromkeys(speakers))
    if len(judged) == 1 and (SCORE in record or len(names) == 1):
        return judged.pop()
    if len(names) < 2:
        raise ValueError(
            f"{where}: {names[0]!r} is the only speaker and has no verdicts, so there is no assistant to be found"
        )
    return names[0] if record.get("pturn") == 2 else names[1]


def _score(record: dict[str, Any], where: str) -> float | None:
    score = record.get(SCORE)
    if score is None:
        return None
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
        raise ValueError(f"{where}: {SCORE} must be a finite number, got {score!r}")
    return float(score)


def _group(record: dict[str, Any]) -> str:
    """Dialogues that start from the same persona, topic and grade are rollouts of one prompt."""
    if not record.get("P2"):
        return ""
    prompt = "\x1f".join(str(record.get(key) or "") for key in ("task_name", "topic", "grade", "P1", "P2"))
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]

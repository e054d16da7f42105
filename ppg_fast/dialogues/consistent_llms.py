"""Persona dialogues of the Consistent-LLMs family, translated to our records. docs/data.md has the format.

Source: abdulhaim/consistent-LLMs, "Consistently Simulating Human Personas with Multi-Turn Reinforcement Learning"
(NeurIPS 2025)
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from ppg_fast.dialogues.message import brief, short

SCORE, VERDICTS = "P2_prompt_consistency_score", "eval_prompt_consistency"
TRANSLATED = re.compile("conversation$|eval_")  # the keys of a record that are not carried along
ROUNDING = 5e-4  # stored means may be rounded to three decimals
MAJORITY = 4  # times as many dialogues that need one word as need the other decide
_PREFIX = re.compile(r"\s*([^:\n]{1,80}):")
_VERDICT = re.compile(r"\b(YES|NO)\b")
_LAST_WORD = re.compile(r"\b(yes|no)\W*$", re.IGNORECASE)


@dataclass(frozen=True)
class JudgedDialogue:
    """One dialogue before its file is calibrated: what was said, and what the judge said of each line of P2."""

    number: int  # in its file
    where: str  # file and dialogue, for messages
    messages: tuple[dict[str, str], ...]
    texts: tuple[str | None, ...]  # the judge's on each assistant message, None where there is none
    judged: int  # lines the judge was asked about
    score: float | None  # mean consistency as stored, None where it was not
    group: str  # dialogues of one prompt share it; "" where no persona is known
    more: Mapping[str, Any]  # what else the record holds

    @property
    def verdicts(self) -> list[str | None]:
        """ "YES", "NO", or None where the judge gave none, of each assistant message."""
        return [verdict(text) for text in self.texts]

    def share(self, word: str) -> float:
        """Share of ``word`` among the lines that the judge was asked about."""
        return self.verdicts.count(word) / max(self.judged, 1)

    def reproduced_by(self, word: str, count: Callable[[str | None, str], bool | None]) -> bool:
        """Whether the stored score is the share of consistent lines if ``word`` means consistent.

        ``count``: whether a text is counted as ``word``, None for either way. A line without a verdict may have
        counted either way, or not at all.
        """
        if self.score is None:
            return True
        counted = [count(text, word) for text, said in zip(self.texts, self.verdicts, strict=True) if said]
        sure, silent = counted.count(True), len(self.texts) - len(counted)
        for lines in {len(counted), self.judged, len(self.texts)}:
            consistent = round(self.score * lines)
            either = counted.count(None) + min(lines - len(counted), silent)
            if lines and abs(self.score - consistent / lines) <= ROUNDING and sure <= consistent <= sure + either:
                return True
        return False

    def describe(self) -> str:
        """Stored score and both shares in words."""
        return f"{SCORE} is {self.score}, the share of YES is {self.share('YES'):.4f}, of NO {self.share('NO'):.4f}"


def is_family_record(record: object) -> bool:
    """Whether ``record`` has the shape of a Consistent-LLMs dialogue: a conversation of numbered lines, or the family's
    own keys beside one."""
    if not isinstance(record, dict) or "conversation" not in record:
        return False
    lines = record["conversation"]
    own = {"P1", "P2", "pturn", VERDICTS, SCORE} & record.keys()
    return bool(own) or (isinstance(lines, list) and bool(lines) and all(_is_numbered(line) for line in lines))


def parse_record(record: dict[str, Any], number: int, where: str) -> JudgedDialogue:
    """Read one dialogue; raise ValueError naming the line that is wrong. P2 becomes the assistant, P1 the user, P2's
    persona the system."""
    lines = _numbered_lines(record["conversation"], where)
    if not lines:
        raise ValueError(f"{where}: the conversation is empty")
    texts = _verdict_texts(record.get(VERDICTS), lines, where)
    names = _names(lines, where)
    own = _lines_of_p2(record, names, set(texts), where)
    persona = record.get("P2") or ""
    if not isinstance(persona, str):
        raise ValueError(f"{where}: P2 must be a string, got {brief(persona)}")
    messages = [{"role": "system", "content": persona.strip()}] if persona.strip() else []
    for line, text in lines.items():
        # only the known name and its colon: a line may hold others
        content = text.lstrip()[len(names[line]) :].lstrip()[1:].strip()
        messages.append({"role": "assistant" if line in own else "user", "content": content})
    judged = tuple(texts.get(line) for line in lines if line in own)
    asked, more = len(own & texts.keys()), {k: v for k, v in record.items() if not TRANSLATED.match(k)}
    return JudgedDialogue(number, where, tuple(messages), judged, asked, _score(record, where), _group(record), more)


def verdict(text: str | None) -> str | None:
    """The last YES or NO of the judge's text, "YES" or "NO"; in lower case it counts as the very last word only. None
    if there is none."""
    words = _VERDICT.findall(text or "") or _LAST_WORD.findall(text or "")
    return words[-1].upper() if words else None


def _last_word(text: str | None, word: str) -> bool:
    return verdict(text) == word


def _any_yes(text: str | None, word: str) -> bool:
    """The authors' own rule."""
    return ("YES" in (text or "")) == (word == "YES")


def _any_no(text: str | None, word: str) -> bool:
    return bool(re.search(r"\bNO\b", text or "")) == (word == "NO")


def _unless_both(text: str | None, word: str) -> bool | None:
    """None, either way, where the rules differ: a text with both words, or with one in lower case."""
    counts = {rule(text, word) for rule in RULES}
    return counts.pop() if len(counts) == 1 else None


RULES = (_last_word, _any_yes, _any_no)  # by which a file's scores may have been counted


def calibrate(dialogues: Iterable[JudgedDialogue], refuse: Callable[[str], None]) -> tuple[str | None, set[int]]:
    """The word, "YES" or "NO", that means consistent in this file (None if no line has a verdict), and the numbers of
    the dialogues that fit it.

    It is the word whose share reproduces the stored scores; a verdict that holds both words may have counted as either.
    A dialogue that fits neither word, or the other one than at least `MAJORITY` times as many, is told to ``refuse``.
    ValueError with both shares if nothing decides, or if many need different words: files of the family differ in
    this, so there is nothing to assume.
    """
    dialogues = list(dialogues)
    judged = [d for d in dialogues if any(d.verdicts)]
    needs: dict[str, list[JudgedDialogue]] = {"YES": [], "NO": []}
    unfit: dict[int, str] = {}
    for dialogue in judged:
        fitting = [word for word in needs if dialogue.reproduced_by(word, _unless_both)]
        if not fitting:
            rule = "neither YES nor NO as the word for consistent reproduces the stored score"
            unfit[dialogue.number] = f"{dialogue.where}: {rule}: {dialogue.describe()}"
        elif len(fitting) == 1:
            needs[fitting[0]].append(dialogue)
    fit = [d for d in judged if d.number not in unfit]
    consistent = _decided(needs, unfit) or (_by_one_rule(fit) if fit else None)
    for problem in unfit.values():
        refuse(problem)
    if fit and not consistent:
        rule = "cannot tell whether YES or NO means consistent, no dialogue of the file decides it"
        raise ValueError(f"{rule}: {fit[0].where}: {fit[0].describe()}")
    return consistent, {d.number for d in dialogues} - unfit.keys()


def _decided(needs: Mapping[str, list[JudgedDialogue]], unfit: dict[int, str]) -> str | None:
    """The word that most dialogues need, the others added to ``unfit``; None where none needs any."""
    few, most = sorted(needs, key=lambda word: len(needs[word]))
    if len(needs[few]) * MAJORITY > len(needs[most]):
        first = "; ".join(f"{needs[word][0].where}: {needs[word][0].describe()}" for word in ("YES", "NO"))
        raise ValueError(f"consistent is YES in one dialogue and NO in another: {first}; split the file")
    for dialogue in needs[few]:
        rule = f"consistent is {few} here and {most} in {len(needs[most])} other dialogues of the file"
        unfit[dialogue.number] = f"{dialogue.where}: {rule}: {dialogue.describe()}"
    return most if needs[most] else None


def _by_one_rule(dialogues: Sequence[JudgedDialogue]) -> str | None:
    """The word by which one rule of counting gives all scores of the file; None where two words do, or none."""
    words = {w for w in ("YES", "NO") for rule in RULES if all(d.reproduced_by(w, rule) for d in dialogues)}
    return words.pop() if len(words) == 1 else None


def to_record(dialogue: JudgedDialogue, consistent: str | None, identity: str) -> dict[str, Any]:
    """Our on-disk record: reward 1.0 for a consistent line, 0.0 for another, None without a verdict, or where nothing
    says what is ``consistent``."""
    scored = [None if word is None or not consistent else float(word == consistent) for word in dialogue.verdicts]
    made = {"id": identity, "group_id": dialogue.group or identity}
    return {**dialogue.more, **made, "messages": list(dialogue.messages), "turn_rewards": scored}


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
    if _is_numbered(entry):
        return entry
    raise ValueError(f"{where} must be [line number, text], got {brief(entry)}")


def _is_numbered(entry: object) -> TypeGuard[tuple[int, str | None]]:
    if not isinstance(entry, list) or len(entry) != 2:
        return False
    number, text = entry
    return isinstance(number, int) and not isinstance(number, bool) and (text is None or isinstance(text, str))


def _names(lines: Mapping[int, str], where: str) -> dict[int, str]:
    """The name that each line begins with, one of the two that most do."""
    prefixes = {line: match[1].strip() for line, text in lines.items() if (match := _PREFIX.match(text))}
    names = [name for name, _ in Counter(prefixes.values()).most_common(2)]
    for line, text in lines.items():
        if prefixes.get(line) not in names:
            shown = [short(name) for name in names]
            rule = f"does not begin with one of the two speakers [{', '.join(shown)}]"
            raise ValueError(f"{where}, line {line} {rule}: {short(text)}")
    return prefixes


def _lines_of_p2(record: dict[str, Any], names: Mapping[int, str], judged: set[int], where: str) -> set[int]:
    """P2's lines: those of the one name that was judged; else, as the family's own code has it, of the second to speak
    (the first if pturn is 2). Where both have one name, every second line."""
    found, second = list(dict.fromkeys(names.values())), record.get("pturn") != 2
    if len(found) == 1 and "pturn" in record and len(names) > 1:
        return set(list(names)[second::2])
    said = {names[line] for line in judged}
    if len(said) == 1 and (SCORE in record or len(found) == 1):
        p2 = said.pop()
    elif len(found) == 1:
        rule = "is the only speaker and has no verdicts, so there is no assistant to be found"
        raise ValueError(f"{where}: {short(found[0])} {rule}")
    else:
        p2 = found[second]
    return {line for line, name in names.items() if name == p2}


def _score(record: dict[str, Any], where: str) -> float | None:
    score = record.get(SCORE)
    if score is None:
        return None
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
        raise ValueError(f"{where}: {SCORE} must be a finite number, got {short(score)}")
    return float(score)


def _group(record: dict[str, Any]) -> str:
    """Dialogues that start from the same persona, topic and grade are rollouts of one prompt."""
    if not record.get("P2"):
        return ""
    prompt = "\x1f".join(str(record.get(key) or "") for key in ("task_name", "topic", "grade", "P1", "P2"))
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).hexdigest()[:16]

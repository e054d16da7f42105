"""Chat templates against the oracle: of each template and dialogue whether what is trained is exact, or why it is
refused. As a command: write the table into bench/results, for `ppg-fast bench --render`."""

import re
import sys
import warnings
from importlib.metadata import version
from itertools import pairwise, product
from pathlib import Path

from chat_case import OWN, SHIPS, folder, tokenizer_of
from template_oracle import REFUSED, expected, parts
from template_shapes import SHAPES, tools_of

from ppg_fast.dialogues import ChatFormat, Dialogue, encode_dialogue
from ppg_fast.dialogues.message import message_of

PLACES = (("ships/", [SHIPS]), ("", [folder(), OWN]))  # ours, and those of models
NAMES = [
    before + name
    for before, places in PLACES
    if folder()
    for name in sorted(p.stem for f in places for p in f.glob("*.jinja"))
]
ONE, OWN, SEVERAL, OFFLINE = "one", "own", "several", "offline"
REFUSES, LOSES, ENDLESS = "refuses", "loses", "no end"
LINE = re.compile(r"dialogue 'd', message (\d+): [^\n]{9,300}")


def row(name):
    """(outcome, problem) of each shape; a problem is "" where the oracle agrees."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = tokenizer_of(name)
        made = attempt(ChatFormat, tokenizer)
        return {shape: Cell(tokenizer, name, messages).outcome(*made) for shape, messages in SHAPES.items()}


class Cell:
    """One template and one dialogue, by the oracle and by ppg_fast."""

    def __init__(self, tokenizer, name, messages):
        self.tokenizer, self.expected = tokenizer, expected(tokenizer, name, messages)
        tools = tuple(tools_of(messages) or ())
        spoken = tuple(message_of(message, "message") for message in messages)
        turns = sum(message.role == "assistant" for message in spoken)
        self.dialogue = Dialogue("d", "g", spoken, (1.0,) * turns, tools)

    def outcome(self, chat, refusal):
        faults = self.expected.faults
        if chat is None:
            return self.no_format(refusal)
        sample, refusal = attempt(encode_dialogue, chat, self.dialogue)
        if sample is None:
            mark, problem = self.refused(refusal)
            return mark, problem or self.kept_silent(chat)
        problem = self.inexact(chat, sample) or self.on_policy(chat)
        if faults:
            problem = f"trained, but {faults[0]}" + (f"; {problem}" if problem else "")
        if problem:
            return "", problem
        if [REFUSED] in [list(dict.fromkeys(texts)) for texts in self.expected.replies]:
            return OFFLINE, ""
        agrees = self.spoken(chat) == sample.tokens[: len(self.spoken(chat))]
        last = [turns[-1].context + turns[-1].answer for turns in self.fitting(sample)]
        if not agrees and len(starts(sample)) == 1 and set(last) & set(self.could_be_spoken()):
            return "", f"a rollout reads {self.tokenizer.decode(self.spoken(chat))!r}"
        return (SEVERAL if len(starts(sample)) > 1 else ONE if agrees else OWN), ""

    def no_format(self, refusal):
        """The mark of a template that no answer can be written with; the line has no message to name."""
        reasons = {reason[:6] for _, reason in self.expected.faults}
        marks = {
            "refuses it": (REFUSES, "raises"),
            "must write the answer": (LOSES, "lost"),
            "must end": (ENDLESS, "no end"),
        }
        mark, reason = next((found for said, found in marks.items() if said in refusal), (REFUSES, ""))
        agreed = reasons & {reason, "raises"} and one_line(refusal)
        return mark, "" if agreed else f"{refusal[:200]}; faults: {self.expected.faults[:3]}"

    def refused(self, refusal):
        """The mark of a refusal: one line that names a message and a reason which the oracle finds too."""
        found = LINE.fullmatch(refusal)
        if not found:
            return REFUSES, f"not one line that names a message: {refusal[:200]!r}"
        raised = "refuses it" in refusal
        for messages, reason in self.expected.faults:
            said = reason.startswith("raises") and " ".join(reason.split())[7:47] in refusal
            if int(found[1]) in messages and (said if raised else reason == "lost"):
                return (REFUSES if raised else LOSES), ""
        return REFUSES, f"{refusal[:200]}; faults: {self.expected.faults[:3]}"

    # ---- offline -----------------------------------------------------------------------------------------------------
    def inexact(self, chat, sample):
        """What is wrong with the tokens: of each turn those before it and its own, what is trained, and the parts."""
        if not self.fitting(sample):
            return self.unlike(sample, self.expected.turns)
        banned = set(chat.banned_token_ids(len(self.tokenizer)))
        for turn in self.expected.turns:
            answer = self.encode(turn.answer)
            if banned & set(answer) or answer[-1] not in chat.end_ids or set(answer[:-1]) & set(chat.end_ids):
                return f"a sampler could not say {turn.answer!r}"
        return ""

    def fitting(self, sample):
        both = (self.expected.turns, self.expected.seen)
        return [turns for turns in both if turns and not self.unlike(sample, turns)]

    def encode(self, text):
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def unlike(self, sample, expected_turns):
        bounds = [*starts(sample), len(sample.tokens)]
        begins = []
        for number, turn in enumerate(expected_turns):
            at = [n for n, of in enumerate(sample.turn_ids) if of == number]
            if not at:
                return f"turn {number} is not trained"
            begins.append(max(start for start in bounds if start <= at[0]))
            context, answer = sample.tokens[begins[-1] : at[0]], [sample.tokens[n] for n in at]
            if at != list(range(at[0], at[-1] + 1)) or answer != self.encode(turn.answer):
                return f"turn {number} trains {self.tokenizer.decode(answer)!r}, not {turn.answer!r}"
            if context != self.encode(turn.context):
                seen = self.tokenizer.decode(context)
                differ = (n for n, (a, b) in enumerate(zip(seen, turn.context, strict=False)) if a != b)
                at = max(next(differ, min(len(seen), len(turn.context))) - 30, 0)
                return f"before turn {number}: ...{seen[at:]!r}, not ...{turn.context[at:]!r}"
        first = list(dict.fromkeys(begins))
        wanted = [begins[n] for n in parts(expected_turns)]
        return "" if first == bounds[:-1] == wanted else f"parts at {bounds[:-1]}, not {wanted}"

    # ---- on-policy ---------------------------------------------------------------------------------------------------
    def on_policy(self, chat):
        """The same from a rollout's side: the opening, and what follows an answer that was sampled."""
        for make, given, texts in self.asked(chat):
            tokens, refusal = attempt(make, given, self.dialogue.tools)
            got = REFUSED if tokens is None else self.tokenizer.decode(tokens)
            if got not in texts:
                what = f"on-policy, {make.__name__} of {[m.role for m in given]}"
                return f"{what} is {got[-150:]!r} {refusal[:150]}, not {texts[0][-150:]!r}"
            if tokens is None and not one_line(refusal):
                return f"refused in more than one line: {refusal!r}"
        return ""

    def kept_silent(self, chat):
        """Of a dialogue that is refused for a message of the context or its tools, a rollout must be refused too."""
        messages, tools = self.dialogue.messages, self.dialogue.tools
        places = [n for n, message in enumerate(messages) if message.role == "assistant"]
        heard = [messages[before + 1 : after] for before, after in pairwise(places) if after > before + 1]
        made = [attempt(chat.opening, messages[: places[0]], tools), *(attempt(chat.reply, m, tools) for m in heard)]
        blamed = self.expected.faults[0][0]
        if all(tokens is not None for tokens, _ in made) and (not blamed & {*places} or len(blamed) == len(messages)):
            return f"on-policy nothing is refused, though {self.expected.faults[0]}"
        if self.expected.unopened and made[0][0] is not None:
            return f"opening is {self.tokenizer.decode(made[0][0])[-150:]!r}, though {self.expected.faults[0]}"
        return next((f"more than one line: {said!r}" for _, said in made if "\n" in said), "")

    def asked(self, chat):
        """(what writes it, messages, what may be written) before each answer to which somebody spoke."""
        done, messages = self.expected, self.dialogue.messages
        places = [turn.message for turn in done.turns]
        if done.openings:
            yield chat.opening, messages[: places[0]], done.openings
        for (before, after), texts in zip(pairwise(places), done.replies, strict=False):
            if texts:
                yield chat.reply, messages[before + 1 : after], texts

    def spoken(self, chat):
        """The tokens of a rollout that samples the answers of the log."""
        before = [make(given, self.dialogue.tools) for make, given, _ in self.asked(chat)]
        answers = [self.encode(turn.answer) for turn in self.expected.turns]
        return [token for pair in zip(before, answers, strict=False) for part in pair for token in part]

    def could_be_spoken(self):
        """The texts that a rollout might read, up to the last answer."""
        answers = [turn.answer for turn in self.expected.turns]
        if any(not texts for texts in self.expected.replies):
            return
        for before in product(self.expected.openings, *self.expected.replies):
            yield "".join(part for pair in zip(before, answers, strict=True) for part in pair)


def starts(sample):
    return list(getattr(sample, "starts", None) or [0])


def attempt(make, *given, **named):
    """(what it makes, "") or (None, what its ValueError says)."""
    try:
        return make(*given, **named), ""
    except ValueError as error:
        return None, str(error)


def one_line(text):
    return bool(text) and "\n" not in text and len(text) <= 360


def write(root=Path(__file__).parents[2]):
    """Bring bench/results up to date; where a cell is not as the oracle has it, say so and write nothing."""
    from ppg_fast.bench import result_file

    rows = {name: row(name) for name in NAMES}
    problems = [
        f"{name} | {shape} | {problem}"
        for name, cells in rows.items()
        for shape, (_, problem) in cells.items()
        if problem
    ]
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 1
    versions = {package: version(package) for package in ("trl", "transformers", "jinja2")}
    file = result_file.header("python tests/helpers/template_table.py", versions=versions)
    file["chat_templates"] = {
        name: {shape: outcome for shape, (outcome, _) in cells.items()} for name, cells in rows.items()
    }
    print(f"wrote {result_file.write(root / result_file.FOLDER, 'chat_templates.cpu', file)}")
    return 0


if __name__ == "__main__":
    sys.exit(write())

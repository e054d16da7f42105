"""What a chat template makes of a dialogue, found with transformers alone: of each answer what the model sees and what
it says, what stands between two answers, and which messages a template refuses or loses.

Nothing of ppg_fast is imported here. An answer is what the template writes for it as the last message behind its
generation prompt, up to and with the first end token; what it writes there by itself (an empty block of thoughts) is
context. History is what the generation prompt has before it.
"""

import json
import re
from dataclasses import dataclass, field, replace
from itertools import pairwise

from template_shapes import tools_of

ENDS = {  # of the models' generation configs, by the beginning of a template's name; the longest that fits
    "cohere": ["<|END_OF_TURN_TOKEN|>"],
    "deepseek": ["<\uff5cend▁of▁sentence\uff5c>"],
    "diffusion_gemma": ["<turn|>", "<|tool_response>"],
    "gemma": ["<end_of_turn>"],
    "gemma4": ["<turn|>", "<|tool_response>"],
    "glm4moe": ["<|user|>", "<|observation|>"],
    "gptoss": ["<|return|>", "<|call|>"],
    **{key: ["<end_of_utterance>"] for key in ("idefics3", "smolvlm")},
    **{key: ["<|im_end|>"] for key in ("chatml", "lfm2", "nemotron", "phi4", "qwen", "smollm2")},
    "llama3": ["<|eot_id|>"],
    "llava_next": ["</s>"],
    "mistral": ["</s>"],
    "muse_glimmer": ["<|eot|>"],
    "phi": ["<|end|>"],
}
IN_HISTORY = {"gptoss": ["<|end|>"]}  # what closes an answer once somebody has replied
EMPTY_THOUGHTS = re.compile(r"\s*<think>\s*</think>(\s*)")
MARK = "Wx5oracle"
NEAR = 6  # characters of a prompt by which it is found again
REFUSED = "refused"  # in place of a reply that leaves out what is heard, or does not end the answer before it
PROBE = [{"role": "user", "content": "a"}]


@dataclass
class Turn:
    """The text before an answer, that answer (which is trained), and where in the dialogue it stands."""

    context: str
    answer: str
    message: int


@dataclass
class Expected:
    """``openings``: what may stand before the first answer. ``turns``; ``seen``: the same with whole generation
    prompts, which some templates do not keep to in the answer. ``replies``: what may stand from the end of each answer
    but the last to the next, with this history or none; nothing where nobody speaks between. ``faults``: (messages it
    can be laid to, reason). ``unopened``: no form of it can be written even up to the first answer."""

    openings: list[str] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)
    seen: list[Turn] = field(default_factory=list)
    replies: list[list[str]] = field(default_factory=list)
    faults: list[tuple[set[int], str]] = field(default_factory=list)
    unopened: bool = False


def parts(turns):
    """Numbers of the turns that begin a part: those before which the template writes another history."""
    views = [turn.context + turn.answer for turn in turns]
    return [n for n, turn in enumerate(turns) if not n or not turn.context.startswith(views[n - 1])]


def expected(tokenizer, name, messages):
    """Of the first form that the template writes without a fault; else the faults of every form."""
    name = name.rpartition("/")[2]
    readings = [Reading(tokenizer, name, form, parts) for parts in (False, True) for form in _forms(messages)]
    found: list[Expected] = []
    for reading in readings:
        found.append(reading.expected())
        if not found[-1].faults:
            return found[-1]
    faults = [fault for one in found for fault in one.faults]
    return replace(found[0], faults=faults, unopened=all(one.unopened for one in found))


def _forms(messages):
    """The dialogue as templates may want it, the most usual form first: arguments as objects or as text, no content as
    none or as empty."""
    forms = [_form(message, as_text, empty) for as_text in (0, 1) for empty in (0, 1) for message in [messages]]
    return [form for n, form in enumerate(forms) if form not in forms[:n]]


def _form(messages, as_text, empty):
    messages = json.loads(json.dumps(messages))
    for message in messages:
        for made in message.get("tool_calls", ()) if as_text else ():
            made["function"]["arguments"] = json.dumps(made["function"]["arguments"])
        if message["content"] is None and empty:
            message["content"] = ""
    return messages


def said(message, with_thoughts=False):
    """The texts of a message that must be written, the last of them the one that comes last."""
    thoughts = [message["reasoning_content"]] if with_thoughts and "reasoning_content" in message else []
    content = [message["content"].strip()] if (message.get("content") or "").strip() else []
    made = [made["function"]["arguments"] for made in message.get("tool_calls", ())]
    return [*thoughts, *content, *((json.loads(a) if isinstance(a, str) else a)["city"] for a in made)]


class Fault(Exception):
    """(messages it can be laid to, reason)."""


class Reading:
    """One dialogue in one form, rendered by the tokenizer's own template."""

    def __init__(self, tokenizer, name, messages, in_parts):
        self.tokenizer, self.messages, self.tools, self.rendered = tokenizer, messages, tools_of(messages), {}
        self.in_parts = in_parts  # content as templates of models that see images want it
        family = lambda table: table[max((k for k in table if name.startswith(k)), key=len, default="")]  # noqa: E731
        ends = family({"": [], **ENDS})
        at = lambda names: re.compile("|".join(map(re.escape, names)) or "(?!)")  # noqa: E731
        self.at_end, self.at_close = at(ends), at([*ends, *family({"": [], **IN_HISTORY})])
        self.at_token = at(sorted(tokenizer.get_added_vocab(), key=len, reverse=True))

    def text(self, messages, prompt=False):
        """The rendering; of a list of one conversation, for transformers refuses one without messages."""
        key = json.dumps([messages, prompt])
        if key not in self.rendered:
            given = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
            self.rendered[key] = self.tokenizer.apply_chat_template(
                [given if self.in_parts else messages], tools=self.tools, tokenize=False, add_generation_prompt=prompt
            )[0]
        return self.rendered[key]

    def expected(self):
        answers = [n for n, message in enumerate(self.messages) if message["role"] == "assistant"]
        done = Expected()
        for index in answers:
            try:
                turn, seen = self.turn(index)
                done.turns.append(turn)
                done.seen.append(seen)
            except Fault as fault:  # noqa: PERF203
                done.faults.append(fault.args)
        try:
            self.prompt(answers[0])
        except Exception:
            done.unopened = True
        if not done.faults:
            done.openings = self.openings(answers[0])
            done.replies = [self.reply(*two) for two in pairwise(answers)]
        return done

    # ---- one answer --------------------------------------------------------------------------------------------------
    def turn(self, index):
        """The turn, and the same with the whole generation prompt before it."""
        whole, prompt = self.whole(index), self.prompt(index)
        text, start, cut = self.as_seen(index, prompt, whole)
        begin = self.after_its_own(index, text, start)
        last = said(self.messages[index], True)[-1:]
        found = self.at_end.search(text, max(begin, text.rindex(last[0]) + len(last[0]) if last else 0))
        if found is None:
            raise Fault({index}, "no end")
        turn = Turn(text[:begin], text[begin : found.end()], index)
        plain = "reasoning_content" not in self.messages[index]  # thoughts must stand in a block that is open
        return turn, replace(turn, context=prompt + text[start:begin]) if cut and plain else turn

    def openings(self, index):
        before = self.messages[:index]
        try:
            return [self.text(before, prompt=True), *[self.begun(index)] * (not before)]
        except Exception:
            return [self.begun(index)]

    def begun(self, index):
        """What stands before an answer that begins a dialogue, up to and with the header that others have."""
        before, header = self.text(self.marked(index)[: index + 1]).partition(MARK)[0], self.header()
        return before[: before.rindex(header) + len(header)] if header and header in before else before

    def prompt(self, index):
        """What the model sees before it answers."""
        before = self.messages[:index]
        try:
            text = self.text(before, prompt=True)
        except Exception as error:
            if any(message["role"] != "system" for message in before):
                raise Fault({index - 1, index}, f"raises {error}") from None
            text = self.begun(index)
        self.require(range(index), text)
        return text

    def whole(self, index):
        messages = self.messages[: index + 1]
        try:
            text = self.text(messages)
        except Exception as error:
            raise Fault({index, self.raising(messages, str(error))}, f"raises {error}") from None
        self.require([index], text)
        return text

    def raising(self, messages, reason):
        """The message with which a template begins to say this."""
        for stop in range(1, len(messages)):
            try:
                self.text(messages[:stop])
            except Exception as error:  # noqa: PERF203
                if str(error) == reason:
                    return stop - 1
        return len(messages) - 1

    def require(self, which, text):
        """What the messages say must be in the text; of thoughts only those of an answer that stands last."""
        lost = {n for n in which if any(one not in text for one in said(self.messages[n], which == [n]))}
        if self.tools and self.tools[0]["function"]["description"] not in text:
            lost |= set(range(len(self.messages)))
        if lost:
            raise Fault(lost, "lost")

    def marked(self, index):
        return [{**m, "content": MARK} if n == index else m for n, m in enumerate(self.messages)]

    def as_seen(self, index, prompt, whole):
        """The history that the model sees and the answer as the template writes it last; where the prompt ends in it;
        whether the answer begins otherwise than the prompt, which then goes the answer's way."""
        if prompt and whole.startswith(prompt):
            return whole, len(prompt), False
        first = said(self.messages[index], True)[:1]
        bound = whole.rindex(first[0]) if first else len(whole)
        if not index:
            begun = self.begun(index)
            return whole, len(begun) if whole.startswith(begun) else bound, True
        opened = prompt[self.common(prompt, self.text(self.messages[:index])) :]
        for size in range(len(opened), 0, -1):
            at = whole.rfind(opened[:size], 0, bound)
            if at >= 0 and not any(m.start() < size < m.end() for m in self.at_token.finditer(opened)):
                history = prompt[: len(prompt) - len(opened)]
                if any(one in whole[at:bound] for m in self.messages[:index] for one in said(m)):
                    break  # it joins two answers in one
                return history + whole[at:], len(history) + size, size < len(opened)
        opened = next((n for n in range(bound, 0, -1) if whole[:n].endswith(prompt[-NEAR:])), 0)
        if opened and not any(one in whole[opened:bound] for m in self.messages[:index] for one in said(m)):
            return prompt + whole[opened:], len(prompt), False  # no generation prompt, and earlier messages rewritten
        header = self.header() if whole[:bound].endswith(self.header()) else ""
        return prompt + header + whole[bound:], len(prompt), False

    def header(self):
        """What a template writes before an answer as a rule."""
        try:
            asked = self.text(PROBE, prompt=True)
            return asked[self.common(asked, self.text(PROBE)) :]
        except Exception:
            return ""

    def common(self, one, other):
        """How many characters two texts share, tokens whole."""
        size = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        return next((m.start() for m in self.at_token.finditer(one) if m.start() < size < m.end()), size)

    def after_its_own(self, index, text, start):
        """Behind what the template writes before an answer by itself: its header, an empty block of thoughts."""
        header, message = self.header(), self.messages[index]
        start += len(header) if header and text.startswith(header, start) else 0
        content = message.get("content") or ""
        forms = [form for form in (content, content.rstrip(), content.lstrip(), content.strip()) if form]
        own = next((text.rfind(form) for form in forms if form in text), -1)
        for empty in EMPTY_THOUGHTS.finditer(text) if "reasoning_content" not in message else ():
            if empty.start() <= start < empty.end():
                behind = EMPTY_THOUGHTS.search(self.text([*PROBE, {"role": "assistant", "content": MARK}]))
                return min(empty.start(1) + len(behind[1]), empty.end()) if own < 0 else min(empty.end(), own)
        return start

    def reply(self, index, following):
        """What the template writes from the end of answer ``index`` on: with the history before it, which it may
        rewrite, and with none."""
        if following == index + 1:
            return []
        found = [self.behind(self.messages[:following], index)]
        try:
            found.append(self.behind([*PROBE, *self.messages[index:following]], len(PROBE)))
        except Exception:
            found.append(REFUSED)
        return [text for text in found if text != REFUSED] or found

    def behind(self, messages, index):
        message, heard = messages[index], messages[index + 1 :]
        if message.get("tool_calls"):  # some templates write what is said beside a call behind its results
            own, content = said(message)[-1], ""
        else:
            own = content = MARK
        talk = [{**m, "content": content} if n == index else m for n, m in enumerate(messages)]
        text = self.text(talk, prompt=True)
        after = text[text.rindex(own) + len(own) :]
        closed = self.at_close.search(after)
        if closed is None or any(one not in after[closed.end() :] for m in heard for one in said(m)):
            return REFUSED
        return after[closed.end() :]

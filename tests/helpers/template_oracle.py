"""What a chat template makes of a dialogue, found with transformers alone: of each answer what the model sees and what
it says, what stands between two answers, and which messages a template refuses or loses.

Nothing of ppg_fast is imported here. An answer is what the template writes for it as the last message, up to and with
its first end token; what it writes before that by itself (an empty block of thoughts) is context.
"""

import json
import re
from dataclasses import dataclass, field

ENDS = {  # of the models' generation configs, by the beginning of a template's name; the longest that fits
    "cohere": ["<|END_OF_TURN_TOKEN|>"],
    "deepseek": ["<\uff5cend▁of▁sentence\uff5c>"],
    "diffusion_gemma": ["<turn|>", "<|tool_response>"],
    "gemma": ["<end_of_turn>"],
    "gemma4": ["<turn|>", "<|tool_response>"],
    "glm4moe": ["<|user|>", "<|observation|>"],
    "gptoss": ["<|return|>", "<|call|>"],
    "idefics3": ["<end_of_utterance>"],
    "lfm2": ["<|im_end|>"],
    "llama3": ["<|eot_id|>"],
    "llava_next": ["</s>"],
    "muse_glimmer": ["<|eot|>"],
    "nemotron": ["<|im_end|>"],
    "phi3": ["<|end|>"],
    "qwen": ["<|im_end|>"],
    "smolvlm": ["<end_of_utterance>"],
}
IN_HISTORY = {"gptoss": ["<|end|>"]}  # what closes an answer once somebody has replied
EMPTY_THOUGHTS = re.compile(r"\s*<think>\s*</think>\s*")
MARK = "Wx5oracle"


# ---- the dialogues ---------------------------------------------------------------------------------------------------
def call(number, city):
    return {
        "id": f"call0000{number}",
        "type": "function",
        "function": {"name": "weather", "arguments": {"city": city}},
    }


def result(number, content):
    return {"role": "tool", "tool_call_id": f"call0000{number}", "name": "weather", "content": content}


PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Its name"}},
    "required": ["city"],
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "The weather of a city", "parameters": PARAMETERS},
    }
]
SYSTEM = {"role": "system", "content": "be kind"}
ASK, GO = {"role": "user", "content": "hello you"}, {"role": "user", "content": "and now?"}
ANSWER, BYE = {"role": "assistant", "content": "good day"}, {"role": "assistant", "content": "farewell"}
CALLS = {"role": "assistant", "content": "Let me look.", "tool_calls": [call(1, "Rome")]}
TOLD = {"role": "assistant", "content": "It is warm."}
SHAPES = {
    "plain": [ASK, ANSWER, GO, BYE],
    "system": [SYSTEM, ASK, ANSWER, GO, BYE],
    "thinking": [
        ASK,
        {**ANSWER, "reasoning_content": "I ponder"},
        GO,
        {**BYE, "reasoning_content": "I wonder"},
    ],
    "one tool": [ASK, CALLS, result(1, "12 C"), TOLD],
    "two tools": [
        ASK,
        {**CALLS, "tool_calls": [call(1, "Rome"), call(2, "Oslo")]},
        result(1, "12 C"),
        result(2, "3 C"),
        TOLD,
    ],
    "call alone": [ASK, {**CALLS, "content": None}, result(1, "12 C"), TOLD],
    "system later": [ASK, ANSWER, SYSTEM, GO, BYE],
    "two users": [ASK, GO, ANSWER],
    "two assistants": [ASK, ANSWER, BYE],
    "spaces": [{**ASK, "content": "  hello you \n"}, {**ANSWER, "content": " \n good day \n "}, GO, BYE],
    "empty answer": [ASK, {**ANSWER, "content": ""}, GO, BYE],
    "assistant first": [ANSWER, GO, BYE],
    "single": [ASK, ANSWER],
}


def tools_of(messages):
    return TOOLS if any("tool_calls" in message for message in messages) else None


# ---- what a template makes of them -----------------------------------------------------------------------------------
@dataclass
class Turn:
    """The text before an answer that is trained, that answer, and where in the dialogue it stands."""

    context: str
    answer: str
    message: int


@dataclass
class Expected:
    """``opening``: up to the first answer; ``replies``: from the end of each answer but the last to the next, None
    where nobody speaks between; ``faults``: what is refused or lost, by the messages it can be laid to."""

    opening: str = ""
    turns: list[Turn] = field(default_factory=list)
    replies: list[str | None] = field(default_factory=list)
    faults: list[tuple[set[int], str]] = field(default_factory=list)

    @property
    def parts(self):
        """Numbers of the turns that begin a part: those before which the template writes another history."""
        views = [turn.context + turn.answer for turn in self.turns]
        return [n for n, view in enumerate(views) if not n or not view.startswith(views[n - 1])]


def forms(messages):
    """The dialogue as templates may want it, the most usual form first: arguments as objects or as text, no content as
    none or as empty."""
    for as_text in (False, True):
        for empty in (False, True):
            yield [_form(message, as_text, empty) for message in messages]


def _form(message, as_text, empty):
    message = json.loads(json.dumps(message))
    for made in message.get("tool_calls", ()) if as_text else ():
        made["function"]["arguments"] = json.dumps(made["function"]["arguments"])
    if message["content"] is None and empty:
        message["content"] = ""
    if "reasoning_content" in message:  # templates have three names for it
        message |= {"reasoning": message["reasoning_content"], "thinking": message["reasoning_content"]}
    return message


def expected(tokenizer, name, messages):
    """Of the form that the template writes without a fault, else of the first."""
    found = [Reading(tokenizer, name, form).expected() for form in forms(messages)]
    return next((one for one in found if not one.faults), found[0])


class Reading:
    """One dialogue in one form, rendered by the tokenizer's own template."""

    def __init__(self, tokenizer, name, messages):
        self.tokenizer, self.messages, self.tools = tokenizer, messages, tools_of(messages)
        self.cache = {}
        family = lambda table: table[max((k for k in table if name.startswith(k)), key=len, default="")]  # noqa: E731
        ends = family({"": [], **ENDS})
        at = lambda names: re.compile("|".join(map(re.escape, names)) or "(?!)")  # noqa: E731
        self.at_end, self.at_close = at(ends), at([*ends, *family({"": [], **IN_HISTORY})])
        self.at_token = at(sorted(tokenizer.get_added_vocab(), key=len, reverse=True))
        self.faults = []

    def text(self, messages, prompt=False):
        """The rendering; a list of one conversation, for transformers refuses one without messages."""
        key = json.dumps([messages, prompt])
        if key not in self.cache:
            self.cache[key] = self.tokenizer.apply_chat_template(
                [messages], tools=self.tools, tokenize=False, add_generation_prompt=prompt
            )[0]
        return self.cache[key]

    def expected(self):
        answers = [n for n, message in enumerate(self.messages) if message["role"] == "assistant"]
        done = Expected(faults=self.faults)
        try:
            for number, index in enumerate(answers):
                prompt, turn = self.turn(index)
                done.turns.append(turn)
                if not number:
                    done.opening = prompt
                else:
                    done.replies.append(self.reply(answers[number - 1], index))
        except Fault as fault:
            self.faults.append(fault.args)
        return done

    # ---- one answer --------------------------------------------------------------------------------------------------
    def turn(self, index):
        whole = self.whole(index)
        prompt = self.prompt(index)
        text, start = self.as_seen(index, prompt, whole)
        start = self.after_its_own(index, text, start)
        last = said(self.messages[index], True)[-1:]
        found = self.at_end.search(text, text.rindex(last[0]) + len(last[0]) if last else start)
        if found is None:
            raise Fault({index}, "no end")
        return prompt, Turn(text[:start], text[start : found.end()], index)

    def prompt(self, index):
        """What the model sees before it answers."""
        before = self.messages[:index]
        try:
            text = self.text(before, prompt=True)
        except Exception as error:
            if any(message["role"] != "system" for message in before):
                raise Fault({index - 1, index}, f"raises {error}") from None
            text = self.text(self.marked(index)[: index + 1]).partition(MARK)[0]  # no prompt for who begins by itself
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
        for stop in range(1, len(messages) + 1):
            try:
                self.text(messages[:stop])
            except Exception as error:
                if str(error) == reason:
                    return stop - 1
        return len(messages) - 1

    def require(self, which, text):
        """What the messages say must be in the text; of thoughts only those of an answer that stands last."""
        thoughts = not isinstance(which, range)
        lost = {n for n in which if any(one not in text for one in said(self.messages[n], thoughts))}
        if self.tools and "weather" not in text:
            lost |= set(range(len(self.messages)))
        if lost:
            raise Fault(lost, "lost")

    def marked(self, index):
        return [{**m, "content": MARK} if n == index else m for n, m in enumerate(self.messages)]

    def as_seen(self, index, prompt, whole):
        """The history as the model sees it and the answer as the template writes it last; where the prompt ends in it.

        Where a template writes the answer otherwise than its prompt begins one (other thoughts), the answer's way.
        """
        if whole.startswith(prompt):
            return whole, len(prompt)
        opened = prompt[self.common(prompt, self.text(self.messages[:index])) :]
        first = said(self.messages[index], True)[:1]
        bound = whole.rindex(first[0]) if first else len(whole)
        for size in range(len(opened), 0, -1):
            at = whole.rfind(opened[:size], 0, bound)
            if at >= 0 and not any(m.start() < size < m.end() for m in self.at_token.finditer(opened)):
                history = prompt[: len(prompt) - len(opened)]
                if any(one in whole[at:bound] for m in self.messages[:index] for one in said(m, False)):
                    return prompt + whole[bound:], len(prompt)  # it joins two answers in one
                return history + whole[at:], len(history) + size
        raise Fault({index}, "no prompt")

    def common(self, one, other):
        """How many characters two texts share, tokens whole."""
        size = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
        return next((m.start() for m in self.at_token.finditer(one) if m.start() < size < m.end()), size)

    def after_its_own(self, index, text, start):
        """Behind what the template writes before an answer by itself: its header, an empty block of thoughts."""
        asked = [{"role": "user", "content": "a"}]
        try:
            header = self.text(asked, prompt=True)
            header = header[self.common(header, self.text(asked)) :]
        except Exception:
            header = ""
        start += len(header) if header and text.startswith(header, start) else 0
        message = self.messages[index]
        content = message.get("content") or ""
        forms = [form for form in (content, content.rstrip(), content.lstrip(), content.strip()) if form]
        own = next((text.rfind(form) for form in forms if form in text), -1)
        for empty in EMPTY_THOUGHTS.finditer(text) if "reasoning" not in message else ():
            if empty.start() <= start < empty.end():
                return empty.end() if own < 0 else min(empty.end(), own)
        return start

    # ---- between two -------------------------------------------------------------------------------------------------
    def reply(self, index, following):
        """What the template writes from the end of answer ``index`` on: the history before it may be rewritten."""
        if following == index + 1:
            return None
        message = self.messages[index]
        if message.get("tool_calls"):  # some templates write what is said beside a call behind its results
            alone = [{**m, "content": ""} if n == index else m for n, m in enumerate(self.messages)]
            text, own = self.text(alone[:following], prompt=True), said(message, False)[-1]
        else:
            text, own = self.text(self.marked(index)[:following], prompt=True), MARK
        found = self.at_close.search(text, text.rindex(own) + len(own))
        if found is None:
            raise Fault({index}, "no end")
        return text[found.end() :]


class Fault(Exception):
    """(messages it can be laid to, reason)."""


def said(message, with_thoughts):
    """The texts of a message that must be written, the last of them the one that comes last."""
    thoughts = [message["reasoning"]] if with_thoughts and "reasoning" in message else []
    content = [message["content"].strip()] if (message.get("content") or "").strip() else []
    made = [made["function"]["arguments"] for made in message.get("tool_calls", ())]
    return [*thoughts, *content, *(next(iter(a.values())) if isinstance(a, dict) else json.loads(a)["city"] for a in made)]

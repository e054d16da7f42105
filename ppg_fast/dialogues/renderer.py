"""The one chat renderer: messages to text by a chat template or role tokens, text to tokens, and where a turn ends."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from typing import Any

from ppg_fast.dialogues.conversation import ASK, STAND_IN, Form, Tools, completed, form_of, strings
from ppg_fast.dialogues.message import ROLES, Message
from ppg_fast.dialogues.template_choice import require_read
from ppg_fast.spec import require

END = "<end>"
ROLE_TOKENS = tuple(f"<{role}>" for role in ROLES)
REQUIRED = ("<system>", "<user>", "<assistant>", END)  # <tool> only where there are tool messages
ROLE_TEMPLATE = (  # what `Renderer` writes without a template: role token, content, end token
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% "
    "endif %}"
)
CLOCK = "strftime_now"
REFUSES = "the chat template refuses it"


class Renderer:
    """Messages as a tokenizer's chat template writes them, or as <role> content <end> where it has none.

    Role tokens are tokens of the vocabulary, found by name whether or not the tokenizer would split a text at them.
    ``special``: id of each special token by name, role tokens included. ``added``: those that the tokenizer takes out
    of any text, special or not. ``date``: what a template that writes one is told, "" for today's; as an attribute ""
    where the template writes none. ``template``: a chat template in place of the tokenizer's own;
    ``template_kwargs``: what else it is told, in every rendering. ValueError for a tokenizer that has neither a
    template nor the tokens <system> <user> <assistant> <end>.
    """

    def __init__(
        self, tokenizer: Any, date: str = "", template: str = "", template_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        self.tokenizer, self.template_kwargs = tokenizer, dict(template_kwargs or {})
        own = tokenizer.get_chat_template() if getattr(tokenizer, "chat_template", None) else ROLE_TEMPLATE
        self.template: str = template or own
        self.by_role = self.template == ROLE_TEMPLATE
        require_read(self.template, self.template_kwargs)
        day = datetime.fromisoformat(date) if date else datetime.now()
        dated = CLOCK in self.template
        self.date, self._dated = day.date().isoformat() * dated, _clock(day) * dated + self.template
        added = {token.content: (number, token.special) for number, token in tokenizer.added_tokens_decoder.items()}
        self.special: dict[str, int] = dict(
            zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        ) | {name: number for name, (number, special) in added.items() if special}
        roles: dict[str, int] = {}
        if self.by_role:
            vocabulary = tokenizer.get_vocab()
            missing = [token for token in REQUIRED if token not in vocabulary]
            rule = f"a tokenizer without a chat template must have the tokens {' '.join(REQUIRED)}; missing"
            require(not missing, rule, missing)
            roles = {token: vocabulary[token] for token in (*ROLE_TOKENS, END) if token in vocabulary}
            self.special |= roles
        self._roles, self._at_roles = roles, re.compile("(" + "|".join(map(re.escape, roles)) + ")")
        self.added = {name: number for name, (number, _) in added.items()} | self.special
        names = sorted(self.added, key=len, reverse=True)
        self.token_pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._reserved = [*self.special, *(ROLE_TOKENS if self.by_role else self._structure())]

    def _structure(self) -> list[str]:
        """Added tokens that are not marked as special, and that the template writes around a message all the same."""
        plain = self.added.keys() - self.special.keys()
        try:
            written = self.text([Message("user", "a")]) if plain else ""
        except ValueError:  # a template that refuses this says so where it matters
            return []
        return sorted(name for name in plain if name in written)

    def check(self, message: Message) -> None:
        """ValueError for a role without a token, and for a content that spells a control token.

        Such a content would end its message early or speak for another role. Every special token is one, whatever else
        the tokenizer uses it for.
        """
        role = f"<{message.role}>"
        if self.by_role:
            require(role in self._roles, "the tokenizer must have a token for the role", role)
        self._check_text("content", [message.content])
        for key, value in message.more.items():
            self._check_text(key, strings(value))

    def check_tools(self, tools: Tools) -> None:
        """ValueError for tools that spell a control token."""
        self._check_text("tools", strings(list(tools)))

    def _check_text(self, name: str, texts: Iterable[str]) -> None:
        for text in texts:
            token = next((token for token in self._reserved if token in text), None)
            if token is not None:
                start = max(text.index(token) - 20, 0)
                got = f"got {token!r} in {text[start : start + 60]!r}"
                raise ValueError(f"{name} must not hold a special token of the tokenizer, {got}")

    def without_special(self, text: str) -> str:
        """``text`` without what would be read as a control token: for what a model says while a run goes on."""
        while found := [name for name in self._reserved if name in text]:  # taking one out may bring another together
            for name in found:
                text = text.replace(name, "")
        return text

    def text(self, messages: Sequence[Message], answer_next: bool = False, tools: Tools = ()) -> str:
        """The messages, then the header of an answer if ``answer_next``. ValueError, one line that names the message,
        where the template refuses them."""
        if self.by_role:
            written = "".join(f"<{message.role}>{message.content}{END}" for message in messages)
            return written + "<assistant>" if answer_next else written
        try:
            return self._render(messages, answer_next, tools)
        except Exception as error:  # a template refuses a conversation with an error class of its own
            reason = one_line(error)
        for index in range(len(messages) - 1):  # where it begins to say so
            try:
                self._render(messages[: index + 1], False, tools)
            except Exception as error:  # noqa: PERF203
                if one_line(error) == reason:
                    raise ValueError(f"message {index}: {REFUSES}: {reason}") from error
        raise ValueError(f"message {max(len(messages) - 1, 0)}: {REFUSES}: {reason}")

    def _render(self, messages: Sequence[Message], answer_next: bool, tools: Tools) -> str:
        conversation = self._form.conversation(messages)
        try:
            return self.raw(conversation, answer_next, tools)
        except Exception:  # Mistral's templates want ids of nine letters, others a description of every tool
            whole = completed(conversation, tools)
            if whole == (conversation, list(tools)):
                raise
            try:
                return self.raw(whole[0], answer_next, whole[1])
            except Exception:
                pass  # what it says of the messages as they were given tells more
            raise

    @cached_property
    def _form(self) -> Form:
        return form_of(self.raw)

    def raw(self, conversation: list[dict[str, Any]], answer_next: bool = False, tools: Tools = ()) -> str:
        """What `apply_chat_template` writes, with the renderer's own date; it raises what a template raises."""
        return self.tokenizer.apply_chat_template(
            [conversation],  # a list of one: transformers refuses an empty conversation
            tools=list(tools) or None,
            chat_template=self._dated,
            tokenize=False,
            add_generation_prompt=answer_next,
            **self.template_kwargs,
        )[0]

    def before_answer(self, messages: Sequence[Message], tools: Tools = ()) -> str:
        """The text up to where the assistant begins to speak: the generation prompt after ``messages``.

        Where the assistant opens the dialogue, what the template writes before the answer of a dialogue so begun, if
        that ends with its generation prompt (it may write more with a first message only) or it has none there.
        ValueError where it refuses that too, or takes the answer for the user's.
        """
        refused: ValueError | None = None
        prompt = ""
        try:
            prompt = self.text(messages, answer_next=True, tools=tools)
        except ValueError as error:
            refused = error
        if any(message.role != "system" for message in messages):
            if refused:
                raise refused
            return prompt
        try:
            begun = self._begun(messages, tools)
        except ValueError:
            if refused:
                raise
            return prompt
        return begun if refused or (not messages and begun.endswith(prompt)) else prompt

    def _begun(self, messages: Sequence[Message], tools: Tools) -> str:
        """The text before an answer that opens a dialogue."""
        opened, asked = (self.text([*messages, Message(r, STAND_IN)], tools=tools) for r in ("assistant", "user"))
        rule = "the chat template must write an answer that opens a dialogue"
        require(STAND_IN in opened and opened != asked, rule, opened[:60])
        begun = opened[: opened.index(STAND_IN)]
        return begun[: begun.rindex(self.header) + len(self.header)] if self.header in begun else begun

    @cached_property
    def header(self) -> str:
        """The generation prompt after a question; "" where there is none, or the template refuses that."""
        try:
            asked = self.text([ASK], answer_next=True)
            return asked[self.common(asked, self.text([ASK])) :]
        except ValueError:
            return ""

    def common(self, one: str, other: str) -> int:
        """How many characters of ``one`` the two begin with alike, tokens whole."""
        size = len(shared_start(one, other))
        tokens = self.token_pattern.finditer(one)
        return next((token.start() for token in tokens if token.start() < size < token.end()), size)

    def digest(self) -> str:
        """A checksum of what decides the tokens of a message: template, what it is told, and tokenizer; not the
        date."""
        core = getattr(self.tokenizer, "backend_tokenizer", None)
        tokenizer = core.to_str() if core is not None else sorted(self.tokenizer.get_vocab().items())
        parts = (
            self.template,
            tokenizer,
            sorted(self.special.items()),
            *([sorted(self.template_kwargs.items())] if self.template_kwargs else []),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The tokens of a text. ValueError where the tokenizer has none for it."""
        tokens: list[int] = []
        for part in self._at_roles.split(text) if self.by_role else [text]:
            if part in self._roles:
                tokens.append(self._roles[part])
            elif part:
                found = self.tokenizer(part, add_special_tokens=False)["input_ids"]
                kept = bool(found) or not part.strip()
                require(kept, "the tokenizer must give tokens for the content", part[:40])
                tokens.extend(found)
        return tokens


def first_difference(one: Sequence[Any], other: Sequence[Any]) -> int:
    """First position at which the two differ; the last common one if either is the beginning of the other."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)) - 1)


def _clock(day: datetime) -> str:
    """The function of transformers by which a template asks for the date, written in Jinja to give that of ``day``.

    A macro of the same name goes before the function; the line break is the one that transformers' settings take away.
    """
    directives = [flag + letter for letter in "aAbBcdDeFGhHIjmMpRSTuUVwWxXyYzZ" for flag in ("", "-")]
    values = {f"%{directive}": day.strftime(f"%{directive}") for directive in directives}
    steps = "".join(f"|replace({json.dumps(name)}, {json.dumps(value)})" for name, value in values.items())
    return f"{{%- macro {CLOCK}(format) -%}}{{{{ format{steps} }}}}{{%- endmacro %}}\n"


def shared_start(one: str, other: str) -> str:
    """The longest text that both begin with."""
    return one[
        : next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    ]


def one_line(error: BaseException) -> str:
    """What an exception says, in one line of bounded length."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@contextmanager
def in_message(index: int) -> Iterator[None]:
    """A ValueError inside names the message."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"message {index}: {error}") from error

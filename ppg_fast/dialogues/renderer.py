"""The one chat renderer: messages to text by a chat template or role tokens, text to tokens, and where a turn ends."""

import re
from collections.abc import Sequence
from typing import Any

from ppg_fast.dialogues.dialogue import ROLES, Message
from ppg_fast.spec import require

END = "<end>"
ROLE_TOKENS = tuple(f"<{role}>" for role in ROLES)
REQUIRED = ("<system>", "<user>", "<assistant>", END)  # <tool> only where there are tool messages
ROLE_TEMPLATE = (  # what `Renderer` writes without a template: role token, content, end token
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% "
    "endif %}"
)


class Renderer:
    """Messages as a tokenizer's chat template writes them, or as <role> content <end> where it has none.

    Role tokens are tokens of the vocabulary, found by name whether or not the tokenizer would split a text at them.
    ``special``: id of each special token by name, role tokens included. ValueError for a tokenizer that has neither a
    template nor the tokens <system> <user> <assistant> <end>.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        template = getattr(tokenizer, "chat_template", None) or ROLE_TEMPLATE
        self.by_role = template == ROLE_TEMPLATE
        self.special: dict[str, int] = dict(
            zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True)
        ) | {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        roles: dict[str, int] = {}
        if self.by_role:
            vocabulary = tokenizer.get_vocab()
            missing = [token for token in REQUIRED if token not in vocabulary]
            rule = f"a tokenizer without a chat template must have the tokens {' '.join(REQUIRED)}; missing"
            require(not missing, rule, missing)
            roles = {token: vocabulary[token] for token in (*ROLE_TOKENS, END) if token in vocabulary}
            self.special |= roles
        self._roles, self._at_roles = roles, re.compile("(" + "|".join(map(re.escape, roles)) + ")")
        # padding and unknown words are harmless in a content, unless the same token also begins or ends something
        harmless = {tokenizer.unk_token, tokenizer.pad_token} - {tokenizer.eos_token, tokenizer.bos_token}
        harmless = {token for token in harmless if token and token not in str(template)}
        reserved = (*self.special, *ROLE_TOKENS, END) if self.by_role else tuple(self.special)
        self._reserved = [token for token in dict.fromkeys(reserved) if token not in harmless]

    def check(self, message: Message) -> None:
        """ValueError for a role without a token, and for a content that spells a special token.

        Such a content would end its message early or speak for another role.
        """
        role = f"<{message.role}>"
        if self.by_role:
            require(role in self._roles, "the tokenizer must have a token for the role", role)
        for token in self._reserved:
            if token in message.content:
                got = f"got {token!r} in {message.content[:60]!r}"
                raise ValueError(f"content must not hold a special token of the tokenizer, {got}")

    def without_special(self, text: str) -> str:
        """``text`` without what would be read as a special token."""
        while found := [name for name in self.special if name in text]:  # taking one out may bring another together
            for name in found:
                text = text.replace(name, "")
        return text

    def text(self, messages: Sequence[Message], answer_next: bool = False) -> str:
        """The messages, then the header of an answer if ``answer_next``. ValueError where the template refuses them."""
        if self.by_role:
            written = "".join(f"<{message.role}>{message.content}{END}" for message in messages)
            return written + "<assistant>" if answer_next else written
        conversation = [message.as_dict() for message in messages]
        try:
            return self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=answer_next)
        except Exception as error:  # a template refuses a conversation with an error class of its own
            raise ValueError(f"the chat template refuses it: {error}") from error

    def added(self, before: str, messages: Sequence[Message], answer_next: bool = False) -> str:
        """What the text of ``messages`` adds to ``before``, the text of fewer; ValueError where it does not append."""
        text = self.text(messages, answer_next)
        if not text.startswith(before):
            changed = before[first_difference(text, before) :][:60]
            rule = "the chat template must only append (a training template keeps what earlier messages had)"
            raise ValueError(f"{rule}, but it no longer writes {changed!r}")
        return text[len(before) :]

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

    def end_of_turn(self, tokens: Sequence[int]) -> int | None:
        """How many of an answer's tokens are the turn: those up to its last special token, if only blanks follow.

        What a template writes after that, such as a line break, the policy never chose. None where no special token
        ends it.
        """
        special = set(self.special.values())
        end = max((n + 1 for n, token in enumerate(tokens) if token in special), default=None)
        return None if end is None or self.tokenizer.decode(tokens[end:]).strip() else end


def first_difference(one: Sequence[Any], other: Sequence[Any]) -> int:
    """First position at which the two differ; the last common one if either is the beginning of the other."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)) - 1)

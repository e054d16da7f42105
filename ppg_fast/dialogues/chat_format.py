"""Messages to tokens through the tokenizer's chat template; and tokenizers made on the spot that have one."""

from collections.abc import Iterable, Sequence
from typing import Any

from ppg_fast.dialogues.dialogue import ROLES, Message

PAD, END, UNKNOWN = "<pad>", "<end>", "<unk>"
SPECIAL = (PAD, END, UNKNOWN, *(f"<{role}>" for role in ROLES))
ROLE_TEMPLATE = (  # every message is: role token, content, end token
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% "
    "endif %}"
)


class ChatFormat:
    """What stands between the answers of a dialogue, as tokens: the opening before the first, the reply after any.

    Answers themselves are never rendered: they are the tokens that were sampled, up to and with ``end_id``. ValueError
    for a tokenizer that has neither a chat template nor the role tokens of ours, or whose template does not end an
    answer with a special token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        if not tokenizer.chat_template:
            missing = [t for t in (*SPECIAL[3:6], END) if t not in tokenizer.get_vocab()]
            if missing:
                raise ValueError(
                    f"a tokenizer needs a chat template or the tokens <system> <user> <assistant> {END}, got none of "
                    f"{missing}"
                )
            tokenizer.chat_template = ROLE_TEMPLATE
        self._special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._before = [Message("user", "a"), Message("assistant", "b")]
        answer = self._render(self._before, False)[len(self._render(self._before[:1], True)) :]
        ends = [t for t in self._encode(answer) if t in self._special]
        if not ends:
            raise ValueError(f"the chat template must end an answer with a special token, got {answer!r}")
        self.end_id: int = ends[-1]
        end = tokenizer.convert_ids_to_tokens(self.end_id)
        self._answered = self._render(self._before, False)
        self._answered = self._answered[: self._answered.rindex(end) + len(end)]
        self._replies: dict[Message, list[int]] = {}

    def opening(self, messages: Sequence[Message]) -> list[int]:
        """The tokens up to where the first answer begins."""
        self._reject_special(messages)
        return self._encode(self._render(messages, True))

    def reply(self, message: Message) -> list[int]:
        """The tokens from the end token of an answer to the beginning of the next."""
        if message not in self._replies:  # a group shares its questions: encode them once
            self._reject_special([message])
            text = self._render([*self._before, message], True)
            if not text.startswith(self._answered):
                raise ValueError(
                    f"the chat template must only append, but it changed an earlier message before {message.content!r}"
                )
            self._replies[message] = self._encode(text[len(self._answered) :])
        return self._replies[message]

    def answer(self, text: str) -> list[int]:
        """The tokens of an answer written by somebody else, end token included."""
        self._reject_special([Message("assistant", text)])
        return [*self._encode(text), self.end_id]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of an answer, special tokens left out."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def without_special(self, text: str) -> str:
        """``text`` without what would be read as a special token of the tokenizer."""
        names = self.tokenizer.convert_ids_to_tokens(sorted(self._special))
        while found := [name for name in names if name in text]:  # taking one out may bring another together
            for name in found:
                text = text.replace(name, "")
        return text

    def banned_token_ids(self, vocab_size: int) -> list[int]:
        """Token ids that an answer must not hold: special tokens but the end, and rows of the head that name no
        token."""
        return sorted((self._special - {self.end_id}) | set(range(len(self.tokenizer), vocab_size)))

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _render(self, messages: Sequence[Message], answer_next: bool) -> str:
        conversation = [{"role": m.role, "content": m.content} for m in messages]
        return self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=answer_next)

    def _reject_special(self, messages: Sequence[Message]) -> None:
        """A content that spells a special token would end its message early or speak for another role."""
        for message in messages:
            for token in self.tokenizer.convert_ids_to_tokens(sorted(self._special)):
                if token in message.content:
                    raise ValueError(
                        f"content must not hold a special token of the tokenizer, got {token!r} in "
                        f"{message.content[:60]!r}"
                    )


def make_word_tokenizer(words: Iterable[str]) -> Any:
    """A tokenizer of whole words, split at white space; the special tokens come first, <pad> = 0 and <end> = 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _wrap(core)


def make_byte_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> Any:
    """A byte-level BPE tokenizer trained on ``texts``: any text is covered, whatever it was trained on.

    ``vocab_size`` at least 263: 256 bytes and the special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(SPECIAL):
        raise ValueError(
            f"vocab_size must be at least {len(alphabet) + len(SPECIAL)} (bytes and special tokens), got {vocab_size}"
        )
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    return _wrap(core)


def _wrap(core: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=END, unk_token=UNKNOWN)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<{role}>" for role in ROLES]})
    tokenizer.chat_template = ROLE_TEMPLATE
    return tokenizer

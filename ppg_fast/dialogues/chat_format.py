"""On-policy dialogues as tokens; and tokenizers made on the spot that have a chat template."""

from collections.abc import Iterable, Sequence
from typing import Any

from ppg_fast.dialogues.dialogue import Message
from ppg_fast.dialogues.renderer import END, ROLE_TEMPLATE, ROLE_TOKENS, Renderer

PAD, UNKNOWN = "<pad>", "<unk>"
SPECIAL = (PAD, END, UNKNOWN, *ROLE_TOKENS)


class ChatFormat:
    """What stands between the answers of a dialogue, as tokens: the opening before the first, the reply after any.

    Answers themselves are never rendered: they are the tokens that were sampled, up to and with ``end_id``. A tokenizer
    without a chat template is given that of the role tokens, for whoever loads it from a checkpoint. ValueError for one
    that `Renderer` refuses, or whose template does not end an answer with a special token.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self._renderer = tokenizer, Renderer(tokenizer)
        tokenizer.chat_template = tokenizer.chat_template or ROLE_TEMPLATE
        self._before = [Message("user", "a"), Message("assistant", "b")]
        asked = self._renderer.text(self._before[:1], answer_next=True)
        answer = self._renderer.added(asked, self._before)
        tokens = self._renderer.encode(answer)
        end = self._renderer.end_of_turn(tokens)
        if end is None:
            raise ValueError(f"the chat template must end an answer with a special token, got {answer!r}")
        self.end_id: int = tokens[end - 1]
        name = tokenizer.convert_ids_to_tokens(self.end_id)
        self._answered = asked + answer[: answer.rindex(name) + len(name)]
        self._replies: dict[Message, list[int]] = {}

    def opening(self, messages: Sequence[Message]) -> list[int]:
        """The tokens up to where the first answer begins."""
        for message in messages:
            self._renderer.check(message)
        return self._renderer.encode(self._renderer.text(messages, answer_next=True))

    def reply(self, message: Message) -> list[int]:
        """The tokens from the end token of an answer to the beginning of the next."""
        if message not in self._replies:  # a group shares its questions: encode them once
            self._renderer.check(message)
            text = self._renderer.added(self._answered, [*self._before, message], answer_next=True)
            self._replies[message] = self._renderer.encode(text)
        return self._replies[message]

    def answer(self, text: str) -> list[int]:
        """The tokens of an answer written by somebody else, end token included."""
        self._renderer.check(Message("assistant", text))
        return [*self._renderer.encode(text), self.end_id]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of an answer, special tokens left out."""
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def without_special(self, text: str) -> str:
        """``text`` without what would be read as a special token of the tokenizer."""
        return self._renderer.without_special(text)

    def banned_token_ids(self, vocab_size: int) -> list[int]:
        """Token ids that an answer must not hold: special tokens but the end, and rows of the head that name no
        token."""
        special = set(self._renderer.special.values()) - {self.end_id}
        return sorted(special | set(range(len(self.tokenizer), vocab_size)))


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
    tokenizer.add_special_tokens({"additional_special_tokens": list(ROLE_TOKENS)})
    tokenizer.chat_template = ROLE_TEMPLATE
    return tokenizer

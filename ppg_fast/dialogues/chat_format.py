"""On-policy dialogues as tokens; and tokenizers made on the spot that have a chat template."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ppg_fast.dialogues.answer_form import answer_form, require_own_tokens
from ppg_fast.dialogues.beginnings import Beginnings
from ppg_fast.dialogues.between import Replies
from ppg_fast.dialogues.conversation import Tools
from ppg_fast.dialogues.message import Message
from ppg_fast.dialogues.renderer import END, ROLE_TEMPLATE, ROLE_TOKENS, Renderer, in_message
from ppg_fast.dialogues.written import require_written

PAD, UNKNOWN = "<pad>", "<unk>"
SPECIAL = (PAD, END, UNKNOWN, *ROLE_TOKENS)


class ChatFormat:
    """What stands between the answers of a dialogue, as tokens: the opening before the first, the reply after any.

    Answers themselves are never rendered: they are the tokens that were sampled, up to and with one of ``end_ids``; nor
    is what came before: of a reply the template gives what it writes after a stand-in answer, so it may do with earlier
    answers what it likes. A tokenizer without a chat template is given that of the role tokens, for whoever loads it
    from a checkpoint. ``generation_config``: the model's, whose ``eos_token_id`` (one or a list) end an answer too.
    ``date``: what a template that writes one is told, as YYYY-MM-DD; "": today's. ``template``: a chat template in
    place of the tokenizer's own, which then gets it; ``template_kwargs``: what else it is told in every rendering.
    ValueError for a tokenizer that `Renderer` refuses, or whose template does not end an answer with a token of its
    own.
    """

    def __init__(
        self,
        tokenizer: Any,
        generation_config: Any = None,
        date: str = "",
        template: str = "",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self.renderer = tokenizer, Renderer(tokenizer, date, template, template_kwargs)
        if template:
            require_own_tokens(self.renderer)
        tokenizer.chat_template = template or tokenizer.chat_template or ROLE_TEMPLATE
        eos = getattr(generation_config, "eos_token_id", None)
        listed = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        self.form = answer_form(self.renderer, listed)
        self.end_ids = self.form.end_ids
        self.end_id = self.end_ids[0]
        names = tokenizer.convert_ids_to_tokens(list(self.end_ids))
        self._at_ends = re.compile("|".join(re.escape(name) for name in names if name in self.renderer.added))
        self.beginnings = Beginnings(self.renderer)
        self._replies = Replies(self.renderer, self.form, self._at_ends)

    def opening(self, messages: Sequence[Message], tools: Tools = ()) -> list[int]:
        """The tokens up to where the first answer begins. ValueError names the message that cannot be written."""
        self.renderer.check_tools(tools)
        for index, message in enumerate(messages):
            with in_message(index):
                self.renderer.check(message)
        text = self.renderer.before_answer(messages, tools)
        require_written(self.renderer, messages, tools)
        return self.renderer.encode(text)

    def reply(self, messages: Message | Sequence[Message], tools: Tools = ()) -> list[int]:
        """The tokens from the end token of an answer to the beginning of the next: what was replied, in one message or
        several (results of all tools that the answer called). ValueError names the message that cannot be written."""
        return self._replies.tokens([messages] if isinstance(messages, Message) else messages, tools)

    def rehearse(
        self,
        opening: Sequence[Message],
        replies: Sequence[Message | Sequence[Message]],
        tools: Tools = (),
    ) -> int:
        """Write a dialogue's opening and each reply as a rollout would; the tokens of the opening. ValueError for what
        cannot be written: to be had before a run begins."""
        for reply in replies:
            self.reply(reply, tools)
        return len(self.opening(opening, tools))

    def answer(self, text: str) -> list[int]:
        """The tokens of an answer written by somebody else, end token included."""
        self.renderer.check(Message("assistant", text))
        if self.renderer.by_role:
            return [*self.renderer.encode(text), self.end_id]
        return self.renderer.encode(f"{self.form.opened}{text}{self.form.closed}")

    def up_to_the_end(self, text: str) -> str:
        """The beginning of ``text``, up to and with the first token that ends an answer; all of it where none does."""
        found = self._at_ends.search(text)
        return text[: found.end()] if found else text

    def ends(self, text: str) -> bool:
        """Whether ``text`` ends with a token that ends an answer."""
        return any(found.end() == len(text) for found in self._at_ends.finditer(text))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of an answer, its end and special tokens left out."""
        said = tokens[:-1] if len(tokens) and tokens[-1] in self.end_ids else tokens
        return self.tokenizer.decode(said, skip_special_tokens=True)

    def without_special(self, text: str) -> str:
        """``text`` without what would be read as a special token of the tokenizer."""
        return self.renderer.without_special(text)

    def banned_token_ids(self, vocab_size: int) -> list[int]:
        """Token ids that an answer must not hold: special tokens but the ends and those that the template writes inside
        of answers, and rows of the head that name no token."""
        special = set(self.renderer.special.values()) - set(self.end_ids) - self.form.sayable
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

"""Openings of dialogues, as a rollout begins with them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ppg_fast.config import TrainConfig
from ppg_fast.dialogues.chat_format import make_byte_tokenizer
from ppg_fast.dialogues.prompts import Prompt, read_prompts
from ppg_fast.inspection.chat import reader_of
from ppg_fast.inspection.pieces import TokenTexts
from ppg_fast.inspection.selection import heard, places_of
from ppg_fast.inspection.view import CONTEXT, Piece, View, context_pieces, said, tool_names
from ppg_fast.jobs.prompts import require_room
from ppg_fast.rollouts.tools import Tools, prepared


class OpeningInspector:
    """The openings of ``config.prompts`` as `ppg-fast train --prompts` reads them, each with what a logged partner
    would reply."""

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.path = config, str(config.prompts)
        self.prompts, self.left_out = heard(lambda: read_prompts(self.path, config.strict))
        contents = [m.content for p in self.prompts for turn in (p.messages, *p.logged) for m in turn]
        self.reader = reader_of(config, lambda: make_byte_tokenizer(contents, config.vocab_size))
        self.chat = self.reader.chat
        self.texts = TokenTexts(self.chat.renderer)
        self.tools = Tools(config.tools, {}) if config.tools else None
        self.notes: tuple[str, ...] = ()

    def views(self, names: Sequence[str] = (), count: int = 1) -> Iterator[View]:
        """The view of each opening that `places_of` finds for ``names``."""
        ids = [prompt.id for prompt in self.prompts]
        for place in places_of(names, count, ids, self.path):
            yield self._view(int(place))

    def _view(self, place: int) -> View:
        prompt = self.prompts[place]
        title = f"opening {prompt.id!r} ({place} of {len(self.prompts)} in {Path(self.path).name})"
        pieces: list[Piece] = []
        try:
            prompt = prepared(prompt, self.tools) if self.tools else prompt
            pieces = context_pieces(self.chat.opening(prompt.messages, prompt.tools), self.texts)
            length = sum(len(piece.ids) for piece in pieces)
            require_room(length, self.config.max_dialogue_tokens, self.reader.positions)
            replies = prompt.replies() if self.config.partner == "logged" else []
            for turn, reply in enumerate(replies[: self.config.max_turns - 1]):
                pieces.append(self._answer(turn))
                pieces += context_pieces(self.chat.reply(reply, prompt.tools), self.texts)
        except ValueError as error:
            if self.config.strict:
                raise ValueError(f"prompt {prompt.id!r}: {error}") from error
            return self._refused(title, prompt, pieces, str(error))
        pieces.append(self._answer(1 + max((piece.turn for piece in pieces), default=CONTEXT)))
        return View(title, tuple(self._facts(prompt, length)), tuple(pieces))

    def _refused(self, title: str, prompt: Prompt, pieces: Sequence[Piece], reason: str) -> View:
        """The refusal, what was written before it, and what was not."""
        heard = (message for reply in prompt.logged for message in reply)
        tail = said(tuple(heard) if pieces else prompt.messages)
        refusal, why = f"prompt {prompt.id!r}: {reason}", "not written, as the messages say it"
        return View(title, (("read with", self.reader.name),), tuple(pieces), refusal=refusal, tail=tail, why=why)

    def _answer(self, turn: int) -> Piece:
        """Where the policy speaks."""
        return Piece("", (), (), 0, turn=turn, trained=True)

    def _facts(self, prompt: Prompt, length: int) -> Iterator[tuple[str, str]]:
        ends = self.chat.tokenizer.convert_ids_to_tokens(list(self.chat.end_ids))
        yield "read with", f"{self.reader.name}; answers end with {' or '.join(ends)}"
        yield "opening", f"{length:,} tokens, all context"
        if prompt.tools:
            yield "tools", tool_names(prompt.tools)
        if prompt.logged and self.config.partner == "logged":
            yield "replies", f"{len(prompt.logged)} of the log, as --partner logged says them"
        if prompt.partner:
            yield "partner", prompt.partner[:300]
        if prompt.info:
            yield "for rewards", ", ".join(map(str, prompt.info))[:300]

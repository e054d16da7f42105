"""From a file and the settings of training to what is shown of its dialogues."""

import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from ppg_fast.config import TrainConfig
from ppg_fast.dialogues.chat_format import make_byte_tokenizer
from ppg_fast.dialogues.dialogue import Dialogue, read_file
from ppg_fast.dialogues.encoding import encode_dialogue, stable_group_id
from ppg_fast.dialogues.packing import CONTEXT, Sample, pack
from ppg_fast.inspection.chat import reader_of
from ppg_fast.inspection.pieces import TokenTexts
from ppg_fast.inspection.selection import LeftOut, heard, left_out_of, places_of
from ppg_fast.inspection.view import (
    ADVANTAGE,
    Piece,
    TurnRow,
    View,
    context_pieces,
    credit_of,
    pieces_of,
    said,
    tool_names,
    trained_tokens,
)
from ppg_fast.jobs.offline import encode_within
from ppg_fast.jobs.policy import objective_of
from ppg_fast.training.experience import Experience
from ppg_fast.training.objective import require_nonnegative, require_targets, warn_if_equal, warn_if_hardly_credited

MESSAGE = re.compile(r", message (\d+)")


class Inspector:
    """The dialogues of ``config.data`` as `ppg-fast train --data` reads them.

    ``notes``: what training would warn of, of the file as a whole. ValueError where nothing of the file can be read.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.objective = config, objective_of(config)
        self.path = str(config.data)
        read, said = heard(lambda: read_file(self.path, config.strict))
        self.dialogues, self.formats = read.dialogues, read.formats
        self.left_out = list(dict.fromkeys([*said, *read.left_out]))
        contents = [m.content for d in self.dialogues for m in d.messages]
        self.reader = reader_of(config, lambda: make_byte_tokenizer(contents, config.vocab_size))
        self.chat = self.reader.chat
        self.texts = TokenTexts(self.chat.renderer)
        self.groups = Counter(d.group_id for d in self.dialogues)
        self.mean_returns = self._mean_returns()
        self.notes = self._notes()
        self._read: dict[int, Sample | ValueError] = {}

    def views(self, names: Sequence[str] = (), count: int = 1) -> Iterator[View]:
        """The view of each dialogue that `places_of` finds for ``names``."""
        ids = [dialogue.id for dialogue in self.dialogues]
        others = left_out_of(self.path, self.left_out) if set(names) - set(ids) else {}
        for place in places_of(names, count, ids, self.path, others):
            yield self._unread(place, others[place]) if isinstance(place, str) else self._view(place)

    def _unread(self, name: str, other: LeftOut) -> View:
        """A dialogue that the file has and that could not be read."""
        title, facts = f"dialogue {name!r} (not read of {Path(self.path).name})", (("format", self._format()),)
        return View(title, facts, (), refusal=other.reason, tail=other.messages, why="as the file has it")

    def _sample(self, place: int) -> Sample:
        """A dialogue as `OfflineJob` reads it, once. ValueError where it cannot be."""
        if place not in self._read:
            try:
                self._read[place] = self._encode(self.dialogues[place])
            except ValueError as error:
                self._read[place] = error
        found = self._read[place]
        if isinstance(found, ValueError):
            raise found
        return found

    def _encode(self, dialogue: Dialogue) -> Sample:
        sample = encode_within(self.chat, dialogue, self.config.max_dialogue_tokens, self.reader.positions)
        require_targets(sample, dialogue.id, self.objective)
        return sample

    def _view(self, place: int) -> View:
        dialogue = self.dialogues[place]
        title = f"dialogue {dialogue.id!r} ({place} of {len(self.dialogues)} in {Path(self.path).name})"
        try:
            sample = self._sample(place)
        except ValueError as error:
            if self.config.strict:
                raise
            return self._refused(title, dialogue, str(error))
        others = self._group(dialogue, place)
        batch = pack([sample, *others])
        credit = credit_of(batch, 0, self.objective, self.mean_returns)
        pieces = pieces_of(batch, 0, credit.length, self.texts, self.chat.end_ids)
        pieces = self._with_untrained(dialogue, sample, pieces)
        rows = self._rows(dialogue, batch, credit, pieces)
        read = max(sample.turn_ids, default=CONTEXT)
        tail, why = self._tail(dialogue, read)
        facts = self._facts(dialogue, sample, rows, pieces, len(others))
        return View(
            title,
            tuple(facts),
            tuple(pieces),
            tuple(rows),
            str(self.objective.policy_class),
            "mean return" if self.objective.soft_q_of_rewards else self.objective.baseline,
            ADVANTAGE if self.objective.soft_q_of_rewards else "weight",
            tail=tail,
            why=why,
        )

    def _group(self, dialogue: Dialogue, place: int) -> list[Sample]:
        """The others of its group, which give the baseline; none where there is no baseline to be had."""
        if self.objective.baseline == "none":
            return []
        mates = [n for n, other in enumerate(self.dialogues) if n != place and other.group_id == dialogue.group_id]
        return [sample for mate in mates for sample in self._readable(mate)]

    def _readable(self, place: int) -> list[Sample]:
        """A dialogue as a list of one; of none where it cannot be read, which is said."""
        try:
            return [self._sample(place)]
        except ValueError as error:
            self._leave_out(f"{error}; left out")
            return []

    def _leave_out(self, text: str) -> None:
        if text not in self.left_out:
            self.left_out.append(text)
            warnings.warn(text, stacklevel=2)

    def _with_untrained(self, dialogue: Dialogue, sample: Sample, pieces: list[Piece]) -> list[Piece]:
        """The pieces, those of answers with weight 0 as their turn's."""
        if all(message.trained for message in dialogue.messages):
            return pieces
        messages = tuple(replace(message, trained=True) for message in dialogue.messages)
        whole = encode_dialogue(self.chat, replace(dialogue, messages=messages), self.config.max_dialogue_tokens)
        if whole.tokens[: len(sample.tokens)] != sample.tokens:
            return pieces
        return [
            replace(piece, turn=whole.turn_ids[piece.position], ends=piece.ids[-1] in self.chat.end_ids)
            if not piece.trained and whole.turn_ids[piece.position] != CONTEXT
            else piece
            for piece in pieces
        ]

    def _rows(self, dialogue: Dialogue, batch: Any, credit: Any, pieces: Sequence[Piece]) -> list[TurnRow]:
        counts = trained_tokens(batch, 0)
        parts = {piece.turn: piece.part for piece in pieces if piece.trained}
        answers = [message for message in dialogue.messages if message.role == "assistant"]
        rows = []
        for turn, (reward, count) in enumerate(zip(dialogue.turn_rewards, counts, strict=True)):
            notes = ["no reward: counts as 0"] if reward is None else []
            if not answers[turn].trained:
                notes.append("weight 0: not trained")
            elif not count:
                notes.append("cut off: not read")
            elif not credit.weights[turn]:
                notes.append("no advantage yet" if self.objective.soft_q_of_rewards else "weighs nothing: no gradient")
            elif credit.weights[turn] < 0:
                notes.append("made less likely")
            returns = {name: values[turn] for name, values in credit.returns.items()}
            weight = credit.weights[turn]
            baseline = credit.chosen[turn] - weight
            rows.append(TurnRow(turn, count, parts.get(turn), reward, returns, baseline, weight, tuple(notes)))
        return rows

    def _facts(
        self, dialogue: Dialogue, sample: Sample, rows: Sequence[TurnRow], pieces: Sequence[Piece], others: int
    ) -> list[tuple[str, str]]:
        trained = sum(row.tokens for row in rows)
        parts = 1 + max((piece.part for piece in pieces), default=0)
        read = sum(len(piece.ids) for piece in pieces if piece.read)
        turns = sum(bool(row.tokens) for row in rows)
        text = f"{len(sample.tokens):,}: {trained:,} trained in {turns} turn{'s' * (turns != 1)}, "
        text += f"{len(sample.tokens) - trained:,} context"
        text += f"; the first {read:,} are read" if any(p.trained and not p.read for p in pieces) else ""
        text += f"; {parts} parts, since the template rewrites earlier messages" if parts > 1 else ""
        mates = self.groups[dialogue.group_id] - 1
        group = f"{dialogue.group_id!r} with {mates} other{'s' * (mates != 1)}"
        group += f", {others} of them read for the baseline {self.objective.baseline}" if others else ""
        ends = self.chat.tokenizer.convert_ids_to_tokens(list(self.chat.end_ids))
        tools = [("tools", tool_names(dialogue.tools))] if dialogue.tools else []
        return [
            ("format", self._format()),
            ("read with", f"{self.reader.name}; answers end with {' or '.join(ends)}"),
            ("group", group),
            *tools,
            ("tokens", text),
            ("objective", self._soft_q_text() if self.objective.soft_q_of_rewards else objective_text(rows)),
        ]

    def _soft_q_text(self) -> str:
        """What soft Q-learning does with the rows."""
        assert self.objective.soft_q
        of_it = f"soft Q-learning, beta {self.objective.soft_q.beta:g}: a turn's residual is driven to 0, which is"
        mean = "baseline: c_t - gamma^n c_(t+n) of the file's mean returns c"
        return f"{of_it} -advantage / beta at the start and changes with the policy; {mean}"

    def _format(self) -> str:
        """As what the file was understood."""
        kinds = self.formats.most_common()
        return kinds[0][0] if len(kinds) == 1 else ", ".join(f"{count} of {kind}" for kind, count in kinds)

    def _tail(self, dialogue: Dialogue, read: int) -> tuple[tuple[tuple[str, str], ...], str]:
        """The messages behind turn ``read``, the last one, where a bound cut off what would train."""
        answers = [(place, m) for place, m in enumerate(dialogue.messages) if m.role == "assistant"]
        lost = [turn for turn, (_, answer) in enumerate(answers) if turn > read and answer.trained]
        if not lost:
            return (), ""
        bound = f"max_dialogue_tokens {self.config.max_dialogue_tokens}"
        turns = f"turns {lost[0]} to {lost[-1]} are" if len(lost) > 1 else f"turn {lost[0]} is"
        why = f"cut off by {bound}: {turns} not read, the rewards still count in the windows"
        return said(dialogue.messages[answers[read][0] + 1 :]), why

    def _refused(self, title: str, dialogue: Dialogue, refusal: str) -> View:
        """The refusal, and the text up to the message that it names, as far as it can be written."""
        found = MESSAGE.match(refusal.removeprefix(f"dialogue {dialogue.id!r}"))
        stop = int(found[1]) if found else len(dialogue.messages)
        ends = range(min(stop, len(dialogue.messages)), 0, -1)
        end, pieces = next(filter(None, (self._begun(dialogue, end) for end in ends)), (0, []))
        facts = (("read with", self.reader.name),)
        tail = said(dialogue.messages[end:])
        return View(title, facts, tuple(pieces), refusal=refusal, tail=tail, why="not written, as the messages say it")

    def _begun(self, dialogue: Dialogue, end: int) -> tuple[int, list[Piece]] | None:
        """``end`` and the tokens of the messages before it; None where they cannot be written."""
        kept = dialogue.messages[:end]
        turns = sum(message.role == "assistant" for message in kept)
        try:
            if not turns:
                return end, context_pieces(self.chat.opening(kept, dialogue.tools), self.texts)
            part = replace(dialogue, messages=kept, turn_rewards=dialogue.turn_rewards[:turns])
            sample = encode_dialogue(self.chat, part, self.config.max_dialogue_tokens)
        except ValueError:
            return None
        return end, pieces_of(pack([sample]), 0, len(sample.tokens), self.texts, self.chat.end_ids)

    def _mean_returns(self) -> list[float]:
        """The mean return of the file from each turn on, which soft Q-learning begins near; of other losses nothing."""
        if not self.objective.soft_q_of_rewards:
            return []
        rewards = [torch.tensor([r or 0.0 for r in d.turn_rewards]) for d in self.dialogues]
        counts = torch.tensor([len(row) for row in rewards])
        return Experience(0, self.objective.gamma).means_with(pad_sequence(rewards, batch_first=True), counts)

    def _notes(self) -> tuple[str, ...]:
        """What training says of the rewards of the whole file."""
        samples = [
            Sample([0], [CONTEXT], [r or 0.0 for r in d.turn_rewards], stable_group_id(d.group_id))
            for d in self.dialogues
        ]
        rewards = (warn_if_hardly_credited, warn_if_equal)
        notes = [note for warn in rewards for note in heard(lambda warn=warn: warn(samples, self.objective))[1]]
        if not (self.config.allow_negative_rewards or self.config.of_turns):
            try:
                require_nonnegative(samples, [d.id for d in self.dialogues])
            except ValueError as error:
                notes.append(f"training refuses this file: {error}")
        return tuple(notes)


def objective_text(rows: Sequence[TurnRow]) -> str:
    """What a step maximises of the dialogue, as a sum of weighted log-probs."""
    terms = [f"{row.weight:+.4g} log p(turn {row.turn})" for row in rows if row.tokens and row.weight]
    shown = " ".join(terms[:8]).removeprefix("+").replace(" +", " + ").replace(" -", " - ")
    return (shown + (f" + {len(terms) - 8} more" if len(terms) > 8 else "")) or "0: nothing of it is learned"

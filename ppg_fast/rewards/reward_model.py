"""A sequence-classification model as a reward."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ppg_fast.dialogues.conversation import with_strings
from ppg_fast.dialogues.message import Message
from ppg_fast.dialogues.renderer import Renderer
from ppg_fast.rewards.scoring import Transcript
from ppg_fast.rewards.turn_logits import Row, batches, encode_growing, logits_of, padded, reads_every_turn, rows_of

SAID = 300  # characters of what transformers raises, in an error


class RewardModel:
    """The one logit of a Hugging Face sequence-classification folder on the dialogue in its own chat template.

    Batched in order under ``max_tokens`` padded tokens. A causal model reads a dialogue once, whatever its turns: the
    logit of each answer stands in the same pass (`reads_every_turn`), where the template only appends. ``date``: what a
    template that writes one is told, as YYYY-MM-DD; "": today's. ``begin``: the folder may be that of a language model,
    whose new head is zero, in float32. ValueError for a folder without a model that can be loaded, one without all of
    its weights, a head of several labels, a tokenizer without a chat template, and, with its name, a dialogue longer
    than the model's positions.
    """

    scores_calls = False

    def __init__(
        self,
        folder: str,
        device: torch.device | str = "cpu",
        max_tokens: int = 16384,
        date: str = "",
        begin: bool = False,
    ) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if not Path(folder, "config.json").is_file():
            raise ValueError(
                f"a reward model must be a folder with a Hugging Face checkpoint (config.json), got {folder!r}"
            )
        self.folder, self.max_tokens = folder, max_tokens
        settings: dict[str, Any] = {"num_labels": 1, "dtype": torch.float32} if begin else {}
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                folder, output_loading_info=True, **settings
            )
        except Exception as error:  # transformers, tokenizers and safetensors raise what they like, over many lines
            said = " ".join(str(error).split())[:SAID]
            raise ValueError(f"reward model {folder} cannot be loaded: {type(error).__name__}: {said}") from error
        if not self.tokenizer.chat_template:
            raise ValueError(f"the tokenizer of reward model {folder} must have a chat template, got none")
        self.renderer = Renderer(self.tokenizer, date)
        if model.config.num_labels != 1:
            raise ValueError(f"a reward model must have one label, got {model.config.num_labels} in {folder}")
        missing = set(loading["missing_keys"])
        if begin and "score.weight" in missing:
            torch.nn.init.zeros_(model.score.weight)
            missing.remove("score.weight")
        if missing:  # transformers draws them at random, and so would be the reward
            lacks = ", ".join(sorted(missing)[:3])
            raise ValueError(f"a reward model must hold all of its weights, {folder} lacks {lacks}")
        self.model: Any = model.to(device).eval()
        if self.model.config.get_text_config().pad_token_id is None:  # by it transformers finds the last token of a row
            self.model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.pad = self.model.config.get_text_config().pad_token_id
        self.positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self.one_pass = reads_every_turn(self.model, self.pad)

    def __call__(self, transcripts: Sequence[Transcript], /) -> list[float]:
        """One logit each."""
        found: list[tuple[int, float]] = []
        with torch.no_grad():
            for part in batches(self.rows(transcripts), self.max_tokens, self.pad):
                if self.one_pass:
                    logits = logits_of(self.model, part, self.pad)
                else:
                    logits = self.model(**padded(part, self.pad, self.model.device)).logits[:, 0].float()
                numbers = [number for row in part for number, _ in row.answers]
                found += zip(numbers, logits.tolist(), strict=True)
        return [value for _, value in sorted(found)]

    def rows(self, transcripts: Sequence[Transcript]) -> list[Row]:
        """What is read of them: one row for the prefixes of a dialogue that come one after the other."""
        plain: dict[int, Message] = {}  # by identity: prefixes of a dialogue share their messages
        for message in (m for transcript in transcripts for m in transcript.messages):
            if id(message) not in plain:
                plain[id(message)] = self._plain(message)
        texts = [self._text(t, [plain[id(message)] for message in t.messages]) for t in transcripts]
        encoded = encode_growing(self.renderer, texts)
        for tokens, transcript in zip(encoded, transcripts, strict=True):
            if self.positions and len(tokens) > self.positions:
                rule = f"reward model {self.folder} reads at most {self.positions} tokens"
                where = f"dialogue {transcript.id!r} up to turn {transcript.turns - 1}"
                raise ValueError(f"{rule}, got {len(tokens)} in {where}")
        return rows_of(encoded, self.pad, self.one_pass)

    def _text(self, transcript: Transcript, messages: Sequence[Message]) -> str:
        """``messages``: those of the transcript as `_plain` gives them."""
        text = self.renderer.text(messages)
        called = [m for m in messages if m.tool_calls]
        if called and self.renderer.text([replace(m, more={}) if m.tool_calls else m for m in messages]) == text:
            rule = f"the chat template of reward model {self.folder} must write tool calls"
            raise ValueError(f"{rule}, it leaves out those of dialogue {transcript.id!r}")
        return text

    def _plain(self, message: Message) -> Message:
        """The message without what would be read as a special token: an answer that spells one would end its message
        early or speak for another role."""
        plain = self.renderer.without_special
        return replace(message, content=plain(message.content), more=with_strings(message.more, plain))

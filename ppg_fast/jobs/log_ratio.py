"""Two language models as a reward: how much likelier one finds each answer than the other, and what their logits say
of the states before and behind it."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ppg_fast.dialogues.chat_format import ChatFormat
from ppg_fast.dialogues.conversation import with_strings
from ppg_fast.dialogues.dialogue import Dialogue
from ppg_fast.dialogues.encoding import encode_dialogue
from ppg_fast.dialogues.message import Message
from ppg_fast.dialogues.packing import PackedBatch, micro_batches, pack
from ppg_fast.models.causal_lm import load_model, token_logprobs
from ppg_fast.models.frozen_teacher import require_same_vocabulary
from ppg_fast.reference.turns import first_of_turns
from ppg_fast.rewards import Transcript
from ppg_fast.rewards.formula import INVERSE_SOFT_Q
from ppg_fast.spec import require


class LogRatio:
    """The reward that ``models``, "MODEL,BASE", hold already, in nats. For the ``kind`` "logratio"

    r_t = L_t = sum over the tokens of turn t of (log pi_model - log pi_base),

    since a model tuned on demonstrations, or on pairs by DPO, is such a reward over what it began with
    (arXiv:2305.18290, arXiv:2404.12358). For "inverse_soft_q"

    r_t = L_t + u_t - u_(t+1),    u_t = lse_model - lse_base of the logits at the first token of turn t,

    with u = 0 behind the last turn: the reward for which every residual of `ppg.soft_q_loss` is 0 with beta 1, gamma 1
    and no offsets, of a model whose logits learned values (arXiv:2106.12142; of language models arXiv:2506.23235).
    Both are checkpoint folders of one vocabulary; the template is the model's. One pass of each reads a dialogue.
    ``date``: as `RewardModel`. ValueError names what is wrong.
    """

    def __init__(
        self, kind: str, models: str, device: torch.device | str = "cpu", max_tokens: int = 16384, date: str = ""
    ) -> None:
        from transformers import AutoTokenizer

        self.with_values, self.folders, self.max_tokens = kind == INVERSE_SOFT_Q, models.split(","), max_tokens
        require(len(self.folders) == 2 and all(self.folders), f"{kind} must be MODEL,BASE: two folders", models)
        for folder in self.folders:
            whole = Path(folder, "config.json").is_file()
            require(whole, f"{kind} must name folders with a Hugging Face checkpoint (config.json)", folder)
        tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in self.folders]
        require_same_vocabulary(kind, self.folders[1], tokenizers[1], tokenizers[0])
        self.models = [
            load_model(folder, len(tokenizer)).to(device).eval().requires_grad_(False)
            for folder, tokenizer in zip(self.folders, tokenizers, strict=True)
        ]
        self.chat = ChatFormat(tokenizers[0], self.models[0].generation_config, date)

    @torch.no_grad()
    def __call__(self, transcripts: Sequence[Transcript], /) -> list[list[float]]:
        """One number per answer of each dialogue."""
        samples = [encode_dialogue(self.chat, self._dialogue(t)) for t in transcripts]
        values: list[list[float]] = [[] for _ in samples]
        for part in micro_batches([len(s.tokens) for s in samples], self.max_tokens):
            batch = pack([samples[i] for i in part])
            for i, row in zip(part, self._of_turns(batch).tolist(), strict=True):
                values[i] = row[: len(samples[i].rewards)]
        return values

    def _of_turns(self, batch: PackedBatch) -> Tensor:
        """(S, T) float64, the reward of each turn."""
        there = batch.to(self.models[0].device)
        if not self.with_values:
            model, base = (token_logprobs(m, there).double().cpu() for m in self.models)
            return batch.sum_of_turns(model - base)
        model, base = (torch.stack(token_logprobs(m, there, lse=True)).double().cpu() for m in self.models)
        log_ratios, moved = torch.nn.functional.pad(model - base, (0, 1))  # the last place: a turn without a token
        S, T = batch.rewards.shape
        first = first_of_turns(batch.labels >= 0, batch.turn_ids, batch.dialogue_ids, (S, T))
        values = torch.nn.functional.pad(moved[first], (0, 1))
        return batch.sum_of_turns(log_ratios[:-1]) + values[:, :-1] - values[:, 1:]

    def _dialogue(self, transcript: Transcript) -> Dialogue:
        tools: Any = tuple(transcript.info.get("tools") or ())
        messages = tuple(self._plain(message) for message in transcript.messages)
        return Dialogue(transcript.id, transcript.id, messages, (None,) * transcript.turns, tools)

    def _plain(self, message: Message) -> Message:
        """The message without what would be read as a special token. An answer that is not trained has a value too."""
        plain, read = self.chat.renderer.without_special, message.trained or self.with_values
        return replace(message, content=plain(message.content), more=with_strings(message.more, plain), trained=read)

"""The logit of a reward model at every answer of a dialogue, all of them in one pass where the model is causal."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppg_fast.dialogues.renderer import Renderer


@dataclass
class Row:
    """Tokens that one pass reads. ``answers``: (number of the text, place of its logit) of each text that it holds."""

    tokens: list[int]
    answers: list[tuple[int, int]]


def encode_growing(renderer: Renderer, texts: Sequence[str]) -> list[list[int]]:
    """`Renderer.encode` of each text, linear in the last of texts that grow: where one begins with the text before it
    and goes on with an added token, which a tokenizer takes out of a text before it looks at the rest, the rest alone
    is encoded. The last of such texts is encoded whole too; where that gives other tokens, so is each of them."""
    found: list[list[int]] = []
    begin = 0
    while begin < len(texts):
        grown = [renderer.encode(texts[begin])]
        for number in range(begin + 1, len(texts)):
            before, text = texts[number - 1], texts[number]
            if not (text.startswith(before) and renderer.token_pattern.match(text, len(before))):
                break
            grown.append(grown[-1] + renderer.encode(text[len(before) :]))
        end = begin + len(grown)
        if len(grown) > 1 and renderer.encode(texts[end - 1]) != grown[-1]:
            grown = [renderer.encode(text) for text in texts[begin:end]]
        found += grown
        begin = end
    return found


def rows_of(texts: Sequence[list[int]], pad: int | None, shared: bool = True) -> list[Row]:
    """One row for consecutive ``texts`` of which each begins with the one before, as the prefixes of a dialogue do.

    The logit of a text stands at its last token that is not ``pad``, where transformers takes it too. Without
    ``shared`` each text is a row of its own.
    """
    rows: list[Row] = []
    for number, tokens in enumerate(texts):
        answer = number, next((i for i in reversed(range(len(tokens))) if tokens[i] != pad), 0)
        if shared and rows and tokens[: len(rows[-1].tokens)] == rows[-1].tokens:
            rows[-1] = Row(tokens, [*rows[-1].answers, answer])
        else:
            rows.append(Row(tokens, [answer]))
    return rows


def batches(rows: Sequence[Row], max_tokens: int, pad: int | None) -> Iterator[list[Row]]:
    """Consecutive rows under ``max_tokens`` padded tokens; one at a time where the model cannot tell padding."""
    part: list[Row] = []
    for row in rows:
        full = (len(part) + 1) * max(len(other.tokens) for other in [*part, row]) > max_tokens
        if part and (full or pad is None):
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def padded(rows: Sequence[Row], pad: int | None, device: torch.device) -> dict[str, Tensor]:
    """What a model is called with: tokens and mask (B, L)."""
    longest = max(len(row.tokens) for row in rows)
    tokens = [row.tokens + [pad or 0] * (longest - len(row.tokens)) for row in rows]
    mask = [[1] * len(row.tokens) + [0] * (longest - len(row.tokens)) for row in rows]
    return {
        "input_ids": torch.tensor(tokens, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def logits_of(model: Any, rows: Sequence[Row], pad: int | None) -> Tensor:
    """The logits of all answers of ``rows``, in their order, (A,) float32; differentiable. For a causal model."""
    every = model.score(_hidden(model, padded(rows, pad, model.device)))[..., 0].float()
    at = [(number, place) for number, row in enumerate(rows) for _, place in row.answers]
    numbers, places = torch.tensor(at, device=every.device).unbind(1)
    return every[numbers, places]


def _hidden(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    return model.base_model(**inputs, use_cache=False).last_hidden_state


@torch.no_grad()
def reads_every_turn(model: Any, pad: int | None) -> bool:
    """Whether the logit at a token is that of the text up to it: a linear ``score`` over hidden states which later
    tokens do not change. Asked of the model itself, on six tokens."""
    if not isinstance(getattr(model, "score", None), nn.Linear):
        return False
    text = [token for token in range(8) if token != pad][:6]
    if model.config.get_text_config().vocab_size <= max(text):
        return False
    whole, other = (padded([Row(t, [])], pad, model.device) for t in (text, [*text[:-1], text[0]]))
    here, there = (_hidden(model, inputs)[0] for inputs in (whole, other))
    told, found = model(**whole).logits[0, 0].float(), model.score(here[-1])[0].float()
    return torch.allclose(here[:-1], there[:-1], rtol=1e-6, atol=1e-6) and torch.allclose(found, told, rtol=1e-4)

"""One KV cache for many dialogues: a column is a token of each of them, or a hole where a dialogue has none."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from ppg_fast.models.causal_lm import decoder
from ppg_fast.models.output_head import Head

READ_BLOCK = 512  # columns of one forward pass: bounds the mask and the scores of a long opening
FIRST_CAPACITY = 64  # columns
LOOSE = 1.5  # columns per token of the longest dialogue above which holes are squeezed out


class GrowingLayer(DynamicLayer):
    """A cache layer that writes new columns in place; its memory doubles when it is full.

    transformers has two others: one concatenates, which copies the whole cache for every token, and one of fixed size
    attends to all of its columns whether they are filled or not, and wants the length of the longest dialogue
    beforehand.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.held: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append columns (B, H, W, D); return all keys and values so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        filled = self.get_seq_length()
        end = filled + key_states.shape[2]
        if self.held is None or end > self.held[0].shape[2]:
            capacity = max(FIRST_CAPACITY, end, 2 * filled)
            new = tuple(
                states.new_empty(*states.shape[:2], capacity, states.shape[3]) for states in (key_states, value_states)
            )
            if self.held is not None:
                for larger, full in zip(new, self.held, strict=True):
                    larger[:, :, :filled] = full[:, :, :filled]
            self.held = (new[0], new[1])
        for held, states in zip(self.held, (key_states, value_states), strict=True):
            held[:, :, filled:end] = states
        self.keys, self.values = self.held[0][:, :, :end], self.held[1][:, :, :end]
        return self.keys, self.values

    def select(self, rows: Tensor, columns: Tensor | None) -> None:
        """Keep ``rows`` (R,) and, where given, of each its own ``columns`` (R, W), in that order."""
        kept, filled = [], self.get_seq_length()
        for states in self.held or ():
            states = states[rows, :, :filled]
            if columns is not None:
                states = states.gather(2, columns[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))
            kept.append(states)
        self.keys, self.values = kept
        self.held = (kept[0], kept[1])


class Lockstep:
    """Reads some tokens of each dialogue at a time and gives the logits of the next."""

    def __init__(self, model: Any, size: int) -> None:
        self.model, self.cache = model, Cache(layer_class_to_replicate=GrowingLayer)
        config = model.config.get_text_config()
        self.layer_types = set(getattr(config, "layer_types", None) or ())
        self.window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        self.kept = torch.zeros(size, 0, dtype=torch.bool, device=model.device)
        arguments = inspect.signature(decoder(model).forward).parameters
        # named anew in 5.24
        self.cached = {"cache" if "cache" in arguments else "past_key_values": self.cache, "use_cache": True}
        self.head = Head.of(model)

    def read(self, rows: list[list[int]]) -> Tensor:
        """Append one run of tokens a dialogue, right-aligned, some of them empty; return the logits (B, V) after the
        last column."""
        width = max(map(len, rows))
        padded = torch.tensor([[0] * (width - len(r)) + r for r in rows], device=self.kept.device)
        is_token = torch.tensor([[False] * (width - len(r)) + [True] * len(r) for r in rows], device=self.kept.device)
        hidden = padded.new_empty(0)
        for tokens, mask in zip(padded.split(READ_BLOCK, 1), is_token.split(READ_BLOCK, 1), strict=True):
            hidden = self._append(tokens, mask)
        return self.head.logits(hidden)

    def keep(self, rows: list[int]) -> None:
        """Let the other dialogues go, and squeeze the holes out where they take much room."""
        leave = len(rows) < len(self.kept)
        kept = self.kept[rows]
        longest = int(kept.sum(1).max())
        squeeze = kept.shape[1] > LOOSE * longest
        if not leave and not squeeze:
            return
        columns = kept.byte().argsort(dim=1, descending=True, stable=True)[:, :longest] if squeeze else None
        index = torch.tensor(rows, device=self.kept.device)
        for layer in self.cache.layers:
            assert isinstance(layer, GrowingLayer)
            layer.select(index, columns)
        self.kept = kept if columns is None else kept.gather(1, columns)

    def _append(self, tokens: Tensor, is_token: Tensor) -> Tensor:
        """A forward pass over (B, W) columns, some of them holes; the hidden states (B, D) of the last column."""
        self.kept = torch.cat([self.kept, is_token], 1)
        positions = (self.kept.cumsum(1) - 1).clamp(min=0)
        width = tokens.shape[1]
        out = decoder(self.model)(
            input_ids=tokens,
            attention_mask=self._mask(positions, width),
            position_ids=positions[:, -width:],
            **self.cached,
        )
        return out.last_hidden_state[:, -1]

    def _mask(self, positions: Tensor, width: int) -> Tensor | dict[str, Tensor]:
        """(B, 1, W, past + W): earlier kept columns. A hole sees itself, so that no row is empty. One mask a layer type
        where needed."""
        total = positions.shape[1]
        causal = torch.ones(width, total, dtype=torch.bool, device=positions.device).tril(total - width)
        itself = torch.eye(width, dtype=torch.bool, device=positions.device)
        itself = torch.nn.functional.pad(itself, (total - width, 0))
        full = (self.kept[:, None, None, :] & causal) | itself
        if self.window is None:
            return {"full_attention": full} if "sliding_attention" in self.layer_types else full
        distance = positions[:, None, -width:, None] - positions[:, None, None, :]
        sliding = (full & (distance < self.window)) | itself
        return (
            {"full_attention": full, "sliding_attention": sliding}
            if "sliding_attention" in self.layer_types
            else sliding
        )

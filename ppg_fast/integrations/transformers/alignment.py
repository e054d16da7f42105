"""The arguments of a call in one alignment: every per-token value at the position that predicts its token."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ppg_fast.spec import IGNORE, PolicyLossSpec, require

PER_TOKEN = {
    "advantages": 0.0,
    "loss_mask": 0,
    "old_logprobs": 0.0,
    "ref_logprobs": 0.0,
    "rollout_logprobs": 0.0,
    "turn_ids": -1,
}
TURNS = ("gamma", "baseline", "group_ids", "turn_counts", "values", "gae_lambda")
CREDIT = ("advantages", "turn_advantages", "rewards")
SETTINGS = ("spec", "reduction", "skip_zero_advantages", "chunk_rows", "logits_dtype", "validate", "backend")
DEFAULTS = (*SETTINGS, "policy_class", "gamma", "baseline", "entropy")
ARGUMENTS = tuple(dict.fromkeys((*PER_TOKEN, *CREDIT, *TURNS, *DEFAULTS, "normalizer", "cu_seqlens")))


@dataclass
class LabelledTokens:
    """Labels and per-token arguments of a call, all at the position that predicts the label."""

    labels: Tensor  # (B, L)
    arguments: dict[str, Any]
    shifted_here: bool

    @staticmethod
    def of(
        labels: Tensor | None, shift_labels: Tensor | None, kwargs: dict[str, Any], given: dict[str, Any], items: Any
    ) -> "LabelledTokens":
        """Shifts what came with ``labels``, takes what came with ``shift_labels`` as it is; changes no argument."""
        tokens = labels if shift_labels is None else shift_labels
        require(
            isinstance(tokens, Tensor) and tokens.dim() == 2,
            "labels must be a (B, L) tensor",
            getattr(tokens, "shape", type(tokens)),
        )
        assert tokens is not None
        arguments, cu_seqlens = dict(given), given.get("cu_seqlens", kwargs.get("cu_seq_lens_q"))
        if cu_seqlens is not None:
            arguments["cu_seqlens"] = cu_seqlens
        counted = (tokens if shift_labels is not None else tokens[:, 1:]) != IGNORE  # as transformers' Trainer counts
        if shift_labels is None:
            arguments |= _shifted(given, tokens.shape)
            tokens = _next(tokens, IGNORE)
        bounds = kwargs.get("cu_seq_lens_q", cu_seqlens)  # of what the model sees at once: parts of dialogues
        if cu_seqlens is not None and bounds is not None:  # nothing predicts the first token of one
            starts = torch.zeros(tokens.numel() + 1, dtype=torch.bool, device=tokens.device)
            starts[bounds.to(tokens.device).long()] = starts[cu_seqlens.to(tokens.device).long()] = True
            tokens = tokens.masked_fill(starts[1:].view(tokens.shape), IGNORE)
        if items is not None and "normalizer" not in given:
            arguments["normalizer"] = _normalizer(arguments, items, counted, tokens)
        return LabelledTokens(tokens, arguments, shift_labels is None)

    def in_place(self, values: Tensor | None) -> Tensor | None:
        """(B, L) values of the predictions, where the caller's labels stand."""
        if values is None or not self.shifted_here or values.shape != self.labels.shape:
            return values
        return torch.cat([values.new_zeros(values.shape[0], 1), values[:, :-1]], 1)


def _shifted(given: dict[str, Any], shape: torch.Size) -> dict[str, Any]:
    """The per-token arguments among ``given``, at the position before: that which predicts the token."""
    shifted: dict[str, Any] = {
        name: _next(given[name], beyond)
        for name, beyond in PER_TOKEN.items()
        if isinstance(given.get(name), Tensor) and given[name].shape == shape
    }
    spec = given.get("spec")
    if isinstance(spec, PolicyLossSpec) and isinstance(spec.temperature, Tensor):
        shifted["spec"] = replace(spec, temperature=_next(spec.temperature, 1.0))
    return shifted


def _normalizer(given: dict[str, Any], items: Any, counted: Tensor, labels: Tensor) -> Tensor:
    """What the loss is divided by where transformers' Trainer hands on ``items``, its labels in a window of
    accumulation: that number, 1 for a window without a label.

    Where this call drops some of the labels that are ``counted``, the right denominator is known only if the window is
    this call; otherwise a ValueError, and likewise where the reduction is no mean over tokens.
    """
    credited = [name for name in CREDIT if name in given]
    reduction = given.get("reduction", "token_mean") if credited else "token_mean"
    rule = (
        "num_items_in_batch goes with reduction token_mean; give a normalizer (over the whole window of "
        "accumulation) for others"
    )
    require(reduction == "token_mean", rule, reduction)
    items = torch.as_tensor(items, dtype=torch.float32, device=labels.device).reshape(())
    droppers = [name for name in ("loss_mask", "turn_ids", "cu_seqlens") if name in given]
    if droppers:
        items = _items_trained(items, counted, _trained(labels, given, credited), ", ".join(droppers))
    return torch.where(items > 0, items, 1.0)


@torch.compiler.disable()  # it looks at numbers
def _items_trained(items: Tensor, counted: Tensor, trained: Tensor, droppers: str) -> Tensor:
    here, kept = int(counted.sum()), int(trained.sum())
    rule = (
        f"labels that {droppers} leave out must be -100, as num_items_in_batch counts them for a window of several "
        "calls (or give a normalizer); labels counted and trained here"
    )
    require(kept == here or int(items) == here, rule, (here, kept))
    return items if kept == here else torch.full_like(items, kept)


def _trained(labels: Tensor, given: dict[str, Any], credited: list[str]) -> Tensor:
    """(B, L) bool: the predictions that the loss weighs."""
    trained, mask, turn_ids = labels != IGNORE, given.get("loss_mask"), given.get("turn_ids")
    if mask is not None and mask.shape == labels.shape:  # another shape is refused with the loss
        trained = trained & (mask.to(labels.device) != 0)
    if turn_ids is not None and turn_ids.shape == labels.shape and credited and credited != ["advantages"]:
        trained = trained & (turn_ids.to(labels.device) >= 0)
    return trained


def _next(values: Tensor, beyond: float) -> Tensor:
    """Column i holds what column i + 1 held."""
    return torch.cat([values[:, 1:], values.new_full((values.shape[0], 1), beyond)], 1)

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
TURNS = ("gamma", "baseline", "group_ids", "turn_counts")
CREDIT = ("advantages", "turn_advantages", "rewards")
SETTINGS = ("spec", "reduction", "skip_zero_advantages", "chunk_rows", "validate", "backend")
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
        if shift_labels is None:
            if cu_seqlens is not None:  # nothing predicts the first token of a dialogue
                starts = torch.zeros(tokens.numel() + 1, dtype=torch.bool, device=tokens.device)
                starts[cu_seqlens.to(tokens.device).long()] = True
                tokens = tokens.masked_fill(starts[:-1].view(tokens.shape), IGNORE)
            arguments |= _shifted(given, tokens.shape)
            tokens = _next(tokens, IGNORE)
        if items is not None and "normalizer" not in given:
            arguments["normalizer"] = _normalizer(given, items)
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


def _normalizer(given: dict[str, Any], items: Any) -> Any:
    """The number of labels in a window of accumulation, as transformers' Trainer hands it on; ValueError where the
    reduction is no mean over them."""
    reduction = given.get("reduction", "token_mean") if any(name in given for name in CREDIT) else "token_mean"
    rule = (
        "num_items_in_batch goes with reduction token_mean; give a normalizer (over the whole window of "
        "accumulation) for others"
    )
    require(reduction == "token_mean", rule, reduction)
    return items if isinstance(items, Tensor) else float(items)


def _next(values: Tensor, beyond: float) -> Tensor:
    """Column i holds what column i + 1 held."""
    return torch.cat([values[:, 1:], values.new_full((values.shape[0], 1), beyond)], 1)

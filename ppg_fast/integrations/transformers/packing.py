"""Dialogues end to end in one row that a transformers model keeps apart, as the arguments of a patched model."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppg_fast.dialogues.packing import Sample, pack
from ppg_fast.models import varlen_attention
from ppg_fast.spec import IGNORE, require

# model.set_attn_implementation(PACKED_ATTENTION): reads the bounds and makes no mask of the row's length squared
PACKED_ATTENTION = varlen_attention.NAME

# layers that carry nothing over a bound where position ids restart; chunks are those of transformers' own attention
PACKABLE_LAYERS = (*varlen_attention.LAYERS, "chunked_attention")

FIELDS = ("input_ids", "turn_ids", "rewards", "group_id", "rollout_logprobs")


def check_packable(model: Any) -> None:
    """ValueError for a model whose layers carry a state over the bounds of packed dialogues: Mamba, convolutions,
    linear attention."""
    config = model.config.get_text_config()
    layers = set(getattr(config, "layer_types", None) or ()) or (
        {"recurrent"} if getattr(model, "_is_stateful", False) else set()
    )
    unknown = sorted(layers - set(PACKABLE_LAYERS))
    require(
        not unknown,
        f"dialogues can be packed for layers of {', '.join(PACKABLE_LAYERS)}; pad them for {config.model_type}",
        unknown,
    )


class PackedCollator:
    """Collates dialogues to one packed row, (1, N), for a model after `patch`.

    A transformers model keeps the dialogues of a packed row apart only where position_ids restart, attention_mask is
    None and use_cache is off; with an all-ones mask or the default cache it mixes them without a word. So the batch has
    exactly this, and the bounds for attention that reads them (`PACKED_ATTENTION`, flash attention).

    A dialogue is a `ppg_fast.dialogues.Sample`, or a mapping:
        input_ids         tokens, a list or (L,) tensor.
        turn_ids          one per token: the assistant's turn it belongs to, -1 for context. Explicit, as two adjacent
                          turns look like one.
        rewards           one per turn; default none: then give the call advantages or turn_advantages.
        group_id          an integer, rollouts of one prompt share it; default 0.
        rollout_logprobs  one per token, the sampler's, in nats; for all dialogues or for none.

    A batch has input_ids, position_ids, labels (transformers' alignment), shift_labels, turn_ids, rollout_logprobs
    (both where shift_labels stand) of shape (1, N); use_cache False; cu_seq_lens_q = cu_seq_lens_k (S + 1,) int32,
    max_length_q = max_length_k; rewards (S, T) float32, turn_counts and group_ids (S,), if there are rewards. No label
    crosses from one dialogue to the next. Where a dialogue has several parts (`Sample.starts`), positions and
    cu_seq_lens are those of the parts, and cu_seqlens (S + 1,) has the dialogues, for the loss.

    Raises: ValueError for an unknown or missing field, lists of unequal length, a turn id beyond the rewards, no
        dialogue.
    """

    def __call__(self, dialogues: Sequence[Sample | Mapping[str, Any]]) -> dict[str, Any]:
        require(len(dialogues) > 0, "a packed row needs at least one dialogue", len(dialogues))
        rewarded = [not isinstance(d, Mapping) or d.get("rewards") is not None for d in dialogues]
        require(all(rewarded) or not any(rewarded), "rewards must be given for all dialogues or for none", rewarded)
        batch = pack([_sample(d) for d in dialogues])
        lengths = torch.diff(batch.part_seqlens)
        longest = int(lengths.max())
        # the last of a dialogue is masked
        own_labels = torch.cat([batch.labels.new_full((1,), IGNORE), batch.labels[:-1]])
        collated = {
            "input_ids": batch.tokens[None],
            "position_ids": batch.position_ids[None],
            "use_cache": False,
            "labels": own_labels[None],
            "shift_labels": batch.labels[None],
            "turn_ids": batch.turn_ids[None],
            "cu_seq_lens_q": batch.part_seqlens,
            "cu_seq_lens_k": batch.part_seqlens,
            "max_length_q": longest,
            "max_length_k": longest,
        }
        if len(batch.part_seqlens) > len(batch.cu_seqlens):
            collated["cu_seqlens"] = batch.cu_seqlens
        if batch.rollout_logprobs is not None:
            collated["rollout_logprobs"] = batch.rollout_logprobs[None]
        if all(rewarded):
            collated.update(rewards=batch.rewards, turn_counts=batch.turn_counts, group_ids=batch.group_ids)
        return collated


def _sample(dialogue: Sample | Mapping[str, Any]) -> Sample:
    if isinstance(dialogue, Sample):
        return dialogue
    unknown = sorted(set(dialogue) - set(FIELDS))
    require(not unknown, f"a dialogue has the fields {', '.join(FIELDS)}", unknown)
    require(
        "input_ids" in dialogue and "turn_ids" in dialogue, "a dialogue needs input_ids and turn_ids", sorted(dialogue)
    )
    tokens, turn_ids = _numbers(dialogue["input_ids"]), _numbers(dialogue["turn_ids"])
    rewards = _numbers(dialogue.get("rewards"))
    if dialogue.get("rewards") is None:
        rewards = [0.0] * (max(turn_ids, default=-1) + 1)
    logprobs = dialogue.get("rollout_logprobs")
    return Sample(
        tokens, turn_ids, rewards, int(dialogue.get("group_id") or 0), None if logprobs is None else _numbers(logprobs)
    )


def _numbers(values: Any) -> list[Any]:
    return [] if values is None else values.tolist() if isinstance(values, Tensor) else list(values)

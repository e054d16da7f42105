"""Checks of values, made inside the operators so that they hold under torch.compile too."""

import torch
from torch import Tensor

from ppg_fast.reference.turns import turn_mask
from ppg_fast.rules import FLOAT32_MAX
from ppg_fast.spec import IGNORE, require


def check_labels(labels: Tensor, vocabulary: int, validate: bool) -> None:
    """IndexError unless every label is in [0, vocabulary) or -100; on a GPU only when ``validate`` asks for the
    sync."""
    if labels.is_cpu or validate:
        bad = ((labels < 0) & (labels != IGNORE)) | (labels >= vocabulary)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise IndexError(
                f"labels must be in [0, {vocabulary}) or {IGNORE}, got {int(labels.flatten()[row])} at row {row}"
            )


def check_named(ids: Tensor, rows: Tensor, vocabulary: int) -> None:
    """ValueError unless the teacher's ids (N, k) of these rows (N,) are tokens, each once, or negative: none."""
    order = ids.sort(1).values
    again = (order[:, 1:] == order[:, :-1]) & (order[:, 1:] >= 0)
    bad = rows & ((ids >= vocabulary).any(1) | again.any(1))
    if bad.any():
        row = int(bad.nonzero()[0])
        rule = f"ids of the teacher must be in [0, {vocabulary}), each once, or negative"
        raise ValueError(f"{rule}, got {ids[row].tolist()} at row {row}")


def check_mask(mask: Tensor) -> None:
    """ValueError unless every value of a loss mask is 0 or 1; a weight would count as 1."""
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        flat = mask.flatten()
        row = int(((flat != 0) & (flat != 1)).nonzero()[0])
        rule = "loss_mask must be 0 or 1 (advantages is the place for weights)"
        raise ValueError(f"{rule}, got {flat[row].item()} at row {row}")


def mask_factor(mask: Tensor | None, validate: bool) -> Tensor | None:
    """On a GPU, where `check_mask` would wait for it, what makes a loss NaN under a mask that breaks its rule:
    0-d, 1 or NaN. Else None."""
    if mask is None or mask.is_cpu or validate or mask.dtype == torch.bool:
        return None
    return torch.where(((mask == 0) | (mask == 1)).all(), 1.0, torch.nan)


def check_turn_counts(turn_counts: Tensor, T: int) -> None:
    """ValueError unless every dialogue has between 0 and T turns."""
    bad = (turn_counts < 0) | (turn_counts > T)
    if bad.any():
        b = int(bad.nonzero()[0])
        raise ValueError(f"turn_counts must be in [0, {T}], got {int(turn_counts[b])} for dialogue {b}")


def check_cu_seqlens(cu_seqlens: Tensor, tokens: int) -> None:
    """ValueError unless the bounds of packed sequences rise from 0 to the number of tokens."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or sorted(bounds) != bounds:
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens, {tokens}, got {bounds}")


def check_turn_ids(turn_ids: Tensor, T: int, sequences: Tensor, turn_counts: Tensor | None, active: Tensor) -> None:
    """ValueError where an active token has a turn id that is not -1 or one of its dialogue's turns. All (N,) but
    ``turn_counts`` (B,)."""
    limit = torch.full_like(turn_ids, T) if turn_counts is None else turn_counts[sequences]
    bad = active & ((turn_ids < -1) | (turn_ids >= limit))
    if bad.any():
        row = int(bad.nonzero()[0])
        rule = "turn_ids must be -1 (context) or in [0, turns of the dialogue)"
        raise ValueError(f"{rule}, got {int(turn_ids[row])} at row {row} of a dialogue with {int(limit[row])} turns")


def check_temperatures(temperatures: Tensor, active: Tensor) -> None:
    """ValueError unless every active token has a finite positive temperature; those of masked rows are free."""
    bad = temperatures[active & ~((temperatures > 0) & temperatures.isfinite())]
    require(bad.numel() == 0, "temperature must be finite and > 0 for every active token", bad[:1].tolist())


def check_rewards(rewards: Tensor, turn_counts: Tensor | None, segment_ids: Tensor | None) -> None:
    """ValueError unless every reward of a turn that is there is finite, and every segment one run of turns."""
    if turn_counts is not None:
        check_turn_counts(turn_counts, rewards.shape[1])
    finite = bool(rewards.sum().isfinite())  # nearly always, and then no element has to be looked at
    if finite and segment_ids is None:
        return
    exists = torch.ones(rewards.shape, dtype=torch.bool, device=rewards.device)
    if turn_counts is not None:
        exists = turn_mask(turn_counts, rewards.shape[1])
    bad = exists & ~rewards.isfinite()
    if not finite and bad.any():
        b, t = (int(i) for i in bad.nonzero()[0])
        raise ValueError(f"rewards must be finite, got {float(rewards[b, t])} for dialogue {b}, turn {t}")
    if segment_ids is not None:
        _check_segments(segment_ids, exists)


def check_reward_size(rewards: Tensor, turn_counts: Tensor | None, beta: float) -> None:
    """ValueError where the reward of a turn that is there has no float32 any more once it is divided by ``beta``."""
    large = rewards.double().abs() > FLOAT32_MAX * beta
    if turn_counts is not None:
        large &= turn_mask(turn_counts, rewards.shape[1])
    if large.any():
        b, t = (int(i) for i in large.nonzero()[0])
        why = f"beta {beta:g} divides them (raise it, or scale the rewards down)"
        rule = f"rewards must be at most {FLOAT32_MAX * beta:.3g} in size where {why}"
        raise ValueError(f"{rule}, got {float(rewards[b, t]):g} for dialogue {b}, turn {t}")


def _check_segments(segment_ids: Tensor, exists: Tensor) -> None:
    """ValueError where an id comes back after another one: a segment is one run of turns."""
    run = torch.nn.functional.pad((segment_ids[:, 1:] != segment_ids[:, :-1]).cumsum(1), (1, 0))
    # turns of one id side by side, those beyond the dialogue behind them
    order = segment_ids.argsort(dim=1, stable=True)
    ids, run, exists = (t.gather(1, order) for t in (segment_ids, run, exists))
    scattered = ((ids[:, 1:] == ids[:, :-1]) & (run[:, 1:] != run[:, :-1]) & exists[:, 1:] & exists[:, :-1]).any(1)
    if scattered.any():
        b = int(scattered.nonzero()[0])
        raise ValueError(
            f"segment ids must be constant on contiguous runs of turns, got {segment_ids[b].tolist()} for dialogue {b}"
        )

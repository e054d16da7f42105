"""Checks of values, made inside the operators so that they hold under torch.compile too."""

import torch
from torch import Tensor

from ppg_fast.spec import IGNORE


def check_labels(labels: Tensor, vocabulary: int, validate: bool) -> None:
    """IndexError unless every label is in [0, vocabulary) or -100; on a GPU only when ``validate`` asks for the sync."""
    if labels.is_cpu or validate:
        bad = ((labels < 0) & (labels != IGNORE)) | (labels >= vocabulary)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise IndexError(f"labels must be in [0, {vocabulary}) or {IGNORE}, got {int(labels.flatten()[row])} at row {row}")


def check_turn_counts(turn_counts: Tensor, T: int) -> None:
    """ValueError unless every dialogue has between 0 and T turns."""
    bad = (turn_counts < 0) | (turn_counts > T)
    if bad.any():
        b = int(bad.nonzero()[0])
        raise ValueError(f"turn_counts must be in [0, {T}], got {int(turn_counts[b])} for dialogue {b}")


def check_rewards(rewards: Tensor, turn_counts: Tensor | None, segment_ids: Tensor | None) -> None:
    """ValueError unless every reward of a turn that is there is finite, and every segment one run of turns."""
    if turn_counts is not None:
        check_turn_counts(turn_counts, rewards.shape[1])
    finite = bool(rewards.sum().isfinite())  # nearly always, and then no element has to be looked at
    if finite and segment_ids is None:
        return
    there = torch.ones(rewards.shape, dtype=torch.bool, device=rewards.device)
    if turn_counts is not None:
        there = torch.arange(rewards.shape[1], device=rewards.device) < turn_counts[:, None]
    bad = there & ~rewards.isfinite()
    if not finite and bad.any():
        b, t = (int(i) for i in bad.nonzero()[0])
        raise ValueError(f"rewards must be finite, got {float(rewards[b, t])} for dialogue {b}, turn {t}")
    if segment_ids is not None:
        _check_segments(segment_ids, there)


def _check_segments(segment_ids: Tensor, there: Tensor) -> None:
    """ValueError where an id comes back after another one: a segment is one run of turns."""
    run = torch.nn.functional.pad((segment_ids[:, 1:] != segment_ids[:, :-1]).cumsum(1), (1, 0))
    order = segment_ids.argsort(dim=1, stable=True)  # turns of one id side by side, those beyond the dialogue behind them
    ids, run, there = (t.gather(1, order) for t in (segment_ids, run, there))
    scattered = ((ids[:, 1:] == ids[:, :-1]) & (run[:, 1:] != run[:, :-1]) & there[:, 1:] & there[:, :-1]).any(1)
    if scattered.any():
        b = int(scattered.nonzero()[0])
        raise ValueError(f"segment ids must be constant on contiguous runs of turns, got {segment_ids[b].tolist()} for dialogue {b}")

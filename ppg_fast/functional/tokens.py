"""What arrives in any shape, as canonical rows: labels (N,) with -100 where masked, per-row float32, sequences, weights of a reduction."""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from ppg_fast.reference import consecutive_ids, group_sum
from ppg_fast.spec import IGNORE, REDUCTIONS, SEQUENCE_LEVEL, PolicyLossSpec, require, require_number, require_one_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_floats(name: str, tensor: Tensor) -> None:
    """ValueError unless the tensor holds logits, hidden states or weights that the kernels read."""
    require(isinstance(tensor, Tensor), f"{name} must be a tensor", type(tensor).__name__)
    require(tensor.dtype in DTYPES, f"{name} must be float32, bfloat16 or float16", tensor.dtype)


def per_token(name: str, values: Tensor | None, labels: Tensor) -> Tensor | None:
    """``values`` of the labels' shape -> contiguous detached float32 (N,); None stays None."""
    if values is None:
        return None
    require(isinstance(values, Tensor), f"{name} must be a tensor", type(values).__name__)
    require(values.shape == labels.shape, f"{name} must have the shape of labels, {tuple(labels.shape)}", tuple(values.shape))
    require(values.device == labels.device, f"{name} must be on the device of labels, {labels.device}", values.device)
    return values.detach().reshape(-1).float().contiguous()


@dataclass(frozen=True)
class Tokens:
    """The labels of a call as N rows, and which sequence each belongs to."""

    shape: torch.Size  # of the labels as given
    labels: Tensor  # (N,) int64, -100 where masked
    sequence_count: int
    cu_seqlens: Tensor | None

    @staticmethod
    def of(labels: Tensor, loss_mask: Tensor | None, cu_seqlens: Tensor | None, device: torch.device, validate: bool) -> "Tokens":
        """Checks and flattens; a token is active where its label is not -100 and the mask, if any, is not 0."""
        require(
            isinstance(labels, Tensor) and labels.dtype == torch.int64,
            "labels must be an int64 tensor",
            getattr(labels, "dtype", type(labels)),
        )
        require(labels.device == device, f"labels must be on the device of the logits or hidden states, {device}", labels.device)
        flat = labels.reshape(-1)
        if loss_mask is not None:
            require(
                loss_mask.shape == labels.shape, f"loss_mask must have the shape of labels, {tuple(labels.shape)}", tuple(loss_mask.shape)
            )
            require(loss_mask.device == device, f"loss_mask must be on the device of labels, {device}", loss_mask.device)
            flat = torch.where(loss_mask.reshape(-1) != 0, flat, IGNORE)
        if cu_seqlens is None:
            count = labels.shape[:-1].numel() if labels.dim() > 1 else 1
        else:
            _check_cu_seqlens(cu_seqlens, labels, validate)
            count = cu_seqlens.numel() - 1
        return Tokens(labels.shape, flat.contiguous(), count, cu_seqlens)

    @property
    def active(self) -> Tensor:
        """(N,) bool. A negative label other than -100 counts: it is an error that the op reports."""
        return self.labels != IGNORE

    def sequences(self) -> Tensor:
        """(N,) int64, the sequence of each token."""
        N = self.labels.numel()
        rows = torch.arange(N, device=self.labels.device)
        if self.cu_seqlens is not None:
            return torch.bucketize(rows, self.cu_seqlens[1:].long(), right=True).clamp(max=max(self.sequence_count - 1, 0))
        return rows // max(N // max(self.sequence_count, 1), 1)

    def masked_where(self, condition: Tensor) -> "Tokens":
        return replace(self, labels=torch.where(condition, IGNORE, self.labels))


def _check_cu_seqlens(cu_seqlens: Tensor, labels: Tensor, validate: bool) -> None:
    N = labels.numel()
    require(labels.dim() == 1 or labels.shape[0] == 1, "cu_seqlens goes with packed labels, (N,) or (1, N)", tuple(labels.shape))
    is_list = cu_seqlens.dim() == 1 and cu_seqlens.numel() >= 1 and cu_seqlens.dtype in (torch.int32, torch.int64)
    require(is_list, "cu_seqlens must be (S + 1,) int32", (tuple(cu_seqlens.shape), cu_seqlens.dtype))
    require(cu_seqlens.device == labels.device, f"cu_seqlens must be on the device of labels, {labels.device}", cu_seqlens.device)
    if (cu_seqlens.is_cpu or validate) and not torch.compiler.is_compiling():
        bounds = cu_seqlens.tolist()
        rising = bounds[0] == 0 and bounds[-1] == N and all(a <= b for a, b in pairwise(bounds))
        require(rising, f"cu_seqlens must rise from 0 to the number of tokens, {N}", bounds)


def token_advantages(advantages: Tensor, labels: Tensor) -> Tensor:
    """Advantages of the labels' shape, or (B,) for a (B, L) batch -> (N,) float32."""
    require(isinstance(advantages, Tensor), "advantages must be a tensor", type(advantages).__name__)
    if labels.dim() == 2 and advantages.shape == labels.shape[:1] and advantages.shape != labels.shape:
        advantages = advantages[:, None].expand(labels.shape)
    return per_token("advantages", advantages, labels)  # type: ignore[return-value]


def reduction_weights(tokens: Tokens, reduction: str, normalizer: float | Tensor | None) -> Tensor | None:
    """Weight of each token, (N,) float32 or None for 1, so that the reduced loss is the sum of weighted losses.

    With m active tokens, S sequences that have one, n_s of them in sequence s:  token_mean 1/m, sequence_mean 1/(S n_s),
    sequence_sum 1/S, sum and none 1. A ``normalizer`` stands in place of m, S, S, 1 and 1.
    """
    require_one_of("reduction", reduction, REDUCTIONS)
    if isinstance(normalizer, Tensor):
        require(normalizer.dim() == 0, "normalizer must be a number or a 0-d tensor", tuple(normalizer.shape))
        normalizer = normalizer.detach().to(tokens.labels.device, torch.float32)
    elif normalizer is not None:
        require_number("normalizer", normalizer, 0.0, open_low=True)
    active = tokens.active
    if reduction in ("sum", "none"):
        return None if normalizer is None else (1.0 / _scalar(normalizer, active)).expand(active.shape).contiguous()
    if reduction == "token_mean":
        outer = _scalar(active.sum().clamp(min=1) if normalizer is None else normalizer, active)
        return (1.0 / outer).expand(active.shape).contiguous()
    sequences = tokens.sequences()
    lengths = group_sum(active.long(), sequences, tokens.sequence_count)
    outer = _scalar((lengths > 0).sum().clamp(min=1) if normalizer is None else normalizer, active)
    if reduction == "sequence_sum":
        return (1.0 / outer).expand(active.shape).contiguous()
    return 1.0 / (outer * lengths.clamp(min=1)[sequences])


def _scalar(value: float | Tensor, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device=like.device)


def ratio_groups(tokens: Tokens, turn_ids: Tensor | None, spec: PolicyLossSpec) -> tuple[Tensor, int] | None:
    """For a sequence-level loss, the group each token shares its ratio with, (N,) int64, and how many groups there may be."""
    if spec.loss_type not in SEQUENCE_LEVEL:
        return None
    sequences = tokens.sequences()
    if spec.loss_type == "gspo":
        return sequences, tokens.sequence_count
    require(turn_ids is not None, 'loss_type "gspo_turn" needs turn_ids', turn_ids)
    assert turn_ids is not None
    require(
        turn_ids.numel() == tokens.labels.numel(), f"turn_ids must have the shape of labels, {tuple(tokens.shape)}", tuple(turn_ids.shape)
    )
    turn = turn_ids.reshape(-1).long().clamp(min=0)
    span = turn.max() + 1 if turn.numel() else 1
    return consecutive_ids(sequences * span + turn), tokens.labels.numel()


def ordered_sum(values: Tensor) -> Tensor:
    """Sum of (N,) in an order that does not depend on the number of threads: blocks of 1,024, one thread each, then their sums."""
    while values.numel() > 1024:
        values = torch.nn.functional.pad(values, (0, -values.numel() % 1024)).view(-1, 1024).sum(1)
    return values.sum()

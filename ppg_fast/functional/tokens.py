"""What arrives in any shape, as canonical rows: labels (N,) with -100 where masked, per-row float32, sequences, weights
of a reduction."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ppg_fast import backends, ops
from ppg_fast.contract import Wanted
from ppg_fast.losses import SHARED
from ppg_fast.ops.tracing import as_data, constant, transformed
from ppg_fast.reference import consecutive_ids, group_sum
from ppg_fast.rules import require_float32
from ppg_fast.spec import IGNORE, REDUCTIONS, PolicyLossSpec, fail, require, require_one_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def chosen_backend(backend: str | None, tensor: Tensor) -> str:
    """``backend``, or the fastest where ``tensor`` is; RuntimeError where torch.func would not see through it."""
    name = backend or backends.default(tensor.device.type)
    if name != "reference" and transformed():
        raise RuntimeError(
            f"ppg_fast's kernels have no rules for torch.func and forward-mode AD, got backend {name!r} inside of one: "
            'give backend="reference", or differentiate by loss.backward() or torch.autograd.grad'
        )
    return name


def check_tensor(name: str, value: Tensor, shape: torch.Size | None, device: torch.device) -> None:
    """ValueError unless ``value`` is a tensor of that shape (None: any) on that device."""
    if not isinstance(value, Tensor):
        fail(f"{name} must be a tensor", type(value).__name__)
    if value.device != device:
        fail(f"{name} must be on {device} like the logits or hidden states", value.device)
    if shape is not None and value.shape != shape:
        fail(f"{name} must have the shape of labels, {tuple(shape)}", tuple(value.shape))


def check_floats(name: str, tensor: Tensor) -> None:
    """ValueError unless the tensor holds logits, hidden states or weights that the kernels read."""
    if not isinstance(tensor, Tensor):
        fail(f"{name} must be a tensor", type(tensor).__name__)
    if tensor.dtype not in DTYPES:
        fail(f"{name} must be float32, bfloat16 or float16", tensor.dtype)


def readable(tensor: Tensor, validate: bool) -> bool:
    """Whether values may be looked at here: they cost no sync, or the caller asked for it, and no tracer is at work."""
    return (tensor.is_cpu or validate) and not torch.compiler.is_compiling()


def per_token(name: str, values: Tensor | None, labels: Tensor) -> Tensor | None:
    """``values`` of the labels' shape -> contiguous detached float32 (N,); None stays None."""
    if values is None:
        return None
    check_tensor(name, values, labels.shape, labels.device)
    return values.detach().reshape(-1).float().contiguous()


def check_tokens(labels: Tensor, loss_mask: Tensor | None, cu_seqlens: Tensor | None, device: torch.device) -> int:
    """The number of sequences, or a ValueError where shapes, dtypes or devices do not fit."""
    check_tensor("labels", labels, None, device)
    require(labels.dtype == torch.int64, "labels must be int64", labels.dtype)
    if loss_mask is not None:
        check_tensor("loss_mask", loss_mask, labels.shape, device)
    if cu_seqlens is None:
        return labels.shape[0] if labels.dim() == 2 else 1
    check_tensor("cu_seqlens", cu_seqlens, None, device)
    require(
        labels.dim() == 1 or labels.shape[0] == 1,
        "cu_seqlens goes with packed labels, (N,) or (1, N)",
        tuple(labels.shape),
    )
    is_list = cu_seqlens.dim() == 1 and cu_seqlens.numel() >= 1 and cu_seqlens.dtype in (torch.int32, torch.int64)
    require(is_list, "cu_seqlens must be (S + 1,) int32", (tuple(cu_seqlens.shape), cu_seqlens.dtype))
    return cu_seqlens.numel() - 1


@dataclass(frozen=True)
class Tokens:
    """The labels of a call as N rows, and which sequence each belongs to."""

    shape: torch.Size  # of the labels as given
    labels: Tensor  # (N,) int64, -100 where masked
    sequence_count: int
    packed: Tensor | None  # (N,) int64, the sequence of each token; None: the rows of a (B, L) batch, or one

    @staticmethod
    def of(
        labels: Tensor, loss_mask: Tensor | None, cu_seqlens: Tensor | None, device: torch.device, validate: bool
    ) -> "Tokens":
        """Checks and flattens; a token is active where its label is not -100 and the mask, if any, is not 0."""
        sequence_count = check_tokens(labels, loss_mask, cu_seqlens, device)
        flat = labels.reshape(-1)
        if loss_mask is not None:
            flat = ops.active_labels(flat, loss_mask, validate)
        packed = None if cu_seqlens is None else ops.sequence_ids_op(cu_seqlens, flat, validate)
        return Tokens(labels.shape, flat.contiguous(), sequence_count, packed)

    @property
    def active(self) -> Tensor:
        """(N,) bool. A negative label other than -100 counts: it is an error that the op reports."""
        return self.labels != IGNORE

    def sequences(self) -> Tensor:
        """(N,) int64, the sequence of each token."""
        return ops.sequence_ids(None, self.sequence_count, self.labels) if self.packed is None else self.packed

    def masked_where(self, condition: Tensor) -> "Tokens":
        return replace(self, labels=torch.where(condition, IGNORE, self.labels))


def asked_for(outputs: tuple[Tensor, ...], wanted: Wanted, shape: torch.Size) -> Tensor | tuple[Tensor, ...]:
    """Log-probs in the shape of the labels; a tuple where the log-sum-exp, the entropy or score norms (without a
    gradient) are wanted, too, in this order."""
    logprobs, entropy, norms, lse = outputs
    more = [lse] * wanted.lse + [entropy] * wanted.entropy + [norms.detach()] * wanted.score_norms
    return (logprobs.view(shape), *(values.view(shape) for values in more)) if more else logprobs.view(shape)


def advantages_per_token(advantages: Tensor, labels: Tensor) -> Tensor:
    """Advantages of the labels' shape, from that or from (B,) for a (B, L) batch, which is not copied."""
    if not isinstance(advantages, Tensor):
        fail("advantages must be a tensor", type(advantages).__name__)
    if labels.dim() == 2 and advantages.shape == labels.shape[:1] and advantages.shape != labels.shape:
        return advantages[:, None].expand(labels.shape)
    return advantages


def checked_normalizer(
    reduction: str, normalizer: float | Tensor | None, device: torch.device, validate: bool
) -> float | Tensor | None:
    """The normalizer as a number > 0 or a 0-d float32 tensor on the device, or a ValueError for it or the name of the
    reduction."""
    require_one_of("reduction", reduction, REDUCTIONS)
    if isinstance(normalizer, Tensor):
        require(normalizer.dim() == 0, "normalizer must be a number or a 0-d tensor", tuple(normalizer.shape))
        if readable(normalizer, validate):
            require_float32("normalizer", normalizer.detach(), 0.0, open_low=True)
        return normalizer.detach().to(device, torch.float32)
    return None if normalizer is None else require_float32("normalizer", normalizer, 0.0, open_low=True)


def reduction_weights(
    tokens: Tokens, reduction: str, normalizer: float | Tensor | None, validate: bool
) -> Tensor | None:
    """Weight of each token, (N,) float32 or None for 1, so that the reduced loss is the sum of weighted losses.

    With m active tokens, S sequences that have one, n_s of them in sequence s:  token_mean 1/m, sequence_mean 1/(S
    n_s), sequence_sum 1/S, sum and none 1. A ``normalizer`` stands in place of m, S, S, 1 and 1.
    """
    normalizer = checked_normalizer(reduction, normalizer, tokens.labels.device, validate)
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


def likelihood_weights(
    weights: Tensor | None, normalizer: float | Tensor | None, labels: Tensor, active: Tensor, validate: bool
) -> Tensor | None:
    """Weight of -l of each token in the reduced loss, float32 of the labels' shape, 0 where it is not ``active`` (of
    any shape): ``weights`` over the number of active tokens whose weight is not 0, or over ``normalizer``."""
    if weights is None:
        require(normalizer is None, "nll_normalizer goes with nll_weights", normalizer)
        return None
    check_tensor("nll_weights", weights, labels.shape, labels.device)
    normalizer = checked_normalizer("sum", normalizer, labels.device, validate)
    weights = torch.where(active.view(labels.shape), weights.detach().float(), 0.0)
    outer = (weights != 0).sum().clamp(min=1) if normalizer is None else normalizer
    return weights / _scalar(outer, weights)


def _scalar(value: float | Tensor, like: Tensor) -> Tensor:
    """A 0-d float32 on the device of ``like``, filled there: a copy from the host would wait for the device."""
    if isinstance(value, Tensor):
        return value.float()
    filled = torch.full if constant(value) else as_data
    return filled((), value, dtype=torch.float32, device=like.device)


def ratio_groups(tokens: Tokens, turn_ids: Tensor | None, spec: PolicyLossSpec) -> tuple[Tensor, int] | None:
    """For a sequence-level loss, the group each token shares its ratio with, (N,) int64, and how many groups there may
    be."""
    if spec.loss_type not in SHARED:
        return None
    sequences = tokens.sequences()
    if SHARED[spec.loss_type] == "sequence":
        return sequences, tokens.sequence_count
    require(turn_ids is not None, f'loss_type "{spec.loss_type}" needs turn_ids', turn_ids)
    assert turn_ids is not None
    check_tensor("turn_ids", turn_ids, tokens.shape, tokens.labels.device)
    require(not turn_ids.is_floating_point(), "turn_ids must be integers", turn_ids.dtype)
    turn = turn_ids.reshape(-1).long().clamp(min=-1) + 1
    span = turn.max() + 1 if turn.numel() else 1
    return consecutive_ids(sequences * span + turn), tokens.labels.numel()


def ordered_sum(values: Tensor) -> Tensor:
    """Sums of (..., N) in an order that does not depend on the number of threads: blocks of 1,024, one thread each,
    then their sums."""
    while values.shape[-1] > 1024:
        values = torch.nn.functional.pad(values, (0, -values.shape[-1] % 1024)).unflatten(-1, (-1, 1024)).sum(-1)
    return values.sum(-1)

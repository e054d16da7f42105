"""Hidden states and a head as a caller holds them, checked and as rows."""

import torch
from torch import Tensor

from ppg_fast import ops
from ppg_fast.contract import Chunks
from ppg_fast.functional.tokens import check_floats
from ppg_fast.rules import require_integer
from ppg_fast.spec import fail, require


def head_of(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    chunk_rows: int | None,
    max_active_rows: int | None,
    logits_dtype: torch.dtype | str | None,
) -> tuple[Tensor, Tensor, Tensor | None, Chunks]:
    """Hidden states (N, D), weight (V, D), bias (V,) of one dtype, and the chunks of its rows; ValueError where they do
    not fit."""
    check_floats("hidden", hidden)
    check_floats("weight", weight)
    require(isinstance(labels, Tensor), "labels must be a tensor", type(labels).__name__)
    fits = hidden.dim() >= 1 and hidden.shape[:-1] == labels.shape
    require(fits, f"hidden must be the shape of labels and a hidden size, {(*labels.shape, 'D')}", tuple(hidden.shape))
    require(
        weight.dim() == 2 and weight.shape[1] == hidden.shape[-1],
        f"weight must be (V, D) with D = {hidden.shape[-1]}",
        tuple(weight.shape),
    )
    require(weight.shape[0] >= 1, "the vocabulary must hold at least one token", weight.shape[0])
    require(weight.device == hidden.device, f"weight must be on the device of hidden, {hidden.device}", weight.device)
    if bias is not None:
        require(bias.shape == weight.shape[:1], f"bias must be (V,) = ({weight.shape[0]},)", tuple(bias.shape))
        require(bias.device == hidden.device, f"bias must be on the device of hidden, {hidden.device}", bias.device)
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))  # with and without grad mode
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    require(
        hidden.dtype == weight.dtype,
        "hidden and weight must have one dtype (or run under autocast)",
        (hidden.dtype, weight.dtype),
    )
    require(
        bias is None or bias.dtype == weight.dtype,
        f"bias must have the dtype of weight, {weight.dtype}",
        None if bias is None else bias.dtype,
    )
    dtype = _checked_logits_dtype(logits_dtype, hidden)
    if chunk_rows is None:
        rows = ops.default_chunk_rows(weight.shape[0], dtype.itemsize, hidden.device.type, frozen)
    else:
        rows = require_integer("chunk_rows", chunk_rows, 1)
    bound = None if max_active_rows is None else require_integer("max_active_rows", max_active_rows, 1)
    return hidden.reshape(labels.numel(), hidden.shape[-1]), weight, bias, Chunks(rows, bound, dtype == torch.float32)


def _checked_logits_dtype(given: torch.dtype | str | None, hidden: Tensor) -> torch.dtype:
    """The dtype of the logits of ``hidden``: by default what its products are fastest in; ValueError for another than
    float32 and its own."""
    if given is None:
        return ops.product_dtype(hidden.dtype, hidden.device.type)
    found = next((t for t in (torch.float32, hidden.dtype) if given in (t, str(t).removeprefix("torch."))), None)
    if found is None:
        fail(f"logits_dtype must be float32 or the dtype of hidden and weight, {hidden.dtype}", given)
    return found

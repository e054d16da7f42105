"""Causal attention inside each dialogue of a packed row: the "ppg_varlen" entry of transformers' AttentionInterface.

A packed row holds dialogues one after the other, ``cu_seq_lens_q`` their bounds. On a CUDA device in half precision it
is `torch.nn.attention.varlen.varlen_attn`, or flash-attn's own kernel where it is installed and knows what torch's does
not: score softcaps, and a deterministic backward pass under torch.use_deterministic_algorithms. Elsewhere (float32, a
softcap without flash-attn) it is a loop over the dialogues. No mask of the packed row's length squared is ever made.
Without ``cu_seq_lens_q`` the bounds are where position ids restart; in a padded batch or with a cache it is ordinary
attention, so that the same model also generates.

Why an entry of our own: a packed row with restarting position ids is block-diagonal in transformers only if
attention_mask is None and use_cache is off, silently contaminated otherwise, and its SDPA path builds the dense mask.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

NAME = "ppg_varlen"
LAYERS = ("full_attention", "sliding_attention")  # layer types of transformers that it computes
QUERY_BLOCK = 512  # rows of scores made at once where a mask or softcap forbids the fused kernel


def varlen_attention(
    module: nn.Module,
    query: Tensor,  # (B, H, Q, D); B = 1 when packed
    key: Tensor,  # (B, Hkv, K, D)
    value: Tensor,
    # (B, K) bool, True = no padding; or (B, 1, Q, K), what each query sees; ignored when packed
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    cu_seq_lens_q: Tensor | None = None,  # (S + 1,) int32
    max_length_q: int | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """softmax(causal(Q K^T scaling)) V, one dialogue at a time -> (B, Q, H, D), and no weights."""
    del dropout  # a policy is trained without it: the sampler's policy must be the trainer's
    _refuse(module, key.shape[2], kwargs)
    if cu_seq_lens_q is None and attention_mask is None:
        cu_seq_lens_q = _restarts(query, key, kwargs.get("position_ids"))
    if cu_seq_lens_q is None:
        if attention_mask is not None and attention_mask.dim() == 4:
            out = _masked(query, key, value, attention_mask, scaling, softcap)
        else:
            out = _causal(query, key, value, attention_mask, scaling, sliding_window, softcap)
    elif query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and (not softcap or flash_attn()):
        return _fused(query, key, value, scaling, sliding_window, softcap, cu_seq_lens_q, max_length_q), None
    elif len(lengths := torch.diff(cu_seq_lens_q).tolist()) == 1:
        out = _causal(query, key, value, None, scaling, sliding_window, softcap)
    else:
        parts = zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True)
        outs = [_causal(q, k, v, None, scaling, sliding_window, softcap).transpose(1, 2) for q, k, v in parts]
        return torch.cat(outs, dim=1), None  # put together as the next product reads it: one copy, not two
    return out.transpose(1, 2).contiguous(), None  # no copy where what comes out lies as a model's queries


@cache
def flash_attn() -> Callable[..., Tensor] | None:
    """flash-attn's `flash_attn_varlen_func`, None where the package is not installed."""
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError:
        return None
    return flash_attn_varlen_func


def _fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
    bounds: Tensor,
    longest: int | None,
) -> Tensor:
    """A CUDA kernel: (1, H, N, D) -> (1, N, H, D)."""
    longest = int(torch.diff(bounds).max()) if longest is None else longest
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in (q, k, v))
    # the kernels count the keys left of the query, transformers counts it too
    left = -1 if window is None else window - 1
    deterministic, flash = torch.are_deterministic_algorithms_enabled(), flash_attn()
    lengths = bounds, bounds, longest, longest
    if flash is not None and (softcap or deterministic):
        more = {"softcap": softcap or 0.0, "deterministic": deterministic}
        return flash(q, k, v, *lengths, softmax_scale=scaling, causal=True, window_size=(left, 0), **more)[None]
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scaling, "window_size": (left, 0)}
    # torch 2.11 takes grouped heads unasked
    if q.shape[1] != k.shape[1] and "enable_gqa" in inspect.signature(varlen_attn).parameters:
        options["enable_gqa"] = True
    out = varlen_attn(q, k, v, *lengths, **options)
    assert isinstance(out, Tensor)  # a pair only where auxiliary results are asked for
    return out[None]


def _refuse(module: nn.Module, length: int, given: dict[str, Any]) -> None:
    """ValueError for what a model asks of its attention and this one does not know."""
    if given.get("s_aux") is not None:
        raise ValueError(f"{NAME} attention knows no attention sinks, got a model of type {type(module).__name__}")
    config, layer = getattr(module, "config", None), getattr(module, "layer_idx", None)
    chunk, types = getattr(config, "attention_chunk_size", None), getattr(config, "layer_types", None)
    if chunk and types and layer is not None and types[layer] == "chunked_attention" and length > chunk:
        raise ValueError(
            f"{NAME} attention knows no chunks, so a row must have at most the {chunk} tokens of the first, got "
            f"{length}"
        )


def _restarts(query: Tensor, key: Tensor, positions: object) -> Tensor | None:
    """Bounds (S + 1,) int32 of the dialogues of a row whose position ids restart; None for one that is not packed."""
    if (
        not isinstance(positions, Tensor)
        or query.shape[0] != 1
        or query.shape[2] in (0, 1)
        or query.shape[2] != key.shape[2]
    ):
        return None
    starts = (torch.diff(positions[0]) != 1).nonzero()[:, 0] + 1
    ends = starts.new_tensor([0]), starts, starts.new_tensor([query.shape[2]])
    return torch.cat(ends).int() if len(starts) else None


def _causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    is_token: Tensor | None,
    scaling: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Queries (B, H, Q, D) that are the last of K keys; ``is_token`` (B, K) bool, False = padding.

    Where the fused kernel does not serve, in blocks of queries, so that no (Q, K) mask is made. Padding sees itself: no
    row is empty.
    """
    length, past = q.shape[2], k.shape[2] - q.shape[2]
    window = k.shape[2] if window is None else min(window, k.shape[2])
    if not softcap and is_token is None and window == k.shape[2] and (past == 0 or length == 1):
        return scaled_dot_product_attention(
            q, k, v, is_causal=length > 1, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        first, end = max(0, past + start - window + 1), past + stop
        distance = torch.arange(past + start, end, device=q.device)[:, None] - torch.arange(first, end, device=q.device)
        seen = (distance >= 0) & (distance < window)
        if is_token is not None:
            seen = (seen & is_token[:, None, None, first:end]) | (distance == 0)
        blocks.append(_masked(q[:, :, start:stop], k[:, :, first:end], v[:, :, first:end], seen, scaling, softcap))
    return torch.cat(blocks, dim=2)


def _masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scaling: float | None, softcap: float | None) -> Tensor:
    """Attention under a mask, boolean or added to the scores, with Gemma-2's softcap * tanh(score / softcap) where
    asked."""
    if not softcap:
        return scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min) if seen.dtype == torch.bool else scores + seen
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


def varlen_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that transformers hands to `varlen_attention`: padding (B, K), None without; causality and windows it
    knows itself.

    A whole mask where a caller adds rules of its own, and for a cache of fixed size, whose last columns are not filled
    yet. Without an entry in this interface transformers drops every mask without a word, padding included.
    """
    if use_vmap or int(q_offset) + q_length != kv_offset + kv_length:
        places: dict[str, Any] = {
            "q_offset": q_offset,
            "kv_offset": kv_offset,
            "attention_mask": attention_mask,
            "use_vmap": use_vmap,
        }
        places |= {} if mask_function is None else {"mask_function": mask_function}
        return sdpa_mask(batch_size, q_length, kv_length, allow_is_causal_skip=False, device=kwargs["device"], **places)
    if attention_mask is None:
        return None
    is_token = attention_mask[:, -kv_length:]
    return None if bool(is_token.all()) else is_token


AttentionInterface.register(NAME, varlen_attention)
AttentionMaskInterface.register(NAME, varlen_mask)

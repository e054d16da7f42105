"""Causal attention inside each dialogue of a packed row: the "ppg_varlen" entry of transformers' AttentionInterface.

A packed row holds dialogues one after the other, ``cu_seq_lens_q`` their bounds. On a CUDA device in half precision it is
`torch.nn.attention.varlen.varlen_attn`, or flash-attn's own kernel where it is installed and knows what torch's does not: score softcaps,
and a deterministic backward pass under torch.use_deterministic_algorithms. Elsewhere (float32, a softcap without flash-attn) it is a loop
over the dialogues. No mask of the packed row's length squared is ever made. Without ``cu_seq_lens_q`` it is ordinary attention with the
given mask, so that the same model also generates.

Why an entry of our own: a packed row with restarting position ids is block-diagonal in transformers only if attention_mask is None
and use_cache is off, silently contaminated otherwise, and its SDPA path builds the dense mask.
"""

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "ppg_varlen"
QUERY_BLOCK = 512  # rows of scores made at once where a mask or softcap forbids the fused kernel


def varlen_attention(
    module: nn.Module,
    query: Tensor,  # (B, H, Q, D); B = 1 when packed
    key: Tensor,  # (B, Hkv, K, D)
    value: Tensor,
    attention_mask: Tensor | None,  # (B, 1, Q, K) bool, True = seen; ignored when packed
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
    if kwargs.get("s_aux") is not None:
        raise ValueError(f"{NAME} attention knows no attention sinks, got a model of type {type(module).__name__}")
    if cu_seq_lens_q is None:
        out = _masked(query, key, value, attention_mask, scaling, softcap)
    elif query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and (not softcap or flash_attn()):
        return _fused(query, key, value, scaling, sliding_window, softcap, cu_seq_lens_q, max_length_q), None
    else:
        lengths = torch.diff(cu_seq_lens_q).tolist()
        parts = zip(*(t.split(lengths, dim=2) for t in (query, key, value)), strict=True)
        out = torch.cat([_causal(q, k, v, scaling, sliding_window, softcap) for q, k, v in parts], dim=2)
    return out.transpose(1, 2).contiguous(), None


@cache
def flash_attn() -> Callable[..., Tensor] | None:
    """flash-attn's `flash_attn_varlen_func`, None where the package is not installed."""
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ImportError:
        return None
    return flash_attn_varlen_func


def _fused(
    q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None, softcap: float | None, bounds: Tensor, longest: int | None
) -> Tensor:
    """A CUDA kernel: (1, H, N, D) -> (1, N, H, D)."""
    longest = int(torch.diff(bounds).max()) if longest is None else longest
    q, k, v = (t[0].transpose(0, 1).contiguous() for t in (q, k, v))
    left = -1 if window is None else window - 1  # the kernels count the keys left of the query, transformers counts it too
    deterministic, flash = torch.are_deterministic_algorithms_enabled(), flash_attn()
    lengths = bounds, bounds, longest, longest
    if flash is not None and (softcap or deterministic):
        more = {"softcap": softcap or 0.0, "deterministic": deterministic}
        return flash(q, k, v, *lengths, softmax_scale=scaling, causal=True, window_size=(left, 0), **more)[None]
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"scale": scaling, "window_size": (left, 0)}
    if q.shape[1] != k.shape[1] and "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.11 takes grouped heads unasked
        options["enable_gqa"] = True
    out = varlen_attn(q, k, v, *lengths, **options)
    assert isinstance(out, Tensor)  # a pair only where auxiliary results are asked for
    return out[None]


def _causal(q: Tensor, k: Tensor, v: Tensor, scaling: float | None, window: int | None, softcap: float | None) -> Tensor:
    """One dialogue, (1, H, L, D). Where the fused kernel does not serve, in blocks of queries, so that no (L, L) mask is made."""
    length = q.shape[2]
    window = length if window is None else min(window, length)
    if not softcap and window == length:
        return scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        first = max(0, start - window + 1)
        distance = torch.arange(start, stop, device=q.device)[:, None] - torch.arange(first, stop, device=q.device)
        seen = (distance >= 0) & (distance < window)
        blocks.append(_masked(q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], seen, scaling, softcap))
    return torch.cat(blocks, dim=2)


def _masked(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, scaling: float | None, softcap: float | None) -> Tensor:
    """Attention under a boolean mask, with Gemma-2's softcap * tanh(score / softcap) where asked."""
    if not softcap:
        grouped, causal = q.shape[1] != k.shape[1], seen is None and q.shape[2] > 1
        return scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=causal, scale=scaling, enable_gqa=grouped)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (q.shape[3] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if seen is None and q.shape[2] > 1:
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v


AttentionInterface.register(NAME, varlen_attention)

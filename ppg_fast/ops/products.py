"""Matrix products of a head's 16-bit operands in float32: by the device where it has them, else tile by tile."""

import platform
from collections.abc import Iterator

import torch
from torch import Tensor

from ppg_fast.backends import constant_result

TILE_BYTES = 2 * 2**20  # of a head's rows cast to float32: still in a CPU's cache when they are multiplied


def has_products(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of 16-bit ``dtype`` by instructions of its own; float32 always."""
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    if dtype == torch.bfloat16:  # oneDNN's answer on x86 includes emulation
        by_flags = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return by_flags or (platform.machine() == "aarch64" and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True


@constant_result
def product_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """In what operands of ``dtype`` are multiplied, and the default of their logits: float32 on a CPU that has no
    products of their own, else that."""
    return torch.float32 if device_type == "cpu" and not has_products(dtype) else dtype


def tiles(weight: Tensor, cast: bool = True) -> Iterator[tuple[slice, Tensor]]:
    """Rows of ``weight`` (V, D), a few at a time: where they lie, and themselves in float32, until the next ones; as
    they are unless ``cast``."""
    size = max(16, TILE_BYTES // (4 * max(1, weight.shape[1])))
    memory = weight.new_empty(min(size, len(weight)) if cast else 0, weight.shape[1], dtype=torch.float32)
    for start in range(0, len(weight), size):
        part = weight[start : start + size]
        yield slice(start, start + size), memory[: len(part)].copy_(part) if cast else part


def adds_in_float32(like: Tensor) -> bool:
    """Whether the device has products from 16 to 32 bits. PyTorch's CPU has none, ROCm refuses them in some versions
    and was wrong in others (pytorch/pytorch#162600)."""
    return like.is_cuda and not torch.version.hip


def add_product(total: Tensor, a: Tensor, b: Tensor, beta: int) -> None:
    """float32 ``total`` = beta total + a b of 16-bit ``a`` and ``b``, on a device that `adds_in_float32`."""
    torch.addmm(total, a, b, out_dtype=torch.float32, beta=beta, out=total)


def project(x: Tensor, weight: Tensor, bias: Tensor | None, logits: Tensor) -> None:
    """Write x W^T + b into ``logits``, rounded once: in the dtype of x (n, D) and weight (V, D), or in float32."""
    if logits.dtype == product_dtype(x.dtype, x.device.type) == x.dtype:
        if bias is None:
            torch.mm(x, weight.t(), out=logits)
        else:
            torch.addmm(bias, x, weight.t(), out=logits)
    elif adds_in_float32(x):
        if bias is not None:
            logits.copy_(bias)
        add_product(logits, x, weight.t(), beta=int(bias is not None))
    else:
        x, bias = x.float(), None if bias is None else bias.float()
        for at, rows in tiles(weight):
            out = logits[:, at] if logits.dtype == torch.float32 else x.new_empty(len(x), len(rows))
            project(x, rows, None if bias is None else bias[at], out)
            if out.dtype != logits.dtype:
                logits[:, at] = out

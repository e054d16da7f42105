"""What is done otherwise on ROCm, whose devices say that they are CUDA's."""

from types import ModuleType

import pytest
import torch

from ppg_fast.ops import products
from ppg_fast.ops.head import Chunk, Head


class OnGpu(torch.Tensor):
    """A tensor of a CPU that says what one of a GPU says."""

    is_cuda = True


@pytest.mark.parametrize("hip", [None, "7.0"])
def test_no_gemm_from_16_to_32_bits(hip, monkeypatch):
    """Its share of d_weight is rounded once a chunk, and added in float32."""
    called, addmm = [], torch.addmm

    def recorded(total, a, b, *, out_dtype, beta, out):
        called.append(out_dtype)
        return addmm(total, a.to(out_dtype), b.to(out_dtype), beta=beta, out=out)

    monkeypatch.setattr(torch, "addmm", recorded)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(products, "has_products", lambda _: True)
    x, d, weight = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((48, 8), (48, 40), (40, 8)))
    head = Head(x, weight, None, 16, (False, True, False), ModuleType("unused"))
    for rows in torch.arange(48).split(16):
        head.accumulate(Chunk(rows, x[rows], d[rows].as_subclass(OnGpu), None, alone=False))
    assert called == ([] if hip else [torch.float32] * 3)
    assert head.d_weight.dtype == torch.float32
    rounded = torch.stack([(d[r].double().t() @ x[r].double()) for r in torch.arange(48).split(16)])
    bound = 2.0**-8 * rounded.abs().sum(0) + 1e-5
    assert ((head.d_weight.double() - rounded.sum(0)).abs() <= bound).all()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("hip", [None, "7.0"])
def test_float32_logits(hip, biased, monkeypatch):
    """By one product from 16 to 32 bits, or by products of float32, tile by tile."""
    called, addmm = [], torch.addmm

    def recorded(total, a, b, *, beta=1, out=None, **of):
        if "out_dtype" in of:
            called.append(beta)
            a, b = a.to(of["out_dtype"]), b.to(of["out_dtype"])
        return addmm(total, a, b, beta=beta, out=out)

    monkeypatch.setattr(torch, "addmm", recorded)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(products, "has_products", lambda _: True)
    monkeypatch.setattr(products, "TILE_BYTES", 16 * 4 * 8)
    x, weight, bias = (torch.randn(shape, dtype=torch.bfloat16) for shape in ((48, 8), (40, 8), (40,)))
    logits = torch.full((48, 64), torch.nan)[:, :40]
    products.project(x.as_subclass(OnGpu), weight, bias if biased else None, logits)
    assert called == ([] if hip else [int(biased)])
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double() if biased else None)
    torch.testing.assert_close(logits.double(), expected, rtol=1e-6, atol=1e-5)

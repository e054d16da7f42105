"""Compiles a kernel whose row is spread over a cluster of CTAs. `cluster_probe.py SM` ends with 0 where that works.

A process of its own, because a Triton that cannot do it does not raise but abort; and Triton alone, because torch takes
seconds to import.
"""

import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def normalise_kernel(rows, V, BLOCK_V: tl.constexpr):
    """What the policy loss asks of a cluster: a maximum and a sum over all of its CTAs, and a store in place that
    depends on both."""
    cols = tl.arange(0, BLOCK_V)
    row = rows + tl.program_id(0).to(tl.int64) * V
    x = tl.load(row + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
    e = tl.exp2(x - tl.max(x))
    tl.store(row + cols, (e / tl.sum(e)).to(tl.bfloat16), mask=cols < V)


if __name__ == "__main__":
    source = ASTSource(
        fn=normalise_kernel, signature={"rows": "*bf16", "V": "i32", "BLOCK_V": "constexpr"}, constexprs={(2,): 65536}
    )
    triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": 16, "num_ctas": 2})

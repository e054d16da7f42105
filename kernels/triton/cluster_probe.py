"""Compiles a kernel whose row is spread over a cluster of CTAs: `cluster_probe.py SM` exits with 0 where that works.

Run in its own process, because a Triton that cannot do it aborts instead of raising. Imports Triton only: torch takes
seconds.
"""

import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def normalise_kernel(rows, V, BLOCK_V: tl.constexpr):
    """What the policy loss needs from a cluster: a maximum and a sum over all its CTAs, and an in-place store that
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

"""Compiles a kernel whose row is spread over a cluster of CTAs: `cluster_probe.py SM` exits with 0 where that works.

Run in its own process, because a Triton that cannot do it aborts instead of raising. Imports Triton only: torch takes
seconds.
"""

import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def normalise_kernel(rows, ticket, V, BLOCK_V: tl.constexpr):
    """What the policy loss needs from a cluster: a maximum and a sum over all its CTAs, an in-place store that depends
    on both, and one ticket for all of them."""
    cols = tl.arange(0, BLOCK_V)
    row = rows + tl.program_id(0).to(tl.int64) * V
    x = tl.load(row + cols, mask=cols < V, other=float("-inf")).to(tl.float32)
    e = tl.exp2(x - tl.max(x))
    tl.store(row + cols, (e / tl.sum(e)).to(tl.bfloat16), mask=cols < V)
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(ticket, 0)


def one_ticket_a_cluster(ptx: str) -> bool:
    """Whether the first atomic of ``ptx`` is one CTA's, and all CTAs of its cluster read the number that it drew.

    A ticket for each CTA would make the losses' sum begin too early, and a CTA that does not know the number would wait
    at the cluster's barriers for others that do not come.
    """
    sources: dict[str, set[str]] = {}
    for made, rest in re.findall(r"^\s*(?:@!?%\w+\s+)?[\w.:]+\s+(%\w+)[^,;\n]*,(.*);", ptx, re.MULTILINE):
        sources.setdefault(made, set()).update(re.findall(r"%\w+", rest))
    drawn = re.search(r"^\s*@(%\w+)\s+atom\.[^\n]*(.*?)^\s*(?:@!?%\w+\s+)bra\b", ptx, re.MULTILINE | re.DOTALL)
    if drawn is None:
        return False
    of, new = set(), {drawn[1]}
    while new:
        of |= new
        new = set().union(*(sources.get(register, set()) for register in new)) - of
    told = re.search(r"barrier\.cluster\.wait.*ld\.shared::cluster", drawn[2], re.DOTALL)
    return "%cluster_ctarank" in of and told is not None


if __name__ == "__main__":
    signature = {"rows": "*bf16", "ticket": "*i32", "V": "i32", "BLOCK_V": "constexpr"}
    source = ASTSource(fn=normalise_kernel, signature=signature, constexprs={(3,): 65536})
    found = triton.compile(
        source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": 16, "num_ctas": 2}
    )
    if not one_ticket_a_cluster(found.asm["ptx"]):
        sys.exit("a ticket is drawn by each CTA of a cluster, or not told to all of them")

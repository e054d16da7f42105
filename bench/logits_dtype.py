"""Cost of float32 logits of 16-bit operands, and the errors they take away: `python -m ppg_fast.bench.logits_dtype`.

Every call once a round, the order turned round each time; errors against float64 from the same rounded operands. On one
machine both kinds of product are measured: those that its CPU has no instructions for, PyTorch emulates.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ppg_fast as ppg
from ppg_fast.ops import products

from . import machine, result_file
from .tables import NOT_MEASURED, Results, duration, of, table
from .timing import Contestant, Pace, interleave

N, D, V = 256, 896, 32064  # rows, their hidden size, the vocabulary
CONFIDENT = 1e-4  # 1 - p of a confident row, about
DTYPES = ("bfloat16", "float16")
ROUNDS = 3


def problem(dtype: torch.dtype, confident: bool, size: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and labels; logits of standard deviation 3, or those of rows that are all but certain."""
    n, d, v = size
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(v, d, generator=generator) * 3 / math.sqrt(d)
    hidden, labels = torch.randn(n, d, generator=generator), torch.randint(v, (n,), generator=generator)
    if confident:
        of_label = weight[labels]
        hidden = (math.log(v) - math.log(CONFIDENT)) * of_label / of_label.square().sum(1, keepdim=True)
    return hidden.to(dtype), weight.to(dtype), labels


def truth(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs (n,) and d log-prob / d hidden (n, D) in float64."""
    logprobs, gradients = [], []
    wide = weight.double()
    for x, y in zip(hidden.double().split(32), labels.split(32), strict=True):
        logp = torch.log_softmax(x @ wide.t(), -1)
        logprobs.append(logp.gather(1, y[:, None])[:, 0])
        gradients.append(wide[y] - logp.exp() @ wide)
    return torch.cat(logprobs), torch.cat(gradients)


def call(hidden: Tensor, weight: Tensor, labels: Tensor, dtype: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs and the gradients of minus their sum, by `linear_policy_loss`."""
    hidden, weight = (t.detach().requires_grad_() for t in (hidden, weight))
    ones = torch.ones(len(labels))
    out = ppg.linear_policy_loss(hidden, weight, labels, ones, reduction="sum", logits_dtype=dtype)
    d_hidden, d_weight = torch.autograd.grad(out.loss, (hidden, weight))
    return out.logprobs, d_hidden, d_weight


def errors(given: tuple[Tensor, Tensor, Tensor], dtype: str) -> dict[str, float]:
    """Of log-probs in nats, of rows of d_hidden relative to their length."""
    (exact, d_exact), (found, d_hidden, _) = truth(*given), call(*given, dtype)
    nats = (found.detach().double() - exact).abs()
    relative = (d_hidden.double() + d_exact).norm(dim=1) / d_exact.norm(dim=1)
    return {
        "mean": float(nats.mean()),
        "most": float(nats.max()),
        "d_hidden_median": float(relative.median()),
        "d_hidden_most": float(relative.max()),
    }


@contextmanager
def multiplying(in_16_bits: bool) -> Iterator[None]:
    """Products of 16-bit operands as on a CPU that has them, or as on one that has not."""
    has, products.has_products = products.has_products, lambda dtype: in_16_bits or dtype == torch.float32
    try:
        yield
    finally:
        products.has_products = has


def timed(dtype: str, size: tuple[int, int, int]) -> list[dict[str, Any]]:
    """Loss and gradients by either kind of product, and of float32 operands."""
    given = problem(getattr(torch, dtype), False, size)
    wide = given[0].float(), given[1].float(), given[2]

    def by(in_16_bits: bool, logits: str) -> Callable[[], Any]:
        def run() -> Any:
            with multiplying(in_16_bits):
                return call(*given, logits)

        return run

    cases = [(in_16_bits, logits) for in_16_bits in (True, False) for logits in (dtype, "float32")]
    contestants = [Contestant(f"{half} {logits}", "ours", by(half, logits)) for half, logits in cases]
    contestants.append(Contestant("float32 operands", "ceiling", lambda: call(*wide, None)))
    for one in contestants:
        one.call()
    seconds = interleave(contestants, Pace(ROUNDS, budget=math.inf), "cpu")
    own = products.has_products(getattr(torch, dtype))
    rows = [("float32" if not half else dtype, logits, half == own, f"{half} {logits}") for half, logits in cases]
    rows.append(("float32", "float32 of float32 operands", False, "float32 operands"))
    return [
        {"operands": dtype, "products": of, "logits": logits, "here": here, "median": statistics.median(seconds[name])}
        for of, logits, here, name in rows
    ]


def measure(size: tuple[int, int, int] = (N, D, V)) -> dict[str, Any]:
    """Errors of every dtype, sort of row and logits, and times."""
    found = [
        {"operands": dtype, "rows": "confident" if confident else "ordinary", "logits": logits, **errors(given, logits)}
        for dtype in DTYPES
        for confident in (False, True)
        for given in [problem(getattr(torch, dtype), confident, size)]
        for logits in (dtype, "float32")
    ]
    return {"size": size, "errors": found, "times": [time for dtype in DTYPES for time in timed(dtype, size)]}


def logits_dtype_section(results: Results) -> str:
    """Two tables: errors, and times."""
    text = ""
    for device, file in of(results, "logits_dtype"):
        found = file["logits_dtype"]
        n, d, v = found["size"]
        heads = (
            f"operands, rows (N {n:,}, D {d:,}, V {v:,})",
            "logits",
            "log-prob off by, mean",
            "at most",
            "d_hidden off by, median row",
            "at most",
        )
        rows = [
            (
                f"{e['operands']}, {e['rows']}",
                e["logits"],
                f"{e['mean']:.1e} nats",
                f"{e['most']:.1e} nats",
                f"{e['d_hidden_median']:.2%}",
                f"{e['d_hidden_most']:.2%}",
            )
            for e in found["errors"]
        ]
        text += table(heads, rows) + "\n"
        heads = (
            f"operands ({device}, threads: {file['ppg_fast']['threads']})",
            "products",
            "logits",
            "loss, gradients",
        )
        here = {True: " (chosen on this CPU)", False: ""}
        times = [
            (t["operands"], t["products"] + here[t["here"]], t["logits"], duration(t["median"])) for t in found["times"]
        ]
        text += table(heads, times)
    return text or NOT_MEASURED


def main(argv: Sequence[str] | None = None) -> int:
    """Write ``logits_dtype.cpu.json``."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Measure float32 logits of 16-bit operands.")
    parser.add_argument("--output", type=Path, default=result_file.FOLDER)
    arguments = parser.parse_args(argv)
    file = machine.header("python -m ppg_fast.bench.logits_dtype", "cpu", threads=torch.get_num_threads())
    result_file.write(arguments.output, "logits_dtype.cpu", file | {"logits_dtype": measure()})
    return 0


if __name__ == "__main__":
    sys.exit(main())

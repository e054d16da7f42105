"""What was asked of the kernels on a GPU, as shares of ceilings measured in the same run, and what the results file
says."""

from collections.abc import Callable
from typing import Any

from ..tables import quotient

Bar = tuple[str, str, float, float | None, bool]  # what, "<=" or ">=", the bar, measured, in percent
OURS, INPLACE, ENTROPY = "ppg_fast cuda", "ppg_fast cuda, in place", "ppg_fast cuda, with entropy"
VOCABULARIES = (32000, 128256, 151936, 262144)
PEERS = ("Liger GRPO (Triton)", "torch.compile", "TRL selective_log_softmax", "flash-attention cross-entropy")
HEADS = ("Liger chunked GRPO", "torch.compile", "TRL head")
READ = ("read (sum)", "read (dot)")


def _entry(file: dict[str, Any], names: tuple[str, ...], **case: Any) -> dict[str, Any] | None:
    """The fastest of the named ones in a case; one whose result was wrong does not count."""
    here = [
        e
        for e in file["benchmarks"]
        if e["param"] in names and case.items() <= e["params"].items() and e["params"]["device"] == "cuda"
    ]
    right = [e for e in here if e["extra_info"].get("correct", True)]
    return min(right, key=lambda e: e["stats"]["median"], default=None)


def median(file: dict[str, Any], names: tuple[str, ...], **case: Any) -> float | None:
    entry = _entry(file, names, **case)
    return None if entry is None else entry["stats"]["median"]


def _beside(file: dict[str, Any], names: tuple[str, ...], figure: str, **case: Any) -> float | None:
    """What the clock found beside the median of the fastest: `gpu_clock`."""
    entry = _entry(file, names, **case)
    return None if entry is None else entry["extra_info"].get(figure)


def bars(file: dict[str, Any]) -> list[Bar]:
    """Every bar, measured or not."""
    found: list[Bar] = []
    for make in (_logits, _forward, _hidden, _counts):
        found += make(file)
    return found


def _logits(file: dict[str, Any]) -> list[Bar]:
    rows: list[Bar] = []
    moved = {line["V"]: line.get("over_least") for line in lines(file, "dram") if line.get("op") == "policy_loss"}
    for V in VOCABULARIES:
        case = {"op": "policy_loss", "N": 8192, "V": V, "dtype": "bfloat16", "active": 1.0}
        ours, at = median(file, (INPLACE,), **case), f"V {V:,}"
        rows.append((f"{at}: DRAM bytes of the fused kernel / (one read + one write)", "<=", 1.05, moved.get(V), False))
        least_of_copy = 0.85 if V == 262144 else 0.90
        copied = quotient(median(file, ("copy",), **case), ours)
        rows.append((f"{at}: share of the rate of a device copy", ">=", least_of_copy, copied, True))
        graphs = (_beside(file, (name,), "graph_seconds", **case) for name in ("copy", INPLACE))
        rows.append(
            (f"{at}: share of the rate of a device copy, as CUDA graphs", ">=", least_of_copy, quotient(*graphs), True)
        )
        host = quotient(_beside(file, (INPLACE,), "host_seconds", **case), ours)
        rows.append((f"{at}: host time of a call / the GPU's", "<=", 1.0, host, False))
        slowest = {name: quotient(median(file, (name,), **case), ours) for name in PEERS}
        least = min((r for r in slowest.values() if r is not None), default=None)
        name = next((n for n, r in slowest.items() if r == least and r is not None), "the others")
        rows.append((f"{at}: time of {name} / ours", ">=", 1.5, least, False))
        rows.append(
            (
                f"{at}: time of quack's cross-entropy / ours",
                ">=",
                1.0,
                quotient(median(file, ("quack cross-entropy",), **case), ours),
                False,
            )
        )
    return rows


def _forward(file: dict[str, Any]) -> list[Bar]:
    rows: list[Bar] = []
    for V in VOCABULARIES:
        case = {"op": "logprobs", "N": 8192, "V": V, "dtype": "bfloat16"}
        share = quotient(median(file, READ, **case), median(file, (ENTROPY,), **case))
        rows.append((f"V {V:,}: log-prob and entropy alone, share of the read rate", ">=", 0.90, share, True))
    return rows


def _hidden(file: dict[str, Any]) -> list[Bar]:
    case: dict[str, Any] = {"op": "linear", "N": 8192, "V": 128256, "D": 4096, "dtype": "bfloat16", "zero": 0.0}
    ours, bare = _entry(file, (OURS,), **case, active=1.0), median(file, ("three bare GEMMs",), **case, active=1.0)
    seconds = None if ours is None else ours["stats"]["median"]
    quarter = quotient(median(file, (OURS,), **case, active=0.25), seconds)
    peak = None if ours is None else ours["extra_info"].get("peak_extra_bytes")
    limit = None if ours is None else ours["extra_info"].get("chunk_bytes")
    allowed = None if limit is None else limit + case["V"] * case["D"] * 4 + case["N"] * case["D"] * 2
    peers = [r for name in HEADS if (r := quotient(median(file, (name,), **case, active=1.0), seconds)) is not None]
    return [
        (
            "from hidden states, V 128,256, D 4,096: share of three bare GEMMs",
            ">=",
            0.90,
            quotient(bare, seconds),
            True,
        ),
        (
            "its peak memory / (a chunk of logits + float32 d_weight + d_hidden)",
            "<=",
            1.0,
            quotient(peak, allowed),
            False,
        ),
        ("25% of the rows active: time / that of all", "<=", 0.30, quarter, False),
        ("fastest head of the others: time / ours", ">=", 1.5, min(peers, default=None), False),
    ]


def _counts(file: dict[str, Any]) -> list[Bar]:
    paths = {line["path"]: line for line in lines(file, "counts") if "launches" in line}
    names = {
        "rewards and logits to loss and dlogits": ("launches", 2), "hidden states to loss and gradients": ("syncs", 1),
        "hidden states to loss and gradients, rows bounded": ("syncs", 0),
    }  # fmt: skip
    value: Callable[[Any], float] = lambda found: float(len(found) if isinstance(found, list) else found)  # noqa: E731
    rows: list[Bar] = [
        (f"{path}: {what}", "<=", most, value(paths[path][what]) if path in paths else None, False)
        for path, (what, most) in names.items()
    ]
    first = "rewards and logits to loss and dlogits"
    return [*rows, (f"{first}: syncs", "<=", 0, float(paths[first]["syncs"]) if first in paths else None, False)]


def lines(file: dict[str, Any], part: str) -> list[dict[str, Any]]:
    return file["parts"].get(part, {}).get("results", [])


def met(bar: Bar) -> str:
    """ "met", "not met" or "not measured"."""
    _, relation, limit, measured, _ = bar
    if measured is None:
        return "not measured"
    return "met" if (measured <= limit if relation == "<=" else measured >= limit) else "**not met**"

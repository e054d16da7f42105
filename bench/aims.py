"""What we aimed for on a CPU, what was measured on each processor, and where it falls short or the rounds do not say:
ratios of medians of one run."""

from collections.abc import Callable
from typing import Any

from .bench_host_time import EAGER, PRODUCT
from .core_clock import undisturbed
from .intervals import Between, Drawn, interval, medians, over, verdict
from .tables import NOT_MEASURED, Results, of, table

# (provider, **what its case must have) -> median seconds, the fastest of several names; ``alone``: of the calls that
# had the cores to themselves
Time = Callable[..., Drawn | None]
OURS, INPLACE, KEEPING = "ppg_fast cpu", "ppg_fast cpu, in place", "ppg_fast cpu, skip_zero_advantages=False"
NORMS = "ppg_fast cpu, in place, score norms"
READ, GEMMS = ("read (sum)", "read (dot)"), "three bare GEMMs"
DTYPES = ("float32", "bfloat16")


def _times(file: dict[str, Any]) -> Time:
    def time(names: str | tuple[str, ...], alone: bool = False, **case: Any) -> Drawn | None:
        wanted = (names,) if isinstance(names, str) else names
        found = [e for e in file["benchmarks"] if e["param"] in wanted and case.items() <= e["params"].items()]
        if not found:
            return None
        fastest = min(found, key=lambda e: e["stats"]["median"])
        return medians(fastest, _alone(fastest, file) if alone else None)

    return time


def _alone(entry: dict[str, Any], file: dict[str, Any]) -> list[bool] | None:
    """Which of its calls had the cores to themselves; None: not known."""
    case = [e["extra_info"].get("core_gflops", ()) for e in file["benchmarks"] if e["group"] == entry["group"]]
    own = entry["extra_info"].get("core_gflops")
    return undisturbed(own, [speed for speeds in case for speed in speeds]) if own else None


Bar = float | tuple[float, float]  # the latter: with AVX-512, and with half its lanes
Measured = Drawn | Between | float  # times with their draws, peaks of memory, a number alone
Row = tuple[str, Bar, Measured | None]  # what, at most, measured


def _policy_loss(time: Time) -> list[Row]:
    rows: list[Row] = []
    for dtype, bar in zip(DTYPES, ((1.1, 1.15), (1.7, 2.0)), strict=True):
        one = {"dtype": dtype, "threads": 1, "alone": True}
        got = over(time(INPLACE, **one), time("memcpy", **one))
        rows.append((f"loss and gradient in place, {dtype}, 1 thread / memcpy", bar, got))
    for allocator, what, other, most in (
        ("tuned", "", "torch.compile", 0.2),
        ("default", ", default allocator", "eager PyTorch", 0.1),
    ):
        for dtype in DTYPES:
            two = {"dtype": dtype, "threads": 2, "allocator": allocator}
            got = over(time(INPLACE, **two), time(other, **two))
            rows.append((f"in place, {dtype}, 2 threads{what} / {other}", most, got))
    for case in ({"dtype": dtype, "threads": threads, "allocator": "tuned"} for dtype in DTYPES for threads in (1, 2)):
        what = f"in place with score norms, {case['dtype']}, threads: {case['threads']} / without"
        rows.append((what, 1.05, over(time(NORMS, alone=True, **case), time(INPLACE, alone=True, **case))))
    return rows


def _logprobs(time: Time) -> list[Row]:
    rows: list[Row] = []
    for dtype, bar in zip(DTYPES, (1.5, (1.5, 2.0)), strict=True):
        for threads in (1, 2):
            case = {"dtype": dtype, "threads": threads, "alone": True}
            what = f"log-probs, {dtype}, threads: {threads} / reading the logits once"
            rows.append((what, bar, over(time(OURS, **case), time(READ, **case))))
    return rows


def _linear(time: Time, file: dict[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for dtype, bar in zip(DTYPES, (1.08, 1.15), strict=True):
        at = {"N": 2048, "dtype": dtype}
        whole, half, tenth = ({**at, "active": share, "zero": 0.0} for share in (1.0, 0.5, 0.1))
        zero = {**at, "active": 1.0, "zero": 0.5}
        full, masked, kept = time(OURS, **whole), time(OURS, **half), time(KEEPING, **zero)
        skipped = over(time(OURS, **zero), masked)
        rows.append((f"from hidden states, {dtype} / three bare GEMMs", bar, over(full, time(GEMMS, **whole))))
        for name in sorted({e["param"] for e in file["benchmarks"] if e["param"].startswith(f"{GEMMS}, ")}):
            few = over(time(name, **whole), time(GEMMS, **whole))
            rows.append((f"{name}, {dtype} / at once", bar, few))
        rows += [
            (f"its peak of memory, {dtype} / the leanest other's", 1.0, _leanest(file, whole)),
            (f"10% of the rows active, {dtype} / all", 1 / 7, over(time(OURS, **tenth), full)),
            (f"half of the turns with zero advantage, skipped, {dtype} / masked", 1.0, skipped),
        ]
        if full is not None and masked is not None and kept is not None:  # both halves have as many rows
            what = f"a row of zero advantage that is not skipped, {dtype} / a full row"
            rows.append((what, 1 / 3, over(kept - masked, full - masked)))
    return rows


def _frozen(time: Time, file: dict[str, Any]) -> list[Row]:
    whole = {"dtype": "float32", "active": 1.0}
    bare = time("two bare GEMMs", **whole)
    kinds = {"one pass": OURS, "reduction none": f"{OURS}, reduction none", "log-probs": f"{OURS}, log-probs"}
    rows: list[Row] = [
        (f"frozen head, {kind} / two bare GEMMs", 1.1, over(time(name, **whole), bare)) for kind, name in kinds.items()
    ]
    here = [e for e in file["benchmarks"] if whole.items() <= e["params"].items()]
    peaks = {e["param"]: e["extra_info"].get("peak_extra_bytes") for e in here}
    once, saved = peaks.get(kinds["one pass"]), peaks.get(kinds["log-probs"])
    if once and saved:
        row = here[0]["params"]
        allowed = once + row["N"] * row["D"] * 4
        rows.append(("frozen head, peak of memory, log-probs / one pass and one (N, D) more", 1.0, saved / allowed))
    return rows


def _distillation(time: Time, file: dict[str, Any]) -> list[Row]:
    """Against every peer, PyTorch's own functions among them, where all rows count."""
    here = [e for e in file["benchmarks"] if e["params"]["active"] == 1 and e["params"]["V"] == 32000]
    peers = tuple({e["param"] for e in here if e["extra_info"]["kind"] == "peer"})
    rows: list[Row] = []
    for case in sorted({(e["params"]["dtype"], e["params"]["variant"]) for e in here}, reverse=True):
        at = {"V": 32000, "active": 1.0, "dtype": case[0], "variant": case[1]}
        what = f"distillation, {case[1]}, {case[0]}"
        rows.append((f"{what} / the fastest other", 1.0, over(time(OURS, **at), time(peers, **at))))
        rows.append((f"{what}, peak of memory / the leanest other's", 1.0, _leanest(file, at)))
    return rows


def _soft_q(time: Time) -> list[Row]:
    what = "soft Q-learning, {} / gspo"
    found = ((dtype, [time(OURS, dtype=dtype, variant=name) for name in ("soft Q", "gspo")]) for dtype in DTYPES)
    return [(what.format(dtype), 1.1, over(*both)) for dtype, both in found]


def _kept(time: Time) -> list[Row]:
    full = time("the full head, another loss", variant="k = 20", dtype="float32")
    return [("kept sets of 20 / the full head", 1 / 8, over(time(OURS, variant="k = 20", dtype="float32"), full))]


def _critic(time: Time) -> list[Row]:
    what, plain = "a step with {}, hidden states of {} / without", "ppg_fast, leave_one_out"
    ways = (("a critic", "ppg_fast, value and its critic"), ("auto", "ppg_fast, auto"))
    return [
        (what.format(words, D), 1.05, over(time(name, D=D), time(plain, D=D)))
        for words, name in ways
        for D in (128, 512)
    ]


def _training_step(time: Time, file: dict[str, Any]) -> list[Row]:
    what, at, names = "a whole step of 40,000 byte tokens", {"shape": "bytes", "N": 40_000}, ("ppg_fast", "TRL GRPO")
    return [
        (f"{what} / TRL's", 1.0, over(*(time(name, **at) for name in names))),
        (f"{what}, peak of memory / TRL's", 1.0, _leanest(file, at, names[0])),
    ]


def _leanest(file: dict[str, Any], case: dict[str, Any], own: str = OURS) -> Measured | None:
    infos = [(e["param"], e["extra_info"]) for e in file["benchmarks"] if case.items() <= e["params"].items()]
    infos = [(name, info) for name, info in infos if info.get("peak_extra_bytes")]
    ours = next((info for name, info in infos if name == own), None)
    peers = [info for _, info in infos if info["kind"] == "peer"]
    if ours is None or not peers:
        return None
    peer = min(peers, key=lambda info: info["peak_extra_bytes"])
    value = ours["peak_extra_bytes"] / peer["peak_extra_bytes"]
    above, below = (info.get("peaks_extra_bytes", ()) for info in (ours, peer))
    return Between(value, min(above) / max(below), max(above) / min(below)) if above and below else value


def _returns(time: Time) -> list[Row]:
    windows = ("greedy", "lookahead:3", "lookahead:100", "segment:10", "full")
    found = [seconds for w in windows if (seconds := time(OURS, N=1000, V=500, variant=w)) is not None]
    slowest = max(found, key=lambda seconds: seconds[0]) * 1e3 if found else None
    return [("returns of 1,000 dialogues of 500 turns, the slowest window, in ms", 5.0, slowest)]


def _host_time(time: Time) -> list[Row]:
    names = [f"ppg_fast{stub}{place}" for stub in ("", " cuda") for place in ("", ", in place")]
    names = [f"{name}, kernels stubbed" if "cuda" in name else name for name in names]
    eager = time(EAGER, variant="policy_loss")
    rows: list[Row] = [
        (f"host time of `policy_loss`, {name} / {EAGER}", 1.5, over(time(name, variant="policy_loss"), eager))
        for name in names
    ]
    case = {"variant": "partial_returns"}
    ours = time("ppg_fast", **case)
    return [*rows, ("host time of `partial_returns` / the product", 5.0, over(ours, time(PRODUCT, **case)))]


MAKERS = {
    "policy_loss": _policy_loss,
    "logprobs": _logprobs,
    "partial_returns": _returns,
    "critic": _critic,
    "host_time": _host_time,
    "soft_q": _soft_q,
    "linear_kept": _kept,
}
WITH_PEAKS = {
    "linear": _linear,
    "linear_frozen": _frozen,
    "distillation": _distillation,
    "training_step": _training_step,
}


def aims_section(results: Results) -> str:
    """Each aim with its bar, and a column for each processor that a result file is of."""
    cells: dict[tuple[str, Bar], dict[str, str]] = {}
    for op in (*MAKERS, *WITH_PEAKS):
        for where, file in of(results, op, ("cpu",)):
            time, half = _times(file), file["machine_info"].get("ppg_fast_isa") == "avx2"
            for what, bar, got in MAKERS[op](time) if op in MAKERS else WITH_PEAKS[op](time, file):
                if got is not None:
                    asked = bar[half] if isinstance(bar, tuple) else bar
                    cells.setdefault((what, bar), {})[where] = _cell(got, asked)
    columns = sorted({where for row in cells.values() for where in row})
    lines = [(what, _asked(bar), *(row.get(c, "") for c in columns)) for (what, bar), row in cells.items()]
    return table(("", "at most", *columns), lines) if lines else NOT_MEASURED


def _asked(bar: Bar) -> str:
    return "{:.2f}, AVX2 {:.2f}".format(*bar) if isinstance(bar, tuple) else f"{bar:.2f}"


def _cell(got: Measured, bar: float) -> str:
    """What was measured, between what the rounds leave it, and whether the aim is met."""
    if isinstance(got, (int, float)):
        return f"{got:.2f}, " + ("yes" if got <= bar else "**no**")
    between, met = interval(got), verdict(got, bar)
    left = "no interval" if between is None else f"{between[0]:.2f} to {between[1]:.2f}"
    return f"{got[0]:.2f} ({left}), " + ("undecided" if met is None else "yes" if met else "**no**")

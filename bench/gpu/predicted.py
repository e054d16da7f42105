"""What the model expects beside what was measured, as tables for the documents."""

from typing import Any

from ..tables import NOT_MEASURED, Results, quotient, table
from .bars import ENTROPY, INPLACE, OURS, READ, VOCABULARIES, lines, median
from .predict import NAME
from .sections import merged

Row = dict[str, Any]
AIMS = {"policy_loss": {32000: 0.90}, "logprobs": {}, "head": {}}
BEYOND = {"policy_loss": 0.93, "logprobs": 0.92, "head": 0.94}
ARE_CALLED = {"policy_loss": "loss and gradient, share of a copy", "logprobs": "log-probs and entropy, share of a read"}
LOOK_AT = {
    "issue": "`smsp__issue_active.avg.pct_of_peak_sustained_active`, `smsp__inst_executed_pipe_xu`",
    "evenness": "`dram__throughput.avg.pct_of_peak_sustained_elapsed` beside that of the copy",
    "clock": "`smsp__cycles_elapsed.avg.per_second`, and the power limit",
    "copy": "the copy of the same run",
    "exchange": "`smsp__average_warps_issue_stalled_*_per_issue_active`, by source line",
    "latency": "waits of the consumers for `full`, by source line",
    "few": "the plans with 256 threads beside those with 512",
    "gap": "the op beside the sum of its kernels",
    "start": "a call of 132 rows",
    "end": "the op with and without its sum of losses",
}


def prediction_section(results: Results) -> str:
    """Everything that the model says; what was measured stands beside it where the GPU is one that the model knows."""
    file = results.get(NAME)
    if file is None:
        return NOT_MEASURED
    measured = _Measured(results)
    makers = {
        "Aims": _aims, "All calls": _calls, "Ways to spread a row": _plans, "Head": _heads, "Triton": _triton,
        "What each change brings": _changes, "What moves the prediction most": _sensitivity,
        "What it is made of": _inputs,
    }  # fmt: skip
    return "\n".join(f"**{name}**\n\n{make(file, measured)}" for name, make in makers.items())


class _Measured:
    """Shares of the newest GPU run, and the name that the model has for its GPU."""

    def __init__(self, results: Results) -> None:
        self.file = merged(results)
        runs = [f for name, f in results.items() if name.startswith("gpu") and name.endswith(".cuda")]
        newest = max(runs, key=lambda f: f["datetime"], default={"machine_info": {}})
        self.gpu: str = newest["machine_info"].get("gpu", {}).get("name", "")

    def call(self, row: Row) -> float | None:
        if self.file is None or row["device"] not in self.gpu:
            return None
        case = {"op": row["op"], "N": 8192, "V": row["V"], "dtype": row["dtype"], "active": row["active"]}
        limits, ours = {"policy_loss": (("copy",), (INPLACE,)), "logprobs": (READ, (ENTROPY,))}[row["op"]]
        return quotient(median(self.file, limits, **case), median(self.file, ours, **case))

    def head(self, row: Row) -> float | None:
        if self.file is None or row["device"] not in self.gpu:
            return None
        case = {"op": "linear", "N": 8192, "V": 128256, "D": 4096, "zero": 0.0, "active": row["active"]}
        return quotient(median(self.file, ("three bare GEMMs",), **case), median(self.file, (OURS,), **case))

    def plan(self, row: Row) -> float | None:
        for line in lines(self.file, "plans") if self.file and row["device"] in self.gpu else ():
            same = all(line["plan"][key] == row["plan"][key] for key in ("cluster", "threads"))
            if same and (line["V"], line["full"]) == (row["V"], 100) and line["launched"]:
                return line["share_of_copy"]
        return None


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.0%}"


def _tenth(share: float) -> str:
    return f"{share:.1%}"


def _device(measured: _Measured, file: Row) -> str:
    """The one whose table has room for measured shares."""
    return next((d["name"] for d in file["devices"] if d["name"] in measured.gpu), "H200")


def _aims(file: Row, measured: _Measured) -> str:
    device, rows = _device(measured, file), []

    def add(what: str, aim: float, row: Row, found: float | None) -> None:
        verdict = "yes" if row["share"] >= aim else "**no**"
        rows.append((what, f"{aim:.0%}", _tenth(row["share"]), verdict, _percent(found), row.get("bound", "products")))

    for op, called in ARE_CALLED.items():
        for row in file["calls"]:
            if (row["device"], row["op"], row["dtype"], row["active"]) == (device, op, "bfloat16", 1.0):
                aim = AIMS[op].get(row["V"], BEYOND[op])
                add(f"{called}, V {row['V']:,}", aim, row, measured.call(row))
    for row in file["heads"]:
        if (row["device"], row["active"], row["built"]) == (device, 1.0, True):
            add("from hidden states, share of three GEMMs", BEYOND["head"], row, measured.head(row))
    return table((f"{device}, bfloat16, all rows", "aim", "predicted", "met", "measured", "bound by"), rows)


def _by_vocabulary(file_rows: list[Row], key: Any, heading: str, measured: _Measured) -> str:
    found: dict[str, dict[int, Row]] = {}
    for row in file_rows:
        found.setdefault(key(row), {})[row["V"]] = row
    cells = [
        (name, *(f"{by[V]['share']:.0%}, {by[V]['bound']}" if V in by else "" for V in VOCABULARIES))
        for name, by in found.items()
    ]
    return table((heading, *(f"V {V:,}" for V in VOCABULARIES)), cells)


def _calls(file: Row, measured: _Measured) -> str:
    def key(row: Row) -> str:
        rows = "" if row["active"] == 1 else f", {row['active']:.0%} of the rows"
        return f"{row['device']}: {ARE_CALLED[row['op']].split(',')[0]}, {row['dtype']}{rows}"

    return _by_vocabulary(file["calls"], key, "predicted share of a copy, or of a read", measured)


def _plans(file: Row, measured: _Measured) -> str:
    rows = [
        (_named(row["plan"]), f"{row['V']:,}", _tenth(row["share"]), _percent(measured.plan(row)), row["bound"])
        for row in file["plans"]
    ]
    return table(("H200, bfloat16, all rows", "V", "predicted", "measured", "bound by"), rows)


def _named(plan: Row) -> str:
    if not plan["cluster"]:
        return f"two passes, {plan['per_sm']} an SM"
    return f"cluster {plan['cluster']}, {plan['threads']} threads, {plan['slots']} slots, {plan['per_sm']} an SM"


def _heads(file: Row, measured: _Measured) -> str:
    rows = [
        (f"{row['device']}, {row['active']:.0%} of the rows; afterwards: {row['after']}" + " (as built)" * row["built"],
         f"{row['gemms_ms']} ms", f"{row['sweep_ms']} ms", f"{row['ms']} ms", _tenth(row["share"]),
         _percent(measured.head(row)) if row["built"] else "")
        for row in file["heads"]
    ]  # fmt: skip
    heads = ("N 8,192, V 128,256, D 4,096, bfloat16", "three GEMMs", "sweep", "all", "predicted", "measured")
    return table(heads, rows)


def _triton(file: Row, measured: _Measured) -> str:
    return _by_vocabulary(
        file["triton"], lambda row: f"{row['device']}: {row['way']}", "predicted share of a copy, bfloat16", measured
    )


def _changes(file: Row, measured: _Measured) -> str:
    found: dict[str, dict[int, Row]] = {}
    for row in file["changes"]:
        found.setdefault(row["change"], {})[row["V"]] = row
    cells = [
        (name, *(f"{by[V]['policy_loss']:.1%} / {by[V]['logprobs']:.1%}" if V in by else "" for V in VOCABULARIES))
        for name, by in found.items()
    ]
    return table(("H200: loss and gradient / log-probs and entropy", *(f"V {V:,}" for V in VOCABULARIES)), cells)


def _sensitivity(file: Row, measured: _Measured) -> str:
    """One line an unknown, the widest first."""
    found: dict[str, list[Row]] = {}
    for row in file["sensitivity"]:
        found.setdefault(row["unknown"], []).append(row)
    columns = [(op, V) for op in ("policy_loss", "logprobs") for V in (32000, 128256)]
    cells = []
    for name, rows in found.items():
        ranges = [[row[op] for row in rows if row["V"] == V] for op, V in columns]
        values = dict.fromkeys(row["value"] for row in rows)
        shown = [f"{low:.0%} to {high:.0%}" for low, high in ranges]
        cells.append((sum(abs(high - low) for low, high in ranges), name, " to ".join(values), *shown, LOOK_AT[name]))
    cells.sort(key=lambda cell: -cell[0])
    heads = ("H200", "from, to", "loss 32,000", "loss 128,256", "log-probs 32,000", "log-probs 128,256", "look at")
    return table(heads, [cell[1:] for cell in cells])


def _inputs(file: Row, measured: _Measured) -> str:
    rows = [
        (d["name"], str(d["sms"]), f"{d['clock'] / 1e9:.2f} GHz", f"{d['copy'] / 1e12:.1f} TB/s",
         f"{d['gemm'] / 1e12:,.0f} TFLOP/s", d["source"])
        for d in file["devices"]
    ]  # fmt: skip
    devices = table(("", "SMs", "clock", "a copy's rate", "GEMMs", "from"), rows)
    counts = [
        (f"`{name}`", arch, f"{c['first']:.2f}", f"{c['second']:.2f}", f"{c['row']}", f"{c['forward']}")
        for arch, kernels in file["counts"].items()
        for name, c in kernels.items()
        if ", 2, " not in name  # score norms
    ]
    heads = ("issue slots", "", "an element, first sweep", "second", "of a warp, rest of a row", "without gradient")
    unknowns = ", ".join(f"{name} {value:g}" for name, value in file["unknowns"].items())
    return f"{devices}\n{table(heads, counts)}\nAssumed (`bench/gpu/model.py` says what each is): {unknowns}.\n"

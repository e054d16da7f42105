"""One launch of the emulated policy loss and its check against the reference in float64.

`python -m emulator.cases LIBRARY FAULTS` (with tests/helpers/ on the path) runs the PROBES without a fault and with
each of those planted in the library, which it must fail: a fork and a JSON line each, exit status and words.
"""

import itertools
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path

import torch
from emulator.build import Control, install
from forks import fork
from torch import Tensor

import ppg_fast as ppg
from ppg_fast import reference
from ppg_fast.contract import PerRow
from ppg_fast.spec import PolicyLossSpec

GUARD = 7.75  # what lies between the rows and must still be there afterwards
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
CHUNK = 16384  # bytes, as in csrc/cuda/plan.h


@dataclass(frozen=True)
class Case:
    """Six rows (B = 2, L = 3): row 1 is masked and holds NaN, row 3 has no advantage, the others are FULL."""

    V: int
    dtype: torch.dtype = torch.bfloat16
    spec: PolicyLossSpec = field(default_factory=PolicyLossSpec)
    shift: int = 0  # elements from a 16-byte boundary to the first row
    gap: int = 0  # elements between two rows
    out: int | None = None  # the same shift for dlogits; None: in place
    on_policy: bool = False
    row_temperatures: bool = False
    entropy: bool = True
    score_norm: bool = False
    holes: bool = False  # -inf logits
    likelihood: bool = False  # weights of -l beside the reduction, which make row 3 FULL
    rows: tuple[int, ...] = (0, 1, 2, 3, 4, 5)  # which of the six; data belong to the row, not to its place

    @property
    def shape(self) -> tuple[int, int]:
        return (2, 3) if len(self.rows) == 6 else (1, len(self.rows))


@dataclass
class Result:
    loss: Tensor
    logprob: Tensor
    entropy: Tensor
    dlogits: Tensor
    score_norm: Tensor | None = None

    def bits(self) -> list[Tensor]:
        return [t.contiguous().view(torch.uint8) for t in (self.loss, self.logprob, self.entropy, self.dlogits)]

    def same_bits(self, other: "Result") -> bool:
        return all(torch.equal(a, b) for a, b in zip(self.bits(), other.bits(), strict=True))


def strided(case: Case, shift: int) -> tuple[Tensor, Tensor]:
    """A (B, L, V) view with the case's alignment, gaps and a batch stride of its own, and the memory it lies in."""
    B, L = case.shape
    stride = case.V + case.gap
    batch = L * stride + 2 * case.gap
    vector = 16 // case.dtype.itemsize
    memory = torch.full(((B - 1) * batch + L * stride + shift + 2 * vector,), GUARD, dtype=case.dtype)
    start = -memory.data_ptr() // case.dtype.itemsize % vector + shift
    return memory.as_strided((B, L, case.V), (batch, stride, 1), start), memory


def shortest_ring(case: Case, cluster: int) -> int:
    """The slots that one row needs in the worst alignment."""
    vector = 16 // case.dtype.itemsize
    part = ceil(ceil(case.V / cluster) / vector) * vector
    return ceil((part + vector - 1) * case.dtype.itemsize / CHUNK)


def columns(case: Case) -> dict[str, Tensor]:
    """Everything of a row but its logits' memory, drawn from the row's number and V alone."""
    rows = []
    for row in case.rows:
        draw = torch.Generator().manual_seed(7919 * row + case.V)
        logits = torch.randn(case.V, generator=draw) * 4
        if case.holes:
            logits[torch.rand(case.V, generator=draw) < 0.3] = -torch.inf
        label = int(torch.randint(case.V, (1,), generator=draw))
        logits[label] = logits.max() if row % 2 else 1.25  # likely, so that its probability can move by a bound
        u = torch.rand(6, generator=draw)
        advantage = 0.0 if row == 3 else float(u[0] * 3 - 1.5)
        rows.append((logits, -100 if row == 1 else label, advantage, *u[1:].tolist()))
    logits, labels, *floats = zip(*rows, strict=True)
    names = ("advantages", "weights", "old", "ref", "temperatures", "nll")
    columns = {name: torch.tensor(values) for name, values in zip(names, floats, strict=True)}
    columns["weights"] += 0.5
    columns["temperatures"] = 0.7 + 0.6 * columns["temperatures"]
    return {"logits": torch.stack(logits).to(case.dtype), "labels": torch.tensor(labels), **columns}


def run(ops, case: Case) -> Result:
    """Launch, and check all there is to check; AssertionError where the launch is wrong, RuntimeError where the
    emulator refuses it."""
    c, spec, N = columns(case), case.spec, len(case.rows)
    x, memory = strided(case, case.shift)
    x.copy_(c["logits"].view(x.shape))
    truth_in = c["logits"].double().requires_grad_()
    for i, row in enumerate(case.rows):
        if row == 1:
            x[divmod(i, case.shape[1])] = torch.nan
    dlogits, out_memory = (x, memory) if case.out is None else strided(case, case.out)
    before = memory.clone()
    temperatures = c["temperatures"] if case.row_temperatures else None
    truth_spec = replace(spec, temperature=temperatures.double()) if temperatures is not None else spec
    with torch.no_grad():
        logprob, _ = reference.token_logprobs(truth_in, c["labels"], truth_spec.temperature, spec.logit_softcap)
    # log-ratios away from the clip's kinks, on both sides of them
    side = torch.tensor([0.5, -0.1])[torch.tensor(case.rows) % 2]
    old = None if case.on_policy else (logprob + side * (1 + c["old"])).float()
    ref = (logprob + 0.3 - c["ref"]).float() if spec.kl_coef else None
    rollout = old + 0.4 * c["ref"] - 0.2 if spec.reads_rollout and old is not None else None
    nll = c["nll"] * (torch.tensor(case.rows) != 2) if case.likelihood else None
    given = (old, ref, rollout)
    truth = reference.policy_loss(
        truth_in, c["labels"], c["advantages"], c["weights"], *given, truth_spec, nll_weights=nll
    )
    (gradient,) = torch.autograd.grad(truth[0].sum(), truth_in)
    rows = PerRow(c["advantages"], c["weights"], *given, temperatures, nll)
    live = (c["labels"] >= 0) & (rows.live | spec.needs_every_row)
    gradient = torch.where(live[:, None], gradient, 0.0)

    got = [torch.full((N,), torch.nan) for _ in range(3)]
    entropy = case.entropy or spec.entropy_coef != 0 or case.score_norm
    norm = torch.full((N,), torch.nan) if case.score_norm else None
    outputs = got[0], got[1], got[2] if entropy else None, dlogits, norm
    ops.policy_loss(x, c["labels"], list(rows), spec.numbers, spec.choices, *outputs)
    result = Result(*got, dlogits.reshape(N, case.V).clone(), norm)
    if norm is not None:
        norms = reference.score_norms(truth_in, c["labels"], truth_spec.temperature, spec.logit_softcap)
        assert ((norm - norms).abs() <= 2e-6).all(), f"score norm {norm.tolist()}, expected {norms.tolist()}"
    for name, actual, want in zip(("loss", "logprob", "entropy"), got[: 3 if entropy else 2], truth, strict=False):
        error = (actual.double() - want).abs()
        assert (error <= 5e-6 * (1 + want.abs())).all(), f"{name} {actual.tolist()}, expected {want.tolist()}"
    error = (result.dlogits.double() - gradient).abs()
    allowed = (
        1.02 * ROUNDING[case.dtype] * gradient.abs() + 2.0**-24 + 5e-6 * (1 + gradient.abs().amax(1, keepdim=True))
    )
    assert (error <= allowed).all(), f"dlogits {error.max():.3e} off in row {error.amax(1).argmax()}"
    dead = result.dlogits[~live].contiguous().view(torch.uint8)
    assert not dead.any(), "a row without a gradient is not exactly zero"
    assert (outside(case, out_memory, dlogits) == GUARD).all(), "written between the rows"
    if case.out is not None:
        assert torch.equal(memory.view(torch.uint8), before.view(torch.uint8)), "the logits were written"
    return result


def outside(case: Case, memory: Tensor, rows: Tensor) -> Tensor:
    """The elements of ``memory`` that belong to no row."""
    free = torch.ones(memory.numel(), dtype=torch.bool)
    free.as_strided(rows.shape, rows.stride(), rows.storage_offset()).fill_(False)
    return memory[free]


# What a planted fault must not survive: every cluster, aligned and not, shortest rings, late delivery.
PROBES = [
    (Case(V, dtype, shift=shift, out=out, score_norm=seed == 2), cluster, seed, mode)
    for (V, dtype, shift, out, cluster), seed, mode in itertools.product(
        (
            (20011, torch.bfloat16, 0, None, 1),
            (12289, torch.bfloat16, 3, 3, 1),
            (9001, torch.float32, 1, None, 2),
            (4099, torch.bfloat16, 5, 5, 4),
        ),
        (1, 2),
        (1, 2),
    )
] + [  # rows of which most have no gradient, in clusters that are not in step
    (Case(4099, score_norm=seed == 2, rows=(3, 3, 3, 0, 3, 3, 3, 3, 5, 3)), cluster, seed, mode)
    for cluster, seed, mode in itertools.product((2, 4), (1, 2), (1, 2))
]


def fused_case(seed: int) -> tuple[list[Tensor], dict]:
    """50 tokens of three dialogues, packed: `partial_policy_loss` arguments before the policy class, and options.

    Under odd seeds a run of tokens is masked, over which a producer can run ahead.
    """
    draw = torch.Generator().manual_seed(seed)
    N, V, T = 50, 300, 6
    logits, labels = torch.randn(N, V, generator=draw) * 3, torch.randint(V, (N,), generator=draw)
    counts = torch.tensor([6, 3, 5])
    bounds = torch.tensor([0, 21, 22, 50], dtype=torch.int32)
    turns = torch.rand(N, generator=draw) * (torch.repeat_interleave(counts, bounds.diff()) + 1)
    mask = torch.rand(N, generator=draw) < 0.8
    mask[2 : 40 if seed % 2 else 0] = False
    options = {
        "loss_mask": mask, "cu_seqlens": bounds, "turn_counts": counts, "gamma": 0.9,
        "baseline": "leave_one_out", "group_ids": torch.tensor([4, 4, 4]), "reduction": "sequence_mean",
        "old_logprobs": torch.randn(N, generator=draw) - 9, "spec": PolicyLossSpec("cispo", clip_high=0.3),
    }  # fmt: skip
    return [logits, labels, torch.randn(3, T, generator=draw), turns.long() - 1], options


def run_fused(
    seed: int,
    backend: str = "cuda",
    policy_class: str = "lookahead:2",
    forward_ended: Callable[[], object] = lambda: None,
    **changed: object,
) -> tuple[Tensor, ...]:
    """Loss, log-probs, entropy and gradient of `fused_case`, whose scaling is a launch of the backward pass."""
    arguments, options = fused_case(seed)
    x = arguments[0].requires_grad_()
    out = ppg.partial_policy_loss(*arguments, policy_class, **(options | changed), backend=backend)
    forward_ended()
    (gradient,) = torch.autograd.grad(out.loss.sum(), x)
    return out.loss.detach(), out.logprobs, out.entropy, gradient


def probe(library: str, fault: int) -> None:
    install(library)
    control = Control(library)
    control.plant(fault)
    for case, cluster, seed, mode in PROBES:
        control.set(
            resident=1,
            cluster=cluster,
            threads=256,
            slots=shortest_ring(case, cluster) + seed - 1,
            seed=seed,
            mode=mode,
        )
        run(torch.ops.ppg_fast_emulated, case)
    torch.use_deterministic_algorithms(True)  # fresh memory is poisoned: what is read too early shows
    for cluster, seed, mode in itertools.product((1, 2), (1, 2, 3), (1, 2)):  # three batches of rows
        control.set(resident=seed, cluster=cluster, threads=256, slots=2, seed=seed, mode=mode)
        for got, want in zip(run_fused(seed), run_fused(seed, "reference"), strict=True):
            assert torch.allclose(got, want, rtol=1e-5, atol=1e-6), "fused"


def each(library: str, faults: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for fault in range(faults + 1):
            log = Path(folder, "log")
            _, status = os.waitpid(fork(lambda fault=fault: probe(library, fault), {}, log), 0)
            print(json.dumps({"status": os.waitstatus_to_exitcode(status), "said": log.read_text()}), flush=True)


if __name__ == "__main__":
    each(sys.argv[1], int(sys.argv[2]))

"""The two launches of a fused policy loss in Triton's interpreter, argument by argument as the contract words them,
against `oracle`."""

import itertools
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from cases import LOSSES, TERMS
from contract_case import close

pytest.importorskip("triton")

from triton.runtime.interpreter import GridExecutor

from ppg_fast import backends
from ppg_fast.contract import Columns, Reduction, Turns
from ppg_fast.spec import BASELINES, REDUCTIONS, PolicyLossSpec

# (B, L) and the bounds of packed sequences: dialogues; an empty run and one of a token; more dialogues than a program
# takes
LAYOUTS = {"padded": (3, 9, None), "packed": (1, 26, (0, 7, 7, 8, 26)), "many": (33, 1, None)}
MASKS = (
    None,
    torch.bool,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)
CLASSES = ("greedy", ("lookahead", 2), "full", ("segment", 2), ("segment", "ids"), ("mask", None))
T = 5
LAUNCHED: list[str] = []  # kernels, in the interpreter
GRID = list(itertools.product(REDUCTIONS, BASELINES))


@pytest.fixture
def triton(request, monkeypatch):
    if reason := backends.why_not("triton"):
        pytest.skip(reason)
    request.getfixturevalue("interpreted_triton")
    if not torch.cuda.is_available():
        monkeypatch.setattr(GridExecutor, "__call__", recorded_launch)
    return backends.load("triton")


def recorded_launch(executor, *args, launch=GridExecutor.__call__, **kwargs):
    LAUNCHED.append(executor.fn.__name__)
    launch(executor, *args, **kwargs)


def strewn(values, dtype=torch.float32):
    """(B, L) values with strides that no dense tensor has."""
    t = torch.as_tensor(values)
    B, L = t.shape
    frame = torch.empty(B + 1, 2, L + 2, dtype=dtype)
    frame[1:, 1, 2:] = t.to(dtype)
    return frame[1:, 1, 2:]


class Drawn:
    """A call, and the same as a batch of the oracle. Masked rows hold NaN, or labels that are out of range."""

    def __init__(
        self,
        i,
        layout,
        spec,
        reduction="token_mean",
        baseline="none",
        policy_class=None,
        mask=None,
        skip=False,
        V=67,
        given=None,
    ):
        rng = np.random.default_rng(i)
        B, L, cu = LAYOUTS[layout]
        self.N, self.shape, self.skip, self.spec = B * L, (B, L), skip, spec
        sequence = oracle.sequences((self.N,) if cu else (B, L), cu)
        S = len(cu) - 1 if cu else B
        labels, label_on, mask_on = rng.integers(V, size=self.N), rng.random(self.N) < 0.85, rng.random(self.N) < 0.85
        self.logits = torch.tensor(2 * rng.normal(size=(B, L, V)), dtype=torch.float32)
        turn = rng.integers(-1, T, self.N)
        counts = rng.integers(1, T + 1, S) if i % 2 else None
        if counts is not None:
            turn = np.minimum(turn, counts[sequence] - 1)
        active = label_on & (mask_on | (mask is None)) & (turn >= 0 if policy_class else True)
        if layout == "packed":
            active[0:7] = False  # a sequence without a token
        label_on = label_on & ~((labels >= 0) & ~active & (mask is None) & (turn >= 0 if policy_class else True))
        label_on[:7] &= layout != "packed"
        self.turns, advantages = self.draw_turns(rng, S, counts, policy_class, baseline, sequence, turn)
        rows = self.logits.reshape(self.N, V).double().numpy()
        column = {name: rng.normal(size=self.N) for name in ("old", "ref", "rollout")}
        temperature = rng.uniform(0.6, 1.4, self.N).astype(np.float32) if i % 3 == 0 else spec.temperature
        logprobs = oracle.token_logprobs(rows, labels, active, temperature, spec.logit_softcap)[0]
        shift = rng.choice([-0.5, -0.05, 0.05, 0.5], (3, self.N))
        column = {n: (logprobs - s).astype(np.float32).astype(np.float64) for n, s in zip(column, shift, strict=True)}
        column["rollout"] = (column["old"] - shift[2]).astype(np.float32).astype(np.float64)
        self.batch = oracle.Batch(
            labels,
            advantages,
            active,
            sequence,
            turn,
            *column.values(),
            replace(spec, temperature=temperature),
            reduction,
            given,
        )
        self.truth = oracle.policy_loss(rows, self.batch)
        self.skipped = ~active | ((advantages == 0) & skip & (not spec.needs_every_row))
        poison = np.where(active, 1.0, np.nan)
        self.logits[torch.tensor(self.skipped).view(B, L)] = torch.nan
        place = lambda values, dtype=torch.float32: strewn(values.reshape(B, L), dtype)  # noqa: E731
        self.columns = Columns(
            place(np.where(label_on, labels, oracle.IGNORE), torch.int64),
            None
            if mask is None
            else place(np.where(mask_on, (0.25, np.nan)[i % 2], -0.0) if mask.is_floating_point else mask_on, mask),
            place(turn, (torch.int32, torch.int64)[i % 2]) if policy_class else None,
            None if policy_class else place(np.where(active, advantages, np.nan)),
            *(place(c * poison) for c in column.values()),
            place(temperature * poison) if isinstance(temperature, np.ndarray) else None,
        )
        normalizer = torch.tensor(given) if given and i % 2 else given
        bounds = None if cu is None else torch.tensor(cu, dtype=(torch.int32, torch.int64)[i % 2])
        self.reduction = Reduction(reduction, normalizer, S, bounds)

    def draw_turns(self, rng, S, counts, policy_class, baseline, sequence, turn):
        if policy_class is None:
            return None, (rng.normal(size=self.N) * (rng.random(self.N) < 0.7)).astype(np.float32).astype(np.float64)
        kind, number = policy_class if isinstance(policy_class, tuple) else (policy_class, None)
        rewards = rng.integers(-1, 3, (S, T)).astype(np.float64)
        ids = np.sort(rng.integers(-2, 2, (S, T)), 1)
        reward_mask = rng.random((T, T)) < 0.5
        groups = rng.integers(0, max(S // 3, 1), S) - 7
        policy_class = {"ids": ("segment", ids), None: (kind, reward_mask) if kind == "mask" else kind}.get(
            number, policy_class
        )
        returns = oracle.partial_returns(rewards, policy_class, 0.9, counts)
        advantages = oracle.turn_advantages(returns.astype(np.float32), groups, baseline, counts)
        if counts is not None:
            rewards[np.arange(T) >= counts[:, None]] = np.nan
        turns = Turns(
            torch.tensor(rewards, dtype=torch.float32),
            None if counts is None else torch.tensor(counts, dtype=torch.int32),
            torch.tensor(ids) if number == "ids" else None,
            torch.tensor(reward_mask) if kind == "mask" else None,
            None if baseline == "none" else torch.tensor(groups),
            {"greedy": 1, "lookahead": number}.get(kind, 2**31 - 1),
            number if kind == "segment" and number != "ids" else 0,
            0.9,
            baseline,
        )
        return turns, np.where(turn >= 0, advantages[sequence, turn.clip(0)], 0.0)

    def run(self, module, inplace=False, **more):
        logits = self.logits.clone()
        dlogits = logits if inplace else torch.empty_like(logits)
        arguments = {
            "logits": logits,
            "columns": self.columns,
            "turns": self.turns,
            "reduction": self.reduction,
            "spec": self.spec,
        }
        LAUNCHED.clear()
        out = module.fused_policy_loss(
            **{**arguments, "skip_zero_advantages": self.skip, "entropy": True, "dlogits": dlogits, **more}
        )
        assert LAUNCHED == ["credit_kernel", "policy_loss_kernel"] or torch.cuda.is_available()
        return (*out, dlogits)

    def check(self, out):
        loss, logprobs, entropy, dlogits = self.truth
        read = ~self.skipped
        each = self.reduction.kind == "none"
        terms = np.abs(oracle.policy_loss(np.zeros((self.N, 2)), replace(self.batch, labels=self.batch.labels * 0))[0])
        close(out[0], np.reshape(loss, self.shape if each else ()), "loss", scale=np.abs(terms).max() + 4)
        close(out[1], (logprobs * read).reshape(self.shape), "logprob", scale=4.0)
        close(out[2], (entropy * read).reshape(self.shape), "entropy", scale=4.0)
        close(out[3].reshape(dlogits.shape), dlogits * read[:, None], "dlogits", 4e-5)
        still = torch.tensor(self.skipped | ((self.batch.advantages == 0) & (not self.spec.needs_every_row)))
        assert not out[3].reshape(self.N, -1)[still].any()


# of the oracle, whose log ratios have no bound
KNOWN_TERMS = [numbers for numbers in TERMS.values() if "max_log_ratio" not in numbers]


@pytest.mark.parametrize(
    ("reduction", "baseline", "layout"),
    [(*of, ("padded", "packed")[i % 2]) for i, of in enumerate(GRID)]
    + [(r, b, "many") for r, b in zip(REDUCTIONS, BASELINES * 2, strict=False)],
)
def test_from_rewards(triton, reduction, baseline, layout):
    i = GRID.index((reduction, baseline)) + 7 * list(LAYOUTS).index(layout)
    spec = replace(LOSSES[list(LOSSES)[i % len(LOSSES)]], **KNOWN_TERMS[i % len(KNOWN_TERMS)])
    case = Drawn(
        i,
        layout,
        spec,
        reduction,
        baseline,
        CLASSES[i % len(CLASSES)],
        MASKS[i % len(MASKS)],
        i % 5 < 2,
        given=None if i % 4 else 5.5,
    )
    case.check(case.run(triton, inplace=i % 2 == 0))


@pytest.mark.parametrize(("mask", "policy_class"), list(zip(MASKS, CLASSES * 2, strict=False)), ids=str)
def test_every_mask_and_window(triton, mask, policy_class):
    case = Drawn(MASKS.index(mask), "packed", LOSSES["ppo"], "sequence_mean", "leave_one_out", policy_class, mask, V=19)
    case.check(case.run(triton))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_from_advantages(triton, layout, reduction, skip):
    i = REDUCTIONS.index(reduction) * 2 + skip
    case = Drawn(i, layout, LOSSES["cispo"], reduction, mask=torch.bool if skip else None, skip=skip)
    case.check(case.run(triton, inplace=skip))


def test_equal_returns_leave_no_advantage(triton):
    """0.1 is no float32: a baseline that were not exact would leave some of it."""
    for baseline in BASELINES[1:]:
        case = Drawn(3, "many", LOSSES["ppo"], "sum", baseline, "full")
        rewards = torch.full((33, T), 0.1)
        turns = case.turns._replace(
            rewards=rewards, group_ids=torch.arange(33, dtype=torch.int32) % 2, turn_counts=None
        )
        _, _, _, dlogits = case.run(
            triton, turns=turns, columns=case.columns._replace(turn_ids=torch.zeros(33, 1, dtype=torch.int64))
        )
        assert not dlogits.any(), baseline


def test_the_bits_of_logprobs_fwd(triton):
    case = Drawn(1, "padded", LOSSES["ppo"], V=1003)
    _, logprob, entropy, _ = case.run(triton)
    labels = torch.where(torch.tensor(case.batch.active), torch.tensor(case.batch.labels), -100)
    expected, entropies, _ = triton.logprobs_fwd(case.logits, labels, None, case.spec.temperature, 0.0, True)
    assert torch.equal(logprob.flatten(), expected)
    assert torch.equal(entropy.flatten(), entropies)


def test_the_sum_does_not_depend_on_the_grid(triton, monkeypatch):
    case = Drawn(2, "packed", LOSSES["ppo"], "sequence_mean", "leave_one_out", "full")
    losses = []
    for count in (1, 3, 1000):
        monkeypatch.setattr(sys.modules["ppg_fast.kernels.policy_loss"], "programs", lambda *_, count=count: count)
        losses.append(case.run(triton)[0])
    assert all(torch.equal(loss, losses[0]) for loss in losses)


def test_without_rows_or_gradient(triton):
    case = Drawn(0, "padded", LOSSES["ppo"], "token_mean", "leave_one_out", "greedy")
    with_gradient = case.run(triton)
    loss, logprob, entropy, _ = case.run(triton, dlogits=None, entropy=False)
    assert torch.equal(loss, with_gradient[0])
    assert torch.equal(logprob, with_gradient[1])
    assert entropy.shape == (0,)
    columns = Columns(*(None if c is None else c[:0] for c in case.columns))
    none = triton.fused_policy_loss(
        case.logits[:0], columns, None, Reduction("token_mean", None, 0, None), PolicyLossSpec(), False, True,
        case.logits[:0]
    )  # fmt: skip
    assert none[0] == 0
    assert none[1].shape == (0, 9)


def test_a_row_over_a_cluster(triton, monkeypatch):
    """The program of a cluster: the whole row as one block. That its parts meet is for test_triton_compile.py and a GPU
    to show."""
    from ppg_fast.kernels import plan

    monkeypatch.setattr(plan, "why_no_clusters", lambda device: None)
    shape = plan.row_shape(torch.empty(1, 1, 40_000), False)
    assert (shape["ONE_BLOCK"], shape["num_ctas"], shape["BLOCK_V"], shape["num_warps"]) == (True, 2, 65_536, 16)
    case = Drawn(4, "padded", LOSSES["ppo"], "token_mean", V=40_000)
    case.check(case.run(triton))


@pytest.mark.parametrize(
    ("V", "dtype", "hip", "shape"),
    [
        (32_000, torch.bfloat16, None, (False, 4_096, 4)),  # several programs an SM
        (30_522, torch.float16, None, (False, 4_096, 4)),
        (32_768, torch.bfloat16, "7.0", (True, 32_768, 8)),  # its warps have 64 threads
        (32_768, torch.float32, None, (True, 32_768, 16)),
        (16_384, torch.bfloat16, None, (True, 16_384, 16)),
        (32_784, torch.bfloat16, None, (False, 16_384, 16)),
    ],
)
def test_where_a_row_is_kept(triton, monkeypatch, V, dtype, hip, shape):
    from ppg_fast.kernels import plan

    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(plan, "WARP_SIZE", 64 if hip else 32)
    found = plan.row_shape(torch.empty(1, 1, V, dtype=dtype), False)
    assert (found["ONE_BLOCK"], found["BLOCK_V"], found["num_warps"]) == shape


def test_a_row_that_is_read_again_by_a_small_program(triton, monkeypatch):
    from ppg_fast.kernels import plan

    monkeypatch.setattr(plan, "SHARED", 4 * 17_008)  # in float32, so that sums can be compared closely
    assert plan.row_shape(torch.empty(1, 1, 17_008), False)["BLOCK_V"] == 4_096
    case = Drawn(4, "padded", LOSSES["ppo"], "token_mean", V=17_008)
    case.check(case.run(triton))


H200 = SimpleNamespace(multi_processor_count=132, L2_cache_size=50 * 2**20)


@pytest.mark.parametrize(
    ("hip", "capability", "version", "reason"),
    [
        ("6.4", (9, 4), "3.9.0", "ROCm"),
        (None, (8, 0), "3.9.0", "sm_80"),
        (None, (9, 0), "3.7.1", "3.7.1"),
        (None, (9, 0), "3.10.0+git1", None),
        (None, (10, 0), "3.8.0", None),
    ],
)
def test_who_may_use_clusters(triton, monkeypatch, hip, capability, version, reason):
    from ppg_fast.kernels import plan

    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(plan.triton, "__version__", version)
    monkeypatch.setattr(plan, "cluster_probe", lambda sm: None)
    said = plan.why_no_clusters(torch.device("cuda", 0))
    assert said is None if reason is None else reason in said
    monkeypatch.setattr(plan, "cluster_probe", lambda sm: f"not on sm_{sm}")
    assert plan.why_no_clusters(torch.device("cuda", 0)) is not None


def test_rows_that_are_read_twice_fit_the_cache(triton, monkeypatch):
    """Half of the L2, but a quarter of the SMs at least; on ROCm one for each compute unit; small programs in pairs."""
    from ppg_fast.kernels import plan

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H200)
    cuda, count = torch.device("cuda", 0), plan.programs.__wrapped__
    assert [count(cuda, 512, 2 * V) for V in (50_257, 128_256, 151_936, 262_144)] == [132, 102, 86, 50]
    assert count(cuda, 512, 4 * 262_144) == 33
    assert count(cuda, 128, 2 * 32_000) == 409
    assert count(cuda, 128, 2 * 17_000) == 4 * 132
    assert count(cuda, 4 * 512) * 4 == count(cuda, 512) == plan.WAVES * 132
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert count(cuda, 512, 2 * 262_144) == 132

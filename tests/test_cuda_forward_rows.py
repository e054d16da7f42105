"""Rows without a gradient in the one-pass kernel, under the emulator: they are sent to one CTA of their cluster only,
and their numbers are those of a row with a gradient, bit for bit."""

import random
from dataclasses import replace

import pytest
import torch
from emulator import build as emulator
from emulator.cases import Case, run, shortest_ring

from ppg_fast.spec import PolicyLossSpec

if why_not := emulator.why_not():
    pytest.skip(why_not, allow_module_level=True)

FORWARD, MASKED = 3, 1  # rows of Case; the others have a gradient
OPS = torch.ops.ppg_fast_emulated


@pytest.fixture
def control():
    library = emulator.build()
    torch.ops.load_library(library)
    control = emulator.Control(library)
    control.take_stats()
    yield control
    control.set()


def launch(control, case, cluster, threads=256, spare=0, **how):
    slots = shortest_ring(case, cluster) + spare
    control.set(cluster=cluster, threads=threads, slots=slots, **how)
    return run(OPS, case)


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
def test_they_are_sent_to_one_cta(control, cluster):
    case, warps = Case(1003, entropy=False, out=0), 8
    for rows, sends in (
        ((FORWARD,) * 3, 3 * cluster),
        ((FORWARD, 0, FORWARD, MASKED), 2 * cluster + cluster**2),
        ((0, 2), 2 * cluster**2),
    ):
        launch(control, replace(case, rows=rows), cluster)
        assert control.take_stats().sends == warps * sends


@pytest.mark.parametrize("cluster", [1, 2, 4])
@pytest.mark.parametrize("threads", [256, 512])
def test_the_same_bits_with_and_without_a_gradient(control, cluster, threads):
    """The same row, in one call among rows of all kinds, in another under a KL term, which wants every gradient."""
    case = Case(9001, shift=cluster, out=None, entropy=False, rows=(FORWARD, 0, FORWARD, MASKED, FORWARD, FORWARD, 5))
    mixed = launch(control, case, cluster, threads, resident=1)
    every = launch(control, replace(case, spec=PolicyLossSpec(kl_coef=0.1)), cluster, threads, resident=1)
    assert torch.equal(mixed.logprob, every.logprob)
    assert mixed.dlogits[0].count_nonzero() == 0 < every.dlogits[0].count_nonzero()


@pytest.mark.parametrize("cluster", [1, 2, 4])
def test_rows_of_all_kinds_in_any_order(control, cluster):
    """A rank that has nothing to wait for runs ahead of the others, as far as it may."""
    draw = random.Random(cluster)
    for seed in range(6):
        rows = tuple(draw.choices((0, MASKED, FORWARD, FORWARD, FORWARD, 5), k=17))
        dtype = draw.choice((torch.float32, torch.bfloat16, torch.float16))
        case = Case(4099, dtype, shift=seed % 3, out=draw.choice((None, seed % 3)), score_norm=seed % 2 == 0, rows=rows)
        launch(control, case, cluster, spare=seed % 2, resident=1, seed=seed, mode=seed % 3)

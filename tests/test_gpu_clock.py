"""The clock of a GPU reports what the kernels take, whatever the host does: on a fake GPU whose kernels take a known
time."""

import itertools
import random
from functools import partial

import pytest
import torch
from fake_gpu import LAUNCH, FakeGpu
from ppg_fast.bench import harness, machine, timing
from ppg_fast.bench.gpu_clock import MOST, Gpu, GpuClock
from ppg_fast.bench.problem import Case

KERNEL = 244e-6  # what the fused kernel takes at V = 32,000 at the rate of a copy
PACE = timing.Pace(rounds=12, budget=1e9)


def jitter(low, high):
    draw = random.Random(0)
    return (draw.uniform(low, high) for _ in itertools.count())


def measured(gpu, call, kind="ours", before=None):
    contestant = timing.Contestant("a", kind, call, before)
    return timing.interleave([contestant], PACE, "cuda", gpu=gpu)["a"], contestant.facts


HOSTS = {
    "fast": (20e-6, 20e-6),
    "out of place": (200e-6, 200e-6),
    "in place": (650e-6, 650e-6),
    "jittery": (200e-6, 3e-3),
    "slower than the first spin": (9e-3, 9e-3),
    "very slow": (60e-3, 60e-3),
}


@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_the_kernel_is_measured_whatever_the_host_does(host):
    gpu = FakeGpu()
    seconds, facts = measured(gpu, gpu.call([KERNEL], jitter(*host)))
    assert seconds == [pytest.approx(KERNEL, rel=1e-6)] * PACE.rounds
    assert facts["graph_seconds"] == pytest.approx(KERNEL, rel=1e-6)
    assert facts["host_bound"] is False
    assert host[0] * 0.999 <= facts["host_seconds"] <= host[1] * 1.001
    assert facts["thread_seconds"] == pytest.approx(facts["host_seconds"])
    assert facts["spin_mhz"] == 1980


def test_a_clock_that_waits_before_the_call_measures_the_host():
    """Kernel and all: 325 us of host work, the kernel hidden behind the other 325."""
    gpu = FakeGpu()
    call = gpu.call([KERNEL], jitter(650e-6, 650e-6))
    gpu.evict()
    gpu.synchronize()
    start, end = gpu.event(), gpu.event()
    start.record()
    call()
    end.record()
    end.synchronize()
    assert start.elapsed_time(end) / 1e3 == pytest.approx(650e-6)


def test_kernels_in_a_row_have_no_host_between_them():
    gpu = FakeGpu()
    seconds, facts = measured(gpu, gpu.call([KERNEL, 3e-6, 20e-6], jitter(300e-6, 900e-6)))
    assert seconds == [pytest.approx(KERNEL + 23e-6)] * PACE.rounds
    assert facts["graph_seconds"] == pytest.approx(KERNEL + 23e-6)


def test_a_call_that_waits_for_the_gpu_is_said_to():
    """The host's work after the wait is in the figure, that before it is not."""
    gpu = FakeGpu()
    seconds, facts = measured(gpu, gpu.call([KERNEL, KERNEL], jitter(300e-6, 300e-6), syncs=True))
    assert facts["host_bound"] is True
    assert "host_seconds" not in facts
    assert facts["not_captured"] == "the call waits for the GPU"
    assert "graph_seconds" not in facts
    assert seconds == [pytest.approx(2 * KERNEL + 100e-6)] * PACE.rounds
    assert gpu.log.count("call") < PACE.rounds + 12  # tried longer spins once, not in every round


def test_a_host_slower_than_any_spin_is_said_too():
    gpu = FakeGpu()
    _, facts = measured(gpu, gpu.call([KERNEL], jitter(2 * MOST, 2 * MOST)))
    assert facts["host_bound"] is True


def test_one_late_call_is_measured_again():
    """The system takes the processor away once."""
    gpu = FakeGpu()
    host = itertools.chain([200e-6] * 3, [30e-3], itertools.repeat(200e-6))
    seconds, facts = measured(gpu, gpu.call([KERNEL], host))
    assert seconds == [pytest.approx(KERNEL)] * PACE.rounds
    assert facts["host_bound"] is False
    assert facts["host_seconds"] == pytest.approx(200e-6)


def test_eviction_and_restoring_are_outside_of_the_clock():
    gpu = FakeGpu(eviction=7e-3)

    def restore():
        gpu.log.append("restore")
        gpu.work(100e-6)
        gpu.launch(5e-3)

    seconds, facts = measured(gpu, gpu.call([KERNEL], jitter(650e-6, 650e-6)), before=restore)
    assert seconds == [pytest.approx(KERNEL)] * PACE.rounds
    assert facts["graph_seconds"] == pytest.approx(KERNEL)
    assert gpu.log[:6] == ["restore", "evict", "call"] * 2
    replayed = gpu.log[gpu.log.index("replay") - 2 :]
    assert replayed == ["restore", "evict", "replay"] * (len(replayed) // 3)


def test_a_call_that_cannot_be_captured_says_why():
    gpu = FakeGpu()
    plain = gpu.call([KERNEL], jitter(200e-6, 200e-6))

    def call():
        if gpu.capturing is not None:
            gpu.synchronize()
        plain()

    seconds, facts = measured(gpu, call)
    assert facts["not_captured"] == "RuntimeError: operation not permitted when stream is capturing"
    assert seconds == [pytest.approx(KERNEL)] * PACE.rounds


def test_peers_have_no_graphs():
    gpu = FakeGpu()
    _, facts = measured(gpu, gpu.call([KERNEL], jitter(200e-6, 200e-6)), kind="peer")
    assert facts.keys() == {"host_bound", "host_seconds", "thread_seconds", "spin_mhz"}


def test_a_graph_costs_its_host_little():
    gpu = FakeGpu()
    clock = GpuClock(gpu)
    clock(gpu.capture(gpu.call([KERNEL], jitter(650e-6, 650e-6))), gpu.evict)
    assert clock.facts()["host_seconds"] == pytest.approx(LAUNCH)


# ---- a failed capture ------------------------------------------------------------------------------------------------
def test_a_failed_capture_leaves_torch_as_it_was(monkeypatch):
    """`torch.cuda.graph` would leave its stream current and the allocator in the midst of a capture."""
    log = []

    class Graph:
        def capture_begin(self):
            log.append("begin")

        def capture_end(self):
            log.append("end")
            raise RuntimeError("operation failed due to a previous error during capture")

        def pool(self):
            return 1, 2

    class Stream:
        def __enter__(self):
            log.append("stream")

        def __exit__(self, *error):
            log.append("stream left")

    fakes = {"CUDAGraph": Graph, "Stream": lambda: None, "stream": lambda stream: Stream(), "current_device": lambda: 0}
    fakes |= {name: lambda name=name: log.append(name) for name in ("synchronize", "empty_cache")}
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    ended = lambda *given: log.append(given)  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", ended, raising=False)

    def call():
        log.append("call")
        raise ValueError("cannot be captured")

    with pytest.raises(ValueError, match="cannot be captured"):
        Gpu(lambda: None).capture(call)
    assert log == ["synchronize", "empty_cache", "stream", "begin", "call", "end", (0, (1, 2)), "stream left"]


# ---- in the results --------------------------------------------------------------------------------------------------
class CpuWork(FakeGpu):
    """Whose calls launch nothing: a millisecond each."""

    def event(self):
        event = super().event()
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at) + 1.0
        return event


def test_entries_have_what_the_clock_found(monkeypatch):
    states = iter([{"sm_mhz": 1980}, {"sm_mhz": 1755}])
    monkeypatch.setattr(timing, "cache_bytes", lambda device: 2**16)
    monkeypatch.setattr(machine, "gpu_state", lambda device: next(states))
    monkeypatch.setattr(harness, "interleave", partial(timing.interleave, gpu=CpuWork()))
    entries, _ = harness.measure(Case("logprobs", 8, 64), harness.PACES["quick"], compilers=False)
    for entry in entries:
        info = entry["extra_info"]
        assert (info["gpu_before"], info["gpu_after"]) == ({"sm_mhz": 1980}, {"sm_mhz": 1755})
        assert info["host_bound"] is False
        assert ("graph_seconds" in info) == (info["kind"] != "peer")
        assert ("graph_share_of_ceiling" in info) == (info["kind"] == "ours")
    assert {e["extra_info"]["kind"] for e in entries} == {"ours", "peer", "ceiling"}

"""The clock of a GPU. The host stays ahead of it, so that what lies between two events is the GPU's work alone."""

import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

LEAST, MOST = 1e-3, 0.1  # seconds that the GPU is kept busy while the host puts a call on it
MARGIN = 3  # times what the host took the last time
RATE = 1.5e9  # cycles a second, before a spin has been measured


class Gpu:
    """What a clock asks of a GPU. Tests give one whose kernels take a known time."""

    wall = staticmethod(time.perf_counter)
    thread = staticmethod(time.thread_time)

    def __init__(self, evict: Callable[[], None]) -> None:
        self.evict = evict  # empties the caches before a call

    def event(self) -> Any:
        """With ``record``, ``query``, ``synchronize`` and ``elapsed_time`` in milliseconds, as `torch.cuda.Event`."""
        return torch.cuda.Event(enable_timing=True)

    def spin(self, cycles: int) -> None:
        """Keep the stream busy, the memory and the caches at rest."""
        torch.cuda._sleep(cycles)

    def capture(self, call: Callable[[], Any]) -> Callable[[], None]:
        """A replay of what ``call`` puts on the GPU; whatever the call raises where it cannot be captured."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        with torch.cuda.stream(stream):  # torch.cuda.graph would leave it current after a failure
            graph.capture_begin()
            try:
                result = call()
            except BaseException:
                _abandon(graph)
                raise
            graph.capture_end()
        del result  # the graph keeps its memory
        return graph.replay


def _abandon(graph: torch.cuda.CUDAGraph) -> None:
    """End a capture that failed; without the second step the allocator would free nothing from then on."""
    with suppress(RuntimeError):  # of the failure that is on its way to the caller
        graph.capture_end()
    with suppress(RuntimeError):  # ended already
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), graph.pool())


@dataclass(frozen=True)
class Reading:
    """One call, in seconds: of the GPU, of the host while the GPU was busy with something else, and of its thread's
    CPU. ``ahead``: the GPU did not begin before the host was done."""

    gpu: float
    host: float
    thread: float
    mhz: float  # of the spin before it
    ahead: bool


class GpuClock:
    """Times the calls of one contestant.

    A spin keeps the GPU busy while the host puts the call on it. Where the first event of the call has happened before
    the host was done, the spin was too short and the call is measured again behind a longer one. A call that waits for
    the GPU is never done before: then the figures say ``host_bound``.
    """

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.lead, self.rate = gpu, LEAST, RATE
        self.readings: list[Reading] = []
        self.waits = False

    def __call__(self, call: Callable[[], Any], prepare: Callable[[], None]) -> float:
        """Seconds of ``call`` on the GPU; ``prepare`` is outside of the clock."""
        reading = self._read(call, prepare)
        while not (reading.ahead or self.waits):
            self.waits = self.lead >= MOST
            self.lead = LEAST if self.waits else min(max(2 * self.lead, MARGIN * reading.host), MOST)
            reading = self._read(call, prepare)
        if reading.ahead:
            self.lead = min(max(LEAST, MARGIN * reading.host), MOST)
        self.readings.append(reading)
        return reading.gpu

    def _read(self, call: Callable[[], Any], prepare: Callable[[], None]) -> Reading:
        gpu, cycles = self.gpu, int(self.lead * self.rate)
        before, start, end = gpu.event(), gpu.event(), gpu.event()
        prepare()
        before.record()
        gpu.spin(cycles)
        start.record()
        thread, wall = gpu.thread(), gpu.wall()
        result = call()
        wall, thread = gpu.wall() - wall, gpu.thread() - thread
        end.record()
        ahead = not start.query()
        end.synchronize()
        del result
        self.rate = cycles / max(before.elapsed_time(start) / 1e3, 1e-9)
        return Reading(start.elapsed_time(end) / 1e3, wall, thread, self.rate / 1e6, ahead)

    def facts(self) -> dict[str, Any]:
        """Medians of what was found beside the GPU's seconds."""
        done = [r for r in self.readings if r.ahead]
        found: dict[str, Any] = {"host_bound": len(done) < len(self.readings)}
        if done:  # what the host does while it waits says nothing
            found["host_seconds"] = statistics.median(r.host for r in done)
            found["thread_seconds"] = statistics.median(r.thread for r in done)
            found["spin_mhz"] = round(statistics.median(r.mhz for r in done))
        return found

    def replays(self, call: Callable[[], Any], prepare: Callable[[], None], rounds: int) -> dict[str, Any]:
        """Median seconds of the call's CUDA graph, or why there is none."""
        if self.waits:
            return {"not_captured": "the call waits for the GPU"}
        prepare()
        try:
            replay = self.gpu.capture(call)
        except Exception as error:  # whatever it is, the plain calls have been measured
            return {"not_captured": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"}
        prepare()
        replay()  # brings the graph to the GPU
        clock = GpuClock(self.gpu)
        return {"graph_seconds": statistics.median(clock(replay, prepare) for _ in range(rounds))}

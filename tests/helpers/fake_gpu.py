"""A GPU with one stream, whose kernels take a known time, and a host, whose calls do: both in virtual time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

CYCLES = 1.98e9  # a second
LAUNCH = 10e-6  # of the host, for a graph


@dataclass
class Event:
    gpu: "FakeGpu"
    at: float = -1.0

    def record(self) -> None:
        self.at = self.gpu.launch(0.0)

    def query(self) -> bool:
        return self.at <= self.gpu.now

    def synchronize(self) -> None:
        self.gpu.now = max(self.gpu.now, self.at)

    def elapsed_time(self, end: "Event") -> float:
        return (end.at - self.at) * 1e3  # ms


class FakeGpu:
    """In place of `gpu_clock.Gpu`. ``now``: the host's time; ``free``: when the stream has nothing left to do."""

    def __init__(self, eviction: float = 50e-6) -> None:
        self.now = self.free = self.worked = 0.0
        self.eviction = eviction
        self.capturing: list[float] | None = None
        self.log: list[str] = []

    # ---- for the calls that are timed
    def launch(self, seconds: float) -> float:
        """-> when it will be done."""
        if self.capturing is not None:
            self.capturing.append(seconds)
            return self.free
        self.free = max(self.free, self.now) + seconds
        return self.free

    def work(self, seconds: float) -> None:
        """Of the host."""
        self.now += seconds
        self.worked += seconds

    def synchronize(self) -> None:
        if self.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nand a second line")
        self.now = max(self.now, self.free)

    def call(self, kernels: list[float], host: Iterator[float], syncs: bool = False) -> Callable[[], Any]:
        """Host work before each kernel, and after the last one; with ``syncs`` it waits for the first."""

        def call() -> None:
            self.log.append("call")
            each = next(host) / (len(kernels) + 1)
            for number, kernel in enumerate(kernels):
                self.work(each)
                self.launch(kernel)
                if syncs and number == 0:
                    self.synchronize()
            self.work(each)

        return call

    # ---- for the clock
    def evict(self) -> None:
        self.log.append("evict")
        self.launch(self.eviction)

    def event(self) -> Event:
        return Event(self)

    def spin(self, cycles: int) -> None:
        self.work(5e-6)
        self.launch(cycles / CYCLES)

    def capture(self, call: Callable[[], Any]) -> Callable[[], None]:
        self.synchronize()
        self.capturing = kernels = []
        try:
            call()
        finally:
            self.capturing = None

        def replay() -> None:
            self.log.append("replay")
            self.work(LAUNCH)
            for kernel in kernels:
                self.launch(kernel)

        return replay

    def wall(self) -> float:
        return self.now

    def thread(self) -> float:
        return self.worked

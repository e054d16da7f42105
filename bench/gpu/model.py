"""A queueing model of the kernels over the vocabulary. Nothing here was measured on a GPU.

Memory is a server that all CTAs share, the issue slots of an SM one that its CTAs share. A CTA fills a ring of slots
from memory; it sweeps a row chunk by chunk, exchanges, and sweeps it again. What a chunk costs at issue is read from
the machine code (`counts`), what memory gives from a table of devices, and the rest is in `Unknowns`.
"""

import heapq
import math
import random
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

CHUNK, PORT = 16384, 64  # bytes of a slot; bytes that reach an SM in a cycle
FULL_WARPS = 16  # of an SM that reach `Unknowns.issue`
SKIP, FORWARD, FULL = range(3)
SAMPLE = 11  # one of so many CTAs is simulated, with its rows and its share of memory


@dataclass(frozen=True)
class Device:
    """Published figures of a GPU. ``copy``: bytes a second, reads and writes together, and of a read alone. ``clock``:
    at which the published peak of its tensor cores holds. ``clusters``: of 1, 2, 4 and 8 SMs that fit."""

    name: str
    sms: int
    clock: float
    copy: float
    gemm: float  # floating-point operations a second of large bfloat16 GEMMs
    clusters: dict[int, int]
    l2: int  # bytes
    lanes: int = 128  # elements that an SM issues for in one cycle
    exponentials: int = 16  # an SM a cycle


@dataclass(frozen=True)
class Unknowns:
    """What the first measurement has to tell, in cycles, launches in seconds. ``issue`` and ``evenness`` are such that
    the table of an independent estimate comes out."""

    issue: float = 0.78  # share of an SM's issue slots that 16 warps of these kernels fill
    few: float = 0.7  # of that, what 8 warps fill that are alone on their SM
    evenness: float = 0.935  # share of a copy's rate that a kernel of bursts of reads and writes reaches
    latency: float = 1000  # of a bulk copy under load
    exchange: float = 2000  # between the sweeps at least: shuffles, other CTAs, divisions, one after the other
    reread: float = 600  # of loads that hit L2
    iteration: float = 0.7e-6  # of a thread of the counting kernel, which waits for each of its loads
    gap: float = 3e-6  # between two launches that depend on each other
    start: float = 3e-6  # of a kernel before its first row: barriers, cluster sync, look-up
    end: float = 3e-6  # the sum of losses by the CTA that finishes last


@dataclass(frozen=True)
class Counts:
    """From a kernel's machine code: issue slots and exponentials of an element in both sweeps; slots of a warp for the
    rest of a row with a gradient, and of one without. ``waits``: that one waits for the exchange all the same."""

    first: float
    second: float
    row: float
    forward: float
    exp_first: float = 1.0
    exp_second: float = 1.0
    waits: bool = True


@dataclass(frozen=True)
class Plan:
    """How a row is spread, as in csrc/cuda/plan.h. ``kept``: the second sweep finds the row in its slots, else in L2,
    and ``slots`` chunks at a time are loaded and waited for. ``ahead``: of the next row while this one is computed."""

    cluster: int
    threads: int
    slots: int
    per_sm: int = 1
    kept: bool = True
    ahead: bool = True


@dataclass(frozen=True)
class Launches:
    """What an op does around its sweep. ``iterations``: dependent loads of a thread of the counting kernel, 0: there is
    none. ``overlapped``: by programmatic dependent launch. ``summed``: the losses of all rows are."""

    iterations: int = 16
    overlapped: bool = False
    summed: bool = True

    def seconds(self, u: Unknowns) -> float:
        count = self.iterations * u.iteration + u.gap if self.iterations else 0.0
        before = max(count, u.start) if self.overlapped else count + u.start
        return before + u.end * self.summed


@dataclass(frozen=True)
class Case:
    """One call over bfloat16 or float32 rows. ``full``: of 100 rows, in runs of 64, the others are SKIP.
    ``read_only``: no gradient."""

    V: int
    size: int  # bytes of an element
    plan: Plan
    counts: Counts
    launches: Launches = field(default_factory=Launches)
    N: int = 8192
    full: int = 100
    read_only: bool = False

    def kind(self, n: int) -> int:
        return (FORWARD if self.read_only else FULL) if n // 64 * 37 % 100 < self.full else SKIP

    def moved(self) -> int:
        """Bytes that must move: an active row is read, every row of the gradient is written."""
        read = sum(self.kind(n) != SKIP for n in range(self.N))
        return (read + (0 if self.read_only else self.N)) * self.V * self.size


@dataclass(frozen=True)
class Prediction:
    """Seconds of one call, and of its bytes at the rate of a copy; seconds that memory and issue slots are busy."""

    seconds: float
    least: float
    memory: float
    issue: float
    launches: float

    @property
    def share(self) -> float:
        return self.least / self.seconds

    @property
    def bound(self) -> str:
        """What is busy most, or the latency of both where neither is for more than three quarters of the time; and the
        launches where they are more than a twentieth."""
        most = "memory" if self.memory > self.issue else "issue slots"
        if max(self.memory, self.issue) < 0.75 * (self.seconds - self.launches):
            most = "latency"
        return f"{most}, launches" if self.launches > 0.05 * self.seconds else most


def predict(device: Device, case: Case, u: Unknowns | None = None) -> Prediction:
    """The whole op without the host."""
    u = u or Unknowns()
    part = _Part(device, case, u)
    cycles, launches = part.run(), case.launches.seconds(u)
    busy = sum(part.worked) / len(part.worked)
    least = case.moved() / device.copy
    return Prediction(
        cycles / device.clock + launches, least, part.bytes / part.rate / device.clock, busy / device.clock, launches
    )


class _Part:
    """The simulated part of a device. One CTA stands for all of its cluster, which do the same at the same time."""

    def __init__(self, device: Device, case: Case, u: Unknowns) -> None:
        plan, counts, self.case, self.u = case.plan, case.counts, case, u
        size = max(plan.cluster, 1)
        clusters = device.clusters[size] * plan.per_sm
        teams = max(2, round(clusters / SAMPLE / plan.per_sm) * plan.per_sm)
        self.first_rows, self.step = [i * clusters // teams for i in range(teams)], clusters
        evenness = 1.0 if case.read_only else u.evenness
        self.rate = device.copy * evenness / device.clock * teams / (clusters * size)  # bytes a cycle
        self.backlog = device.l2 / 2 / (device.copy / device.clock)  # cycles of writes that may wait in L2
        left = math.ceil(case.V / size) * case.size
        self.chunks = [CHUNK] * (left // CHUNK) + ([left % CHUNK] if left % CHUNK else [])
        slot, exp = 1 / device.lanes / case.size / u.issue, device.lanes / device.exponentials
        self.first, self.second = (
            slot * max(issued, exp * exps)
            for issued, exps in ((counts.first, counts.exp_first), (counts.second, counts.exp_second))
        )
        warps = plan.threads / 32 / 4  # of a scheduler
        self.row, self.forward = counts.row * warps / u.issue, counts.forward * warps / u.issue
        self.alone = min(1.0, u.few ** math.log2(FULL_WARPS * 32 / plan.threads))  # of the SM's rate: one CTA's
        self.memory, self.issue = 0.0, [0.0] * (teams // plan.per_sm)  # free again at
        self.worked = [0.0] * len(self.issue)
        self.bytes, self.draw = 0, random.Random(0)

    def run(self) -> float:
        """Cycles until the last row is written."""
        teams = [self.team(index, row) for index, row in enumerate(self.first_rows)]
        heap = [(next(team), index) for index, team in enumerate(teams)]
        last = 0.0
        while heap:
            t, index = heapq.heappop(heap)
            last = max(last, t)
            try:
                heapq.heappush(heap, (max(t, teams[index].send(t)), index))
            except StopIteration:
                continue
        return max(last, self.memory)

    def through_memory(self, t: float, size: int) -> float:
        self.bytes += size
        self.memory = max(t, self.memory) + size / self.rate
        return self.memory

    def computed(self, t: float, index: int, work: float) -> float:
        """When a team that asks for ``work`` cycles at ``t`` has them; another of its SM may be computing."""
        sm = index // self.case.plan.per_sm
        begin = max(t, self.issue[sm])
        self.issue[sm] = begin + work
        self.worked[sm] += work
        return begin + work / self.alone

    def team(self, index: int, first_row: int) -> Generator[float, float, None]:
        """Yields until when it has to wait, and is sent that time."""
        plan, counts, u = self.case.plan, self.case.counts, self.u
        mine = [(n, self.case.kind(n)) for n in range(first_row, self.case.N, self.step)]
        to_read: Iterator[int] = (size for _, kind in mine if kind != SKIP for size in self.chunks)
        arrivals: deque[float] = deque()

        def ask(t: float) -> None:
            """For the next chunk, into a slot that is free."""
            if size := next(to_read, 0):
                latency = u.latency * (0.75 + self.draw.random() / 2)
                before = arrivals[-1] if arrivals else t
                arrivals.append(max(self.through_memory(t, size) + latency, before + size / PORT))

        t = yield 0.0
        for _ in range(plan.slots * plan.ahead):
            ask(t)
        for _, kind in mine:
            if kind == SKIP:
                for size in () if self.case.read_only else self.chunks:
                    t = yield self.through_memory(t, size) - self.backlog
                continue
            if plan.kept and not plan.ahead:  # a row in registers: all of it is there before anything is computed
                for _ in self.chunks:
                    ask(t)
                t = yield max(arrivals)
            for j, size in enumerate(self.chunks):
                for _ in self.chunks[j : j + plan.slots] if not plan.kept and j % plan.slots == 0 else ():
                    ask(t)
                t = yield arrivals.popleft()
                t = yield self.computed(t, index, size * self.first)
                if kind == FORWARD and plan.ahead:
                    ask(t)
            there = t + (u.exchange if kind == FULL or counts.waits else 0.0)
            t = yield max(there, self.computed(t, index, self.row if kind == FULL else self.forward))
            for j, size in enumerate(self.chunks if kind == FULL else ()):
                t += 0.0 if plan.kept or j % plan.slots else u.reread
                t = yield self.computed(t, index, size * self.second)
                self.through_memory(t, size)
                if plan.kept and plan.ahead:
                    ask(t)


def chosen(V: int, size: int, block: int = 232448, sm: int = 233472) -> Plan:
    """`plan_row` of csrc/cuda/plan.h without a softcap; shared memory as on Hopper and Blackwell."""
    if V * size <= CHUNK:
        return Plan(0, 128, 1, 8, kept=False, ahead=False)
    for cluster in (1, 2, 4, 8):
        for per_sm in (2, 1):
            threads, room, vector = 512 // per_sm, block if per_sm == 1 else sm // 2 - 1024, 16 // size
            part = math.ceil(math.ceil(V / cluster) / vector) * vector
            fixed = 2 * cluster * threads // 32 * 16 + 2 * 8 * 32 + 16 + 9 * 8  # exchange, rows, slope, barriers
            slots = (room - fixed) // (CHUNK + 16)
            if slots >= math.ceil((part + vector - 1) * size / CHUNK) + (2 if per_sm == 2 else 3):
                return Plan(cluster, threads, slots, per_sm)
    return Plan(0, 512, 1, min(max((256 << 10) // (V * size), 1), 2), kept=False, ahead=False)

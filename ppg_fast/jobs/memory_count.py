"""Bytes of the tensors that live on the meta device, by the names of what they are for."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Count(TorchDispatchMode):
    """Bytes of the storages that are alive, each under the name that was current when it was made; a snapshot at the
    peak.

    Not torch's MemTracker: it fails on frozen parameters (adapters), tells parameters from activations but not layers
    from attention and head, and cannot be told of a moment's memory such as a chunk of logits.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.known: dict[int, Any] = {}
        self.name, self.phase = "weights", "forward pass"
        self.restart()

    def restart(self) -> None:
        """Look for the peak from here on."""
        self.peak, self.at_peak, self.peak_phase = 0, Counter(), self.phase

    @contextmanager
    def under(self, name: str) -> Iterator[None]:
        """New tensors are called ``name``, while the block runs."""
        self.name, before = name, self.name
        try:
            yield
        finally:
            self.name = before

    @contextmanager
    def phase_of(self, phase: str) -> Iterator[None]:
        """Where a peak is said to be, while the block runs."""
        self.phase, before = phase, self.phase
        try:
            yield
        finally:
            self.phase = before

    def rename(self, tensor: Tensor, name: str) -> None:
        """What the tensor's memory is called from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self.known and self.known[key][1] != name:
            reference, before, size = self.known[key]
            self.live[before] -= size
            self.live[name] += size
            self.known[key] = (reference, name, size)

    def note(self, tensor: Tensor) -> None:
        """Count a tensor's memory, once, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or tensor.device.type != "meta":
            return

        def freed(_: object) -> None:
            entry = self.known.pop(key, None)
            if entry:
                self.live[entry[1]] -= entry[2]

        self.known[key] = (weakref.ref(storage, freed), self.name, size)
        self.live[self.name] += size
        self.look()

    def look(self, **besides: int) -> None:
        """Take a snapshot if more is alive than ever, with ``besides`` for a moment."""
        total = self.live.total() + sum(besides.values())
        if total > self.peak:
            self.peak, self.peak_phase = total, self.phase
            self.at_peak = Counter({k: v for k, v in (self.live + Counter(besides)).items() if v})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.note(value)
        return out

"""Metrics of a loss that wait until they are read."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class LazyMetrics(Mapping[str, Tensor]):
    """Metrics by name, computed when the first one is read, from tensors that must not have been modified in place
    until then.

    ``known`` are there already and cost nothing. Inside a CUDA graph's capture nothing is kept or checked: what is read
    after a replay belongs to that replay.
    """

    def __init__(
        self,
        values: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]],
        made_of: Iterable[tuple[str, Tensor]] = (),
        known: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._values, self._known = values, known or {}
        self._captured = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
        self._made_of = []
        if not self._captured:
            self._made_of = [(name, t, t._version) for name, t in made_of if not t.is_inference()]

    def _read(self) -> Mapping[str, Tensor]:
        if isinstance(self._values, Mapping):
            return self._values
        for name, tensor, version in self._made_of:
            if tensor._version != version:
                raise RuntimeError(
                    f"metrics are computed when they are first read, but {name} was modified in place since: read "
                    "them before"
                )
        values = {**self._values(), **self._known}
        if not self._captured:
            self._values, self._made_of = values, []
        return values

    def __getitem__(self, name: str) -> Tensor:
        return self._known[name] if name in self._known else self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __repr__(self) -> str:
        return repr(dict(self._read()))


def when_read(
    metrics: Callable[[], Mapping[str, Tensor]], arguments: Mapping[str, Any], known: Mapping[str, Tensor]
) -> Mapping[str, Tensor]:
    """`LazyMetrics`, made of the tensors among ``arguments``; torch.compile, which cannot follow them, computes them at
    once."""
    if torch.compiler.is_compiling():
        return {**metrics(), **known}
    made_of = [(name, value) for name, value in arguments.items() if isinstance(value, Tensor)]
    return LazyMetrics(metrics, made_of, known)

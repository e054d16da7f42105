"""Checkpoints on disk: folders that appear whole or not at all, and the global sources of randomness that belong in
them.

The format is torch's (`torch.save`, read back with ``weights_only``; torch.distributed.checkpoint for tensors that are
sharded over ranks), the checksum file is that of ``sha256sum``. A state holds tensors, numbers, text, lists, tuples and
dictionaries.
"""

import hashlib
import random
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppg_fast.distributed import Ranks
from ppg_fast.writing import refusal, sync

STATE, SHARDS, SUMS = "state.pt", "shards", "SHA256SUMS"
PARTIAL, DAMAGED = ".partial", ".damaged"


def save(folder: Path, step: int, state: dict[str, Any], keep: int, ranks: Ranks | None = None) -> Path:
    """Write ``state`` as ``folder``/step-<step>, then remove all checkpoints but the newest ``keep``.

    It is written and synced under another name and then renamed: whenever the process dies, the checkpoints before this
    one are whole.
    All ``ranks`` call it: each writes and sums its part of the tensors that are sharded over them, the first everything
    else of its own ``state``. OSError, on all of them, where it cannot be written, a full disk for one; nothing is left
    of it then, and nothing else is touched.
    """
    ranks = ranks or Ranks()
    target = folder / f"step-{step:08d}"
    partial = target.with_name(target.name + PARTIAL)
    shards: dict[str, Any] = {}
    plain = _each_leaf(state, lambda leaf, name: _marked(leaf, name, shards)) if ranks.sharded else state

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"*{PARTIAL}"):  # by a process that was killed
            shutil.rmtree(left)
        partial.mkdir()
        with open(partial / STATE, "wb") as file:
            torch.save(plain, file)

    def sums() -> str:
        mine = [partial / STATE, *(partial / SHARDS).glob(".metadata")] if ranks.is_main else []
        mine += sorted((partial / SHARDS).glob(f"__{ranks.rank}_*"))
        for path in mine:
            sync(path)
        return "".join(f"{_digest(path)}  {path.relative_to(partial)}\n" for path in mine)

    def finish() -> None:
        (partial / SUMS).write_text("".join(lines), encoding="utf-8")
        for path in (partial / SUMS, *filter(Path.is_dir, [partial / SHARDS]), partial):
            sync(path)
        if target.exists():
            target.rename(target.with_name(f"{target.name}.old{PARTIAL}"))
        partial.rename(target)
        sync(folder)
        for old in checkpoints(folder)[:-keep]:
            old.rename(old.with_name(old.name + PARTIAL))
        for left in folder.glob(f"*{PARTIAL}"):
            shutil.rmtree(left)

    try:
        ranks.run_on_main(begin)
        if shards:
            _write_shards(partial / SHARDS, shards)
        lines = ranks.run_on_all(sums)
        ranks.run_on_main(finish)
    except BaseException as error:
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, Exception) and not isinstance(error, ValueError):
            raise OSError(f"{target}: {refusal(error) or error}") from error
        raise
    return target


def newest(folder: Path, ranks: Ranks | None = None) -> dict[str, Any] | None:
    """The state of the newest checkpoint that is whole, its tensors on the CPU; None where there is no checkpoint.

    A damaged one is a warning and renamed, and the one before it is taken. ValueError if all are damaged. All ``ranks``
    call it; tensors that were sharded over as many or other ranks are sharded over these, or whole where these hold the
    whole model each.
    """
    ranks = ranks or Ranks()
    path = ranks.run_on_main(lambda: _newest_whole(folder))
    if path is None:
        return None
    state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    if not (path / SHARDS).is_dir():
        return state
    shards = _read_shards(path / SHARDS, ranks)
    return _each_leaf(state, lambda leaf, _: shards[leaf[1]] if _is_mark(leaf) else leaf)


def _newest_whole(folder: Path) -> Path | None:
    found = checkpoints(folder)
    damaged: list[str] = []
    for path in reversed(found):
        if fault := _fault(path):
            damaged.append(f"{path} ({fault})")
            continue
        for text, other in zip(damaged, reversed(found), strict=False):
            warnings.warn(f"damaged checkpoint {text}: going on from {path.name}, the one before", stacklevel=2)
            shutil.rmtree(other.with_name(other.name + DAMAGED), ignore_errors=True)
            other.rename(other.with_name(other.name + DAMAGED))
        return path
    if damaged:
        raise ValueError(f"a checkpoint must match its {SUMS}, and none does: {', '.join(damaged)}")
    return None


def _each_leaf(value: Any, change: Callable[[Any, str], Any], name: str = "") -> Any:
    """``value`` with ``change`` applied to what is no dictionary, by its name: the keys that lead to it."""
    if isinstance(value, dict):
        return {key: _each_leaf(inner, change, f"{name}/{key}" if name else str(key)) for key, inner in value.items()}
    return change(value, name)


def _marked(leaf: Any, name: str, shards: dict[str, Any]) -> Any:
    """``leaf`` itself, or, where it is sharded over ranks, a mark in its place, and it in ``shards``."""
    if not hasattr(leaf, "device_mesh"):
        return leaf
    shards[name] = leaf
    return SHARDS, name


def _is_mark(leaf: Any) -> bool:
    return isinstance(leaf, tuple) and len(leaf) == 2 and leaf[0] == SHARDS


def _write_shards(folder: Path, shards: dict[str, Any]) -> None:
    """Every rank's part of the tensors, in a file of its own. Where a rank fails, all do, with the error of the first
    that did."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    class Writer(FileSystemWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            try:
                return super().write_data(plan, planner)
            except RuntimeError as error:
                raise refusal(error) or error from None  # here, where its cause is known: it travels without

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about collectives between CPUs: gloo is what we want
            save(shards, storage_writer=Writer(folder))
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def _read_shards(folder: Path, ranks: Ranks) -> dict[str, Any]:
    """The tensors of a folder, sharded over ``ranks`` as FSDP2 shards them. Each rank reads what it needs and asks no
    other."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    described = FileSystemReader(folder).read_metadata().state_dict_metadata
    shards: dict[str, Any] = {}
    for name, of in described.items():
        assert isinstance(of, TensorStorageMetadata)
        shards[name] = ranks.empty(of.size, of.properties.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about reading without the other ranks: each reads its own
        load(shards, checkpoint_id=folder, no_dist=True)
    return shards


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def _digest(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, None if its bytes are those that were written."""
    try:
        pairs = [line.split() for line in (path / SUMS).read_text(encoding="utf-8").split("\n") if line] or [[]]
        for written, name in pairs:
            if _digest(path / name) != written:
                return f"the checksum of {name} differs"
        files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()} - {SUMS}
        unsummed = files.symmetric_difference(name for _, name in pairs)
        return f"{SUMS} does not name {', '.join(sorted(unsummed))}" if unsummed else None
    except (OSError, ValueError) as error:
        return str(error)


def random_states() -> dict[str, Any]:
    """The states of the global generators of Python, NumPy and torch, of every CUDA device too where CUDA is in use."""
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 (the global generator is what an environment may use)
    plain = {"key": numpy_state["state"]["key"].tolist(), "pos": int(numpy_state["state"]["pos"])}
    return {
        "python": random.getstate(),
        "numpy": {
            **numpy_state,
            "state": plain,
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Set what `random_states` gave. The states of CUDA devices that are not here are left out."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])  # noqa: NPY002
    torch.set_rng_state(states["torch"])
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, device)

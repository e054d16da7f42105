"""Checkpoints on disk: folders that appear whole or not at all, and the global sources of randomness that belong in them.

The format is torch's (`torch.save`, read back with ``weights_only``), the checksum file is that of ``sha256sum``. A state holds tensors,
numbers, text, lists, tuples and dictionaries.
"""

import hashlib
import os
import random
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

STATE, SUMS = "state.pt", "SHA256SUMS"
PARTIAL, DAMAGED = ".partial", ".damaged"


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write ``state`` as ``folder``/step-<step>, then remove all checkpoints but the newest ``keep``.

    It is written and synced under another name and then renamed: whenever the process dies, the checkpoints before this one are whole.
    OSError where it cannot be written, a full disk for one; nothing is left of it then, and nothing else is touched.
    """
    target = folder / f"step-{step:08d}"
    partial = target.with_name(target.name + PARTIAL)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f"*{PARTIAL}"):  # by a process that was killed
            shutil.rmtree(left)
        partial.mkdir()
        with open(partial / STATE, "wb") as file:
            torch.save(state, file)
        (partial / SUMS).write_text(f"{_digest(partial / STATE)}  {STATE}\n", encoding="utf-8")
        for path in (partial / STATE, partial / SUMS, partial):
            sync(path)
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
        sync(folder)
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old.rename(old.with_name(old.name + PARTIAL)))
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        refusal = (
            error if isinstance(error, OSError) else error.__context__
        )  # torch's writer hides a failed write behind an error of its own
        if isinstance(refusal, OSError):
            raise OSError(f"{target}: {refusal}") from error
        raise
    return target


def newest(folder: Path) -> dict[str, Any] | None:
    """The state of the newest checkpoint that is whole, its tensors on the CPU; None where there is no checkpoint.

    A damaged one is a warning and renamed, and the one before it is taken. ValueError if all are damaged.
    """
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
        return torch.load(path / STATE, map_location="cpu", weights_only=True)
    if damaged:
        raise ValueError(f"a checkpoint must match its {SUMS}, and none does: {', '.join(damaged)}")
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first."""
    return sorted(path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk and not only in its cache."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def _fault(path: Path) -> str | None:
    """What is wrong with a checkpoint, None if its bytes are those that were written."""
    try:
        written, name = (path / SUMS).read_text(encoding="utf-8").split()
        return None if _digest(path / name) == written else f"the checksum of {name} differs"
    except (OSError, ValueError) as error:
        return str(error)


def random_states() -> dict[str, Any]:
    """The states of the global generators of Python, NumPy and torch, of every CUDA device too where CUDA is in use."""
    numpy_state: Any = np.random.get_state(legacy=False)  # noqa: NPY002 (the global generator is what an environment may use)
    plain = {"key": numpy_state["state"]["key"].tolist(), "pos": int(numpy_state["state"]["pos"])}
    return {
        "python": random.getstate(),
        "numpy": {**numpy_state, "state": plain, "has_gauss": int(numpy_state["has_gauss"]), "gauss": float(numpy_state["gauss"])},
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

"""Peak extra memory of one call: on a CPU the growth of the resident set in a process of its own, on a GPU what the
allocator saw."""

import ctypes
import gc
import multiprocessing
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _kilobytes(field: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(field + ":"))


def _settle() -> None:
    """Give freed memory back to the system, so that the next call cannot live in it unseen."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _child(build: Callable[[], tuple[Callable[[], Any], Callable[[], Any]]], compiles: bool, pipe: Connection) -> None:
    try:
        warm, call = build()
        warm()
        if compiles:  # compilers need memory too, once; it is not what is asked for
            call()
        _settle()
        CLEAR.write_text("5")  # the high-water mark starts again from here
        before = _kilobytes("VmRSS")
        call()
        pipe.send(1024 * max(0, _kilobytes("VmHWM") - before))
    except Exception as error:  # whatever it is, the parent reports it under the provider's name
        pipe.send(f"{type(error).__name__}: {error}")


def cpu_peak(build: Callable[[], tuple[Callable[[], Any], Callable[[], Any]]], compiles: bool) -> int | None:
    """Bytes by which the resident set grew above the inputs; None where Linux does not tell.

    ``build`` makes a small call, which loads libraries and starts threads, and the call itself. It runs in a fork of
    this process,
    which must not have computed anything yet: thread pools do not survive a fork. RuntimeError with the reason if the
    call failed.
    """
    if not sys.platform.startswith("linux") or not CLEAR.exists():
        return None
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(build, compiles, theirs))
    process.start()
    theirs.close()
    try:
        answer = mine.recv()
    except EOFError:
        answer = "the process was killed"
    process.join()
    if isinstance(answer, str):
        raise RuntimeError(answer)
    return answer


def cuda_peak(call: Callable[[], Any]) -> int:
    """Bytes that the CUDA allocator held above what was there before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del result
    return peak

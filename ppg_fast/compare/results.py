"""Results of a comparison, a JSON file for each class and seed: none is computed twice, and a killed comparison keeps
those it has."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ppg_fast.writing import opened

RESULTS = "results"
MEASUREMENT = "gradient"


@dataclass(frozen=True)
class Run:
    """One run, of one result. ``version``: tabular, language or logged. ``policy_class``: one to train with, or
    `MEASUREMENT` of all of them at the start."""

    version: str
    problem: str
    policy_class: str
    seed: int

    @property
    def name(self) -> str:
        """Of its file; digits of a hash keep apart what file systems take for the same."""
        text = "-".join(str(v) for v in asdict(self).values())
        plain = "".join(c if c.isalnum() or c == "-" else "_" for c in text)
        return f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:6]}.json"


Work = Callable[[Sequence[Run]], list[dict[str, Any]]]


def read(folder: Path, run: Run) -> dict[str, Any] | None:
    """The result of ``run``, None where there is none (or half of one, which cannot be: files appear whole)."""
    path = folder / RESULTS / run.name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def compute(
    folder: Path, parts: Sequence[Sequence[Run]], work: Work, jobs: int
) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Compute the results that are missing, part by part, ``jobs`` of them at a time in processes of one thread each;
    yield each as it is done.

    ``work`` computes the runs of a part together, and must be picklable for jobs > 1. A part that fails does not stop
    the others; the first failure is raised at the end.
    """
    (folder / RESULTS).mkdir(parents=True, exist_ok=True)
    missing = [part for runs in parts if (part := [run for run in runs if read(folder, run) is None])]
    if jobs <= 1:
        for part in missing:
            yield from zip(part, _compute(folder, part, work), strict=True)
        return
    import multiprocessing

    failure: BaseException | None = None
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_one_thread) as pool:
        futures = {pool.submit(_compute, folder, part, work): part for part in missing}
        try:
            for future in as_completed(futures):
                if (error := future.exception()) is not None:
                    failure = failure or error
                    continue
                yield from zip(futures[future], future.result(), strict=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():  # told to stop: nobody waits for what they compute
                child.terminate()
            raise
    if failure:
        raise failure


def _one_thread() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group: the first process ends the others
    import torch

    torch.set_num_threads(1)


def _compute(folder: Path, part: Sequence[Run], work: Work) -> list[dict[str, Any]]:
    start = time.perf_counter()
    found = work(part)
    seconds = round((time.perf_counter() - start) / len(part), 3)
    found = [{**asdict(run), "seconds": seconds, **result} for run, result in zip(part, found, strict=True)]
    for run, result in zip(part, found, strict=True):
        write_whole(folder / RESULTS / run.name, json.dumps(result))
    return found


def write_whole(path: Path, text: str) -> None:
    """Write a file that is whole, or as it was, whenever the process is killed."""
    with opened(path) as file:
        file.write(text)

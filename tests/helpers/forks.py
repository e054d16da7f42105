"""Ranks as forks of one process that has imported everything: a rank then costs its work and not its imports, which for
a tiny run are most of it."""

import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

SECONDS = 300  # the longest that a fork lives, also where whoever began it is killed


def fork(run: Callable[[], int | None], environment: dict[str, str], log: Path | None = None) -> int:
    """The process id of a fork in which ``run`` runs and whose exit status it gives; its output goes to ``log`` where
    there is one."""
    sys.stdout.flush()
    sys.stderr.flush()
    if child := os.fork():
        return child
    status = 1
    signal.alarm(SECONDS)
    try:
        if log is not None:
            output = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
        os.environ.update(environment)
        status = run() or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def meeting(world: int) -> list[dict[str, str]]:
    """What torchrun tells each of ``world`` ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    of_all = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**of_all, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]


def run_ranks(world: int, run: Callable[[], int | None]) -> None:
    """Run ``run`` on each of ``world`` ranks; RuntimeError where one ends badly, and the others are ended."""
    running = {fork(run, of): of["RANK"] for of in meeting(world)}
    while running:
        child, status = os.wait()
        rank = running.pop(child)
        if status:
            for other in running:
                os.kill(other, signal.SIGKILL)
            raise RuntimeError(f"rank {rank} ended with wait status {status}")

"""How a process is told to stop: the first signal ends what it does in good order, the second ends the process.

SIGINT, SIGTERM and SIGHUP are treated alike. Where a step is under way, whose weights must not be left half changed,
the first is only noted, and `check` raises `Stopped` between two forward passes; where nothing can be lost
(`interruptible`: waiting for servers, a user's own functions), it is raised at once.
"""

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HANGUPS = 1.0  # seconds in which a terminal that closes may say so twice, by the kernel and by its shell
POLL = 0.05  # seconds

Item = TypeVar("Item")
Result = TypeVar("Result")


class Stopped(KeyboardInterrupt):
    """A signal, now ``number``, asked to stop. No Exception: no library's or user's ``except Exception`` holds it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def __str__(self) -> str:
        return signal.Signals(self.number).name


class _State:
    """Of the process, as signals are: what was asked for, and whether that may be raised anywhere."""

    number = 0
    at_once = False


_state = _State()


def requested() -> int:
    """The first signal that came while somebody listened; 0: none."""
    return _state.number


def check() -> None:
    """Stopped where a signal came."""
    if _state.number:
        raise Stopped(_state.number)


def sleep(seconds: float) -> None:
    """Wait, in any thread; Stopped as soon as a signal comes."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        check()
        time.sleep(min(POLL, left))
    check()


@contextmanager
def interruptible() -> Iterator[None]:
    """A block in which the first signal is raised at once, whatever runs in it."""
    check()
    before, _state.at_once = _state.at_once, True
    try:
        check()  # what came in between
        yield
    finally:
        _state.at_once = before


@contextmanager
def on_signals(at_once: bool = True, notice: str = "", repeats: float = 0.0) -> Iterator[None]:
    """Listen while the block runs: the first signal is raised, or noted for `check`, the second ends the process at
    once with status 128 + its number.

    ``notice``: said on stderr at the first. ``repeats``: seconds in which further signals are the first once more, for
    launchers that pass on what their whole group was sent. A SIGHUP that is ignored (nohup) stays so. Without effect in
    threads other than the main one, which is the only one that Python lets listen.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: object) -> None:
        if not _state.number:
            _state.number = number
            if _state.at_once:
                raise Stopped(number)

    before = _state.number, _state.at_once
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # a thread, since the main one may be inside of a long operation, where Python calls no handler
    watcher = threading.Thread(target=_watch, args=(reader, notice, repeats), daemon=True, name="signals")
    watcher.start()
    _state.at_once = at_once
    ignored = [n for n in (signal.SIGHUP,) if signal.getsignal(n) is signal.SIG_IGN]
    handlers = {number: signal.signal(number, note) for number in SIGNALS if number not in ignored}
    try:
        yield
    finally:
        _state.number, _state.at_once = before
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(writer)  # which ends the watcher
        watcher.join()
        os.close(reader)


def _watch(reader: int, notice: str, repeats: float) -> None:
    """Read the numbers of signals as they come in; say that the first was heard, end the process at the second."""
    first = 0.0
    while numbers := os.read(reader, 1):
        number, now = numbers[0], time.monotonic()
        if number not in SIGNALS:
            continue
        if not first:
            first = now
            if notice:
                _say(f"{signal.Signals(number).name}: {notice}")
        elif now - first >= max(repeats, HANGUPS if number == signal.SIGHUP else 0.0):
            for child in multiprocessing.active_children():
                child.kill()
            _say(f"{signal.Signals(number).name} again: ended at once")
            os._exit(128 + number)


def _say(text: str) -> None:
    """On stderr past Python's buffers; a terminal that is gone cannot hear it, and one that had a bar gets its cursor
    back."""
    shown = "\x1b[?25h" if os.isatty(2) else ""
    with suppress(OSError):
        os.write(2, f"{shown}ppg-fast: {text}\n".encode())


def side_by_side(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, name: str = "worker"
) -> list[Result]:
    """``function`` of each item in threads, ``workers`` at a time, in the items' order; Stopped at the first signal.

    After the first error no further item is begun, and those under way are waited for no longer: the threads are
    daemons, so that no process waits for a server that does not answer.
    """
    waiting: queue.SimpleQueue[tuple[int, Item]] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
    over = threading.Event()
    for pair in enumerate(items):
        waiting.put(pair)

    def work() -> None:
        while not over.is_set():
            try:
                number, item = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                done.put((number, function(item), None))
            except BaseException as error:
                over.set()
                done.put((number, None, error))

    for _ in range(min(workers, len(items))):
        threading.Thread(target=work, daemon=True, name=name).start()
    results: dict[int, Result] = {}
    try:
        while len(results) < len(items):
            check()
            try:
                number, result, error = done.get(timeout=POLL)
            except queue.Empty:
                continue
            if error is not None:
                raise error
            results[number] = result
    finally:
        over.set()
    return [results[number] for number in range(len(items))]


def as_command(main: Callable[..., int]) -> Callable[..., int]:
    """A command line whose exit status after a signal is 128 + its number, as a shell counts."""
    from functools import wraps

    @wraps(main)
    def run(*arguments: Any, **options: Any) -> int:
        try:
            with on_signals():
                return main(*arguments, **options)
        except Stopped as stop:
            _say(f"stopped ({stop})")
            return 128 + stop.number

    return run

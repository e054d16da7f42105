"""One part after the other, each in a process of its own and bounded in time; the results file is whole after every
line of theirs."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import result_file

TAIL = 3000  # characters of a part's output that are kept
LEAST = 5.0  # seconds under which no part is started
Collected = tuple[dict[str, Any], str | None]  # what a part found, and why it failed


@dataclass(frozen=True)
class Part:
    """Something to run. ``commands`` run one after the other in ``folder`` and share ``limit`` seconds; in their words
    {seconds} is what each may plan with. Lines of JSON that they append to ``lines`` are results. ``collect(exit
    statuses, output, lines)`` says what was found, and why the part failed, if it did.
    """

    name: str
    limit: float
    commands: Sequence[Sequence[str]]
    collect: Callable[[list[int | None], str, list[dict[str, Any]]], Collected]
    lines: Path | None = None
    folder: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    missing: str | None = None  # why it cannot be run here
    after: Callable[[], None] = lambda: None


def header(command: str, commit: str | None = None) -> dict[str, Any]:
    """Of a GPU run: `result_file.header`, and the parts to come."""
    return result_file.header(command, commit=commit) | {"parts": {}}


class Store:
    """The results file, whole whenever it is looked at. ``path``: where it was written last."""

    def __init__(self, folder: Path, name: str, content: dict[str, Any]) -> None:
        self.folder, self.name, self.content = folder, name, content
        self.write()

    def write(self) -> None:
        self.path = result_file.write(self.folder, self.name, self.content)

    def take(self, part: str, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Move what belongs to the whole file to its place; what is left belongs to the part."""
        left = []
        for line in lines:
            known = {
                name: line.pop(name) for name in ("machine_info", "versions", "benchmarks", "missing") if name in line
            }
            self.content["machine_info"] |= known.get("machine_info", {})
            self.content["ppg_fast"]["versions"] |= known.get("versions", {})
            self.content["ppg_fast"]["missing"] |= known.get("missing", {})
            self.content["benchmarks"] += [{**entry, "part": part} for entry in known.get("benchmarks", [])]
            left += [line] if line else []
        return left


class Lines:
    """The JSON lines of a part, as they come."""

    def __init__(self, path: Path | None) -> None:
        self.path, self.read = path, 0
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")

    def new(self) -> list[dict[str, Any]]:
        if self.path is None or not self.path.exists():
            return []
        with self.path.open() as file:
            file.seek(self.read)
            text = file.read()
        whole = text[: text.rfind("\n") + 1]  # the last line may still be on its way
        self.read += len(whole.encode())
        return [json.loads(line) for line in whole.splitlines()]


def run_part(
    part: Part, limit: float, store: Store, log: Path, clock: Callable[[], float] = time.monotonic
) -> dict[str, Any]:
    """Run one part within ``limit`` seconds; its record, which has been in the file since its first line."""
    each = str(max(1, int(0.9 * limit / len(part.commands))))
    commands = [[word.replace("{seconds}", each) for word in command] for command in part.commands]
    record: dict[str, Any] = {
        "status": "running",
        "limit_s": round(limit, 1),
        "command": [" ".join(c) for c in commands],
        "results": [],
    }
    store.content["parts"][part.name] = record
    store.write()
    start, lines, statuses = clock(), Lines(part.lines), []

    def poll() -> None:
        if found := store.take(part.name, lines.new()):
            record["results"] += found
        record["seconds"] = round(clock() - start, 1)
        store.write()

    with log.open("w") as output:
        for command in commands:
            statuses.append(_bounded(command, part, output, start + limit, poll, clock))
            if statuses[-1] is None:
                break
    poll()
    text = log.read_text(errors="replace")
    part.after()
    found, reason = part.collect(statuses, text, record["results"])
    if None in statuses:
        reason = f"stopped after {limit:.0f} s" + (f"; {reason}" if reason else "")
    record |= {"status": "failed" if reason else "passed", **({"reason": reason} if reason else {}), **found}
    if reason:
        record["output"] = text[-TAIL:]
    store.write()
    return record


def _bounded(
    command: Sequence[str],
    part: Part,
    output: Any,
    deadline: float,
    poll: Callable[[], None],
    clock: Callable[[], float],
) -> int | None:
    """The command's exit status, None where it was stopped at the deadline; 127 where it cannot be started."""
    try:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env={**os.environ, **part.environment},
            cwd=part.folder, preexec_fn=os.setpgrp,
        )  # fmt: skip
    except OSError as error:
        output.write(f"{command[0]}: {error}\n")
        return 127
    try:
        while (left := deadline - clock()) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=min(1.0, left))
            poll()
        return None
    finally:
        _stop(process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    """End the process and what it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(timeout=3)
    process.wait()


def run(
    parts: Sequence[Part], store: Store, seconds: float, logs: Path, clock: Callable[[], float] = time.monotonic
) -> bool:
    """Run the parts in order within ``seconds``; whether all passed. One that fails or is missing does not stop the
    others."""
    logs.mkdir(parents=True, exist_ok=True)
    end = clock() + seconds
    store.write()
    for part in parts:
        left = end - clock()
        if reason := part.missing or (f"no time left: {max(left, 0):.0f} s of {seconds:.0f}" if left < LEAST else None):
            store.content["parts"][part.name] = {"status": "missing", "reason": reason}
            store.write()
        else:
            print(f"{part.name} ...", flush=True)
            run_part(part, min(part.limit, left), store, logs / f"{part.name}.log", clock)
        record = store.content["parts"][part.name]
        say = f"{record.get('seconds', 0):6.1f} s  {part.name:<10} {record['status']}" + (
            f": {record['reason']}" if "reason" in record else ""
        )
        print(say, flush=True)
    return all(store.content["parts"][part.name]["status"] == "passed" for part in parts)


def stop_on_signals() -> None:
    """A kill that can be caught ends the running part too, whose results are in the file already."""

    def leave(number: int, _: Any) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)

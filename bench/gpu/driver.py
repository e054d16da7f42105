"""One part after the other, each in processes of its own and bounded in time; the results file is whole after every
line of theirs."""

import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .lines import RESTART
from .process import LEAST, Supervised, attempt
from .process import end as end_all
from .store import Store, pack

TAIL = 3000  # characters of a part's output that are kept in the results file
TICK = 0.2  # seconds between two looks
ANSWER = 25.0  # seconds within which a device that works answers a process that imports torch
Collected = tuple[dict[str, Any], str | None]  # what a part found, and why it failed


@dataclass(frozen=True)
class Part:
    """Something to run. ``commands`` run side by side in ``folder``, for ``limit`` seconds at most, and for ``most``
    where other parts have left time. In their words {lines} is the file for the lines of `lines.append` and {until} the
    second of the epoch by which they should be done. ``collect(record, output)`` says what was found, and why the part
    failed, if it did. ``estimate``: seconds that it is expected to take, and ``reason`` why.
    """

    name: str
    limit: float
    commands: Sequence[Sequence[str]]
    collect: Callable[[dict[str, Any], str], Collected]
    most: float = 0.0
    estimate: float = 0.0
    reason: str = ""
    folder: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)
    missing: str | None = None  # why it cannot be run here
    on_device: bool = True
    after: Callable[[], None] = lambda: None


def run_part(part: Part, limit: float, store: Store) -> dict[str, Any]:
    """Run one part within ``limit`` seconds; its record, which has been in the file since its first line."""
    start, many = time.monotonic(), len(part.commands) > 1
    stems = [store.logs / (f"{part.name}-{n}" if many else part.name) for n in range(len(part.commands))]
    until = str(int(time.time() + limit - 2.0 - 0.03 * limit))
    commands = [
        [word.replace("{until}", until).replace("{lines}", f"{stem}.jsonl") for word in command]
        for stem, command in zip(stems, part.commands, strict=True)
    ]
    record: dict[str, Any] = {
        "status": "running", "limit_s": round(limit, 1), "estimate_s": part.estimate, "seconds": 0.0,
        "command": [" ".join(command) for command in commands], "results": [], "cases": [],
    }  # fmt: skip
    store.begin(part.name, record)
    logs = [Path(f"{stem}.log") for stem in stems]
    running = [
        Supervised(words, Path(f"{stem}.jsonl"), log, part.folder, part.environment)
        for stem, words, log in zip(stems, commands, logs, strict=True)
    ]

    def take(lines: list[dict[str, Any]]) -> None:
        record["seconds"] = round(time.monotonic() - start, 1)
        store.take(part.name, lines)
        store.write()

    try:
        take([line for process in running for line in process.poll(limit)])
        while (left := start + limit - time.monotonic()) > 0 and not all(process.over for process in running):
            time.sleep(min(TICK, left))
            if lines := [line for process in running for line in process.poll(left)]:
                take(lines)
    finally:  # also where a signal ends the driver
        cut = [process.process for process in running if not process.over]
        end_all(*cut)  # at once, before each is looked at
        take([line for process in running for line in process.stop()])
    record["statuses"] = [process.status for process in running]
    text = "".join(log.read_text(errors="replace") for log in logs)
    try:
        part.after()
        found, reason = part.collect(record, text)
    except Exception as error:  # what a tool said was not what was expected; the other parts go on
        found, reason = {}, f"not understood: {type(error).__name__}: {error}"
    reasons = [f"stopped after {limit:.0f} s"] if cut else []
    reasons += ["a process did not end when it was killed"] if any(process.stuck for process in running) else []
    reason = "; ".join([*reasons, *([reason] if reason else [])])
    record |= {"status": "failed" if reason else "passed", **({"reason": reason} if reason else {}), **found}
    if reason:
        record["output"] = text[-TAIL:]
    for log in logs:
        pack(log)
    store.write()
    return record


def suspicious(record: dict[str, Any]) -> bool:
    """Whether the part may have left a device that answers nobody."""
    statuses = record.get("statuses", [])
    bad = any(status is None or status < 0 or status == RESTART for status in statuses)
    return bad or any(case["outcome"] in ("hung", "died", "stopped") for case in record.get("cases", []))


def run(parts: Sequence[Part], store: Store, seconds: float, probe: Sequence[str] = ()) -> bool:
    """Run the parts in order within ``seconds``; whether all passed. One that fails or is missing does not stop the
    others.

    A part may take its own limit and what the others before it have left, the limits of those to come kept back. After
    one that may have spoilt the device, ``probe`` says whether it answers.
    """
    end, trust = time.monotonic() + seconds, True
    announce(parts, seconds)
    for number, part in enumerate(parts):
        if store.has(part.name):
            _say(part.name, store.content["parts"][part.name], " before, at the same commit")
            continue
        reason = part.missing
        if not reason and part.on_device and not trust:
            log = store.logs / "probe.log"
            trust = attempt(probe, part.folder, part.environment, min(ANSWER, end - time.monotonic()), log)
            reason = None if trust else f"the device did not answer within {ANSWER:.0f} s after what went before"
        left = end - time.monotonic()
        later = sum(p.limit for p in parts[number + 1 :] if not p.missing)
        reason = reason or (f"no time left: {max(left, 0):.0f} s of {seconds:.0f}" if left < LEAST else None)
        if reason:
            store.begin(part.name, {"status": "missing", "reason": reason, "estimate_s": part.estimate})
            store.write()
        else:
            print(f"{part.name} ...", flush=True)
            record = run_part(part, min(left, max(part.limit, min(part.most, left - later))), store)
            trust = trust and not (probe and suspicious(record))
        _say(part.name, store.content["parts"][part.name])
    return all(store.content["parts"][part.name]["status"] == "passed" for part in parts)


def announce(parts: Sequence[Part], seconds: float) -> None:
    """What is to come, before anything has run."""
    print(f"{'part':<10} {'about':>6} {'limit':>6}   of {seconds:.0f} s")
    for part in parts:
        say = "" if part.missing else f"{part.estimate:4.0f} s {part.limit:4.0f} s   {part.reason}"
        print(f"{part.name:<10} {say or f'              {part.missing}'}")
    there = [part for part in parts if not part.missing]
    print(f"{'together':<10} {sum(p.estimate for p in there):4.0f} s {sum(p.limit for p in there):4.0f} s", flush=True)


def _say(name: str, record: dict[str, Any], more: str = "") -> None:
    reason = f": {record['reason']}" if "reason" in record else ""
    about = f"{record.get('seconds', 0):6.1f} s of about {record.get('estimate_s', 0):.0f}"
    print(f"{about}  {name:<10} {record['status']}{more}{reason}", flush=True)


def stop_on_signals() -> None:
    """A kill that can be caught ends the running part too, whose results are in the file already."""

    def leave(number: int, _: Any) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)

"""What one person has answered: a file of ratings, one line an answer, which is on the disk before it is confirmed."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from ppg_fast.rewards.ratings import Ratings
from ppg_fast.spec import require
from ppg_fast.writing import sync

Place = tuple[str, int | None]  # a dialogue and a turn of it, None where it was compared as a whole


class Answers:
    """The ratings of ``rater`` in the file at ``path``, in the format of `Ratings`; other raters' lines stay.

    Each answer is one write and one fsync: a process that is killed loses none that it has confirmed. ValueError for a
    file that holds something else, and where another process is writing to it.
    """

    def __init__(self, path: Path, rater: str) -> None:
        self.path, self.rater = path, rater
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self.file)
            rule = "must be written by one process at a time, got another one that rates (give another --rater)"
            raise ValueError(f"{path} {rule}") from error
        self.given: dict[Place, float] = {}
        self.last: list[tuple[Place, int]] = []  # of this process: what was answered, and where its line begins
        try:
            self._read()
        except ValueError:
            self.close()
            raise
        sync(path.parent)

    def _read(self) -> None:
        size = os.fstat(self.file).st_size
        if not size:
            return
        for dialogue, turns in Ratings(str(self.path)).ratings.items():
            for turn, raters in turns.items():
                if self.rater in raters:
                    self.given[dialogue, turn] = raters[self.rater]
        if os.pread(self.file, 1, size - 1) != b"\n":
            os.write(self.file, b"\n")

    def add(self, dialogue: str, turn: int | None, rating: float, **more: Any) -> None:
        """Write one answer. ValueError for a second one of the same turn."""
        require((dialogue, turn) not in self.given, f"{dialogue!r}, turn {turn}: rated before; undo it first", rating)
        place = {"id": dialogue} | ({} if turn is None else {"turn": turn})
        line = json.dumps({**place, "rating": rating, "rater": self.rater, **more}).encode() + b"\n"
        begins = os.fstat(self.file).st_size
        try:
            if os.write(self.file, line) < len(line):
                raise OSError(f"{self.path} cannot be written: the disk is full")
            os.fsync(self.file)
        except OSError:  # a part of a line is none
            os.ftruncate(self.file, begins)
            raise
        self.given[dialogue, turn] = rating
        self.last.append(((dialogue, turn), begins))

    def undo(self) -> Place | None:
        """Take the last answer of this process back; what it was about, None where there is none."""
        if not self.last:
            return None
        place, begins = self.last.pop()
        os.ftruncate(self.file, begins)
        os.fsync(self.file)
        del self.given[place]
        return place

    def close(self) -> None:
        """Let others write."""
        os.close(self.file)

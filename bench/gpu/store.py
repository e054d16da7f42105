"""The results file of a GPU run and, beside it, the folder of what its processes said and wrote."""

import gzip
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import result_file

LARGE = 200 * 2**10  # bytes of a log above which it is compressed


def header(command: str, commit: str | None = None) -> dict[str, Any]:
    """Of a GPU run: `result_file.header`, and the parts to come."""
    return result_file.header(command, commit=commit) | {"parts": {}}


class Store:
    """The results file, whole whenever it is looked at. ``path``: where it was written last. ``logs``: the folder.

    ``resume``: what an earlier run of the same commit has found is kept, and so are the lines of its parts.
    """

    def __init__(self, folder: Path, name: str, content: dict[str, Any], resume: bool = False) -> None:
        self.folder, self.name, self.content = folder, name, content
        self.logs = folder / f"{name}.logs"
        before = result_file.load(folder).get(name) if resume else None
        if before and before["commit_info"] == content["commit_info"]:
            self.content = before
        else:
            shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True, exist_ok=True)
        self.write()

    def write(self) -> None:
        self.path = result_file.write(self.folder, self.name, self.content)

    def has(self, part: str) -> bool:
        """Whether the part has passed before."""
        return self.content["parts"].get(part, {}).get("status") == "passed"

    def begin(self, part: str, record: dict[str, Any]) -> None:
        """What an earlier run found of the part stays in the file until the next `write`."""
        self.content["benchmarks"] = [entry for entry in self.content["benchmarks"] if entry["part"] != part]
        self.content["parts"].pop(part, None)  # the newest one last
        self.content["parts"][part] = record

    def take(self, part: str, lines: Sequence[dict[str, Any]]) -> None:
        """Put what a part's processes have found where it belongs: into the whole file, or into the part's record."""
        record = self.content["parts"][part]
        for line in lines:
            self._take_work(part, record, line)
            self.content["machine_info"] |= line.pop("machine_info", {})
            self.content["ppg_fast"]["versions"] |= line.pop("versions", {})
            self.content["ppg_fast"]["missing"] |= line.pop("missing", {})
            self.content["benchmarks"] += [{**entry, "part": part} for entry in line.pop("benchmarks", [])]
            record["results"] += [line] if line else []

    def _take_work(self, part: str, record: dict[str, Any], line: dict[str, Any]) -> None:
        if "started" in line:
            line.clear()
        elif "ended" in line:
            case = {"name": line["ended"], **{name: line[name] for name in line if name not in ("ended", "missing")}}
            record["cases"].append(case)
            if case["outcome"] in ("hung", "died", "stopped"):
                self.content["ppg_fast"]["missing"][f"{part}: {case['name']}"] = f"{case['outcome']}: {case['message']}"
            line.clear()


def pack(log: Path) -> None:
    """Compress a log that is large."""
    if log.exists() and log.stat().st_size > LARGE:
        with log.open("rb") as plain, gzip.open(f"{log}.gz", "wb") as packed:
            shutil.copyfileobj(plain, packed)
        log.unlink()

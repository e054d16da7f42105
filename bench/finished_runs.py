"""Runs of the trainer in a folder, for a study of several: one that is finished is not done again."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ppg_fast.spec import require

Run = Callable[[list[str]], Any]


def ppg_fast(arguments: list[str]) -> None:
    """The command, in a process of its own."""
    print("ppg-fast", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "ppg_fast", *arguments], check=True)


class FinishedRuns:
    """The runs in ``folder``, of a dataclass of ``settings`` that the folder keeps; ValueError for other ones."""

    def __init__(self, folder: Path, settings: Any, run: Run) -> None:
        self.folder, self.settings, self.run = folder, settings, run
        folder.mkdir(parents=True, exist_ok=True)
        kept, given = folder / "settings.json", asdict(settings)
        known = json.loads(kept.read_text()) if kept.exists() else given
        require(known == given, f"{folder} must be of the same settings (or choose another folder)", given)
        kept.write_text(json.dumps(given) + "\n")

    def train(self, name: str, *flags: Any) -> None:
        """The run ``name``; one that was stopped begins anew."""
        folder = self.folder / name
        summary = folder / "summary.json"
        if summary.exists() and json.loads(summary.read_text())["status"] == "finished":
            return
        every = ["--output-dir", folder, "--overwrite", "--no-progress", "--threads", 1]
        self.run(["train", *map(str, [*every, "--eval-dialogues", self.settings.eval_dialogues, *flags])])

    def rows(self, name: str) -> list[dict[str, Any]]:
        """What the run logged."""
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().split("\n") if line]

    def summary(self, name: str) -> dict[str, Any]:
        """What the run says of itself."""
        return json.loads((self.folder / name / "summary.json").read_text())

"""Settings that were tried, and what came of them: `python -m ppg_fast.bench.real.tried RUN...`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppg_fast.config import read_yaml

from .. import machine, result_file
from . import command, persona

SHOWN = ("lora_target_modules", "learning_rate", "warmup_steps", "num_prompts", "num_generations", "max_turns")
SHOWN += ("max_new_tokens", "max_steps", "policy_class", "lora_rank", "seed")


def attempt(place: Path) -> dict[str, Any]:
    """What a run's folder says of its settings and of the returns so far."""
    settings, train = read_yaml(str(place / "config.yaml")), command.rows(place, "train")
    return {
        "name": place.name,
        "settings": {name: settings[name] for name in SHOWN},
        "points": persona.points(place),
        "returns": [row["reward"] for row in train],
        "step_seconds": sum(row["step_time"] for row in train) / max(1, len(train)),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Write ``real_tried.cpu.json``."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description="Store what was tried.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders that `ppg-fast train` wrote")
    parser.add_argument("--output", type=Path, default=result_file.FOLDER)
    given = parser.parse_args(argv)
    named = " ".join(place.name for place in given.runs)
    header = machine.header(f"python -m ppg_fast.bench.real.tried {named}", "cpu")
    result_file.write(given.output, "real_tried.cpu", {**header, "tried": [attempt(place) for place in given.runs]})


if __name__ == "__main__":
    main()

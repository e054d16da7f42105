"""`ppg-fast score`."""

import warnings
from pathlib import Path
from typing import Any

from ppg_fast.cli.common import lacks, show_warning


def add(commands: Any) -> None:
    from ppg_fast.config import REWARD_SETTINGS, add_flags

    score = commands.add_parser(
        "score", help="give every turn of logged dialogues its reward: Python, reward model, judge, human ratings"
    )
    score.add_argument("data", help="logged dialogues (formats: docs/data.md)")
    score.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="our JSONL with turn_rewards filled; one that exists is an error",
    )
    score.add_argument("--overwrite", action="store_true", help="replace the output")
    add_flags(score, REWARD_SETTINGS)


def run(flags: dict[str, object]) -> int:
    from ppg_fast.config import make_config

    data, output, overwrite = (flags.pop(name) for name in ("data", "output", "overwrite"))
    config = make_config(flags)
    warnings.showwarning = show_warning
    if lacks("score"):  # reward models are transformers', and the package of jobs imports it
        return 1
    from ppg_fast.jobs.score import score_file

    score_file(str(data), Path(str(output)), config, overwrite=bool(overwrite))
    return 0

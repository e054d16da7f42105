"""`ppg-fast reward`."""

import warnings
from pathlib import Path
from typing import Any

from ppg_fast.cli.common import lacks, show_warning


def add(commands: Any) -> None:
    from ppg_fast.config import REWARD_TRAINING, REWARD_TRAINING_DEFAULTS, add_flags

    reward = commands.add_parser(
        "reward",
        help="train a reward model: pairs, scores, ratings of turns, demonstrations against own rollouts",
        epilog="The settings are those of train. The same command goes on where it was stopped.",
    )
    reward.add_argument("data", help="labelled dialogues (docs/reward_models.md)")
    reward.add_argument("-o", "--output", required=True, metavar="FOLDER", help="new folder, for --reward model:FOLDER")
    reward.add_argument("--model", required=True, metavar="FOLDER", help="language or reward model to begin with")
    reward.add_argument(
        "--ratings", metavar="FILE", help="ratings of the data's turns (JSONL: id, turn, rating, rater)"
    )
    reward.add_argument("--own", metavar="FILE", help="own rollouts: the data are demonstrations against them")
    reward.add_argument("--center", type=float, default=0.01, metavar="FLOAT", help="weight of squared rewards [0.01]")
    reward.add_argument(
        "--patience", type=int, default=3, metavar="INT", help="evaluations without a lower held-out loss [3]"
    )
    add_flags(reward, REWARD_TRAINING, REWARD_TRAINING_DEFAULTS)


def run(flags: dict[str, Any]) -> int:
    from ppg_fast.config import REWARD_TRAINING_DEFAULTS, make_config

    own = {name: flags.pop(name) for name in ("data", "model", "ratings", "own", "center", "patience")}
    output = Path(str(flags.pop("output")))
    config = make_config(REWARD_TRAINING_DEFAULTS, flags)
    if lacks("reward"):
        return 1
    warnings.showwarning = show_warning
    from transformers.utils import logging

    logging.set_verbosity_error()  # its report of a new head
    logging.disable_progress_bar()
    from ppg_fast.jobs.reward_training import Sources, train_reward_model

    train_reward_model(Sources(output=output, **own), config)
    return 0

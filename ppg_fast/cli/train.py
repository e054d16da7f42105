"""`ppg-fast train`."""

import warnings
from pathlib import Path
from typing import Any

from ppg_fast.cli.common import lacks, show_warning


def add(commands: Any) -> None:
    from ppg_fast.config import add_flags

    train = commands.add_parser(
        "train",
        help=(
            "train a policy: in the built-in persona interview, on your prompts (--prompts), offline on logged "
            "dialogues (--data)"
        ),
        epilog="Flags win over the file, the file over the defaults.",
    )
    train.add_argument("--config", metavar="FILE", help="YAML file of settings; the keys are the flags' names")
    train.add_argument(
        "--resume",
        nargs="?",
        const=True,
        metavar="RUN",
        help=(
            "go on with the run in this folder (default: in --output-dir) from its newest checkpoint; other flags "
            "win over its settings"
        ),
    )
    add_flags(train)


def run(flags: dict[str, object]) -> int:
    if lacks("train"):
        return 1
    from ppg_fast.config import DEFAULTS, OF_PROMPTS, OF_REWARDS, make_config, read_yaml

    file, run = flags.pop("config", None), flags.pop("resume", None)
    sources = [read_yaml(str(file)) if file else {}, flags]
    if run is not None:
        folder = Path(make_config(*sources).output_dir if run is True else str(run))
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"--resume wants the folder of a run, with its config.yaml, got {str(folder)!r}")
        if flags.get("overwrite"):
            raise ValueError("--resume and --overwrite exclude each other, got both")
        if Path(str(flags.get("output_dir", folder))) != folder:
            raise ValueError(f"--resume RUN goes on in RUN itself, got also --output-dir {flags['output_dir']!r}")
        sources = [read_yaml(str(folder / "config.yaml")), *sources, {"output_dir": str(folder)}]
    config = make_config(*sources)
    unread = {} if config.prompts else dict.fromkeys(OF_PROMPTS, "without prompts")
    unread |= dict.fromkeys(OF_REWARDS, "with data (ppg-fast score rewards logged dialogues)") if config.data else {}
    for name, why in unread.items():
        if getattr(config, name) != DEFAULTS[name]:
            raise ValueError(f"{name} has no effect {why}, got {getattr(config, name)!r}")
    warnings.showwarning = show_warning
    from transformers.utils import logging

    logging.disable_progress_bar()  # there is one of ours
    if config.reward_model:
        logging.set_verbosity_error()  # its report of a new head
    from ppg_fast.jobs import run_job

    return run_job(config, resume=run is not None)

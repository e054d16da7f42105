"""`ppg-fast inspect`."""

import warnings
from pathlib import Path
from typing import Any

from ppg_fast.cli.common import lacks, show_warning

SETTINGS = (  # those of training that decide what is read and what it is credited for
    *("prompts", "strict", "allow_negative_rewards", "model", "vocab_size", "template_date"),
    *("chat_template", "chat_template_kwargs", "tools"),
    *("policy_class", "gamma", "baseline", "loss_type", "beta", "max_dialogue_tokens"),
)


def add(commands: Any) -> None:
    from ppg_fast.config import add_flags

    inspect = commands.add_parser(
        "inspect",
        help="show dialogues as a model reads them in training: tokens, turns, rewards, windowed returns, weights",
        epilog="The settings are those of train, and mean the same.",
    )
    inspect.add_argument("data", nargs="?", help="logged dialogues, or openings [data or prompts of --config]")
    inspect.add_argument(
        "--dialogue",
        action="append",
        metavar="ID",
        help="a dialogue by its id, or by its place in the file, from 0; may be given several times [0]",
    )
    inspect.add_argument("--count", type=int, default=1, metavar="INT", help="dialogues to show from each on [1]")
    inspect.add_argument("--html", metavar="FILE", help="write them as one page instead, for a browser")
    inspect.add_argument("--overwrite", action="store_true", help="replace the page")
    inspect.add_argument("--config", metavar="FILE", help="YAML file of settings, as in train")
    add_flags(inspect, SETTINGS)


def run(flags: dict[str, Any]) -> int:
    from ppg_fast.spec import require

    data, names, count, page, overwrite = (
        flags.pop(name) for name in ("data", "dialogue", "count", "html", "overwrite")
    )
    require(count >= 1, "count must be an integer >= 1", count)
    if lacks("inspect"):
        return 1
    from ppg_fast.config import read_yaml
    from ppg_fast.inspection import inspect_file, settings_of

    file = flags.pop("config", None)
    config = settings_of(data, flags, read_yaml(str(file)) if file else {})
    warnings.showwarning = show_warning
    inspect_file(config, names or (), count, None if page is None else Path(page), bool(overwrite))
    return 0

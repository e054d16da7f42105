"""`ppg-fast rate`."""

import getpass
import re
import warnings
from pathlib import Path
from typing import Any

from ppg_fast.cli.common import lacks, show_warning


def add(commands: Any) -> None:
    rate = commands.add_parser("rate", help="rate the turns of dialogues, of a file or of a run while it trains")
    rate.add_argument("source", metavar="RUN_OR_FILE", help="folder of a run with --keep-rollouts, or logged dialogues")
    rate.add_argument("--pairs", action="store_true", help="compare two dialogues of one opening instead")
    rate.add_argument(
        "--least-sure", metavar="MODEL", help="folder of a reward model: what it is least sure of comes first"
    )
    rate.add_argument("--port", type=int, default=8765, metavar="INT", help="of the page, on 127.0.0.1 [8765; 0: any]")
    rate.add_argument("--terminal", action="store_true", help="ask here instead of in a browser")
    rate.add_argument("--rater", metavar="NAME", help="who rates [the user's name]")
    rate.add_argument("-o", "--output", metavar="FILE", help="[RUN/ratings/RATER.jsonl, or FILE.RATER.ratings.jsonl]")


def run(arguments: dict[str, Any]) -> int:
    from ppg_fast.rating.answers import Answers
    from ppg_fast.rating.server import Server
    from ppg_fast.rating.tasks import Tasks
    from ppg_fast.rating.terminal import rate
    from ppg_fast.spec import require

    warnings.showwarning = show_warning
    source, rater, port, pairs = Path(arguments["source"]), arguments["rater"], arguments["port"], arguments["pairs"]
    rater = rater or getpass.getuser()
    require(re.fullmatch(r"[\w.@-]{1,64}", rater) is not None, "a rater must be a name of letters, digits, _.@-", rater)
    require(0 <= port < 65536, "port must be from 0 to 65535", port)
    require(source.exists(), "what is rated must be the folder of a run or a file of dialogues", str(source))
    rewards = None
    if arguments["least_sure"]:
        if lacks("rate --least-sure"):
            return 1
        from ppg_fast.rewards import Reward, RewardModel

        rewards = Reward("model", RewardModel(arguments["least_sure"])).turns
    answers = Answers(Path(arguments["output"] or output_of(source, rater, pairs)), rater)
    try:
        tasks = Tasks(source, answers, pairs, rewards)
        if arguments["terminal"]:
            rate(tasks, input, print)
            return 0
        with Server(tasks, port) as server:
            print(f"{server.url}  (ratings go to {answers.path}; Ctrl-C ends it)", flush=True)
            server.serve_forever()
    finally:
        answers.close()
    return 0


def output_of(source: Path, rater: str, pairs: bool) -> Path:
    """Where the ratings of ``source`` go: a file for each rater, and another for comparisons."""
    kind = "pairs.jsonl" if pairs else "jsonl"
    if source.is_dir():
        return source / "ratings" / f"{rater}.{kind}"
    return source.with_name(f"{source.name}.{rater}.ratings.{kind}")

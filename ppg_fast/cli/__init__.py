"""`ppg-fast train | score | reward | convert | compare | merge | push | bench | rate | prompts | inspect | info`."""

import contextlib
import importlib
import re
import sys
from collections.abc import Sequence
from typing import Any

from ppg_fast.about import about
from ppg_fast.cli import compare, dialogues, export, info, inspection, prompts, rate, reward, score, train
from ppg_fast.console import GONE, drop, keep_going, one_line, print_everything
from ppg_fast.stopping import Stopped, as_command

COMPARE, BENCH = "compare", "bench"  # their flags are their own
# what they make is more than what they print
WORK = ("train", "score", "reward", "convert", COMPARE, "merge", "push", BENCH)
COMMANDS = (*WORK, "rate", "prompts", "inspect", "info")
RUN = {
    "train": train.run,
    "score": score.run,
    "reward": reward.run,
    "convert": dialogues.convert,
    "merge": export.merge,
    "push": export.push,
    "rate": rate.run,
    "prompts": prompts.run,
    "inspect": inspection.run,
    "info": about,
}


@as_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 done, 1 bad input or a missing package, 2 bad usage, 130 Ctrl-C,
    141 nobody reads what it prints any more (info, --help: the others finish their work first), 143 SIGTERM, 129
    SIGHUP."""
    given = list(sys.argv[1:] if argv is None else argv)
    print_everything()
    works = bool(given) and given[0] in WORK and not {"-h", "--help"} & set(given)
    try:
        with keep_going() if works else contextlib.nullcontext():
            try:
                return _run(given, works)
            finally:
                sys.stdout.flush()
    except BrokenPipeError:
        drop(sys.stdout)
        return GONE


def _run(given: list[str], works: bool) -> int:
    unread = next((word for word in given if any("\ud800" <= character <= "\udfff" for character in word)), None)
    if unread is not None:
        coding = sys.getfilesystemencoding()
        print(f"ppg-fast: arguments must be text in {coding} (or set LC_ALL=C.UTF-8), got {unread!r}", file=sys.stderr)
        return 2
    arguments = vars(_parser(given).parse_args(given[:1] if given[:1] in ([COMPARE], [BENCH]) else given))
    command = arguments.pop("command")
    try:
        if command == BENCH:
            return importlib.import_module("ppg_fast.bench.command").main(given[1:])
        if command == COMPARE:
            return compare.run(given[1:])
        return RUN[command](arguments)
    except Stopped:  # a signal: its number is the exit status
        raise
    except KeyboardInterrupt:
        print("ppg-fast: stopped", file=sys.stderr)
        return 130
    # bad input, named; anything else is a bug and shows its trace
    except (ValueError, IndexError, OSError, FloatingPointError) as error:
        if isinstance(error, BrokenPipeError) and not works:
            raise
        print(f"ppg-fast: {one_line(error)}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("allocate memory|out of memory", str(error)):
            raise
        less = "--max-tokens and --rollout-batch make it less, ppg-fast info --model FOLDER estimates it"
        print(f"ppg-fast: out of memory: {one_line(error)[:200]}; {less}", file=sys.stderr)
        return 1


def _parser(given: Sequence[str]) -> Any:
    """The parser of all commands; SystemExit for a command that is none."""
    from ppg_fast import __version__
    from ppg_fast.config import Parser
    from ppg_fast.rules import did_you_mean

    parser = Parser(
        prog="ppg-fast", description="Partial policy gradients for language models on multi-turn dialogues."
    )
    parser.add_argument("--version", action="version", version=f"ppg_fast {__version__}")
    names = " | ".join(COMMANDS)
    commands = parser.add_subparsers(dest="command", required=True, metavar=names)
    train.add(commands)
    score.add(commands)
    reward.add(commands)
    dialogues.add(commands)
    commands.add_parser(COMPARE, add_help=False, help="policy classes side by side, with a report (its own --help)")
    export.add(commands)
    commands.add_parser(BENCH, add_help=False, help="measure against peers and this machine's limits (its own --help)")
    rate.add(commands)
    prompts.add(commands)
    inspection.add(commands)
    info.add(commands)
    if given and given[0] not in COMMANDS and not given[0].startswith("-"):
        parser.error(f"no command {given[0]!r}{did_you_mean(given[0], COMMANDS) or f', only {names}'}")
    return parser

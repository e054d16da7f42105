"""`python -m ppg_fast.bench.real STEP...`: real models, each step into ``real_STEP.cpu.json``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppg_fast.config import Parser

from .. import machine, result_file
from . import logged, persona, speech, wide_vocabulary

STEPS = {step.__name__.rpartition(".")[2]: step for step in (speech, persona, logged, wide_vocabulary)}


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r}")
    return name, value


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m ppg_fast.bench.real", description="Real models through the whole of it.")
    parser.add_argument("steps", nargs="*", help=f"what to do, in this order: {', '.join(STEPS)} [all]")
    parser.add_argument(
        "--data", nargs="+", default=(), metavar="FILE", help="of logged dialogues, for the step logged"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=(), help="of the step persona [100 101 102]")
    parser.add_argument(
        "--set", nargs="+", type=_setting, default=(), metavar="NAME=VALUE", help="settings of training to change"
    )
    parser.add_argument("--work", default="runs/real", help="folder of the runs [runs/real]")
    parser.add_argument("--output", type=Path, default=result_file.FOLDER, help="of the results [bench/results]")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Each step, its results written when it is done; 1 with one line where a step fails."""
    given, parser = list(sys.argv[1:] if argv is None else argv), _parser()
    arguments = parser.parse_args(given)
    if unknown := [name for name in arguments.steps if name not in STEPS]:
        parser.error(f"a step must be one of {', '.join(STEPS)}, got {unknown[0]!r}")
    if "logged" in arguments.steps and not arguments.data:
        parser.error("step logged wants --data FILE, a file of logged dialogues")
    if absent := [name for name in arguments.data if not Path(name).is_file()]:
        parser.error(f"--data must be files, got {absent[0]!r}")
    arguments.set = dict(arguments.set)
    named = (Path(word).name if "/" in word else word for word in given)  # no folders of this machine
    command = " ".join(["python -m ppg_fast.bench.real", *named])
    for name in arguments.steps or STEPS:
        if name == "logged" and not arguments.data:
            print("logged: left out, it wants --data FILE", file=sys.stderr)
            continue
        header = machine.header(command, "cpu")
        try:
            found = STEPS[name].measure(arguments)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 1
        print(f"wrote {result_file.write(arguments.output, f'real_{name}.cpu', {**header, **found})}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

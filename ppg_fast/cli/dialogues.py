"""`ppg-fast convert`: what a file of dialogues was understood as, and the same as our JSONL."""

import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppg_fast.cli.common import show_warning


def add(commands: Any) -> None:
    convert = commands.add_parser(
        "convert", help="show how a file of dialogues is understood, and write it as our JSONL"
    )
    convert.add_argument("data", help="dialogues in any format that docs/data.md lists")
    convert.add_argument(
        "-o", "--output", metavar="FILE", help="our JSONL; one that exists is an error [none: only show]"
    )
    convert.add_argument("--strict", action="store_true", help="a bad dialogue is an error instead of left out")
    convert.add_argument("--overwrite", action="store_true", help="replace the output")


def convert(arguments: dict[str, Any]) -> int:
    from ppg_fast.dialogues.dialogue import read_file, write_dialogues
    from ppg_fast.dialogues.overview import overview
    from ppg_fast.writing import check_output, is_stdout

    warnings.showwarning = show_warning
    data, output = str(arguments["data"]), Path(arguments["output"]) if arguments["output"] else None
    if output:
        check_output(output, bool(arguments["overwrite"]), [Path(data)])
    to: Any = sys.stderr if output and is_stdout(output) else sys.stdout
    say: Callable[[str], None] = functools.partial(print, file=to)
    with warnings.catch_warnings():  # the overview says it all
        warnings.simplefilter("ignore")
        read = read_file(data, bool(arguments["strict"]))
    say(overview(data, read))
    if output:
        write_dialogues(output, read.dialogues)
        say(f"{output}: {len(read.dialogues)} dialogues written")
    return 0

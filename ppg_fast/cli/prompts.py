"""`ppg-fast prompts fit` and `ppg-fast prompts choose`."""

import json
import sys
from pathlib import Path
from typing import Any

from ppg_fast.about import missing


def add(commands: Any) -> None:
    prompts = commands.add_parser("prompts", help="choose a prompt for each query, learned from a log of answers")
    parts = prompts.add_subparsers(dest="part", required=True, metavar="fit | choose")
    fit = parts.add_parser("fit", help="fit a log, and say whether choosing by query beats the best single prompt")
    fit.add_argument(
        "log", help='JSONL of {"query", "prompt", "correct": 0 or 1, "propensity"?} (docs/prompt_choice.md)'
    )
    fit.add_argument("-o", "--output", required=True, metavar="FILE", help="what choose reads")
    fit.add_argument("--overwrite", action="store_true", help="replace the output")
    fit.add_argument("--encoder", default="", metavar="FOLDER", help="embed queries by this encoder [TF-IDF]")
    choose = parts.add_parser("choose", help="print each query with the prompt to ask it with, as JSONL")
    choose.add_argument("fitted", metavar="FILE", help="what fit wrote")
    choose.add_argument("queries", help='JSONL of {"query", "prompts"?: those to choose among}')


def run(arguments: dict[str, Any]) -> int:
    if missing(["sklearn"]):
        print("ppg-fast prompts needs scikit-learn: pip install ppg_fast[prompts]", file=sys.stderr)
        return 1
    from ppg_fast import prompt_choice
    from ppg_fast.writing import check_output

    if arguments["part"] == "choose":
        for chosen in prompt_choice.choose(prompt_choice.load(arguments["fitted"]), arguments["queries"]):
            print(json.dumps(chosen, ensure_ascii=False))
        return 0
    output, encoder = Path(arguments["output"]), arguments["encoder"]
    check_output(output, arguments["overwrite"], [Path(arguments["log"])])
    choice = prompt_choice.fit(prompt_choice.read_log(arguments["log"]), encoder and str(Path(encoder).absolute()))
    prompt_choice.save(choice, output)
    print(f"{output}: {choice.describe()}")
    return 0

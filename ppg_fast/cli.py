"""`ppg-fast train | score | compare | merge | push | bench | info`."""

import contextlib
import importlib
import re
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppg_fast.about import EXTRA, about, missing
from ppg_fast.console import GONE, drop, keep_going, one_line, print_everything
from ppg_fast.stopping import Stopped, as_command

COMPARE, BENCH = "compare", "bench"  # their flags are their own
WORK = ("train", "score", COMPARE, "merge", "push", BENCH)  # what they make is more than what they print
COMMANDS = (*WORK, "info")


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
        runs = {"info": about, "score": _score, "train": _train, COMPARE: lambda _: _compare(given[1:])}
        return runs[command](arguments) if command in runs else _export(command, arguments)
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
    _add_train(commands)
    _add_score(commands)
    commands.add_parser(COMPARE, add_help=False, help="policy classes side by side, with a report (its own --help)")
    _add_export_commands(commands)
    commands.add_parser(BENCH, add_help=False, help="measure against peers and this machine's limits (its own --help)")
    _add_info(commands)
    if given and given[0] not in COMMANDS and not given[0].startswith("-"):
        parser.error(f"no command {given[0]!r}{did_you_mean(given[0], COMMANDS) or f', only {names}'}")
    return parser


def _add_train(commands: Any) -> None:
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


def _add_score(commands: Any) -> None:
    from ppg_fast.config import REWARD_SETTINGS, add_flags

    score = commands.add_parser(
        "score", help="give every turn of logged dialogues its reward: Python, reward model, judge, human ratings"
    )
    score.add_argument("data", help="logged dialogues (our JSONL or Consistent-LLMs JSON)")
    score.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="FILE",
        help="our JSONL with turn_rewards filled; one that exists is an error",
    )
    score.add_argument("--overwrite", action="store_true", help="replace the output")
    add_flags(score, REWARD_SETTINGS)


def _add_info(commands: Any) -> None:
    from ppg_fast.config import add_flags

    info = commands.add_parser(
        "info",
        help=(
            "versions, and which backends run here or why not; with --model or --tokens, the memory of a training step"
        ),
        epilog=(
            "With --model or --tokens: peak memory of a step under these settings, which are those of train. A "
            "config.json is enough."
        ),
    )
    info.add_argument("--config", metavar="FILE", help="YAML file of settings, as in train")
    info.add_argument(
        "--tokens", type=int, metavar="INT", help="of a forward pass: max_tokens, or a longer dialogue [max_tokens]"
    )
    info.add_argument(
        "--memory-gb",
        type=float,
        metavar="FLOAT",
        help="say which dialogue fits this much (10^9 bytes) [that of the GPU]",
    )
    add_flags(info)


def _score(flags: dict[str, object]) -> int:
    from ppg_fast.config import make_config

    data, output, overwrite = (flags.pop(name) for name in ("data", "output", "overwrite"))
    config = make_config(flags)
    warnings.showwarning = _show_warning
    if _lacks("score"):  # reward models are transformers', and the package of jobs imports it
        return 1
    from ppg_fast.jobs.score import score_file

    score_file(str(data), Path(str(output)), config, overwrite=bool(overwrite))
    return 0


def _lacks(command: str, modules: Sequence[str] = EXTRA) -> bool:
    """Whether packages of the [train] extra are missing; says which."""
    lacking = missing(modules)
    if lacking:
        print(f"ppg-fast {command} needs {', '.join(lacking)}: pip install ppg_fast[train]", file=sys.stderr)
    return bool(lacking)


def _train(flags: dict[str, object]) -> int:
    if _lacks("train"):
        return 1
    from ppg_fast.config import DEFAULTS, OF_PROMPTS, make_config, read_yaml

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
    for name in () if config.prompts else OF_PROMPTS:
        if getattr(config, name) != DEFAULTS[name]:
            raise ValueError(f"{name} has no effect without prompts, got {getattr(config, name)!r}")
    warnings.showwarning = _show_warning
    from transformers.utils import logging

    logging.disable_progress_bar()  # there is one of ours
    from ppg_fast.jobs import run_job

    return run_job(config, resume=run is not None)


def _add_export_commands(commands: Any) -> None:
    merge = commands.add_parser("merge", help="merge the LoRA adapter of a run into its base model")
    merge.add_argument(
        "source", metavar="RUN_OR_ADAPTER", help="folder of a run, or of an adapter (adapter_config.json)"
    )
    merge.add_argument(
        "-o", "--output", required=True, metavar="FOLDER", help="new folder for the whole model and its tokenizer"
    )
    merge.add_argument("--base", metavar="MODEL", help="folder of the base model [the one that the adapter names]")
    merge.add_argument(
        "--push-to-hub", metavar="REPO", help="upload it to this Hugging Face repository (user/name) too"
    )
    push = commands.add_parser("push", help="upload a trained model with its model card to the Hugging Face Hub")
    push.add_argument(
        "source", metavar="RUN_OR_MODEL", help="folder of a run (its checkpoint/ is taken), of a model or of an adapter"
    )
    push.add_argument("repository", metavar="REPO", help="user/name; made if it does not exist")
    for command in (merge, push):
        command.add_argument(
            "--private", action="store_true", help="make the repository private where it does not exist yet"
        )


def _export(command: str, arguments: dict[str, Any]) -> int:
    if _lacks(command, ("transformers", "huggingface_hub")):
        return 1
    from ppg_fast.models import export

    folder, repository = arguments["source"], arguments.get("repository") or arguments.get("push_to_hub")
    if repository:
        export.require_repository(repository)
    if command == "merge":
        folder = str(export.merge_adapter(folder, arguments["output"], arguments["base"]))
        print(f"merged: {folder}")
    if repository:
        print(f"pushed: {export.push_to_hub(folder, repository, arguments['private'])}")
    return 0


def _compare(flags: Sequence[str]) -> int:
    if not {"-h", "--help"} & set(flags) and _lacks("compare"):
        return 1
    warnings.showwarning = _show_warning
    from ppg_fast.compare.command import main as compare

    return compare(flags)


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
    """Our own warnings are about the user's input: one line, without a place in the source."""
    text = str(message) if "ppg_fast" in filename else f"{category.__name__}: {message}"
    with contextlib.suppress(OSError):  # a terminal that is gone ends nothing
        print(f"ppg-fast: warning: {text}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

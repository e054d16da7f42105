"""`ppg-fast train | score | compare | merge | push | bench | info`."""

import argparse
import importlib
import importlib.metadata
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

EXTRA = ("transformers", "tokenizers", "safetensors", "rich", "matplotlib", "yaml")  # modules of ppg_fast[train]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 done, 1 bad input or a missing package, 2 bad usage, 130 Ctrl-C,
    143 SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="ppg-fast", description="Partial policy gradients for language models on multi-turn dialogues."
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="train | score | compare | merge | push | bench | info"
    )
    _add_train(commands)
    _add_score(commands)
    commands.add_parser("compare", add_help=False, help="policy classes side by side, with a report (its own --help)")
    _add_export_commands(commands)
    commands.add_parser(
        "bench", add_help=False, help="measure against peers and this machine's limits (its own --help)"
    )
    _add_info(commands)
    given = list(sys.argv[1:] if argv is None else argv)
    if given[:1] == ["bench"]:
        return importlib.import_module("ppg_fast.bench.command").main(given[1:])
    arguments = vars(parser.parse_args(given[:1] if given[:1] == ["compare"] else given))
    command = arguments.pop("command")
    try:
        runs = {"info": _about, "score": _score, "train": _train, "compare": lambda _: _compare(given[1:])}
        return runs[command](arguments) if command in runs else _export(command, arguments)
    except KeyboardInterrupt:
        print("ppg-fast: stopped", file=sys.stderr)
        return 130
    # bad input, named; anything else is a bug and shows its trace
    except (ValueError, IndexError, OSError, FloatingPointError) as error:
        print(f"ppg-fast: {error}", file=sys.stderr)
        return 1


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
        const="",
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
    if _lacks_train("score"):  # reward models are transformers', and the package of jobs imports it
        return 1
    from ppg_fast.jobs.score import score_file

    score_file(str(data), Path(str(output)), config, overwrite=bool(overwrite))
    return 0


def _lacks_train(command: str) -> bool:
    """Whether packages of the [train] extra are missing; says which."""
    missing = _missing()
    if missing:
        print(f"ppg-fast {command} needs {', '.join(missing)}: pip install ppg_fast[train]", file=sys.stderr)
    return bool(missing)


def _train(flags: dict[str, object]) -> int:
    if _lacks_train("train"):
        return 1
    from ppg_fast.config import make_config, read_yaml

    file, run = flags.pop("config", None), flags.pop("resume", None)
    sources = [read_yaml(str(file)) if file else {}, flags]
    if run is not None:
        folder = Path(str(run) or make_config(*sources).output_dir)
        if not (folder / "config.yaml").is_file():
            raise ValueError(f"--resume wants the folder of a run, with its config.yaml, got {str(folder)!r}")
        if flags.get("overwrite"):
            raise ValueError("--resume and --overwrite exclude each other, got both")
        if Path(str(flags.get("output_dir", folder))) != folder:
            raise ValueError(f"--resume RUN goes on in RUN itself, got also --output-dir {flags['output_dir']!r}")
        sources = [read_yaml(str(folder / "config.yaml")), *sources, {"output_dir": str(folder)}]
    config = make_config(*sources)
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
    missing = [name for name in ("transformers", "huggingface_hub") if name in _missing((*EXTRA, "huggingface_hub"))]
    if missing:
        print(f"ppg-fast {command} needs {', '.join(missing)}: pip install ppg_fast[train]", file=sys.stderr)
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


def _about(arguments: dict[str, Any]) -> int:
    """`ppg-fast info`: versions and backends, or with settings the memory of a training step under them."""
    asked = {name: arguments.pop(name) for name in ("config", "tokens", "memory_gb")}
    return _memory(arguments, **asked) if arguments or any(v is not None for v in asked.values()) else _info()


def _memory(flags: dict[str, object], config: str | None, tokens: int | None, memory_gb: float | None) -> int:
    """The memory of a training step under the given settings."""
    import torch

    from ppg_fast.config import make_config, read_yaml
    from ppg_fast.jobs.memory_estimate import report
    from ppg_fast.spec import require, require_number

    settings = make_config(read_yaml(config) if config else {}, flags)
    device = settings.device.split(":")[0].replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    tokens = settings.max_tokens if tokens is None else tokens
    require(tokens >= 1, "tokens must be an integer >= 1", tokens)
    if memory_gb is not None:
        require_number("memory_gb", memory_gb, 0.0, open_low=True)
    there = torch.cuda.get_device_properties(0).total_memory if device == "cuda" and torch.cuda.is_available() else 0
    print(report(settings, tokens, device, there if memory_gb is None else memory_gb * 1e9))
    return 0


def _compare(flags: Sequence[str]) -> int:
    missing = _missing()
    if missing and not {"-h", "--help"} & set(flags):
        print(f"ppg-fast compare needs {', '.join(missing)}: pip install ppg_fast[train]", file=sys.stderr)
        return 1
    warnings.showwarning = _show_warning
    from ppg_fast.compare.command import main as compare

    return compare(flags)


def _missing(modules: Sequence[str] = EXTRA) -> list[str]:
    from importlib.util import find_spec

    return [name for name in modules if find_spec(name) is None]


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
    """Our own warnings are about the user's input: one line, without a place in the source."""
    text = str(message) if "ppg_fast" in filename else f"{category.__name__}: {message}"
    print(f"ppg-fast: warning: {text}", file=sys.stderr)


def _info() -> int:
    """Versions, devices and backends; works without the [train] extra."""
    import torch

    from ppg_fast import __version__, backends

    print(f"ppg_fast {__version__}  python {platform.python_version()}  {platform.system()} {platform.machine()}")
    cuda = torch.version.cuda or "none"
    print(f"torch {torch.__version__}  threads {torch.get_num_threads()}  CUDA of torch: {cuda}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"CUDA devices: {', '.join(devices) or 'none that torch sees'}")
    print("\nbackends")
    for name in backends.NAMES:
        print(f"  {name:<8}{(backends.why_not(name) or 'runs here').removeprefix(name + ': ')}")
    for device in ("cpu", "cuda") if devices else ("cpu",):
        chosen = backends.default(device)
        print(
            f"  tensors on {device} use {chosen}"
            + (" (plain PyTorch: right, but slow)" if chosen == "reference" else "")
        )
    print("\ntrain")
    missing = _missing()
    if missing:
        print(f"  not ready, {', '.join(missing)} missing: pip install ppg_fast[train]")
    else:
        versions = (
            f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "tokenizers", "safetensors")
        )
        print(f"  ready ({', '.join(versions)}): ppg-fast train")
        print("  several GPUs: torchrun --nproc-per-node N -m ppg_fast.cli train")
        print(f"  configs for accelerate launch: {Path(__file__).parent / 'launch'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

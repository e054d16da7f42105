"""The flags of `ppg-fast info`; what it prints is `ppg_fast.about`."""

from typing import Any


def add(commands: Any) -> None:
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

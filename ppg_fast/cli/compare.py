"""`ppg-fast compare`, whose flags are its own."""

import warnings
from collections.abc import Sequence

from ppg_fast.cli.common import lacks, show_warning


def run(flags: Sequence[str]) -> int:
    if not {"-h", "--help"} & set(flags) and lacks("compare"):
        return 1
    warnings.showwarning = show_warning
    if {"--prompts", "--env"} & {word.partition("=")[0] for word in flags}:  # rollouts of a model, not a study
        from ppg_fast.compare.window import main
    else:
        from ppg_fast.compare.command import main

    return main(flags)

"""What `ppg-fast inspect` does: a file and settings in, views printed or written as a page."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ppg_fast.config import TrainConfig, make_config
from ppg_fast.dialogues import formats
from ppg_fast.dialogues.consistent_llms import is_family_record
from ppg_fast.dialogues.records import Problems, Record, read_records
from ppg_fast.inspection.inspector import Inspector
from ppg_fast.inspection.openings import OpeningInspector
from ppg_fast.inspection.page import html_page
from ppg_fast.inspection.terminal import print_views
from ppg_fast.writing import check_output, opened, writing


def inspect_file(config: TrainConfig, names: Sequence[str], count: int, page: Path | None, overwrite: bool) -> None:
    """Print the dialogues or openings that ``names`` say, or write them to ``page``, which appears whole or not at all.

    ValueError for what cannot be read or is not there; FileExistsError for a ``page`` that exists without
    ``overwrite``, before anything is read.
    """
    inputs = [Path(name) for name in (config.data, config.prompts, config.model) if name]
    if page is not None:
        check_output(page, overwrite, inputs, flag="--html")
    inspector = Inspector(config) if config.data else OpeningInspector(config)
    views = list(inspector.views(names, count))
    if page is None:
        print_views(views, inspector.notes)
        return
    title = f"{Path(inspector.path).name}, read for {config.policy_class}"
    notes = [*inspector.left_out, *inspector.notes]
    with writing(page), opened(page) as file:
        for text in html_page(title, views, notes):
            file.write(text)
    many = f"{len(views)} dialogues" if len(views) != 1 else "1 dialogue"
    print(f"{page}: {many}, {sum(len(p.ids) for view in views for p in view.pieces):,} tokens")


def settings_of(data: str | None, flags: Mapping[str, Any], file: Mapping[str, Any]) -> TrainConfig:
    """The settings of training from ``flags`` and those of a ``file``, which they go before; ``data`` is a file of
    dialogues, or one of openings (`holds_openings`)."""
    if data is not None and "prompts" in flags:
        raise ValueError(f"data and prompts exclude each other, got {data!r} and {flags['prompts']!r}")
    given = {"data": None, "prompts": None} if data is not None or "prompts" in flags else {}
    if data is not None:
        given |= {"prompts" if holds_openings(data) else "data": data}
    config = make_config(file, given, flags)
    if not (config.data or config.prompts):
        raise ValueError("inspect wants a file of dialogues or openings (or a --config that names one), got none")
    if "tools" in flags and not config.prompts:
        raise ValueError(f"tools has no effect without prompts, got {flags['tools']!r}")
    return config


def holds_openings(path: str) -> bool:
    """Whether what can be read of the file has messages, and none of them is an answer."""
    found = [messages for record in read_records(Path(path), Problems(path, strict=False)) for messages in _of(record)]
    return bool(found) and not any(_is_answer(message) for messages in found for message in messages)


def _of(record: Record) -> Iterator[list[Any]]:
    """The messages of each dialogue of a record, none where it is none of ours; a judged one has answers."""
    try:
        judged = is_family_record(record.value)
        translated = [] if judged else formats.translated(record.value, answered=False).records
        yield from [[{"role": "assistant"}]] if judged else [list(one["messages"]) for one in translated]
    except (ValueError, KeyError, TypeError):
        return


def _is_answer(message: object) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"

"""`ppg-fast score`: logged dialogues in, the same dialogues with a reward for every turn out."""

import functools
import glob
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ppg_fast.config import TrainConfig
from ppg_fast.dialogues.dialogue import KEYS, Dialogue, as_json, read_dialogues
from ppg_fast.dialogues.records import Problems, json_records
from ppg_fast.jobs.endpoints import rewards_of
from ppg_fast.jobs.inputs import input_paths, reward_digest
from ppg_fast.jobs.policy import device_of
from ppg_fast.rewards import Judge, Ratings, Reward, Scores, Transcript, score
from ppg_fast.writing import check_output, is_stdout, is_stream, opened

CHUNK = 64  # dialogues between two writes of the partial output
# settings that say how the rewards are had, not what they are: another one goes on with what was scored
HOW_ASKED = (
    *("timeout", "retries", "concurrency", "strict", "device"),
    *("judge", "judge_key", "judge_retries", "judge_tokens"),
)


def score_file(data: str, output: Path, config: TrainConfig, overwrite: bool = False) -> list[Dialogue]:
    """Write ``data`` to ``output`` with the turn_rewards that the config's rewards give, whole or not at all; say what
    was done. Other keys of a line stay.

    What is scored is kept in a partial file beside it after every ``CHUNK`` dialogues, and the same command goes on
    from there: a judge that fails after an hour costs a chunk. Data or rewards that hold something else than before
    (`reward_digest`) are scored from the beginning. A device or a pipe as ``output`` is written through at the end and
    has no partial file. FileExistsError if ``output`` exists and ``overwrite`` is off, ValueError if it is an input.
    """
    inputs = [Path(data), *input_paths({**asdict(config), "data": None})]
    check_output(output, overwrite, inputs)
    with warnings.catch_warnings():  # that turns have no reward yet is why they are scored
        warnings.filterwarnings("ignore", message=".*assistant messages have no reward")
        dialogues = read_dialogues(data, config.strict)
        config = replace(config, template_date=config.template_date or time.strftime("%Y-%m-%d"))
        rewards = rewards_of(config, device_of(config.device))
        partial = _partial(output, data, config, rewards)
        scored = _scored_before(partial, dialogues)
    lines = _lines_of(data, dialogues)
    say = functools.partial(print, file=sys.stderr if is_stdout(output) else sys.stdout)
    if scored:
        say(f"{len(scored)} of {len(dialogues)} dialogues were scored before: going on")
    for other in _others(output, partial):
        rule = "was scored with other rewards or from other data, so it is not gone on with"
        say(f"{other} {rule}; remove it if it is of no use")
    while len(scored) < len(dialogues):
        part = dialogues[len(scored) : len(scored) + CHUNK]
        scores = score(rewards, [_transcript(d, lines.get(d.id, {})) for d in part])
        scored += [replace(d, turn_rewards=tuple(row)) for d, row in zip(part, scores.totals, strict=True)]
        if partial:
            _write(partial, scored, lines)
        if len(dialogues) > CHUNK:
            say(f"{len(scored)} of {len(dialogues)} dialogues scored")
    _write(output, scored, lines)
    if partial:
        partial.unlink()
    _report(output, scored, rewards, say)
    return scored


def _partial(output: Path, data: str, config: TrainConfig, rewards: Sequence[Reward]) -> Path | None:
    """The file of what is scored so far, named by the content of the data and of the rewards; None beside a stream."""
    if is_stream(output):
        return None
    total = hashlib.sha256(Path(data).read_bytes())
    total.update(reward_digest(config.reward, rewards).encode())
    return output.with_name(f".{output.name}.{total.hexdigest()[:16]}.partial")


def _others(output: Path, partial: Path | None) -> list[Path]:
    """Partial files of other rewards or other data."""
    if not partial:
        return []
    return sorted(p for p in output.parent.glob(f".{glob.escape(output.name)}.*.partial") if p != partial)


def _scored_before(partial: Path | None, dialogues: Sequence[Dialogue]) -> list[Dialogue]:
    """What the partial file holds; nothing where it is no beginning of the data."""
    scored = read_dialogues(partial, True) if partial and partial.exists() else []
    same = all(a.id == b.id and a.messages == b.messages for a, b in zip(scored, dialogues, strict=False))
    return scored if same and len(scored) <= len(dialogues) else []


def _transcript(dialogue: Dialogue, line: Mapping[str, Any]) -> Transcript:
    """With what the line says beside what a dialogue is made of."""
    info = {key: value for key, value in line.items() if key not in KEYS}
    return Transcript(dialogue.id, dialogue.messages, {"group_id": dialogue.group_id, **info})


def _write(path: Path, scored: Sequence[Dialogue], lines: Mapping[str, Mapping[str, Any]]) -> None:
    """One line a dialogue: that of the data with its turn_rewards, or what a dialogue of another format is made of."""
    with opened(path) as file:
        for d in scored:
            line = {**as_json(d), **lines.get(d.id, {}), "turn_rewards": d.turn_rewards}
            text = json.dumps(line, ensure_ascii=False)
            # half of a surrogate pair, in a key that is none of ours, has no UTF-8
            file.write((text if _is_utf8(text) else json.dumps(line)) + "\n")


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _lines_of(data: str, dialogues: Sequence[Dialogue]) -> dict[str, dict[str, Any]]:
    """The line, or list element, that each dialogue was read from, by its id; those of other formats are not there."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in _values(data):
        if isinstance(record, dict) and isinstance(record.get("id"), str) and isinstance(record.get("messages"), list):
            found.setdefault(record["id"], []).append(record)
    said = {d.id: [(m.role, m.content) for m in d.messages] for d in dialogues}
    # an id may stand twice, and the first time in a line that was left out
    fits = lambda r: [(m.get("role"), m.get("content")) for m in r["messages"] if isinstance(m, dict)] == said[r["id"]]  # noqa: E731
    return {name: next(filter(fits, records), records[0]) for name, records in found.items() if name in said}


def _values(data: str) -> list[Any]:
    """The JSON values of the file, as `read_dialogues` reads them, which has said what cannot be read."""
    raw = Path(data).read_bytes().removeprefix(b"\xef\xbb\xbf")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [record.value for record in json_records(raw, Problems(data, strict=False))]


def _report(output: Path, scored: list[Dialogue], rewards: list[Reward], say: Callable[[str], None]) -> None:
    totals = [list(d.turn_rewards) for d in scored]
    values = [value for row in totals for value in row if value is not None]
    unscored = Scores(totals, {}).unscored
    mean = f"mean reward {sum(values) / len(values):.3f}" if values else "no reward"
    say(f"{output}: {len(scored)} dialogues, {len(values)} turns scored, {unscored} not, {mean}")
    for reward in rewards:
        if isinstance(reward.scorer, Judge) and reward.scorer.unparsable:
            say(f"reward {reward.name}: {reward.scorer.unparsable} replies of the judge held no score within its range")
        if isinstance(reward.scorer, Ratings) and reward.scorer.unused:
            unused = reward.scorer.unused
            say(
                f"reward {reward.name}: {len(unused)} dialogues with ratings are not in the data, such as {unused[0]!r}"
            )

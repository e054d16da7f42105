"""`ppg-fast score`: logged dialogues in, the same dialogues with a reward for every turn out."""

import hashlib
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from ppg_fast.config import REWARD_SETTINGS, TrainConfig
from ppg_fast.dialogues.dialogue import KEYS, Dialogue, read_dialogues, write_dialogues
from ppg_fast.jobs.endpoints import rewards_of
from ppg_fast.jobs.policy import device_of
from ppg_fast.rewards import Judge, Ratings, Reward, Scores, Transcript, score

CHUNK = 64  # dialogues between two writes of the partial output


def score_file(data: str, output: Path, config: TrainConfig, overwrite: bool = False) -> list[Dialogue]:
    """Write ``data`` to ``output`` with the turn_rewards that the config's rewards give, whole or not at all; say what
    was done.

    What is scored is kept in a partial file beside it after every ``CHUNK`` dialogues, and the same command goes on
    from there: a judge that fails after an hour costs a chunk. FileExistsError if ``output`` exists and ``overwrite``
    is off.
    """
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists: give another -o, or --overwrite to replace it")
    output.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():  # that turns have no reward yet is why they are scored
        warnings.filterwarnings("ignore", message=".*assistant messages have no reward")
        dialogues = read_dialogues(data, config.strict)
        rewards = rewards_of(config, device_of(config.device))
        partial = output.with_name(f".{output.name}.{_digest(config, dialogues)}.partial")
        scored = read_dialogues(partial, True) if partial.exists() else []
    info = _info(data)
    if scored:
        print(f"{len(scored)} of {len(dialogues)} dialogues were scored before: going on")
    while len(scored) < len(dialogues):
        part = dialogues[len(scored) : len(scored) + CHUNK]
        scores = score(
            rewards, [Transcript(d.id, d.messages, {"group_id": d.group_id, **info.get(d.id, {})}) for d in part]
        )
        scored += [replace(d, turn_rewards=tuple(row)) for d, row in zip(part, scores.totals, strict=True)]
        write_dialogues(partial, scored)
        if len(dialogues) > CHUNK:
            print(f"{len(scored)} of {len(dialogues)} dialogues scored")
    write_dialogues(output, scored)
    partial.unlink()
    _report(output, scored, rewards)
    return scored


def _digest(config: TrainConfig, dialogues: list[Dialogue]) -> str:
    """Eight letters that change with the rewards and the dialogues."""
    settings = [getattr(config, name) for name in REWARD_SETTINGS]
    return hashlib.sha256(repr((settings, dialogues)).encode()).hexdigest()[:8]


def _info(data: str) -> dict[str, dict[str, Any]]:
    """What the lines of our JSONL say beside what a dialogue is made of, by id."""
    found: dict[str, dict[str, Any]] = {}
    for line in Path(data).read_text(encoding="utf-8-sig", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # read_dialogues has said what is wrong with it
            continue
        if isinstance(record, dict) and isinstance(record.get("id"), str):
            found.setdefault(record["id"], {key: value for key, value in record.items() if key not in KEYS})
    return found


def _report(output: Path, scored: list[Dialogue], rewards: list[Reward]) -> None:
    totals = [list(d.turn_rewards) for d in scored]
    values = [value for row in totals for value in row if value is not None]
    unscored = Scores(totals, {}).unscored
    mean = f"mean reward {sum(values) / len(values):.3f}" if values else "no reward"
    print(f"{output}: {len(scored)} dialogues, {len(values)} turns scored, {unscored} not, {mean}")
    for reward in rewards:
        if isinstance(reward.scorer, Judge) and reward.scorer.unparsable:
            print(
                f"reward {reward.name}: {reward.scorer.unparsable} replies of the judge held no score within its range"
            )
        if isinstance(reward.scorer, Ratings) and reward.scorer.unused:
            unused = reward.scorer.unused
            print(
                f"reward {reward.name}: {len(unused)} dialogues with ratings are not in the data, such as {unused[0]!r}"
            )

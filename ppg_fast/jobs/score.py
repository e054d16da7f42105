"""`ppg-fast score`: logged dialogues in, the same dialogues with a reward for every turn out."""

import functools
import glob
import hashlib
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from ppg_fast.config import TrainConfig
from ppg_fast.dialogues.dialogue import Dialogue, as_text, read_dialogues, read_file
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
    was done. Other keys of a line stay; rewards that it has are not looked at.

    What is scored is kept in a partial file beside it after every ``CHUNK`` dialogues, and the same command goes on
    from there: a judge that fails after an hour costs a chunk. Data or rewards that hold something else than before
    (`reward_digest`) are scored from the beginning. A device or a pipe as ``output`` is written through at the end and
    has no partial file. FileExistsError if ``output`` exists and ``overwrite`` is off, ValueError if it is an input.
    """
    inputs = [Path(data), *input_paths({**asdict(config), "data": None})]
    check_output(output, overwrite, inputs)
    dialogues = read_file(data, config.strict, scored=False).dialogues
    config = replace(config, template_date=config.template_date or time.strftime("%Y-%m-%d"))
    rewards = rewards_of(config, device_of(config.device))
    partial = _partial(output, data, config, rewards)
    scored = _scored_before(partial, dialogues)
    say = functools.partial(print, file=sys.stderr if is_stdout(output) else sys.stdout)
    if scored:
        say(f"{len(scored)} of {len(dialogues)} dialogues were scored before: going on")
    for other in _others(output, partial):
        rule = "was scored with other rewards or from other data, so it is not gone on with"
        say(f"{other} {rule}; remove it if it is of no use")
    while len(scored) < len(dialogues):
        part = dialogues[len(scored) : len(scored) + CHUNK]
        scores = score(rewards, [_transcript(d) for d in part])
        scored += [replace(d, turn_rewards=tuple(row)) for d, row in zip(part, scores.totals, strict=True)]
        if partial:
            _write(partial, scored)
        if len(dialogues) > CHUNK:
            say(f"{len(scored)} of {len(dialogues)} dialogues scored")
    _write(output, scored)
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
    with warnings.catch_warnings():  # of turns that no reward scored
        warnings.simplefilter("ignore")
        scored = read_dialogues(partial, True) if partial and partial.exists() else []
    same = all(a.id == b.id and a.messages == b.messages for a, b in zip(scored, dialogues, strict=False))
    return scored if same and len(scored) <= len(dialogues) else []


def _transcript(dialogue: Dialogue) -> Transcript:
    """With what the line says beside what a dialogue is made of."""
    tools = {"tools": list(dialogue.tools)} if dialogue.tools else {}
    return Transcript(dialogue.id, dialogue.messages, {"group_id": dialogue.group_id, **tools, **dialogue.more})


def _write(path: Path, scored: Sequence[Dialogue]) -> None:
    """One line a dialogue, with everything it came with."""
    with opened(path) as file:
        for dialogue in scored:
            file.write(as_text(dialogue) + "\n")


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

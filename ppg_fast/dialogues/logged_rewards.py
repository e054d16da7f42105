"""The rewards that one object of a file holds, by whatever key: one a turn, or one for the whole dialogue."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ppg_fast.dialogues.message import Message, brief, short

TURN_REWARDS = "turn_rewards"
NUMBERS = ("reward", "score", "rating")
THUMBS = ("label", "thumbs")  # a word or a boolean; another label is no reward
UP = ("up", "thumbs_up", "thumbsup", "good", "chosen", "true", "like", "desirable", "\U0001f44d")
DOWN = ("down", "thumbs_down", "thumbsdown", "bad", "rejected", "false", "dislike", "undesirable", "\U0001f44e")


class Found(NamedTuple):
    """One reward a turn, None where it has none; ``key``: where they stand, "" where there are none; ``whole``:
    whether it is one for the dialogue."""

    rewards: Sequence[Any]
    key: str
    whole: bool = False


def rewards_of(record: Mapping[str, Any], messages: Sequence[Message], where: str) -> Found:
    """The ``turn_rewards`` of the object; else what its answers hold under one of `NUMBERS` and `THUMBS`, else what it
    holds there itself, which is the last turn's.

    ValueError, which ``where`` begins, for turn_rewards that are no list and a reward that is no number.
    """
    answers = [message for message in messages if message.role == "assistant"]
    given = record.get(TURN_REWARDS)
    if given is not None:
        if not isinstance(given, list):
            raise ValueError(f"{where}: {TURN_REWARDS} must be a list, got {brief(given)}")
        return Found(given, TURN_REWARDS)
    for key in (*NUMBERS, *THUMBS):
        said = [reward_of(answer.source, key, where) for answer in answers]
        if any(value is not None for value in said):
            return Found(said, f"{key} of the answers")
    for key in (*NUMBERS, *THUMBS):
        value = reward_of(record, key, where)
        if value is not None and answers:
            return Found([*[None] * (len(answers) - 1), value], key, whole=True)
    return no_rewards(messages)


def no_rewards(messages: Sequence[Message]) -> Found:
    """None for every answer."""
    return Found([None for message in messages if message.role == "assistant"], "")


def reward_of(record: Mapping[str, Any], key: str, where: str) -> float | int | None:
    """The reward under ``key``: a number, 1 and 0 for true and false or thumbs up and down; None where it says none."""
    value = record.get(key)
    word = value.strip().lower() if isinstance(value, str) else value
    if isinstance(value, bool) or (isinstance(value, str) and word in (*UP, *DOWN)):
        return float(value is True or word in UP)
    if key in THUMBS:
        return float(value) if value in (0, 1) else None
    if isinstance(value, (int, float)):
        return value
    if key == "reward" and value is not None:
        raise ValueError(f"{where}: {key} must be a number, or thumbs up or down, got {short(value)}")
    return None

"""One logged dialogue with one reward per assistant message, and how it is made of one JSON object."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ppg_fast.dialogues.logged_rewards import no_rewards, rewards_of
from ppg_fast.dialogues.message import Message, brief, message_of, refuse_meaning, require_encodable, short
from ppg_fast.rules import FLOAT32_MAX

KEYS = ("id", "group_id", "messages", "turn_rewards")
DIALOGUE_MEANING = ("functions", "documents", "chat_template_kwargs", "weight", "loss_weight", "train")
LONGEST = 200  # characters of an id, which messages print


@dataclass(frozen=True)
class Dialogue:
    """A dialogue and its rewards; dialogues of one prompt share ``group_id``.

    ``turn_rewards``: one finite number per assistant message, None where it was not scored. ``tools``: the JSON schemas
    of the functions that the assistant may call, for the chat template. ``more``: what else its line holds. ``where``:
    file and line that it was read from. ValueError names dialogue, turn and value.
    """

    id: str
    group_id: str
    messages: tuple[Message, ...]
    turn_rewards: tuple[float | None, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    more: Mapping[str, Any] = field(default_factory=dict, hash=False)
    where: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        require_name("id", self.id)
        require_name("group_id", self.group_id)
        rewards = tuple(
            _reward(value, f"dialogue {self.id!r}, turn {turn}") for turn, value in enumerate(self.turn_rewards)
        )
        object.__setattr__(self, "messages", tuple(self.messages))
        object.__setattr__(self, "turn_rewards", rewards)
        turns = sum(message.role == "assistant" for message in self.messages)
        if turns == 0:
            raise ValueError(f"dialogue {self.id!r} has no assistant message among its {len(self.messages)} messages")
        if turns != len(rewards):
            raise ValueError(f"dialogue {self.id!r} has {turns} assistant messages but {len(rewards)} turn_rewards")

    @property
    def unscored(self) -> int:
        """Number of turns without a reward; they count as reward 0."""
        return self.turn_rewards.count(None)


class Made(NamedTuple):
    """A dialogue, and what of it was not in the object: whether its group is its opening's, where a reward for the
    whole dialogue stood ("": there is none)."""

    dialogue: Dialogue
    grouped: bool
    rewarded: str


def dialogue_of(record: Mapping[str, Any], scored: bool = True) -> Made:
    """The dialogue that one object of ours describes, which has an id; without ``scored`` its rewards are not looked
    at. ValueError says what is wrong."""
    require_name("id", record["id"])
    name = f"dialogue {record['id']!r}"
    if not isinstance(record["messages"], list):
        raise ValueError(f"{name}: messages must be a list, got {brief(record['messages'])}")
    refuse_meaning(record, DIALOGUE_MEANING, name)
    messages = tuple(
        message_of(message, f"{name}, message {index}") for index, message in enumerate(record["messages"])
    )
    tools, given = tools_of(record.get("tools"), name), plain_name(record.get("group_id"))
    group = (group_of(messages, tools) or record["id"]) if given is None else given
    found = rewards_of(record, messages, name) if scored else no_rewards(messages)
    more = {key: value for key, value in record.items() if key not in (*KEYS, "tools")}
    dialogue = Dialogue(record["id"], group, messages, tuple(found.rewards), tools, more)
    return Made(dialogue, given is None, found.key if found.whole else "")


def plain_name(value: object) -> Any:
    """A number as the text of it, anything else as it is."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def group_of(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> str:
    """A hash of what precedes the first answer, which dialogues of one prompt share; "" where nothing does."""
    opening = list(itertools.takewhile(lambda message: message.role != "assistant", messages))
    said = json.dumps([[message.as_json() for message in opening], list(tools)], sort_keys=True)
    return hashlib.sha256(said.encode()).hexdigest()[:16] if opening else ""


def tools_of(value: object, where: str) -> tuple[Mapping[str, Any], ...]:
    """The tools that one JSON value lists, each an object, or their JSON text; ``where`` begins the ValueError for one
    that is none."""
    tools = [] if value is None or value == "" else value
    if isinstance(tools, str):
        with contextlib.suppress(ValueError, RecursionError):
            tools = json.loads(tools)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{where}: tools must be a list of JSON schemas of functions, got {brief(value)}")
    return tuple(tools)


def require_name(key: str, value: object) -> None:
    """ValueError unless ``value`` can name a dialogue or a group in messages."""
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} must be a non-empty string, got {short(value)}")
    if len(value) > LONGEST:
        raise ValueError(f"{key} must be at most {LONGEST} characters long, got {len(value)}: {short(value)}")
    require_encodable(key, value)


def _reward(value: object, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where}: a reward must be a number or null, got {brief(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= FLOAT32_MAX:  # in which rewards train
        raise ValueError(f"{where}: a reward must be finite in float32, got {number}")
    return number

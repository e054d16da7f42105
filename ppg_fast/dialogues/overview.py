"""What a file of dialogues was understood as, in words: counts, what was made and left out, its first dialogue."""

from collections.abc import Iterator

from ppg_fast.dialogues.dialogue import Reading
from ppg_fast.dialogues.logged import Dialogue
from ppg_fast.dialogues.message import Message
from ppg_fast.dialogues.records import MAX_WARNINGS

WIDTH = 100  # characters of a message
MESSAGES = 20  # of the first dialogue


def overview(path: str, read: Reading) -> str:
    """Lines to print: what the file is, how much of it there is, what was made, what stays beside the dialogues, what
    was left out and why, and the first dialogue with its turns and rewards."""
    return "\n".join([*_counts(path, read), *_made(read), *_left_out(read), "", *_shown(read.dialogues[0])])


def _counts(path: str, read: Reading) -> Iterator[str]:
    dialogues = read.dialogues
    kinds = [f"{count} as {kind}" if len(read.formats) > 1 else kind for kind, count in read.formats.most_common()]
    yield f"{path}: {len(dialogues)} dialogues ({', '.join(kinds)}), {len(read.left_out)} left out"
    messages = [message for dialogue in dialogues for message in dialogue.messages]
    turns = sum(len(dialogue.turn_rewards) for dialogue in dialogues)
    calls = sum(len(message.tool_calls) for message in messages)
    groups = len({dialogue.group_id for dialogue in dialogues})
    scored = turns - sum(dialogue.unscored for dialogue in dialogues)
    yield f"{len(messages)} messages, {calls} tool calls, {groups} groups"
    yield f"{turns} turns, {scored} scored{_range(dialogues)}, {turns - scored} not (they count as 0)"
    masked = sum(not message.trained for message in messages)
    if masked:
        yield f"{masked} messages are not trained: their line says so"


def _range(dialogues: list[Dialogue]) -> str:
    rewards = [reward for dialogue in dialogues for reward in dialogue.turn_rewards if reward is not None]
    if not rewards:
        return ""
    return f" (mean {sum(rewards) / len(rewards):.3f}, {min(rewards):g} to {max(rewards):g})"


def _made(read: Reading) -> Iterator[str]:
    if read.ids:
        yield f"made: id of {read.ids} from the file's name and the place in it"
    if read.groups:
        yield f"made: group_id of {read.groups} from the opening"
    for key, count in read.whole.items():
        yield f"made: the reward of the last turn of {count} from {key!r}"
    if pairs := read.formats["chosen and rejected"]:
        yield f"made: the reward of the last turn of {pairs}: 1 of what was chosen, 0 of what was rejected"
    kept = list(dict.fromkeys(key for dialogue in read.dialogues for key in dialogue.more))
    if kept:
        yield f"kept beside: {', '.join(map(_brief, kept[:20]))}" + (", ..." if len(kept) > 20 else "")
    yield from (f"dropped: {_brief(key)}" for key in read.dropped)


def _left_out(read: Reading) -> Iterator[str]:
    for problem in read.left_out[:MAX_WARNINGS]:
        yield f"left out: {problem}"
    if len(read.left_out) > MAX_WARNINGS:
        yield f"left out: {len(read.left_out) - MAX_WARNINGS} more"


def _shown(dialogue: Dialogue) -> Iterator[str]:
    yield f"first dialogue: {dialogue.id}, group {_brief(dialogue.group_id)}"
    if dialogue.tools:
        yield f"  {'tools':<10}{len(dialogue.tools)}"
    turn = 0
    for message in dialogue.messages[:MESSAGES]:
        if message.role == "assistant":
            reward = dialogue.turn_rewards[turn]
            scored = "no reward" if reward is None else f"reward {reward:g}"
            yield f"  {f'turn {turn}':<10}{_said(message)}  [{scored}{'' if message.trained else ', not trained'}]"
            turn += 1
        else:
            yield f"  {message.role:<10}{_said(message)}"
    if len(dialogue.messages) > MESSAGES:
        yield f"  ... {len(dialogue.messages) - MESSAGES} more messages"


def _said(message: Message) -> str:
    calls = ", ".join(str(call["function"]["name"]) for call in message.tool_calls)
    thought = f"(thinks: {_brief(message.reasoning)}) " if message.reasoning else ""
    return thought + _brief(message.content) + (f" -> calls {_brief(calls)}" if calls else "")


def _brief(text: str) -> str:
    """One line of it that any terminal shows."""
    line = " ".join(text[: 4 * WIDTH].split())
    line = "".join(character if character.isprintable() else "\ufffd" for character in line)
    return line if len(line) <= WIDTH else f"{line[:WIDTH]}..."

"""The same in a terminal: one line an answer."""

from collections.abc import Callable
from typing import Any

from ppg_fast.rating.tasks import Tasks

KEYS = {False: {str(n): n for n in (1, 2, 3, 4, 5)}, True: {"a": 1, "t": 0.5, "b": 0}}
HELP = {False: "1 bad .. 5 good", True: "a | b is better, t tie"}


def rate(tasks: Tasks, ask: Callable[[str], str], say: Callable[[str], None]) -> None:
    """Show what is next and read an answer, until nothing is left, the input ends, or q."""
    shown = None
    while (state := tasks.next())["id"] is not None:
        if state["dialogues"] != shown:
            shown = state["dialogues"]
            for number, messages in enumerate(shown):
                say(f"--- {'AB'[number] if tasks.pairs else state['id']}")
                for message in messages:
                    say(f"{_whose(message)}: {_plain(message['text'])}")
        where = "" if tasks.pairs else f"turn {state['turn']}, "
        try:
            key = ask(f"{where}{HELP[tasks.pairs]}, s skip, u undo, q quit: ").strip().lower()
        except EOFError:
            return
        if key == "q":
            return
        if key == "u":
            tasks.undo()
        elif key == "s":
            tasks.skip(state["id"], state["turn"])
        elif key in KEYS[tasks.pairs]:
            tasks.rate(state["id"], state["turn"], KEYS[tasks.pairs][key])
        else:
            say(f"no answer: {_plain(key)[:40]!r}")
        if key in ("u", "s"):
            shown = None
    say("nothing is left to rate")


def _whose(message: dict[str, Any]) -> str:
    return f"assistant, turn {message['turn']}" if "turn" in message else message["role"]


def _plain(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)

"""What the model would see when it answers: a dialogue's text, turn by turn, as the chat template writes it then."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ppg_fast.dialogues.chat_format import ChatFormat
from ppg_fast.dialogues.conversation import Tools
from ppg_fast.dialogues.message import Message
from ppg_fast.dialogues.packing import CONTEXT
from ppg_fast.dialogues.renderer import in_message
from ppg_fast.dialogues.written import require_written


class Span(NamedTuple):
    """A piece of a view's text: context up to the end of a generation prompt, or the turn that follows it."""

    text: str
    turn: int
    message: int  # index of the message that it ends with, for errors
    begins: bool = False  # a part of its own: the text before it is not what the model sees


def spans(chat: ChatFormat, messages: Sequence[Message], tools: Tools = ()) -> Iterator[Span]:
    """The views of a dialogue's trained answers, each what the template makes of the messages before it, then the
    answer as it writes the last one, up to and with its end.

    A view that begins with all of the one before goes on with it; another begins a part of its own. What the template
    writes by itself between its generation prompt and an answer (an empty think block) is context. Behind the last
    answer, what the template adds to its view.
    """
    renderer, before, turn, last = chat.renderer, "", 0, 0
    renderer.check_tools(tools)
    for index, message in enumerate(messages):
        with in_message(index):
            renderer.check(message)
        if message.role != "assistant":
            continue
        if message.trained:
            context, answer = view(chat, messages[: index + 1], tools)
            begins = not context.startswith(before)
            yield Span(context if begins else context[len(before) :], CONTEXT, index, begins or not before)
            yield Span(answer, turn, index)
            before, last = context + answer, index
        turn += 1
    if not before:
        last = max((n for n, message in enumerate(messages) if message.role == "assistant"), default=0)
        raise ValueError(f"message {last}: no answer is trained (their weight is 0), so the dialogue teaches nothing")
    if last + 1 < len(messages) or not renderer.by_role:
        whole = renderer.text(messages, tools=tools)
        if whole.startswith(before):
            yield Span(whole[len(before) :], CONTEXT, len(messages) - 1)


def view(chat: ChatFormat, messages: Sequence[Message], tools: Tools = ()) -> tuple[str, str]:
    """What the model sees before the last of ``messages``, an answer, and the answer with its end."""
    renderer, index, said = chat.renderer, len(messages) - 1, messages[-1].content
    prompt = renderer.before_answer(messages[:-1], tools)
    whole = renderer.text(messages, tools=tools)
    context, start = prompt, len(prompt)
    if not (whole.startswith(prompt) and said and whole.startswith(said, start)):
        context, start = chat.beginnings.of(messages, tools, prompt, whole)
    answer = chat.up_to_the_end(whole[start:])
    if not chat.ends(answer):
        require_written(renderer, messages, tools)
        rule = "the chat template must end the answer with a token that ends one"
        raise ValueError(f"message {index}: {rule}, got {answer[-60:]!r}")
    return context, answer

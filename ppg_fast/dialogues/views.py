"""What the model would see when it answers: a dialogue's text, turn by turn, as the chat template writes it then."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from ppg_fast.dialogues.chat_format import ChatFormat
from ppg_fast.dialogues.conversation import ANSWER, STAND_IN, Tools
from ppg_fast.dialogues.message import Message
from ppg_fast.dialogues.packing import CONTEXT
from ppg_fast.dialogues.renderer import in_message, shared_start
from ppg_fast.spec import require


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
    require(bool(before), "message 0: an answer must be trained, or the dialogue teaches nothing", "weights of 0")
    if last + 1 < len(messages) or not renderer.by_role:
        whole = renderer.text(messages, tools=tools)
        if whole.startswith(before):
            yield Span(whole[len(before) :], CONTEXT, len(messages) - 1)


def view(chat: ChatFormat, messages: Sequence[Message], tools: Tools = ()) -> tuple[str, str]:
    """What the model sees before the last of ``messages``, an answer, and the answer with its end."""
    renderer, index, said = chat.renderer, len(messages) - 1, messages[-1].content
    prompt = renderer.before_answer(messages[:-1], tools)
    whole = renderer.text(messages, tools=tools)
    start = len(prompt)
    context = prompt
    if not whole.startswith(prompt) or not said or not whole.startswith(said, start):
        context, start = _begun(chat, messages, tools, prompt, whole)
    answer = chat.up_to_the_end(whole[start:])
    rule = f"message {index}: the chat template must end the answer with a token that ends one"
    require(chat.ends(answer), rule, answer[-60:])
    return context, answer


def _begun(chat: ChatFormat, messages: Sequence[Message], tools: Tools, prompt: str, whole: str) -> tuple[str, int]:
    """The context of the answer that ``whole`` ends with, and where in it the answer begins.

    A plain answer begins where a stand-in's content does, another one (reasoning, calls) behind the generation prompt,
    as far as the template writes that before it.
    """
    plain = chat.renderer.text([*messages[:-1], replace(ANSWER, more={})], tools=tools)
    start = plain.rfind(STAND_IN)
    if start >= 0 and whole.startswith(plain[:start]):
        return prompt + plain[len(shared_start(prompt, plain[:start])) : start], start
    return prompt, len(shared_start(prompt, whole))

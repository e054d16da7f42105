"""The other side of a dialogue on the user's own prompts: a log, nobody, a model behind an endpoint, or the policy's
own start weights."""

import copy
import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from ppg_fast.dialogues.chat_format import ChatFormat
from ppg_fast.dialogues.message import Message
from ppg_fast.dialogues.prompts import Prompt, Turn
from ppg_fast.endpoint import Endpoint, EndpointError
from ppg_fast.rewards import Transcript
from ppg_fast.rollouts.environment import Environment
from ppg_fast.rollouts.generation import LocalSampler, Request

INSTRUCTION = (
    "You play the user in a conversation with an assistant. Stay in your role, say one message at a time, as a person "
    "would write it, "
    "and never answer for the assistant."
)
OPENER = "Begin."  # many chat templates want the user to speak first, and here the partner does


class Partner(Protocol):
    """Who answers the assistant."""

    def replies(self, conversations: Sequence["Conversation"]) -> Sequence[Turn | None]:
        """The next message of each conversation (or several, heard before the next answer), all at once; None ends
        it."""
        ...


class Conversation:
    """An Environment: the opening of a prompt, then ``partner`` until ``max_turns`` answers or a reply with
    ``stop_phrase`` ("": none).

    ``seed`` picks the prompt, and with the turn it seeds the partner: the rollouts of a group share both. It pays
    nothing: rewards are given to whole transcripts afterwards. ``clean`` takes out of a partner's text what the
    policy's tokenizer must not read. What the partner said last is in ``messages`` for the rewards, also where the
    assistant does not answer it.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        partner: Partner,
        max_turns: int,
        stop_phrase: str = "",
        clean: Callable[[str], str] = lambda text: text,
    ) -> None:
        if not prompts:
            raise ValueError("a conversation needs at least one prompt, got none")
        self.prompts, self.partner, self.max_turns, self.stop_phrase, self.clean = (
            prompts,
            partner,
            max_turns,
            stop_phrase,
            clean,
        )

    def reset(self, seed: int) -> list[Message]:
        """The opening of prompt ``seed`` modulo their number."""
        self.seed, self.turns = seed, 0
        self.prompt = self.prompts[seed % len(self.prompts)]
        self.messages, self.tools = list(self.prompt.messages), self.prompt.tools
        return list(self.messages)

    def step(self, assistant_text: str) -> tuple[Turn | None, float, bool]:
        """The partner's reply, of one message or several, and reward 0."""
        return step_all([self], [assistant_text])[0]

    def hear(self, reply: Turn | None) -> tuple[Turn | None, float, bool]:
        """The reply as the policy reads it, and whether the dialogue is over."""
        if reply is None:
            return None, 0.0, True
        said = [reply] if isinstance(reply, Message) else list(reply)
        over = bool(self.stop_phrase) and any(self.stop_phrase in message.content for message in said)
        clean = [replace(message, content=self.clean(message.content)) for message in said]
        self.messages += clean
        return (None if over else clean[0] if len(clean) == 1 else clean), 0.0, over

    def transcript(self) -> Transcript:
        """The dialogue so far, for rewards."""
        return Transcript(self.prompt.id, tuple(self.messages), self.prompt.info)

    def number(self) -> int:
        """31 bits that this prompt, seed and turn share in a group, and others do not."""
        name = f"{self.seed} {self.turns} {self.prompt.id}"
        return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1


def step_all(
    environments: Sequence[Environment], answers: Sequence[str | Message]
) -> list[tuple[Turn | None, float, bool]]:
    """`Conversation.step` of many at once, so that the partner answers them side by side."""
    conversations = [environment for environment in environments if isinstance(environment, Conversation)]
    for conversation, answer in zip(conversations, answers, strict=True):
        conversation.messages.append(answer if isinstance(answer, Message) else Message("assistant", answer))
        conversation.turns += 1
    going = [c for c in conversations if c.turns < c.max_turns]
    replies = dict(zip(map(id, going), going[0].partner.replies(going), strict=True)) if going else {}
    return [conversation.hear(replies.get(id(conversation))) for conversation in conversations]


class LoggedPartner:
    """Says what the log says, whatever it is told; over when the log is."""

    def replies(self, conversations: Sequence[Conversation]) -> list[Turn | None]:
        """What each log holds between two answers."""
        return [c.prompt.replies()[c.turns - 1] if c.turns <= len(c.prompt.logged) else None for c in conversations]


class NoPartner:
    """Says nothing: every dialogue has one turn."""

    def replies(self, conversations: Sequence[Conversation]) -> list[Message | None]:
        """The end of each."""
        return [None for _ in conversations]


def as_partner(conversation: Conversation, instruction: str) -> list[Message]:
    """The dialogue from the other side: user and assistant change places, and the system message says who the partner
    is.

    The assistant's own system message stays with the assistant, and so do the calls that it makes and their results.
    """
    system = "\n\n".join(text for text in (instruction, conversation.prompt.partner) if text)
    swapped = {"user": "assistant", "assistant": "user"}
    heard = [m for m in conversation.messages if m.role in swapped and not m.tool_calls]
    spoken = [Message(swapped[m.role], m.content) for m in heard]
    first = [Message("user", OPENER)] if spoken and spoken[0].role == "assistant" else []
    return [Message("system", system), *first, *spoken]


class EndpointPartner:
    """A model behind an endpoint, asked by chat completions: its history is text, since nothing is learned from its
    tokens.

    Its thoughts are no part of a reply. A reply without any text ends the dialogue, with one warning; EndpointError
    where it has none because it was cut at ``max_tokens``.
    """

    def __init__(
        self, endpoint: Endpoint, instruction: str = INSTRUCTION, *, temperature: float = 1.0, max_tokens: int = 256
    ) -> None:
        self.endpoint, self.instruction = endpoint, instruction
        self.temperature, self.max_tokens = temperature, max_tokens
        self.warned = False

    def replies(self, conversations: Sequence[Conversation]) -> list[Message | None]:
        """One request each, side by side."""
        replies = self.endpoint.map(self._reply, list(conversations))
        if None in replies and not self.warned:
            self.warned = True
            prompt = conversations[replies.index(None)].prompt.id
            rule = "said nothing, so the dialogue ends there (shown once)"
            warnings.warn(f"partner {self.endpoint.url}: in prompt {prompt!r} it {rule}", stacklevel=2)
        return replies

    def _reply(self, conversation: Conversation) -> Message | None:
        messages = [message.as_dict() for message in as_partner(conversation, self.instruction)]
        settings = {"temperature": self.temperature, "max_tokens": self.max_tokens, "seed": conversation.number()}
        reply = self.endpoint.answer(messages, **settings)
        if reply.text and reply.text.strip():
            return Message("user", reply.text)
        if reply.cut:
            asked = f"prompt {conversation.prompt.id!r}, {len(messages)} messages"
            raise EndpointError(
                f"{self.endpoint.url}: {asked}: the partner's reply was cut at {self.max_tokens} tokens before it said "
                "anything; raise --partner-tokens (one that thinks wants thousands)"
            )
        return None


class ModelPartner:
    """A model in this process as it is now, whatever becomes of it later: the policy's own start weights, kept
    apart."""

    def __init__(
        self,
        model: Any,
        chat: ChatFormat,
        instruction: str = INSTRUCTION,
        *,
        temperature: float = 1.0,
        max_tokens: int = 256,
        batch_size: int = 64,
    ) -> None:
        self.model, self.chat, self.instruction = copy.deepcopy(model).eval().requires_grad_(False), chat, instruction
        self.temperature, self.max_tokens, self.batch_size = temperature, max_tokens, batch_size
        # before a run begins: that the template takes a system message, and the user's words as the assistant's
        chat.opening([Message(role, "a") for role in ("system", "user", "assistant", "user")])

    def replies(self, conversations: Sequence[Conversation]) -> list[Message | None]:
        """Generated side by side, ``batch_size`` at a time."""
        banned = self.chat.banned_token_ids(self.model.get_output_embeddings().weight.shape[0])
        requests = []
        for number, conversation in enumerate(conversations):
            messages = [
                Message(m.role, self.chat.without_special(m.content))
                for m in as_partner(conversation, self.instruction)
            ]
            stream = torch.Generator().manual_seed(conversation.number())
            requests.append(Request(number, self.chat.opening(messages), self.max_tokens, stream))
        replies: list[Message | None] = []
        with torch.no_grad():
            for start in range(0, len(requests), self.batch_size):
                sampler = LocalSampler(self.model, self.chat.end_ids, banned, self.temperature)
                answers = sampler.answer(requests[start : start + self.batch_size])
                replies += [Message("user", self.chat.decode(answer.tokens)) for answer in answers]
        return replies

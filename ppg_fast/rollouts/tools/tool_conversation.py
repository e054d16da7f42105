"""A dialogue in which the policy may call functions before it answers its partner."""

import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ppg_fast.dialogues.conversation import function_of
from ppg_fast.dialogues.message import Message
from ppg_fast.dialogues.prompts import Prompt
from ppg_fast.rewards import Reward, Transcript
from ppg_fast.rewards.python import PythonReward, is_users, said_by
from ppg_fast.rollouts import partner as partners
from ppg_fast.rollouts.environment import Environment
from ppg_fast.rollouts.partner import Conversation, Partner
from ppg_fast.rollouts.rollout import Stepped
from ppg_fast.rollouts.tools.answer_reader import made_id
from ppg_fast.rollouts.tools.calling import an_error, now, outcome, plain_name, text_of
from ppg_fast.rollouts.tools.functions import Tools


class ToolConversation(Conversation):
    """A `Conversation` with ``tools``: results answer the calls of an answer, and the partner an answer without any.

    ``max_turns`` counts the answers without calls, ``max_calls`` the calls: those beyond it are errors, and the answer
    that calls once more ends the dialogue. ``counts``: how many calls there were, and how many failed. ``prompts`` are
    those that `prepared` makes.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        partner: Partner,
        max_turns: int,
        stop_phrase: str = "",
        clean: Callable[[str], str] = lambda text: text,
        *,
        tools: Tools,
        max_calls: int = 16,
    ) -> None:
        super().__init__(prompts, partner, max_turns, stop_phrase, clean)
        self.of, self.max_calls = tools, max_calls

    def reset(self, seed: int) -> list[Message]:
        """The opening of prompt ``seed``; what the environment's reset says stands at the end of its last message."""
        super().reset(seed)
        self.calls, self.counts = 0, Counter[str]()
        self.schemas = {str(function_of(tool).get("name")): tool for tool in self.tools}
        self.environment, self.functions = self.of.open(self.prompt)
        if self.environment is not None and (said := self._begun()) and self.messages:
            last = self.messages[-1]
            self.messages[-1] = replace(last, content=last.content + said)
        return list(self.messages)

    def _begun(self) -> str:
        """What the environment says when it begins, given what the prompt's line holds."""
        prompt = self.prompt
        row = {"prompt": [m.as_dict() for m in prompt.messages], **prompt.info, "id": prompt.id}
        if self.of.by_name:
            row.pop("environment", None)
        try:
            with self.of.importing():
                said = self.environment.reset(**_taken(self.environment.reset, row, self.number()))
            return "" if said is None else self.clean(text_of(said))
        except BaseException as error:
            if not is_users(error):
                raise
            raise ValueError(f"prompt {prompt.id!r}: the environment's reset failed: {said_by(error)}") from error

    def call(self, answer: Message) -> Stepped:
        """The results of the calls of an answer, reward 0; over where there may be no more of them."""
        self.messages.append(answer)
        over = self.calls >= self.max_calls
        results = [] if over else [self._result(call) for call in answer.tool_calls]
        self.messages += results
        return results or None, 0.0, over

    def _result(self, call: Mapping[str, Any]) -> Message:
        self.calls += 1
        self.counts["calls"] += 1
        name = str(call["function"]["name"])
        if self.calls > self.max_calls:
            found = an_error(f"no more calls: a dialogue may have {self.max_calls} of them")
        else:
            with self.of.importing():
                found = outcome(call, self.functions, self.schemas)
        self.counts["failures"] += found.failed
        if found.raised:
            self.of.warn(name, f"prompt {self.prompt.id!r}: tool {name} raised {found.raised}")
        more = {"name": plain_name(self.clean(name)), "tool_call_id": call["id"]}
        return Message("tool", self.clean(found.text), more)

    def transcript(self) -> Transcript:
        """The dialogue so far, and the environment under that name."""
        found = super().transcript()
        if self.environment is None:
            return found
        return replace(found, info={**found.info, "environment": self.environment})


def step_calls(environments: Sequence[Environment], answers: Sequence[Message]) -> list[Stepped]:
    """The next step of many `ToolConversation`: calls are answered here, and the partner is asked for the others, all
    at once."""
    conversations = [environment for environment in environments if isinstance(environment, ToolConversation)]
    pairs = list(zip(conversations, answers, strict=True))
    stepped: dict[int, Stepped] = {id(c): c.call(answer) for c, answer in pairs if answer.tool_calls}
    rest = [(c, answer) for c, answer in pairs if not answer.tool_calls]
    found = partners.step_all([c for c, _ in rest], [answer for _, answer in rest])
    stepped |= {id(c): one for (c, _), one in zip(rest, found, strict=True)}
    return [stepped[id(c)] for c in conversations]


def prepared(prompt: Prompt, tools: Tools) -> Prompt:
    """The prompt with the tools that it is played with, and a log without results: calls are answered anew."""
    heard = [tuple(m for m in turn if m.role != "tool") for turn in prompt.logged]
    return replace(prompt, tools=tools.select(prompt), logged=tuple(turn for turn in heard if turn))


def a_result(prompt: Prompt) -> Message:
    """A result as one of the prompt's tools gives it, to see whether a template takes it."""
    name = str(function_of(prompt.tools[0]).get("name"))
    return Message("tool", "a", {"name": name, "tool_call_id": made_id(0, 0)})


def own_rewards(tools: Tools) -> list[Reward]:
    """What environments pay themselves by a get_reward, as rewards of the whole dialogue."""
    return [
        Reward(kind.__name__, OwnReward(kind, tools), "dialogue")
        for kind in tools.environments
        if callable(getattr(kind, "get_reward", None))
    ]


class OwnReward:
    """The ``get_reward`` of environments of the class ``kind``; None for dialogues in another."""

    def __init__(self, kind: type, tools: Tools) -> None:
        self.kind, self.tools = kind, tools

    def __call__(self, transcripts: Sequence[Transcript], /) -> list[Any]:
        """One value each. ValueError with dialogue and line where it fails."""
        ask = PythonReward(lambda _, environment: now(environment.get_reward()), f"{self.kind.__name__}.get_reward")
        mine = [type(t.info.get("environment")) is self.kind for t in transcripts]
        with self.tools.importing():
            values = iter(ask([t for t, own in zip(transcripts, mine, strict=True) if own]))
        return [next(values) if own else None for own in mine]


def counted(environments: Sequence[Environment], gather: Callable[[Any], list[Any]]) -> dict[str, float]:
    """Calls a dialogue, and the share of them that failed, by TRL's names; those of all ranks together."""
    mine = sum(
        (e.counts for e in environments if isinstance(e, ToolConversation)), Counter(dialogues=len(environments))
    )
    counts = sum(gather(mine), Counter[str]())
    return {
        "tools/call_frequency": counts["calls"] / max(1, counts["dialogues"]),
        "tools/failure_frequency": counts["failures"] / max(1, counts["calls"]),
    }


def _taken(reset: Callable[..., Any], row: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Of a prompt's line what ``reset`` takes; ``seed``, which a group shares, where it names it."""
    parameters = inspect.signature(reset).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(row) | ({"seed": seed} if "seed" in parameters and "seed" not in row else {})
    return {name: value for name, value in {"seed": seed, **row}.items() if name in parameters}

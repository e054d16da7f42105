"""On-policy on the user's own prompts: rollouts with a partner, rewards for whole transcripts, evaluation on prompts
kept apart."""

import random
import shlex
import subprocess
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ppg_fast import stopping
from ppg_fast.config import TrainConfig
from ppg_fast.dialogues.chat_format import make_byte_tokenizer
from ppg_fast.dialogues.message import Message
from ppg_fast.dialogues.packing import Sample
from ppg_fast.dialogues.prompts import Prompt, read_prompts
from ppg_fast.distributed import Ranks
from ppg_fast.jobs.endpoints import make_endpoint, partner_of, refitted, rewards_of_new_answers
from ppg_fast.jobs.inputs import partner_digest, reward_digest, tools_digest
from ppg_fast.jobs.job import Evaluation, Job, keep_readable
from ppg_fast.jobs.progress import Progress
from ppg_fast.jobs.resume import ResumableRun
from ppg_fast.jobs.rewarding import Rewarding
from ppg_fast.rewards import Scores
from ppg_fast.rollouts.generation import EndpointSampler
from ppg_fast.rollouts.partner import Conversation, LoggedPartner, step_all
from ppg_fast.rollouts.rollout import Rollout
from ppg_fast.rollouts.tools import (
    AnswerReader,
    ToolConversation,
    Tools,
    a_result,
    counted,
    own_rewards,
    prepared,
    step_calls,
)
from ppg_fast.spec import require
from ppg_fast.training.evaluation import of_rollouts

REFRESH_FOLDER = "sampler"  # weights for an endpoint that samples


class PromptsJob(Job):
    """Train on prompts; evaluate on a part of them kept apart (at most a fifth, none of fewer than five)."""

    title = "Own prompts"

    def __init__(self, config: TrainConfig, ranks: Ranks | None = None) -> None:
        prompts = read_prompts(str(config.prompts), config.strict)
        contents = [m.content for p in prompts for turn in (p.messages, *p.logged) for m in turn]
        super().__init__(config, lambda: make_byte_tokenizer(contents, config.vocab_size), ranks)
        policy = self.policy
        loaded: dict[str, ModuleType] = {}  # one module for tools and rewards of the same file
        self.tools = Tools(config.tools, loaded) if config.tools else None
        self.read = AnswerReader(policy.chat) if self.tools else None
        own = own_rewards(self.tools) if self.tools and not self.human else []
        asked = not self.human and (bool(config.reward or config.judge) or not own)
        self.named = rewards_of_new_answers(config, policy.model.device, loaded) if asked else []
        policy.fitted = refitted(self.named)
        self.rewarding = Rewarding([*self.named, *own], self.objective)
        self.reported = () if self.human else type(self).reported
        require(
            config.partner != "self" or not policy.ranks.sharded,
            "partner self goes with whole models (parallel ddp)",
            "fsdp2",
        )
        self.partner = partner_of(config, policy.model, policy.chat)
        self.sampler = self._make_sampler()
        self.prompts, played = keep_readable(prompts, self._read, config.strict, str(config.prompts), "prompts")
        self._warn_without_logs()
        self.held_out, self.seen = ([played[i] for i in part] for part in self.split(len(played)))
        scorers = {r.name: r.scorer for r in self.rewarding.rewards}
        roles = {"partner": self.partner, "sampler": self.sampler, **scorers}
        endpoints = {role: getattr(one, "endpoint", None) for role, one in roles.items()}
        policy.used = {role: endpoint.usage for role, endpoint in endpoints.items() if endpoint}

    @property
    def scored(self) -> bool:
        """Not where people rate the dialogues of training."""
        return not self.human

    @property
    def formula(self) -> str:
        """What rewards an answer."""
        return "human ratings" if self.human else self.rewarding.formula

    def source(self) -> str:
        """The file, the partner and the rewards, without addresses and folders: the model card is read by others."""
        config = self.config
        partner = {"logged": "the logged partner", "none": "no partner", "self": "its own start weights as partner"}
        model = f" (`{config.partner_model}`)" if config.partner_model else ""
        named = partner.get(config.partner, f"a model behind an endpoint{model} as partner")
        tools = f", the tools of `{Path(self.tools.place).name}`" if self.tools else ""
        of = f"on the prompts of `{Path(str(config.prompts)).name}`"
        return f"{of} with {named}{tools} and reward `{self.formula}`"

    def data_read(self) -> Iterable[object]:
        """Every prompt as its file has it, and what makes tokens of it: not the tokens, which may hold a date."""
        yield self.policy.chat.renderer.digest()
        for p in self.prompts:
            yield (
                p.id,
                p.partner,
                *([message.as_json() for message in turn] for turn in (p.messages, *p.logged)),
                p.tools,
            )

    @property
    def digests(self) -> dict[str, str]:
        """Rewards and partner too."""
        rewards = reward_digest(self.config.reward, self.named) if self.named else ""
        tools = {"tools": tools_digest(str(self.config.tools))} if self.tools else {}
        return {**super().digests, "rewards": rewards, "partner": partner_digest(self.config), **tools}

    def start(self, run: ResumableRun, progress: Progress) -> None:
        """Say how many prompts there are, who answers and what is rewarded."""
        text = f"{len(self.seen)} prompts to train on, {len(self.held_out)} held out"
        tools = f"; tools {', '.join(self.tools.names)}" if self.tools else ""
        progress.say(f"{text}; partner {self.config.partner}{tools}; reward {self.formula}")

    def collect(self, step: int) -> list[Sample]:
        """Groups of rollouts of the policy as it is now, rewarded."""
        config, policy, start = self.config, self.policy, time.perf_counter()
        if self.sampler and config.sampler_refresh:
            state = policy.ranks.full_state(policy.model)
            policy.ranks.run_on_main(lambda: self._refresh(str(config.sampler_refresh), state))
        seeds = prompt_seeds(step, config.num_prompts, len(self.seen), config.seed)
        make = lambda: self._conversation(self.seen)  # noqa: E731
        mine = policy.ranks.part(len(seeds) * config.num_generations)
        settings: dict[str, Any] = {**self._steps(), "sampler": self.sampler, "only": mine}
        rollouts = policy.roll_out(make, seeds, config.num_generations, policy.generator, **settings)
        scored = {}
        if not self.human:  # who says later what they are worth
            scores = Scores.together(policy.ranks.run_on_all(lambda: self._reward(rollouts)))
            self.rewarding.require_scored(scores)
            scored = scores.describe()
        samples = policy.of_all(rollouts)
        seconds = time.perf_counter() - start
        usage = {f"endpoint/{role}/{k}": v for role, counts in policy.usage().items() for k, v in counts.items()}
        calls = counted([r.environment for r in rollouts], policy.ranks.gather) if self.tools else {}
        self.rollout_metrics = {**scored, **calls, "rollout_time": seconds, **usage}
        return samples

    def measure(self, when: str) -> Evaluation:
        """Mean return on the prompts kept apart, answered by the model in this process, and each reward's own
        values."""
        some, ranks = self.seen[: self.config.eval_dialogues], self.policy.ranks
        prompts, name = (self.held_out, "held-out") if self.held_out else (some, "training")
        make, generator = lambda: self._conversation(prompts), self.policy.sampling_generator(0)
        only = None if ranks.is_main else range(0)  # one rank asks partners and judges, and tells the others
        rollouts = self.policy.roll_out(make, range(len(prompts)), 1, generator, **self._steps(), only=only)
        metrics = ranks.run_on_main(lambda: self._metrics_of(rollouts))
        reward = "nobody rates them" if self.human else f"return {metrics['eval/reward']:.3f}"
        result = f"{reward} over {metrics['eval/turns/mean_count']:.1f} turns"
        return Evaluation(f"{name} prompts", metrics, result, rollouts)

    def _metrics_of(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        if self.human:
            found = of_rollouts([r.sample for r in rollouts], self.objective)
            return {k: v for k, v in found.items() if not k.startswith(("eval/reward", "eval/turns/return"))}
        scores = self._reward(rollouts)
        self.rewarding.require_scored(scores)
        rewards = {f"eval/{name}": value for name, value in scores.describe().items()}
        return {**of_rollouts([r.sample for r in rollouts], self.objective), **rewards}

    def _conversation(self, prompts: Sequence[Prompt]) -> Conversation:
        config = self.config
        settings = (prompts, self.partner, config.max_turns, config.stop_phrase, self.policy.chat.without_special)
        if self.tools:
            return ToolConversation(*settings, tools=self.tools, max_calls=config.max_tool_calls)
        return Conversation(*settings)

    def _steps(self) -> dict[str, Any]:
        """How answers are read and taken to their dialogues."""
        return {"step_all": step_calls if self.tools else step_all, "read": self.read}

    def _reward(self, rollouts: Sequence[Rollout]) -> Scores:
        """Give every turn its reward."""
        conversations = [r.environment for r in rollouts if isinstance(r.environment, Conversation)]
        return self.rewarding.give(rollouts, [c.transcript() for c in conversations])

    def _make_sampler(self) -> EndpointSampler | None:
        """The endpoint that generates rollouts. ValueError where its log-probs or its weights would not be the
        policy's."""
        config = self.config
        if not config.sampler:
            return None
        if config.temperature != 1.0:
            raise ValueError(
                "a sampler endpoint wants temperature 1, where all servers mean the same by a log-prob, got "
                f"{config.temperature}"
            )
        if not config.sampler_refresh and not config.loss_spec().weighs_importance:
            rule = (
                "a sampler endpoint that keeps its first weights wants importance_cap > 0 (or sampler_refresh, "
                "which reloads them)"
            )
            raise ValueError(f"{rule}, got {config.importance_cap}")
        vocab_size = self.policy.model.get_output_embeddings().weight.shape[0]
        chat, positions = self.policy.chat, self.policy.positions
        banned = chat.banned_token_ids(vocab_size)
        unknown = config.nan_rollout in ("one", "drop")
        endpoint, kept = make_endpoint(config, "sampler"), (config.top_p, config.top_k)
        return EndpointSampler(endpoint, chat.end_ids, vocab_size, banned, positions, unknown, *kept)

    def _refresh(self, command: str, state: dict[str, Any] | None) -> None:
        """Write the weights and have the sampler's server load them. OSError with what the command said where it
        fails."""
        folder = Path(self.config.output_dir, REFRESH_FOLDER).absolute()
        self.policy.model.save_pretrained(folder, state_dict=state)
        self.policy.tokenizer.save_pretrained(folder)
        arguments = [part.replace("{folder}", str(folder)) for part in shlex.split(command)]
        with stopping.interruptible():
            done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if done.returncode:
            raise OSError(
                f"sampler_refresh {command!r} failed with status {done.returncode}: "
                f"{(done.stderr or done.stdout).strip()[-300:]}"
            )

    def _read(self, prompt: Prompt) -> Prompt:
        """The prompt as it is played. ValueError where the policy cannot read it or a reply to its answer, or has no
        room to answer it."""
        try:
            prompt = prepared(prompt, self.tools) if self.tools else prompt
            replies = prompt.replies() if isinstance(self.partner, LoggedPartner) else [Message("user", "a")]
            heard = [*replies[: self.config.max_turns - 1], *([[a_result(prompt)]] if self.tools else [])]
            length = self.policy.chat.rehearse(prompt.messages, heard, prompt.tools)
            require_room(length, self.config.max_dialogue_tokens, self.policy.positions)
        except ValueError as error:
            raise ValueError(f"prompt {prompt.id!r}: {error}") from error
        return prompt

    def _warn_without_logs(self) -> None:
        """The logged partner has nothing to say where no prompt is a logged dialogue."""
        logged = not isinstance(self.partner, LoggedPartner) or any(p.logged for p in self.prompts)
        if self.config.max_turns > 1 and not logged:
            rule = "no prompt has a log to follow, so every dialogue has one turn"
            warnings.warn(f"{rule}; --partner names a partner that answers", stacklevel=3)


def require_room(length: int, max_tokens: int, positions: int | None) -> None:
    """ValueError where an opening of ``length`` tokens leaves none for an answer."""
    limit = min(filter(None, (max_tokens, positions)), default=0)
    require(not limit or length < limit, f"an opening must be shorter than the {limit} tokens of a dialogue", length)


def prompt_seeds(step: int, count: int, prompts: int, seed: int) -> list[int]:
    """The prompts of ``step`` (from 1), as seeds of `Conversation`: epoch * prompts + index, each epoch in an order of
    its own.

    A function of the step, so a resumed run goes on where it was; every prompt comes once an epoch.
    """
    places = [divmod(place, prompts) for place in range((step - 1) * count, step * count)]
    orders = {epoch: random.Random(f"{seed} {epoch}").sample(range(prompts), prompts) for epoch, _ in places}
    return [epoch * prompts + orders[epoch][position] for epoch, position in places]

"""On-policy: warm start on scripted answers, then partial policy gradients on rollouts of the persona interview."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ppg_fast.config import TrainConfig
from ppg_fast.dialogues.chat_format import ChatFormat, make_word_tokenizer
from ppg_fast.dialogues.message import Message
from ppg_fast.dialogues.packing import CONTEXT, Sample
from ppg_fast.distributed import Ranks
from ppg_fast.jobs.endpoints import refitted, rewards_of_new_answers
from ppg_fast.jobs.inputs import reward_digest
from ppg_fast.jobs.job import Evaluation, Job
from ppg_fast.jobs.progress import Progress
from ppg_fast.jobs.resume import ResumableRun
from ppg_fast.jobs.rewarding import Rewarding
from ppg_fast.rewards import Scores, Transcript
from ppg_fast.rollouts.environment import TeachableEnvironment
from ppg_fast.rollouts.persona import PersonaInterview, words
from ppg_fast.rollouts.rollout import Rollout
from ppg_fast.spec import require
from ppg_fast.training.evaluation import of_rollouts
from ppg_fast.training.objective import Objective

INTERVIEW = "interview"  # what the environment pays itself, logged beside other rewards
IMITATION: dict[str, Any] = {
    "warmup_steps": 10,
    "final_learning_rate": 1.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "max_skipped_steps": 3,
}


class PersonaJob(Job):
    """Train on personas of the training part, evaluate on personas that it never sees.

    With ``reward`` or ``judge`` these are what trains; what the interview itself pays, the true reward, is logged
    beside them and changes nothing.
    """

    title = "Persona interview"
    reported = ("eval/reward", "eval/reward_share")

    def __init__(self, config: TrainConfig, ranks: Ranks | None = None) -> None:
        super().__init__(config, lambda: make_word_tokenizer(words()), ranks)
        # what the chat template refuses of such a dialogue, before the run begins
        self.policy.chat.rehearse(PersonaInterview().reset(0), [Message("user", "a")])
        limit = min(filter(None, (config.max_dialogue_tokens, self.policy.positions)), default=0)
        for number in range(max(1, config.eval_dialogues)):  # those of training are like them
            length = len(self.policy.chat.opening(PersonaInterview(held_out=True).reset(number)))
            rule = f"the opening of held-out persona {number} must be shorter than the {limit} tokens of a dialogue"
            require(not limit or length < limit, rule, length)
        asked = bool(config.reward or config.judge) and not self.human
        self.named = rewards_of_new_answers(config, self.policy.model.device) if asked else []
        self.policy.fitted = refitted(self.named)
        self.rewarding = Rewarding(self.named, self.objective)
        self.reported = (*type(self).reported, *(["eval/interview"] if self.named else []))

    def source(self) -> str:
        """The built-in environment, and the rewards where they are others than its own."""
        by = f" with reward `{self.rewarding.formula}`" if self.named else " with human ratings" if self.human else ""
        return f"in rollouts of the persona interview that ppg_fast brings along{by}"

    @property
    def digests(self) -> dict[str, str]:
        """Rewards too, where they are not the interview's own."""
        rewards = {"rewards": reward_digest(self.config.reward, self.named)} if self.named else {}
        return {**super().digests, **rewards}

    def start(self, run: ResumableRun, progress: Progress) -> None:
        """Imitate the scripted assistant."""
        config = self.config
        imitation = Objective(imitate=True, reduction="token_mean")
        steps = {"max_steps": config.imitation_steps, "learning_rate": config.imitation_learning_rate}
        schedule = replace(self.policy.schedule(), **IMITATION, **steps)
        with progress.phase("imitation", config.imitation_steps) as phase:
            for metrics in run.optimise("imitation", self.demonstrations, imitation, schedule):
                phase.show(metrics, "loss")

    def demonstrations(self, step: int) -> list[Sample]:
        """Scripted dialogues, every other of plain questions."""
        del step
        environments = [PersonaInterview(plain=j % 2 == 0) for j in range(self.config.imitation_batch)]
        return [
            demonstrate(self.policy.chat, e, self.policy.rng, self.config.teacher_skill, g)
            for g, e in enumerate(environments)
        ]

    def collect(self, step: int) -> list[Sample]:
        """Groups of rollouts of the policy as it is now."""
        policy = self.policy
        seeds = [policy.rng.getrandbits(48) for _ in range(self.config.num_prompts)]
        mine, size = policy.ranks.part(len(seeds) * self.config.num_generations), self.config.num_generations
        rollouts = policy.roll_out(PersonaInterview, seeds, size, policy.generator, only=mine)
        if self.named:
            scores = Scores.together(policy.ranks.run_on_all(lambda: self._reward(rollouts)))
            self.rewarding.require_scored(scores)
            self.rollout_metrics = scores.describe()
        return policy.of_all(rollouts)

    def measure(self, when: str) -> Evaluation:
        """Mean return on the held-out personas; what the interview itself pays, as a share of the best return; and the
        share of right answers by kind."""
        policy, count = self.policy, self.config.eval_dialogues
        rollouts = policy.roll_out(
            lambda: PersonaInterview(held_out=True), range(count), 1, policy.sampling_generator(0)
        )
        paid = sum(r.total_reward for r in rollouts) / count
        share = paid * count / sum(r.environment.best_return() for r in rollouts)  # type: ignore[attr-defined]
        kinds: dict[str, list[bool]] = {}
        for rollout in rollouts:
            for kind, right in rollout.environment.agreement():  # type: ignore[attr-defined]
                kinds.setdefault(kind, []).append(right)
        agreement = {f"eval/agreement/{kind}": sum(v) / len(v) for kind, v in sorted(kinds.items())}
        scored = policy.ranks.run_on_main(lambda: self._scored(rollouts)) if self.named else {}
        metrics = {**of_rollouts([r.sample for r in rollouts], self.objective), "eval/reward": paid, **scored}
        metrics |= {"eval/reward_share": share, **({"eval/interview": paid} if self.named else {}), **agreement}
        result = f"return {paid:.2f}, {share:.0%} of a truthful assistant's"
        if self.named:
            result = f"return {metrics['eval/reward']:.2f} by {self.rewarding.formula}; the interview pays {paid:.2f}"
        return Evaluation("held-out personas", metrics, result, rollouts, "A reward may be for an earlier answer too.")

    def _scored(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Give evaluated rollouts the rewards that train, and say what they come to."""
        scores = self._reward(rollouts)
        self.rewarding.require_scored(scores)
        named = {f"eval/{name}": value for name, value in scores.describe().items()}
        return {**of_rollouts([r.sample for r in rollouts], self.objective), **named}

    def _reward(self, rollouts: Sequence[Rollout]) -> Scores:
        """Give rollouts the rewards that train; what the interview paid stays among the parts."""
        paid: list[list[float | None]] = [list(r.sample.rewards) for r in rollouts]
        scores = self.rewarding.give(rollouts, [Transcript(r.name, tuple(r.messages)) for r in rollouts])
        return replace(scores, parts={**scores.parts, INTERVIEW: paid})


def demonstrate(
    chat: ChatFormat, environment: TeachableEnvironment, rng: random.Random, skill: float, group: int
) -> Sample:
    """A dialogue of ``environment`` with its own scripted assistant, as a sample."""
    tokens = chat.opening(environment.reset(rng.getrandbits(48)))
    sample, done = Sample(tokens, [CONTEXT] * len(tokens), [], group), False
    while not done:
        text = environment.demonstrate(rng, skill)
        reply, reward, done = environment.step(text)
        for part, turn in ((chat.answer(text), len(sample.rewards)), (chat.reply(reply) if reply else [], CONTEXT)):
            sample.tokens += part
            sample.turn_ids += [turn] * len(part)
        sample.rewards.append(reward)
    return sample

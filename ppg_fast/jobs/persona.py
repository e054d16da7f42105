"""On-policy: warm start on scripted answers, then partial policy gradients on rollouts of the persona interview."""

import random
from dataclasses import replace
from typing import Any

from ppg_fast.config import TrainConfig
from ppg_fast.dialogues.chat_format import ChatFormat, make_word_tokenizer
from ppg_fast.dialogues.packing import CONTEXT, Sample
from ppg_fast.distributed import Ranks
from ppg_fast.jobs.policy import Policy
from ppg_fast.jobs.resume import ResumableRun
from ppg_fast.jobs.run_folder import Progress, RunFolder
from ppg_fast.jobs.samples import SHOWN
from ppg_fast.rollouts.environment import TeachableEnvironment
from ppg_fast.rollouts.persona import PersonaInterview, words
from ppg_fast.training.evaluation import of_rollouts
from ppg_fast.training.objective import Objective, warn_if_hardly_credited

IMITATION: dict[str, Any] = {
    "warmup_steps": 10,
    "final_learning_rate": 1.0,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "max_skipped_steps": 3,
}


class PersonaJob:
    """Train on personas of the training part, evaluate on personas that it never sees."""

    data_digest = ""  # a persona is a function of its seed

    def __init__(self, config: TrainConfig, ranks: Ranks | None = None) -> None:
        self.config, self.policy = config, Policy(config, lambda: make_word_tokenizer(words()), ranks)
        self.objective = self.policy.objective()
        self.last: list[Sample] = []  # of the step under way

    def train(self, run: ResumableRun, progress: Progress) -> None:
        """Imitate, evaluate, then climb the windowed return."""
        config = self.config
        imitation = Objective(imitate=True, reduction="token_mean")
        warm_up = replace(
            self.policy.schedule(),
            **IMITATION,
            max_steps=config.imitation_steps,
            learning_rate=config.imitation_learning_rate,
        )
        with progress.phase("imitation", config.imitation_steps) as phase:
            for metrics in run.climb("imitation", self.demonstrations, imitation, warm_up):
                phase.show(metrics, "loss")
        if not run.of_phase("eval"):
            self.evaluate(run, progress, 0, "before")
        with progress.phase(config.policy_class, config.max_steps) as phase:
            for metrics in run.climb("train", self.rollouts, self.objective, self.policy.schedule()):
                phase.show(metrics, "reward")
                if metrics["step"] % config.eval_every == 0:
                    run.log_samples("train", metrics["step"], self.last, self.policy.chat, self.objective)
                    if metrics["step"] < config.max_steps:
                        self.evaluate(run, progress, metrics["step"])

    def demonstrations(self, step: int) -> list[Sample]:
        """Scripted dialogues, every other of plain questions."""
        del step
        environments = [PersonaInterview(plain=j % 2 == 0) for j in range(self.config.imitation_batch)]
        return [
            demonstrate(self.policy.chat, e, self.policy.rng, self.config.teacher_skill, g)
            for g, e in enumerate(environments)
        ]

    def rollouts(self, step: int) -> list[Sample]:
        """Groups of rollouts of the policy as it is now."""
        policy = self.policy
        seeds = [policy.rng.getrandbits(48) for _ in range(self.config.num_prompts)]
        mine, size = policy.ranks.part(len(seeds) * self.config.num_generations), self.config.num_generations
        rollouts = policy.roll_out(PersonaInterview, seeds, size, policy.generator, only=mine)
        self.last = samples = policy.of_all(rollouts)
        if step == 1:
            warn_if_hardly_credited(samples, self.objective)
        return samples

    def evaluate(self, run: RunFolder, progress: Progress, step: int, when: str = "") -> None:
        """Mean return on the same held-out personas with the same sampling noise every time, and its share of the best
        return."""
        policy, count = self.policy, self.config.eval_dialogues
        rollouts = policy.roll_out(
            lambda: PersonaInterview(held_out=True), range(count), 1, policy.sampling_generator(0)
        )
        reward = sum(r.total_reward for r in rollouts) / count
        share = reward * count / sum(r.environment.best_return() for r in rollouts)  # type: ignore[attr-defined]
        kinds: dict[str, list[bool]] = {}
        for rollout in rollouts:
            for kind, right in rollout.environment.agreement():  # type: ignore[attr-defined]
                kinds.setdefault(kind, []).append(right)
        agreement = {f"eval/agreement/{kind}": sum(v) / len(v) for kind, v in sorted(kinds.items())}
        earned = of_rollouts([r.sample for r in rollouts], self.objective)
        run.log("eval", {"step": step, **earned, "eval/reward": reward, "eval/reward_share": share, **agreement})
        run.log_samples("eval", step, [r.sample for r in rollouts], policy.chat, self.objective)
        progress.say(f"held-out personas after step {step}: return {reward:.2f}, {share:.0%} of a truthful assistant's")
        if when:
            note = (
                f"Held-out personas, step {step}, temperature {self.config.temperature}. A reward may settle an "
                "earlier answer too."
            )
            run.write_samples(when, rollouts[:SHOWN], note)

    def finish(self, run: RunFolder, progress: Progress) -> dict[str, Any]:
        """The last evaluation and the curves; start and end for the summary."""
        self.evaluate(run, progress, run.steps, "after")
        run.draw_curve(
            "reward", "eval/reward", f"Persona interview, {self.config.policy_class}", "mean return per dialogue"
        )
        return run.start_and_end("eval/reward", "eval/reward_share")


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

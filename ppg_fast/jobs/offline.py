"""Offline: reward-weighted likelihood of logged dialogues, each turn weighted by its windowed return."""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from ppg_fast.config import TrainConfig
from ppg_fast.dialogues.chat_format import make_byte_tokenizer
from ppg_fast.dialogues.dialogue import Dialogue, read_dialogues
from ppg_fast.dialogues.encoding import encode_dialogue
from ppg_fast.dialogues.packing import CONTEXT, Sample
from ppg_fast.distributed import Ranks
from ppg_fast.jobs.policy import Policy
from ppg_fast.jobs.resume import ResumableRun
from ppg_fast.jobs.run_folder import Progress, RunFolder
from ppg_fast.jobs.samples import SHOWN
from ppg_fast.rollouts.environment import LoggedDialogue
from ppg_fast.rollouts.rollout import Rollout
from ppg_fast.training.evaluation import of_rollouts, on_logged_prefix
from ppg_fast.training.objective import require_nonnegative, warn_if_hardly_credited


class OfflineJob:
    """Train on logged dialogues; evaluate on a part of them kept apart (at most a fifth, none of fewer than five)."""

    def __init__(self, config: TrainConfig, ranks: Ranks | None = None) -> None:
        self.config = config
        dialogues = read_dialogues(str(config.data), strict=config.strict)
        contents = [m.content for d in dialogues for m in d.messages]
        self.policy = Policy(config, lambda: make_byte_tokenizer(contents, config.vocab_size), ranks)
        self.objective = self.policy.objective()
        self.dialogues, samples = _encode_all(self.policy.tokenizer, dialogues, config.strict)
        if not config.allow_negative_rewards:
            require_nonnegative(samples, [d.id for d in self.dialogues])
        warn_if_hardly_credited(samples, self.objective)
        self.samples = [cut_tokens(s, config.max_dialogue_tokens) for s in samples]
        self.shortened = sum(a is not b for a, b in zip(self.samples, samples, strict=True))
        order = list(range(len(samples)))
        self.policy.rng.shuffle(order)
        apart = min(config.eval_dialogues, len(order) // 5)
        self.held_out, self.seen = order[:apart], order[apart:]
        # rewards of a rollout's turns, where somebody can judge them
        self.score: Callable[[Rollout], Sequence[float]] | None = None

    @property
    def data_digest(self) -> str:
        """A checksum of everything that training reads of the dialogues."""
        total = hashlib.sha256()
        for sample in self.samples:
            total.update(repr((sample.tokens, sample.turn_ids, sample.rewards, sample.group_id)).encode())
        return total.hexdigest()

    def train(self, run: ResumableRun, progress: Progress) -> None:
        """Climb the weighted likelihood."""
        config, tokens = self.config, sum(len(s.tokens) for s in self.samples)
        text = f"{len(self.seen)} dialogues to train on, {len(self.held_out)} held out, {tokens:,} tokens"
        progress.say(
            text + (f"; {self.shortened} read up to {config.max_dialogue_tokens} tokens" if self.shortened else "")
        )
        if not run.of_phase("eval"):
            self.evaluate(run, progress, 0, "before")
        with progress.phase(config.policy_class, config.max_steps) as phase:
            for metrics in run.climb("train", self.batch, self.objective, self.policy.schedule()):
                phase.show(metrics, "logprob")
                if metrics["step"] % config.eval_every == 0 and metrics["step"] < config.max_steps:
                    self.evaluate(run, progress, metrics["step"])

    def batch(self, step: int) -> list[Sample]:
        """Dialogues drawn without replacement within a step."""
        del step
        return [
            self.samples[i] for i in self.policy.rng.sample(self.seen, min(self.config.num_prompts, len(self.seen)))
        ]

    def evaluate(self, run: RunFolder, progress: Progress, step: int, when: str = "") -> None:
        """Log-probs of the logged answers, each on its logged prefix, by turn; the policy's own answers in the same
        places.

        The answers are sampled for the pages before and after, and every time where ``score`` can say what they are
        worth.
        """
        where, name = (self.held_out, "held-out") if self.held_out else (self.seen, "training")
        with self.policy.ranks.no_grad_forward(self.policy.module):
            metrics = on_logged_prefix(
                self.policy.module, [self.samples[i] for i in where], self.objective, self.config.max_tokens
            )
        if when or self.score:
            rollouts = self._answer([self.dialogues[i] for i in where])
            metrics |= of_rollouts([r.sample for r in rollouts], self.objective) if self.score else {}
            run.log_samples(
                "eval",
                step,
                [r.sample for r in rollouts],
                self.policy.chat,
                self.objective,
                scored=self.score is not None,
            )
            if when:
                text = f"The policy in the places of {name} logged dialogues, step {step}."
                note = text if self.score else f"{text} The partner does not hear it, so nothing is scored."
                run.write_samples(when, rollouts[:SHOWN], note, scored=self.score is not None)
        run.log("eval", {"step": step, **metrics})
        said = f"; return of its own answers {metrics['eval/reward']:.2f}" if self.score else ""
        progress.say(
            f"{name} dialogues after step {step}: mean log-prob {metrics['eval/logprob']:.3f} nats a token{said}"
        )

    def _answer(self, logged: Sequence[Dialogue]) -> list[Rollout]:
        """One rollout in each of ``logged``, a few of them where nothing is scored; the same sampling noise every
        time."""
        make = lambda: LoggedDialogue(logged, self.config.max_turns)  # noqa: E731
        count = len(logged) if self.score else min(SHOWN, len(logged))
        rollouts = self.policy.roll_out(make, range(count), 1, self.policy.sampling_generator(0))
        for rollout in rollouts if self.score else []:
            rollout.sample.rewards[:] = self.score(rollout)  # type: ignore[misc]
        return rollouts

    def finish(self, run: RunFolder, progress: Progress) -> dict[str, Any]:
        """The last evaluation and the curves; start and end for the summary."""
        self.evaluate(run, progress, run.steps, "after")
        run.draw_curve(
            "logprob",
            "eval/logprob",
            f"Logged dialogues, {self.config.policy_class}",
            "mean log-prob of the answers, nats a token",
        )
        return run.start_and_end("eval/logprob", "eval/weighted_logprob", *(("eval/reward",) if self.score else ()))


def _encode_all(tokenizer: Any, dialogues: Sequence[Dialogue], strict: bool) -> tuple[list[Dialogue], list[Sample]]:
    """Every dialogue that the tokenizer can write, with its sample; the others are a warning each, an error if
    ``strict``."""
    pairs = []
    for dialogue in dialogues:
        try:
            pairs.append((dialogue, encode_dialogue(tokenizer, dialogue)))
        except ValueError as error:  # noqa: PERF203 (the good ones are kept)
            if strict:
                raise
            warnings.warn(f"{error}; left out", stacklevel=2)
    if not pairs:
        raise ValueError(f"none of {len(dialogues)} dialogues can be written in the tokenizer's chat format")
    return [d for d, _ in pairs], [s for _, s in pairs]


def cut_tokens(sample: Sample, max_tokens: int) -> Sample:
    """The turns that end within ``max_tokens`` tokens, the first in any case; 0: all. Rewards stay whole, and so do
    their windows."""
    turn_ids = sample.turn_ids
    if not max_tokens or len(turn_ids) <= max_tokens:
        return sample
    ends = [
        i
        for i in range(1, len(turn_ids) + 1)
        if turn_ids[i - 1] != CONTEXT and turn_ids[i - 1 : i + 1] != [turn_ids[i - 1]] * 2
    ]
    end = max((e for e in ends if e <= max_tokens), default=ends[0])
    return replace(sample, tokens=sample.tokens[:end], turn_ids=turn_ids[:end])

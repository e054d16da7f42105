"""Offline: reward-weighted likelihood of logged dialogues, each turn weighted by its windowed return."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ppg_fast.config import TrainConfig
from ppg_fast.dialogues.chat_format import make_byte_tokenizer
from ppg_fast.dialogues.dialogue import Dialogue, read_dialogues
from ppg_fast.dialogues.encoding import encode_dialogue
from ppg_fast.dialogues.packing import CONTEXT, Sample
from ppg_fast.dialogues.prompts import prompt_of
from ppg_fast.distributed import Ranks
from ppg_fast.jobs.job import Evaluation, Job, keep_readable
from ppg_fast.jobs.resume import ResumableRun
from ppg_fast.jobs.run_folder import Progress
from ppg_fast.jobs.samples import SHOWN
from ppg_fast.rollouts.partner import Conversation, LoggedPartner
from ppg_fast.rollouts.rollout import Rollout
from ppg_fast.training.evaluation import on_logged_prefix
from ppg_fast.training.objective import require_nonnegative, warn_if_hardly_credited


class OfflineJob(Job):
    """Train on logged dialogues; evaluate on a part of them kept apart (at most a fifth, none of fewer than five)."""

    on_policy = False
    title, unit = "Logged dialogues", "mean log-prob of the answers, nats a token"
    reported = ("eval/logprob", "eval/weighted_logprob")

    def __init__(self, config: TrainConfig, ranks: Ranks | None = None) -> None:
        dialogues = read_dialogues(str(config.data), strict=config.strict)
        contents = [m.content for d in dialogues for m in d.messages]
        super().__init__(config, lambda: make_byte_tokenizer(contents, config.vocab_size), ranks)
        encode = lambda dialogue: encode_dialogue(self.policy.tokenizer, dialogue)  # noqa: E731
        self.dialogues, samples = keep_readable(dialogues, encode, config.strict, "dialogues")
        if not config.allow_negative_rewards:
            require_nonnegative(samples, [d.id for d in self.dialogues])
        warn_if_hardly_credited(samples, self.objective)
        self.samples = [cut_tokens(s, config.max_dialogue_tokens) for s in samples]
        self.shortened = sum(a is not b for a, b in zip(self.samples, samples, strict=True))
        self.held_out, self.seen = self.split(len(samples))

    def source(self) -> str:
        """The file."""
        return f"on the logged dialogues of `{Path(str(self.config.data)).name}` by reward-weighted likelihood"

    def data_read(self) -> Iterable[object]:
        """Of every dialogue."""
        return ((s.tokens, s.turn_ids, s.rewards, s.group_id) for s in self.samples)

    def start(self, run: ResumableRun, progress: Progress) -> None:
        """Say how much there is to read."""
        tokens = sum(len(s.tokens) for s in self.samples)
        text = f"{len(self.seen)} dialogues to train on, {len(self.held_out)} held out, {tokens:,} tokens"
        cut = f"; {self.shortened} read up to {self.config.max_dialogue_tokens} tokens" if self.shortened else ""
        progress.say(text + cut)

    def collect(self, step: int) -> list[Sample]:
        """Dialogues drawn without replacement within a step."""
        count = min(self.config.num_prompts, len(self.seen))
        return [self.samples[i] for i in self.policy.rng.sample(self.seen, count)]

    def measure(self, when: str) -> Evaluation:
        """Log-probs of the logged answers, each on its logged prefix, by turn; ``when``: the policy's own answers in
        the same places, to read."""
        where, name = (self.held_out, "held-out") if self.held_out else (self.seen, "training")
        module, samples = self.policy.module, [self.samples[i] for i in where]
        with self.policy.ranks.no_grad_forward(module):
            metrics = on_logged_prefix(module, samples, self.objective, self.config.max_tokens)
        result = f"mean log-prob {metrics['eval/logprob']:.3f} nats a token"
        rollouts = self._answer([self.dialogues[i] for i in where[:SHOWN]]) if when else []
        note = "The policy answers in the places of the log; the partner does not hear it, so nothing is scored."
        return Evaluation(f"{name} dialogues", metrics, result, rollouts, note)

    def _answer(self, logged: Sequence[Dialogue]) -> list[Rollout]:
        """One rollout in each of ``logged``; the same sampling noise every time."""
        prompts, partner = [prompt_of(dialogue) for dialogue in logged], LoggedPartner()
        make = lambda: Conversation(prompts, partner, self.config.max_turns)  # noqa: E731
        return self.policy.roll_out(make, range(len(prompts)), 1, self.policy.sampling_generator(0))


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

"""Offline: reward-weighted likelihood of logged dialogues, each turn weighted by its windowed return."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ppg_fast.config import OF_TURNS, TrainConfig
from ppg_fast.dialogues.chat_format import ChatFormat, make_byte_tokenizer
from ppg_fast.dialogues.dialogue import Dialogue, as_json, read_file
from ppg_fast.dialogues.encoding import encode_dialogue
from ppg_fast.dialogues.packing import Sample
from ppg_fast.dialogues.prompts import prompt_of
from ppg_fast.distributed import Ranks
from ppg_fast.jobs.job import Evaluation, Job, keep_readable
from ppg_fast.jobs.progress import Progress
from ppg_fast.jobs.resume import ResumableRun
from ppg_fast.jobs.samples import SHOWN
from ppg_fast.rollouts.partner import Conversation, LoggedPartner
from ppg_fast.rollouts.rollout import Rollout
from ppg_fast.spec import require
from ppg_fast.training.evaluation import on_logged_prefix
from ppg_fast.training.objective import (
    require_nonnegative,
    require_targets,
    warn_if_equal,
    warn_if_hardly_credited,
)


class OfflineJob(Job):
    """Train on logged dialogues; evaluate on a part of them kept apart (at most a fifth, none of fewer than five)."""

    on_policy = False
    title, unit = "Logged dialogues", "mean log-prob of the answers, nats a token"
    reported = ("eval/logprob", "eval/weighted_logprob")

    def __init__(self, config: TrainConfig, ranks: Ranks | None = None) -> None:
        dialogues = read_file(str(config.data), config.strict, scored=not config.imitate).dialogues
        contents = [m.content for d in dialogues for m in d.messages]
        super().__init__(config, lambda: make_byte_tokenizer(contents, config.vocab_size), ranks)
        self.dialogues, self.samples = keep_readable(
            dialogues, self._encode, config.strict, str(config.data), "dialogues"
        )
        if not (config.allow_negative_rewards or config.of_turns):
            require_nonnegative(self.samples, [d.id for d in self.dialogues])
        self._leave_out_untargeted()
        if not config.imitate:
            warn_if_hardly_credited(self.samples, self.objective)
            warn_if_equal(self.samples, self.objective)
        self.shortened = sum(map(_is_cut, self.samples, self.dialogues))
        self.held_out, self.seen = self.split(len(self.samples))

    def _encode(self, dialogue: Dialogue) -> Sample:
        sample = encode_within(self.policy.chat, dialogue, self.config.max_dialogue_tokens, self.policy.positions)
        return replace(sample, rewards=[1.0] * len(sample.rewards)) if self.config.imitate else sample

    def _leave_out_untargeted(self) -> None:
        """Leave out the dialogues that `require_targets` refuses, with one warning. ValueError under ``strict``, and
        where none would be left."""
        kept, problems = [], []
        for dialogue, sample in zip(self.dialogues, self.samples, strict=True):
            try:
                require_targets(sample, dialogue.id, self.objective)
            except ValueError as error:  # noqa: PERF203 (the good ones are kept)
                if self.config.strict:
                    raise
                problems.append(str(error))
            else:
                kept.append((dialogue, sample))
        if problems:
            count = f"{self.config.data}: {len(problems)} of {len(self.samples)} dialogues are left out"
            if not kept:
                raise ValueError(f"{count}; {problems[0]}")
            warnings.warn(f"{count}; the first: {problems[0]}", stacklevel=2)
        self.dialogues, self.samples = [d for d, _ in kept], [s for _, s in kept]

    def source(self) -> str:
        """The file, and the method."""
        imitates = "imitation with values" if self.config.imitate_td else "imitation"
        _, method = OF_TURNS.get(self.config.loss_type, ((), "reward-weighted likelihood"))
        method = imitates if self.config.imitate else method
        return f"on the logged dialogues of `{Path(str(self.config.data)).name}` by {method}"

    def data_read(self) -> Iterable[object]:
        """Every dialogue as it was logged, and what makes tokens of it: not the tokens, which may hold a date."""
        yield self.policy.chat.renderer.digest()
        for d in self.dialogues:
            yield as_json(d)

    def start(self, run: ResumableRun, progress: Progress) -> None:
        """Say how much there is to read."""
        tokens = sum(len(s.tokens) for s in self.samples)
        text = f"{len(self.seen)} dialogues to train on, {len(self.held_out)} held out, {tokens:,} tokens"
        cut = f"; {self.shortened} read up to {self.config.max_dialogue_tokens} tokens" if self.shortened else ""
        progress.say(text + cut)

    def collect(self, step: int) -> list[Sample]:
        """Dialogues drawn without replacement within a step; openings with all of theirs where a group is compared."""
        drawn = [[i] for i in self.seen]
        if self.config.baseline != "none":
            groups: dict[int, list[int]] = {}
            for i in self.seen:
                groups.setdefault(self.samples[i].group_id, []).append(i)
            drawn = list(groups.values())
        count = min(self.config.num_prompts, len(drawn))
        return [self.samples[i] for group in self.policy.rng.sample(drawn, count) for i in group]

    def measure(self, when: str) -> Evaluation:
        """Log-probs of the logged answers, each on its logged prefix, by turn; ``when``: the policy's own answers in
        the same places, to read."""
        where, name = (self.held_out, "held-out") if self.held_out else (self.seen, "training")
        module, samples = self.policy.module, [self.samples[i] for i in where]
        with self.policy.ranks.no_grad_forward(module):
            metrics = on_logged_prefix(module, samples, self.objective, self.config.max_tokens, self.policy.ranks.check)
        result = f"mean log-prob {metrics['eval/logprob']:.3f} nats a token"
        rollouts = self._answer([self.dialogues[i] for i in where if self._can_answer(i)][:SHOWN]) if when else []
        note = "The policy answers in the places of the log; the partner does not hear it, so nothing is scored."
        return Evaluation(f"{name} dialogues", metrics, result, rollouts, note)

    def _can_answer(self, place: int) -> bool:
        """Whether the chat format can take the log as replies to answers that are not logged."""
        prompt = prompt_of(self.dialogues[place])
        try:
            self.policy.chat.rehearse(prompt.messages, prompt.replies()[: self.config.max_turns], prompt.tools)
        except ValueError:
            return False
        return True

    def _answer(self, logged: Sequence[Dialogue]) -> list[Rollout]:
        """One rollout in each of ``logged``; the same sampling noise every time."""
        prompts, partner = [prompt_of(dialogue) for dialogue in logged], LoggedPartner()
        make = lambda: Conversation(prompts, partner, self.config.max_turns)  # noqa: E731
        return self.policy.roll_out(make, range(len(prompts)), 1, self.policy.sampling_generator(0))


def encode_within(chat: ChatFormat, dialogue: Dialogue, max_tokens: int, positions: int | None) -> Sample:
    """`encode_dialogue`; ValueError too where the policy has no ``positions`` for what is read of the dialogue."""
    sample = encode_dialogue(chat, dialogue, max_tokens)
    length = sample.longest_part
    rule = f"dialogue {dialogue.id!r}: what is read of it must fit the model's {positions} positions"
    require(not positions or length <= positions, f"{rule} (max_dialogue_tokens cuts it)", f"{length} tokens")
    return sample


def _is_cut(sample: Sample, dialogue: Dialogue) -> bool:
    """Whether the last answer that trains was not read."""
    answers = [message.trained for message in dialogue.messages if message.role == "assistant"]
    return max(sample.turn_ids) < max(turn for turn, trained in enumerate(answers) if trained)

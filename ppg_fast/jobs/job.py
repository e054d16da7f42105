"""What every job of `ppg-fast train` does: train step by step, evaluate on what training does not read, report."""

import hashlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ppg_fast.config import TrainConfig
from ppg_fast.dialogues.logged import Dialogue
from ppg_fast.dialogues.packing import Sample
from ppg_fast.dialogues.prompts import Prompt
from ppg_fast.dialogues.records import Problems
from ppg_fast.distributed import Ranks
from ppg_fast.jobs.human import human_of
from ppg_fast.jobs.inputs import content_digest, model_digest
from ppg_fast.jobs.policy import Policy
from ppg_fast.jobs.progress import Progress
from ppg_fast.jobs.resume import ResumableRun
from ppg_fast.jobs.run_folder import RunFolder
from ppg_fast.jobs.samples import SHOWN, rolled_out
from ppg_fast.rewards.labels import Label
from ppg_fast.rollouts.rollout import Rollout
from ppg_fast.training.objective import require_targets, warn_if_hardly_credited

if TYPE_CHECKING:
    from ppg_fast.jobs.refitted_model import RefittedModel

Item = TypeVar("Item", Dialogue, Prompt, Label)
Read = TypeVar("Read")


@dataclass(frozen=True)
class Evaluation:
    """Metrics of ``subject`` ("held-out personas"), their one-line ``result``, dialogues to read and a note on them."""

    subject: str
    metrics: dict[str, float]
    result: str
    rollouts: Sequence[Rollout] = ()
    note: str = ""


class Job(ABC):
    """One kind of training: a subclass reads its data, collects the dialogues of a step and measures the policy.

    Where ``on_policy`` is False, the dialogues of a step are logged ones: their log-prob is shown and drawn instead of
    the return, and the policy's own answers have no reward.
    """

    on_policy = True
    title, unit = "", "mean return per dialogue"  # of the learning curve
    reported: tuple[str, ...] = ("eval/reward",)  # metrics whose start and end go into the summary

    def __init__(self, config: TrainConfig, make_tokenizer: Callable[[], Any], ranks: Ranks | None = None) -> None:
        self.config, self.policy = config, Policy(config, make_tokenizer, ranks)
        self.objective = self.policy.objective()
        self.human = human_of(config)  # who rewards every step, where people do
        self.rollout_metrics: dict[str, Any] = {}  # of the step under way, logged as phase rollout

    @abstractmethod
    def source(self) -> str:
        """Where the dialogues come from, as the rest of "training of a model ..."."""

    @abstractmethod
    def collect(self, step: int) -> list[Sample]:
        """The dialogues of ``step`` (from 1), on all ranks the same."""

    @abstractmethod
    def measure(self, when: str) -> Evaluation:
        """An evaluation on held-out data, with the same sampling noise every time; ``when``: before, after or ""."""

    def data_read(self) -> Iterable[object]:
        """Everything that training reads of the data, for a checksum; nothing where it is a function of the seed."""
        return ()

    def start(self, run: ResumableRun, progress: Progress) -> None:
        """What comes before the first evaluation: an introduction, a warm start."""
        del run, progress

    @property
    def fitted(self) -> "RefittedModel | None":
        """Who learns from people and rewards, where a model does."""
        return self.policy.fitted

    @property
    def scored(self) -> bool:
        """Whether the policy's own answers have rewards in evaluations."""
        return self.on_policy

    @property
    def metric(self) -> str:
        """What is shown and drawn: <metric> of training steps and eval/<metric> of evaluations."""
        return "reward" if self.on_policy else "logprob"

    @property
    def data_digest(self) -> str:
        """A checksum of `data_read`."""
        total = hashlib.sha256()
        for part in self.data_read():
            total.update(repr(part).encode())
        return total.hexdigest()

    @property
    def digests(self) -> dict[str, str]:
        """What must stay as it is while a run goes on, by the names of `resume.DIGESTS`."""
        teacher = {"teacher": content_digest(Path(self.config.teacher))} if self.config.teacher else {}
        return {"data": self.data_digest, "model": model_digest(self.config), **teacher}

    def description(self) -> str:
        """What is trained, on what and how, in one sentence."""
        c = self.config
        made = f"a small Qwen3 of random weights ({c.layers} layers of {c.width})"
        model = f"`{Path(c.model).name}`" if c.model else made
        how = f"policy class `{c.policy_class}`, loss `{c.loss_type}`, seed {c.seed}"
        return f"{'On-policy' if self.on_policy else 'Offline'} training of {model} {self.source()}: {how}."

    def split(self, count: int) -> tuple[list[int], list[int]]:
        """``count`` places in random order: those held out (at most a fifth and ``eval_dialogues``), those to train
        on."""
        order = list(range(count))
        self.policy.rng.shuffle(order)
        apart = min(self.config.eval_dialogues, count // 5)
        return order[:apart], order[apart:]

    def train(self, run: ResumableRun, progress: Progress) -> None:
        """Maximise the objective for ``max_steps`` steps, with an evaluation before them and every ``eval_every``."""
        config, last = self.config, []
        self.start(run, progress)
        if not run.of_phase("eval"):
            self.evaluate(run, progress, 0, "before")

        def collect(step: int) -> list[Sample]:
            learned = self.fitted.refit(run, step, self.policy.ranks, progress.say) if self.fitted else {}
            last[:] = self.collect(step)
            if config.keep_rollouts:
                dialogues = rolled_out(step, self.policy.said, last)
                if self.human:
                    self._rate(run, step, dialogues, last, progress)
                else:
                    run.keep_rollouts(step, dialogues)
                if self.fitted:
                    self.fitted.remember(step, dialogues, last)
            self.rollout_metrics = {**self.rollout_metrics, **learned}
            if self.on_policy and step == 1:
                warn_if_hardly_credited(last, self.objective)
            if self.rollout_metrics:
                run.log("rollout", {"step": step, **self.rollout_metrics})
            return list(last)

        with progress.phase(config.policy_class, config.max_steps) as phase:
            again = self.fitted.again if self.fitted and self.fitted.replays else None
            for metrics in run.optimise("train", collect, self.objective, self.policy.schedule(), again):
                step = metrics["step"]
                if last:  # a run that goes on yields the step before, whose evaluation may not have been done
                    phase.show(metrics, self.metric)
                if step % config.eval_every == 0:
                    if self.on_policy and last:
                        run.log_samples("train", step, last, self.policy.chat, self.objective)
                    if step < config.max_steps and all(row["step"] != step for row in run.of_phase("eval")):
                        self.evaluate(run, progress, step)

    def _rate(
        self, run: RunFolder, step: int, dialogues: Sequence[Dialogue], samples: Sequence[Sample], progress: Progress
    ) -> None:
        """Give the samples of a step the rewards of people, who are waited for."""
        human = self.human
        assert human
        ranks, start = self.policy.ranks, time.perf_counter()
        rated = ranks.run_on_main(lambda: human.rewarded(run, step, dialogues, progress.say))
        for dialogue, sample in zip(rated, samples, strict=True):
            sample.rewards = [float(value or 0.0) for value in dialogue.turn_rewards]
            require_targets(sample, dialogue.id, self.objective)
        self.rollout_metrics = {**self.rollout_metrics, "human_time": time.perf_counter() - start}

    def evaluate(self, run: RunFolder, progress: Progress, step: int, when: str = "") -> None:
        """`measure` after ``step``: logged, said, and with ``when`` (before, after) a page of dialogues to read."""
        found, scored = self.measure(when), self.scored
        run.log("eval", {"step": step, **found.metrics})
        if found.rollouts:
            samples = [rollout.sample for rollout in found.rollouts]
            run.log_samples("eval", step, samples, self.policy.chat, self.objective, scored)
        progress.say(f"{found.subject} after step {step}: {found.result}")
        if when:
            note = f"{found.subject.capitalize()}, step {step}, temperature {self.config.temperature}. {found.note}"
            run.write_samples(when, found.rollouts[:SHOWN], note.rstrip(), scored)

    def finish(self, run: RunFolder, progress: Progress) -> dict[str, Any]:
        """The last evaluation and the curves; start and end of the ``reported`` metrics, for the summary."""
        self.evaluate(run, progress, run.steps, "after")
        title = f"{self.title}, {self.config.policy_class}"
        run.draw_curve(self.metric, f"eval/{self.metric}", title, self.unit)
        return run.start_and_end(*self.reported)


def keep_readable(
    items: Sequence[Item], read: Callable[[Item], Read], strict: bool, path: str, name: str
) -> tuple[list[Item], list[Read]]:
    """The items of the file at ``path`` that ``read`` can read, and what it gives for each. The others are named, with
    their line, as those of a file are: `Problems`."""
    problems = Problems(path, strict, f"none of {len(items)} {name} can be written in the tokenizer's chat format")
    kept: list[Item] = []
    results: list[Read] = []
    for item in items:
        try:
            results.append(read(item))
        except ValueError as error:  # noqa: PERF203 (the good ones are kept)
            problems.add(f"{item.where}: {error}" if item.where else str(error))
        else:
            kept.append(item)
    problems.close(len(kept))
    return kept, results

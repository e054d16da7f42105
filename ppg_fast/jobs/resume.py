"""A run that survives: checkpoints while it goes, an orderly stop at a signal, and the way back in."""

import fcntl
import math
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ppg_fast import stopping
from ppg_fast.config import TrainConfig, read_yaml
from ppg_fast.dialogues.packing import Sample
from ppg_fast.jobs.changes import SILENT, differences, require_changeable
from ppg_fast.jobs.inputs import with_absolute_paths
from ppg_fast.jobs.policy import Policy
from ppg_fast.jobs.run_folder import CHECKPOINTS, CONFIG, METRICS, SUMMARY, RunFolder
from ppg_fast.models.adaptation import frozen_digest, load_trainable_state
from ppg_fast.training import checkpoint
from ppg_fast.training.objective import Objective, Schedule
from ppg_fast.training.trainer import TrainingState, optimise
from ppg_fast.writing import sync


class ResumableRun(RunFolder):
    """A RunFolder that keeps checkpoints of the whole run and, with ``resume``, goes on from the newest.

    As a context manager it turns the first signal into Stopped at the next forward pass, on all ranks at the same one,
    and keeps the folder to itself; `save_stopped` then keeps what was done. ValueError where another process trains in
    it, and where model or data are not those the run began with. Ranks share the run: the first writes, all see the
    same error.
    """

    def __init__(
        self,
        config: TrainConfig,
        policy: Policy,
        digests: Mapping[str, str],
        description: str = "",
        resume: bool = False,
    ) -> None:
        ranks = policy.ranks
        super().__init__(config, description, keeps=ranks.is_main)
        self.ranks, self.policy, self.digests = ranks, policy, dict(digests)
        self._mark: Callable[[], None] | None = None  # writes the checkpoint of the last step
        self.restored = False  # whether the folder holds the run that was there before
        self._release: Callable[[], object] = lambda: None
        ranks.run_on_main(self._claim)
        self.saved = checkpoint.newest(self.path / CHECKPOINTS, ranks) if resume else None
        self.frozen = frozen_digest(policy.model)
        if resume:
            ranks.run_on_all(self._check)
        ranks.run_on_main(lambda: self.open(resume))
        saved = self.saved or {"finished": [], "taken": 0, "metrics_bytes": 0, "seconds": 0.0}
        self.finished: list[str] = saved["finished"]
        self.taken: int = saved["taken"]
        if resume:
            ranks.run_on_main(lambda: (self.path / SUMMARY).unlink(missing_ok=True))
            ranks.run_on_all(lambda: self.rewind(saved["metrics_bytes"], saved["seconds"], self._old_end()))

    def _claim(self) -> None:
        """Keep the folder to this process."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._release = _lock(self, self.path)
        self.owned.recover()

    def _check(self) -> None:
        """ValueError, before anything is written, where a setting is another that may not be, or the checkpoint is none
        of this model, this data and these rewards."""
        saved, config = self.saved, self.config
        require_changeable(saved["config"] if saved else read_yaml(str(self.path / CONFIG)), config)
        if saved is None:
            return
        self.require_metrics(saved["metrics_bytes"])
        for name, digest in self.digests.items():
            if saved.get(name, digest) != digest:
                raise ValueError(
                    f"a run goes on with {DIGESTS[name]} it began with, got others: {_named(name, config)}"
                )
        if saved.get("frozen", "") != self.frozen:
            rule = "a run goes on with the frozen weights it began with, got others"
            raise ValueError(f"{rule}: model {config.model!r}, freeze {config.freeze!r}")
        try:
            load_trainable_state(self.policy.model, saved["training"]["model"])
        except ValueError as error:
            raise ValueError(f"a run goes on with the model it began with, got another one: {error}") from error

    def _old_end(self) -> int | None:
        """The step at which the run had ended, where it is to go further."""
        if not self.saved or self.saved["phase"] != "train":
            return None
        step = self.saved["training"]["step"]
        return step if self.saved["config"]["max_steps"] == step < self.config.max_steps else None

    def origin(self) -> str:
        """What a resumed run goes on from, and with which other settings than before."""
        if not self.saved:
            return f"{self.path} has no checkpoint yet: from the beginning"
        found = differences(self.saved["config"], self.config)
        changes = [f"{name} {old} -> {new}" for name, (old, new) in found.items() if name not in SILENT]
        where = f"{self.path} goes on after step {self.saved['training']['step']} of phase {self.saved['phase']!r}"
        return where + (f", with other settings: {', '.join(changes)}" if changes else "")

    def optimise(
        self,
        phase: str,
        collect: Callable[[int], Sequence[Sample]],
        objective: Objective,
        schedule: Schedule,
        again: Callable[[int, int], Sequence[Sample]] | None = None,
    ) -> Iterator[dict[str, Any]]:
        """The steps of `optimise` that are still to be taken in ``phase``, logged and kept.

        A checkpoint is written once the caller is done with the step, so that an evaluation after it is in the metrics;
        after a signal `save_stopped` writes that of the last step. A run that goes on yields that step once more: what
        the caller does after it may not have been done.
        """
        if phase in self.finished:
            return
        state, resumed = TrainingState.start(self.policy.model, objective, schedule), self.saved is not None
        if resumed:
            self._restore(state, phase)
        for row in [row for row in self.of_phase(phase) if resumed and row["step"] == state.step]:
            self._remember(phase, state)
            yield {name: math.nan if value is None else value for name, value in row.items()}
            self._remember(phase, state)
        for metrics in optimise(self.policy.model, collect, objective, schedule, state, self.ranks, again):
            self.log(phase, metrics)
            self.taken += 1
            self._remember(phase, state)
            yield metrics
            self._remember(phase, state)
            if state.step == schedule.max_steps or (self.config.save_every and not self.taken % self.config.save_every):
                self.save_stopped()
        self.finished.append(phase)

    def _remember(self, phase: str, state: TrainingState) -> None:
        """What a checkpoint of now would hold beside ``state``, which only a step changes: what is under way after it,
        a rollout or an evaluation, may be cut short at any time, and is done again from here."""
        content = {
            "config": with_absolute_paths(asdict(self.config)),
            **self.digests,
            "frozen": self.frozen,
            "phase": phase,
            "finished": list(self.finished),
            "taken": self.taken,
            "policy": self.policy.state_dict(),
            "random": checkpoint.random_states(),
            "metrics_bytes": self.ranks.run_on_main(lambda: (self.path / METRICS).stat().st_size),
            "seconds": self.seconds,
        }
        self._mark = lambda: self._save(content, state)

    def save_stopped(self) -> None:
        """The checkpoint of the last step, where it is not written yet."""
        mark, self._mark = self._mark, None
        if mark:
            mark()

    def _save(self, content: dict[str, Any], state: TrainingState) -> None:
        """A checkpoint of everything; one that cannot be written is a warning, and those before it stay."""
        whole = {**content, "training": state.state_dict(), "random": self.ranks.gather(content["random"])}
        taken = content["taken"]
        try:
            self.ranks.run_on_main(lambda: sync(self.path / METRICS))
            checkpoint.save(self.path / CHECKPOINTS, taken, whole, self.config.keep_checkpoints, self.ranks)
        except OSError as error:
            found = checkpoint.checkpoints(self.path / CHECKPOINTS)
            last = f"the newest is {found[-1].name}" if found else "there is none yet"
            warnings.warn(f"no checkpoint after step {taken}, {last}: {error}", stacklevel=2)

    def save_weights(self) -> None:
        """checkpoint/, as others load it: gathered from all ranks, written by the first."""
        state = self.ranks.full_state(self.policy.model)
        self.ranks.run_on_main(lambda: self.save_checkpoint(self.policy.model, self.policy.tokenizer, state))

    def _restore(self, state: TrainingState, phase: str) -> None:
        saved, self.saved = self.saved, None
        assert saved is not None
        if saved["phase"] != phase:
            raise ValueError(f"a run goes on with the phase it was in, {saved['phase']!r}, got {phase!r}")
        state.load_state_dict(saved["training"])
        self.policy.load_state_dict(saved["policy"])
        # a rank that the run did not have so far begins with what its seed gave it
        if self.ranks.rank < len(saved["random"]):
            checkpoint.set_random_states(saved["random"][self.ranks.rank])

    def __enter__(self) -> "ResumableRun":
        # a launcher passes on what its whole group was sent, so that a signal may come twice
        repeats, notice = 3.0 if self.ranks.world > 1 else 0.0, "saving what was done (once more: at once)"
        self._listening = stopping.on_signals(at_once=False, notice=notice, repeats=repeats)
        self._listening.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.__exit__(None, None, None)
        self.restored = self.keeps and self.owned.restore()
        if self.restored:
            said = "the new run ended before its first step, so the one that was there is there again"
            warnings.warn(f"{self.path}: {said}", stacklevel=2)
        self._release()


DIGESTS = {  # what a checkpoint knows of what it was trained on
    "data": "the dialogues and the tokenizer",
    "model": "the model (configuration, tokenizer, template)",
    "rewards": "the rewards (files, models, judge)",
    "teacher": "the teacher (its weights, its tokenizer)",
    "partner": "the partner (what it is told, its weights)",
    "tools": "the tools (the file, and the modules beside it that it imports)",
}


def _named(name: str, config: TrainConfig) -> str:
    setting = {"data": "data" if config.data else "prompts", "rewards": "reward"}.get(name, name)
    return f"{setting} {getattr(config, setting)!r}"


def _lock(run: ResumableRun, path: Path) -> Callable[[], object]:
    """Keep ``path`` to this process, until the returned function is called or the process ends, however it ends."""
    descriptor = os.open(path, os.O_RDONLY)
    release = weakref.finalize(run, os.close, descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        release()
        raise ValueError(f"only one process may train in a folder, and another one does in {path}") from error
    except OSError as error:  # a file system without locks
        warnings.warn(f"{path} cannot be locked against a second process: {error}", stacklevel=2)
    return release

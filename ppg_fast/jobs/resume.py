"""A run that survives: checkpoints while it goes, an orderly stop at a signal, and the way back in."""

import fcntl
import os
import signal
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ppg_fast.config import TrainConfig
from ppg_fast.dialogues.packing import Sample
from ppg_fast.jobs.policy import Policy
from ppg_fast.jobs.run_folder import CHECKPOINTS, METRICS, SUMMARY, RunFolder
from ppg_fast.models.adaptation import frozen_digest, load_trainable_state
from ppg_fast.training import checkpoint
from ppg_fast.training.objective import Objective, Schedule
from ppg_fast.training.trainer import TrainingState, optimise

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(Exception):
    """A signal, now ``number``, ended the training between two steps; what was done is in a checkpoint."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class ResumableRun(RunFolder):
    """A RunFolder that keeps checkpoints of the whole run and, with ``resume``, goes on from the newest.

    As a context manager it turns the first SIGINT or SIGTERM into Stopped after the step that is under way, and keeps
    the folder to itself. ValueError where another process trains in it, and where model or data are not those the run
    began with. Ranks share the run: the first writes, all see the same error, and a signal to one of them ends the
    training on all after the same step.
    """

    def __init__(
        self, config: TrainConfig, policy: Policy, data_digest: str = "", description: str = "", resume: bool = False
    ) -> None:
        ranks = policy.ranks
        super().__init__(config, description, keeps=ranks.is_main)
        self.ranks, self.policy, self.data_digest = ranks, policy, data_digest
        self.signal: int | None = None
        self._release: Callable[[], object] = lambda: None
        ranks.run_on_main(self._claim)
        self.saved = checkpoint.newest(self.path / CHECKPOINTS, ranks) if resume else None
        self.frozen = frozen_digest(policy.model)
        ranks.run_on_all(self._check)
        ranks.run_on_main(lambda: self.open(resume))
        saved = self.saved or {"finished": [], "taken": 0, "metrics_bytes": 0, "seconds": 0.0}
        self.finished: list[str] = saved["finished"]
        self.taken: int = saved["taken"]
        if resume:
            ranks.run_on_main(lambda: (self.path / SUMMARY).unlink(missing_ok=True))
            ranks.run_on_all(lambda: self.rewind(saved["metrics_bytes"], saved["seconds"]))

    def _claim(self) -> None:
        """Keep the folder to this process."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._release = _lock(self, self.path)

    def _check(self) -> None:
        """ValueError, before anything is written, where the checkpoint is none of this model and this data."""
        saved, config = self.saved, self.config
        if saved is None:
            return
        if saved["data"] != self.data_digest:
            rule = "a run goes on with the dialogues and the tokenizer it began with, got others"
            raise ValueError(f"{rule}: data {config.data or config.prompts!r}")
        if bool(saved["config"]["kl_coef"]) != bool(config.kl_coef):
            raise ValueError(f"a run goes on with a KL term if it began with one, got kl_coef {config.kl_coef}")
        of_before = {name: saved["config"][name] for name in ("policy_class", "signals", "candidates")}
        both = (c.candidate_classes() for c in (replace(config, **of_before), config))
        before, now = (", ".join(map(str, classes)) or "none" for classes in both)
        if before != now:
            rule = "a run goes on with the candidates it began with (policy_class auto or signals, and candidates)"
            raise ValueError(f"{rule}, {before}; got {now}")
        if saved.get("frozen", "") != self.frozen:
            rule = "a run goes on with the frozen weights it began with, got others"
            raise ValueError(f"{rule}: model {config.model!r}, freeze {config.freeze!r}")
        try:
            load_trainable_state(self.policy.model, saved["training"]["model"])
        except ValueError as error:
            raise ValueError(f"a run goes on with the model it began with, got another one: {error}") from error

    def origin(self) -> str:
        """What a resumed run goes on from, and with which other settings than before."""
        if not self.saved:
            return f"{self.path} has no checkpoint yet: from the beginning"
        before = self.saved["config"]
        changes = [
            f"{k} {before.get(k)} -> {v}"
            for k, v in asdict(self.config).items()
            if k not in PLACES and before.get(k) != v
        ]
        where = f"{self.path} goes on after step {self.saved['training']['step']} of phase {self.saved['phase']!r}"
        return where + (f", with other settings: {', '.join(changes)}" if changes else "")

    def optimise(
        self, phase: str, collect: Callable[[int], Sequence[Sample]], objective: Objective, schedule: Schedule
    ) -> Iterator[dict[str, Any]]:
        """The steps of `optimise` that are still to be taken in ``phase``, logged and kept. Stopped after a signal.

        A checkpoint is written once the caller is done with the step, so that an evaluation after it is in the metrics.
        """
        if phase in self.finished:
            return
        state = TrainingState.start(self.policy.model, objective, schedule)
        if self.saved:
            self._restore(state, phase)
        for metrics in optimise(self.policy.model, collect, objective, schedule, state, self.ranks):
            self.log(phase, metrics)
            yield metrics
            self.taken += 1
            stop = self.ranks.largest(self.signal or 0)  # asked once a step, so that all ranks hear the same
            due = self.config.save_every and self.taken % self.config.save_every == 0
            if due or stop or state.step == schedule.max_steps:
                self.save(phase, state)
            if stop:
                raise Stopped(stop)
        self.finished.append(phase)

    def save(self, phase: str, state: TrainingState) -> None:
        """A checkpoint of everything; one that cannot be written is a warning, and those before it stay."""
        content = {
            "config": asdict(self.config),
            "data": self.data_digest,
            "frozen": self.frozen,
            "phase": phase,
            "finished": self.finished,
            "taken": self.taken,
            "training": state.state_dict(),
            "policy": self.policy.state_dict(),
            "random": self.ranks.gather(checkpoint.random_states()),
            "metrics_bytes": self.ranks.run_on_main(self._metrics_bytes),
            "seconds": self.seconds,
        }
        try:
            checkpoint.save(self.path / CHECKPOINTS, self.taken, content, self.config.keep_checkpoints, self.ranks)
        except OSError as error:
            found = checkpoint.checkpoints(self.path / CHECKPOINTS)
            last = f"the newest is {found[-1].name}" if found else "there is none yet"
            warnings.warn(f"no checkpoint after step {self.taken}, {last}: {error}", stacklevel=2)

    def _metrics_bytes(self) -> int:
        checkpoint.sync(self.path / METRICS)
        return (self.path / METRICS).stat().st_size

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
        in_main = threading.current_thread() is threading.main_thread()  # the only one that Python lets set handlers
        self._handlers = {number: signal.signal(number, self._note) for number in SIGNALS} if in_main else {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._release()

    def _note(self, number: int, frame: object) -> None:
        """The first signal is noted; Ctrl-C after it does not wait for the step, unless there are other ranks to leave
        alone with it."""
        # their launcher passes a signal on, so that it may come twice, and sees to it that they end
        if self.ranks.world > 1:
            self.signal = self.signal or number
            return
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
        os.write(2, b"ppg-fast: stopping after this step (Ctrl-C: at once)\n")  # print may be what the signal came into


PLACES = ("output_dir", "overwrite", "progress", "rank_timeout")  # settings that change nothing in what is computed


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

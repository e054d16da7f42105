"""`ppg-fast train` from a config to an exit status: the ranks meet, a job trains, and what was done is kept."""

import dataclasses
import signal
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

from ppg_fast import stopping
from ppg_fast.config import TrainConfig
from ppg_fast.console import one_line
from ppg_fast.distributed import Ranks, lost_a_rank
from ppg_fast.jobs.job import Job
from ppg_fast.jobs.offline import OfflineJob
from ppg_fast.jobs.persona import PersonaJob
from ppg_fast.jobs.progress import Progress
from ppg_fast.jobs.prompts import PromptsJob
from ppg_fast.jobs.resume import ResumableRun
from ppg_fast.jobs.trackers import require_trackers
from ppg_fast.models.export import push_to_hub, require_repository
from ppg_fast.training.trainer import NotFinite

ENDS = {signal.SIGINT: "stopped", signal.SIGTERM: "terminated", signal.SIGHUP: "terminated"}


def run_job(config: TrainConfig, resume: bool = False) -> int:
    """Train as ``config`` says, or go on with the run in its folder. Returns the exit status: 0 done, 130 Ctrl-C, 143
    SIGTERM, 129 SIGHUP.

    ValueError or FileExistsError for bad input, before anything is written; once training runs, the run folder keeps
    what was done whatever happens. FloatingPointError, naming the file that holds the dialogues, after too many steps
    that were not finite.
    """
    require_trackers(config.trackers)
    if config.push_to_hub:
        require_repository(config.push_to_hub)
    ranks = Ranks.join(config.parallel, config.bf16, config.sync_each_batch, config.device, config.rank_timeout)
    if not ranks.is_main:
        warnings.simplefilter("ignore", UserWarning)  # the main rank says it
    if not config.template_date:  # fixed for the whole of the run, and kept in its config.yaml
        today = ranks.gather(time.strftime("%Y-%m-%d"))[0]
        config = dataclasses.replace(config, template_date=today)
    job = make_job(config, ranks)
    progress = Progress(config.progress, config.eval_every)
    progress.console.quiet = not ranks.is_main
    with ResumableRun(config, job.policy, job.digests, job.description(), resume) as run:
        if resume:
            progress.say(run.origin())
        end = _train(job, run, progress)
    ranks.leave()
    skipped = f", {run.skipped_steps} of them skipped (loss or gradient not finite)" if run.skipped_steps else ""
    where = f"{run.path} holds the run that was there before" if run.restored else f"the run is in {run.path}"
    progress.say(f"{end.status} after {run.steps} steps{skipped}; {where}")
    if config.push_to_hub and end.status == "finished" and ranks.is_main:
        progress.say(f"pushed: {push_to_hub(str(run.path), config.push_to_hub, config.hub_private)}")
    return 128 + end.signal if end.signal else 0  # as a shell counts


def make_job(config: TrainConfig, ranks: Ranks) -> Job:
    """The job of ``config``. ValueError where the ranks read different data."""
    kind = OfflineJob if config.data else PromptsJob if config.prompts else PersonaJob
    job = kind(config, ranks)
    if len(set(ranks.gather(job.data_digest))) > 1:
        rule = "all ranks must read the same dialogues, got different ones"
        raise ValueError(f"{rule}: data {config.data or config.prompts!r}")
    return job


def _train(job: Job, run: ResumableRun, progress: Progress) -> "_End":
    """Train and conclude, whatever happens; how it ended."""
    ranks = job.policy.ranks
    end = _End("failed", together=ranks.world == 1)
    try:
        job.train(run, progress)
        end.together = True
        end.saved = True  # or cannot be
        run.save_weights()
        end.results = job.finish(run, progress)
        end.status = "finished"
    except stopping.Stopped as stop:
        # all ranks stop at the same place
        end.status, end.signal, end.together = ENDS[signal.Signals(stop.number)], stop.number, True
        run.save_stopped()
    except NotFinite as error:
        end.together, end.error = True, str(error)  # all ranks had the same loss
        path = run.save_batches(error.batches, job.policy.tokenizer.decode)
        end.error = f"{error}; the dialogues of these steps are in {path}"
        raise FloatingPointError(end.error) from error
    except RuntimeError as error:
        if ranks.world == 1 or not lost_a_rank(error):
            end.error = one_line(error)
            raise
        end.together = False
        rule = f"a rank died or did not answer within {job.config.rank_timeout} seconds (rank_timeout)"
        end.error = f"{rule}; --resume goes on from the newest checkpoint: {str(error).splitlines()[0]}"
        raise OSError(end.error) from error
    except BaseException as error:
        end.error = one_line(error)  # as the command line says it
        raise
    finally:
        _conclude(job, run, end)
    return end


@dataclass
class _End:
    """How a run ended: finished, stopped, terminated or failed, by a ``signal`` or with an ``error``.

    ``together``: whether all ranks are here; ``saved``: whether its weights are.
    """

    status: str
    together: bool
    signal: int = 0
    saved: bool = False
    results: dict[str, Any] = field(default_factory=dict)
    error: str = ""


def _conclude(job: Job, run: ResumableRun, end: _End) -> None:
    """Weights, then the summary, each whatever becomes of the other; a run that failed hides nothing of its failure.

    What needs the other ranks is left out where they may be elsewhere: a rank that failed has failed alone.
    """
    failure, raised = None, bool(end.error)
    if end.together and not end.saved:
        try:
            run.save_weights()
        except OSError as error:
            failure, end.error, end.status = error, end.error or one_line(error), "failed"
    said = {"error": end.error.splitlines()[0]} if end.error else {}
    steps = {"steps": run.steps, "skipped_steps": run.skipped_steps}
    try:
        run.write_summary(status=end.status, **said, **steps, **end.results, **job.policy.describe())
    except OSError as error:
        failure = failure or error
    run.close()
    if failure and not raised:
        raise failure
    if failure:
        warnings.warn(f"{run.path} could not take the weights and the summary: {failure}", stacklevel=2)

"""The two jobs of `ppg-fast train`: on-policy in the persona interview, offline on logged dialogues."""

import signal
import warnings

from ppg_fast.config import TrainConfig
from ppg_fast.export import push_to_hub, require_repository
from ppg_fast.jobs.offline import OfflineJob
from ppg_fast.jobs.persona import PersonaJob
from ppg_fast.jobs.report import Progress, RunFolder
from ppg_fast.jobs.resume import ResumableRun, Stopped
from ppg_fast.jobs.trackers import require_trackers
from ppg_fast.trainer import NotFinite

__all__ = ["OfflineJob", "PersonaJob", "Progress", "ResumableRun", "RunFolder", "run_job"]

EXIT = {"finished": 0, "stopped": 130, "terminated": 143}  # the last two as a shell counts: 128 + SIGINT, 128 + SIGTERM


def run_job(config: TrainConfig, resume: bool = False) -> int:
    """Train as ``config`` says, or go on with the run in its folder. Returns the exit status: 0 done, 130 Ctrl-C, 143 SIGTERM.

    ValueError or FileExistsError for bad input, before anything is written; once training runs, the run folder keeps what was done
    whatever happens. FloatingPointError, naming the file that holds the dialogues, after too many steps that were not finite.
    """
    require_trackers(config.trackers)
    if config.push_to_hub:
        require_repository(config.push_to_hub)
    job = OfflineJob(config) if config.data else PersonaJob(config)
    progress = Progress(config.progress, config.eval_every)
    status = "failed"
    with ResumableRun(config, job.policy, job.data_digest, resume) as run:
        if resume:
            progress.say(run.origin())
        try:
            job.train(run, progress)
            status = "finished"
        except Stopped as stop:
            status = "terminated" if stop.number == signal.SIGTERM else "stopped"
        except KeyboardInterrupt:
            status = "stopped"
        except NotFinite as error:
            path = run.save_batches(error.batches, job.policy.tokenizer.decode)
            raise FloatingPointError(f"{error}; the dialogues of these steps are in {path}") from error
        finally:
            if status == "stopped":
                progress.say("stopped: saving what was done (press Ctrl-C again to give that up)")
            _conclude(job, run, progress, status)
            run.trackers.finish()
    progress.say(f"{status} after {run.steps} steps; the run is in {run.path}")
    if config.push_to_hub and status == "finished":
        progress.say(f"pushed: {push_to_hub(str(run.path), config.push_to_hub, config.hub_private)}")
    return EXIT[status]


def _conclude(job: OfflineJob | PersonaJob, run: ResumableRun, progress: Progress, status: str) -> None:
    """Weights, last evaluation, summary. A terminated run has no time for the evaluation, a failed one hides nothing of its failure."""
    try:
        run.save_checkpoint(job.policy.model, job.policy.tokenizer)
        results = job.finish(run, progress) if status in ("finished", "stopped") else {}
        run.write_summary(status=status, steps=run.steps, **results, **job.policy.describe(), config=run.config)
    except OSError as error:
        if status != "failed":
            raise
        warnings.warn(f"{run.path} could not take the weights and the summary: {error}", stacklevel=2)

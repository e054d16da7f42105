"""`ppg-fast train` from a config to an exit status: the ranks meet, a job trains, and what was done is kept."""

import signal
import warnings

from ppg_fast.config import TrainConfig
from ppg_fast.distributed import Ranks, lost_a_rank
from ppg_fast.jobs.job import Job
from ppg_fast.jobs.offline import OfflineJob
from ppg_fast.jobs.persona import PersonaJob
from ppg_fast.jobs.prompts import PromptsJob
from ppg_fast.jobs.resume import ResumableRun, Stopped
from ppg_fast.jobs.run_folder import Progress
from ppg_fast.jobs.trackers import require_trackers
from ppg_fast.models.export import push_to_hub, require_repository
from ppg_fast.training.trainer import NotFinite

EXIT = {"finished": 0, "stopped": 130, "terminated": 143}  # the last two as a shell counts: 128 + SIGINT, 128 + SIGTERM


def run_job(config: TrainConfig, resume: bool = False) -> int:
    """Train as ``config`` says, or go on with the run in its folder. Returns the exit status: 0 done, 130 Ctrl-C, 143
    SIGTERM.

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
    job = make_job(config, ranks)
    progress = Progress(config.progress, config.eval_every)
    progress.console.quiet = not ranks.is_main
    with ResumableRun(config, job.policy, job.data_digest, job.description(), resume) as run:
        if resume:
            progress.say(run.origin())
        status = _train(job, run, progress)
    ranks.leave()
    progress.say(f"{status} after {run.steps} steps; the run is in {run.path}")
    if config.push_to_hub and status == "finished" and ranks.is_main:
        progress.say(f"pushed: {push_to_hub(str(run.path), config.push_to_hub, config.hub_private)}")
    return EXIT[status]


def make_job(config: TrainConfig, ranks: Ranks) -> Job:
    """The job of ``config``. ValueError where the ranks read different data."""
    kind = OfflineJob if config.data else PromptsJob if config.prompts else PersonaJob
    job = kind(config, ranks)
    if len(set(ranks.gather(job.data_digest))) > 1:
        rule = "all ranks must read the same dialogues, got different ones"
        raise ValueError(f"{rule}: data {config.data or config.prompts!r}")
    return job


def _train(job: Job, run: ResumableRun, progress: Progress) -> str:
    """Train and conclude, whatever happens; how it ended: finished, stopped or terminated."""
    ranks = job.policy.ranks
    status, together = "failed", ranks.world == 1
    try:
        job.train(run, progress)
        status = "finished"
    except Stopped as stop:
        status = "terminated" if stop.number == signal.SIGTERM else "stopped"
    except KeyboardInterrupt:
        status = "stopped"
    except NotFinite as error:
        together = True  # all ranks had the same loss
        path = run.save_batches(error.batches, job.policy.tokenizer.decode)
        raise FloatingPointError(f"{error}; the dialogues of these steps are in {path}") from error
    except RuntimeError as error:
        if ranks.world == 1 or not lost_a_rank(error):
            raise
        rule = f"a rank died or did not answer within {job.config.rank_timeout} seconds (rank_timeout)"
        raise OSError(f"{rule}; --resume goes on from the newest checkpoint: {str(error).splitlines()[0]}") from error
    finally:
        if status == "stopped":
            progress.say("stopped: saving what was done (press Ctrl-C again to give that up)")
        _conclude(job, run, progress, status, together or status != "failed")
        run.close()
    return status


def _conclude(job: Job, run: ResumableRun, progress: Progress, status: str, together: bool) -> None:
    """Weights, last evaluation, summary. A terminated run has no time for the evaluation, a failed one hides nothing of
    its failure.

    What needs the other ranks is left out where they may be elsewhere, ``together`` False: a rank that failed has
    failed alone.
    """
    try:
        if together:
            run.save_weights()
        results = job.finish(run, progress) if status in ("finished", "stopped") else {}
        run.write_summary(status=status, steps=run.steps, **results, **job.policy.describe())
    except OSError as error:
        if status != "failed":
            raise
        warnings.warn(f"{run.path} could not take the weights and the summary: {error}", stacklevel=2)

"""The jobs of `ppg-fast train`: on-policy in the persona interview or on openings of dialogues, offline on logged
dialogues."""

import signal
import warnings

from ppg_fast.config import TrainConfig
from ppg_fast.distributed import Ranks, lost_a_rank
from ppg_fast.jobs.offline import OfflineJob
from ppg_fast.jobs.persona import PersonaJob
from ppg_fast.jobs.prompts import PromptsJob
from ppg_fast.jobs.resume import ResumableRun, Stopped
from ppg_fast.jobs.run_folder import Progress, RunFolder
from ppg_fast.jobs.trackers import require_trackers
from ppg_fast.models.export import push_to_hub, require_repository
from ppg_fast.training.trainer import NotFinite

__all__ = ["OfflineJob", "PersonaJob", "Progress", "PromptsJob", "ResumableRun", "RunFolder", "run_job"]

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
        warnings.simplefilter("ignore", UserWarning)  # the first says it
    job = (OfflineJob if config.data else PromptsJob if config.prompts else PersonaJob)(config, ranks)
    if len(set(ranks.gather(job.data_digest))) > 1:
        raise ValueError(
            f"all ranks must read the same dialogues, got different ones: data {config.data or config.prompts!r}"
        )
    progress = Progress(config.progress, config.eval_every)
    progress.console.quiet = not ranks.is_main
    status, together = "failed", ranks.world == 1
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
            together = True  # all ranks had the same loss
            path = run.save_batches(error.batches, job.policy.tokenizer.decode)
            raise FloatingPointError(f"{error}; the dialogues of these steps are in {path}") from error
        except RuntimeError as error:
            if ranks.world == 1 or not lost_a_rank(error):
                raise
            rule = f"a rank died or did not answer within {config.rank_timeout} seconds (rank_timeout)"
            raise OSError(
                f"{rule}; --resume goes on from the newest checkpoint: {str(error).splitlines()[0]}"
            ) from error
        finally:
            if status == "stopped":
                progress.say("stopped: saving what was done (press Ctrl-C again to give that up)")
            _conclude(job, run, progress, status, together or status != "failed")
            run.close()
    ranks.leave()
    progress.say(f"{status} after {run.steps} steps; the run is in {run.path}")
    if config.push_to_hub and status == "finished" and ranks.is_main:
        progress.say(f"pushed: {push_to_hub(str(run.path), config.push_to_hub, config.hub_private)}")
    return EXIT[status]


def _conclude(
    job: OfflineJob | PersonaJob | PromptsJob, run: ResumableRun, progress: Progress, status: str, together: bool
) -> None:
    """Weights, last evaluation, summary. A terminated run has no time for the evaluation, a failed one hides nothing of
    its failure.

    What needs the other ranks is left out where they may be elsewhere, ``together`` False: a rank that failed has
    failed alone.
    """
    try:
        if together:
            run.save_weights()
        results = job.finish(run, progress) if status in ("finished", "stopped") else {}
        run.write_summary(status=status, steps=run.steps, **results, **job.policy.describe(), config=run.config)
    except OSError as error:
        if status != "failed":
            raise
        warnings.warn(f"{run.path} could not take the weights and the summary: {error}", stacklevel=2)

"""The two jobs of `ppg-fast train`: on-policy in the persona interview, offline on logged dialogues."""

from ppg_fast.config import TrainConfig
from ppg_fast.jobs.offline import OfflineJob
from ppg_fast.jobs.persona import PersonaJob
from ppg_fast.jobs.report import Progress, RunFolder

__all__ = ["OfflineJob", "PersonaJob", "Progress", "RunFolder", "run_job"]


def run_job(config: TrainConfig) -> int:
    """Train as ``config`` says. Returns the exit status: 0 done, 130 stopped by Ctrl-C.

    ValueError or FileExistsError for bad input, before anything is written; once training runs, the run folder keeps what was done
    whatever happens.
    """
    job = OfflineJob(config) if config.data else PersonaJob(config)
    run, progress = RunFolder(config), Progress(config.progress, config.eval_every)
    status = "failed"
    try:
        job.train(run, progress)
        status = "finished"
    except KeyboardInterrupt:
        status = "stopped"
        progress.say("stopped: saving what was done (press Ctrl-C again to give that up)")
    finally:
        run.save_checkpoint(job.policy.model, job.policy.tokenizer)
        results = {} if status == "failed" else job.finish(run, progress)
        run.write_summary(status=status, steps=run.steps, **results, **job.policy.describe(), config=config)
    progress.say(f"{status} after {run.steps} steps; the run is in {run.path}")
    return 0 if status == "finished" else 130

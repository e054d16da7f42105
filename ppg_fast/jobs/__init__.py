"""The jobs of `ppg-fast train`: on-policy in the persona interview or on openings of dialogues, offline on logged
dialogues."""

from ppg_fast.jobs.job import Job
from ppg_fast.jobs.offline import OfflineJob
from ppg_fast.jobs.persona import PersonaJob
from ppg_fast.jobs.progress import Progress
from ppg_fast.jobs.prompts import PromptsJob
from ppg_fast.jobs.resume import ResumableRun
from ppg_fast.jobs.run import run_job
from ppg_fast.jobs.run_folder import RunFolder

__all__ = ["Job", "OfflineJob", "PersonaJob", "Progress", "PromptsJob", "ResumableRun", "RunFolder", "run_job"]

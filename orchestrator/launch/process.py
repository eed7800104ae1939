"""Runs a stage in one child process."""

from __future__ import annotations

from .environment import worker_environment
from .jobs import Job, JobFile, Outcome
from .supervision import Supervisor


def run(job: Job) -> Outcome:
    environment = worker_environment(job.stage, job.surroundings, job.parent_environment)
    JobFile.of(job).write(job.folder.job)
    return Supervisor(job, environment).outcome("run")

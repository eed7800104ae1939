"""Runs one attempt of a node: here, in a child process, or as ranks.

launch(job, stage)
    inline    stage.run in this process, which it may not bring torch into
    process   Supervisor.run("run")
    ranks     Supervisor.run("prepare"), ranks.run_ranks, Supervisor.run("finish")
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from bigpipe.errors import StageFailed
from bigpipe.orchestrator.contract.events import Event
from bigpipe.orchestrator.contract.stage import Stage

from . import inline, ranks
from .acceleration import Acceleration, accelerate
from .environment import visible_secrets, worker_environment
from .jobs import Job, JobFile, Outcome, Result, absolute
from .redaction import Redactor, stored_hub_token
from .supervision import Limits, Supervisor
from .warm import WarmWorker

__all__ = ["Job", "Outcome", "launch"]


def launch(
    job: Job,
    stage: Stage[Any],
    *,
    timeout: float | None,
    cancelled: threading.Event,
    report: Callable[[Event], None],
    secrets: Mapping[str, str],
    parent_environment: Mapping[str, str] | None = None,
    warm: WarmWorker | None = None,
) -> Outcome:
    """Run the attempt to its end.

    timeout: seconds for the whole attempt. cancelled: once set, workers are ended and Interrupted is raised. report is
    called from this thread only. secrets: those this node may see, name → value. warm: a worker that
    waits for this very attempt; taken, or ended where it does not fit.

    Raises the stage's own BigpipeError; StageFailed for crashes, unexpected errors and the timeout, with the log's
    path; Interrupted. When it returns or raises, no process of the attempt is left. Call it from a thread that lives
    until it returns: workers die with the thread that started them.
    """
    started = time.monotonic()
    job = absolute(job)
    limits = Limits(job.node, cancelled, timeout)
    parent = os.environ if parent_environment is None else parent_environment
    secrets = visible_secrets(job, stage, secrets, parent)
    redactor = Redactor([*secrets.values(), stored_hub_token(parent) or ""])
    for folder in (job.out, job.scratch, job.parts, job.memo, job.attempt_dir):
        folder.mkdir(parents=True, exist_ok=True)
    if stage.runs_in == "inline":
        result = inline.run(job, stage, secrets, redactor, report, limits)
        return _outcome(result, result.peak_rss, 0, started)
    environment = worker_environment(job, stage, secrets, parent)
    acceleration = accelerate(job.launch, job.base, job.machine) if stage.runs_in == "ranks" else None
    if acceleration:
        job = replace(job, launch=acceleration.launch)
        for name, value in acceleration.environment(job.machine).items():
            environment.setdefault(name, value)
    _clear(job)
    names = tuple({**job.environment, **secrets})
    cpu = acceleration is not None and acceleration.cpu
    JobFile(job=job, environment=names, secrets=tuple(secrets), cpu=cpu).write(job.job_file)
    supervisor = Supervisor(job, environment, redactor, report, limits, warm)
    if acceleration:
        return _run_ranks(supervisor, stage, acceleration, started)
    result = supervisor.result("run", supervisor.run("run"))
    return _outcome(result, supervisor.peak(), supervisor.anonymous(), started)


def _run_ranks(supervisor: Supervisor, stage: Stage[Any], acceleration: Acceleration, started: float) -> Outcome:
    if stage.finish is None and acceleration.launch.num_processes > 1:
        raise StageFailed(
            f"kind {stage.kind} runs as ranks but has no `finish`", "several ranks need one to merge them"
        )
    if stage.prepare is not None:
        supervisor.result("prepare", supervisor.run("prepare"))
    results = ranks.run_ranks(supervisor, acceleration)
    peak, anonymous = ranks.peaks(supervisor, results)
    result = results[0]
    if stage.finish is not None:
        result = supervisor.result("finish", supervisor.run("finish"))
    return _outcome(result, max(peak, supervisor.peak()), max(anonymous, supervisor.anonymous()), started)


def _outcome(result: Result, peak: int, anonymous: int, started: float) -> Outcome:
    return Outcome(
        metrics=result.metrics,
        files=result.files,
        peak_rss=max(peak, result.peak_rss),
        seconds=time.monotonic() - started,
        peak_anonymous=anonymous,
    )


def _clear(job: Job) -> None:
    """Results of an earlier attempt in the same folder must not be taken for this one's."""
    patterns = (
        "result-*.json", "rank-*.json", "rank-*.pipe", "hello-*.json", "launch.json", "events/*", "processes/*/*",
    )  # fmt: skip
    for pattern in patterns:
        for path in job.attempt_dir.glob(pattern):
            path.unlink()

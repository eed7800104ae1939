"""Runs the ranks of a node through accelerate's launcher, and finds out who failed first where it goes wrong."""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain

from bigpipe.errors import BigpipeError, StageFailed
from bigpipe.orchestrator.contract import LogLine

from .acceleration import Acceleration, accelerate
from .jobs import Failure, Job, Outcome
from .processes import worker_command
from .supervision import LOOK_SECONDS, Supervisor, supervise

LAG_SECONDS = 5.0
"""How long the launcher may take to notice that a rank died. torchrun gives the others 30 s to end; we do not wait."""
SHARE_SECONDS = 60.0
"""How long a result of another machine may take to show up on the shared file system."""


def run(job: Job) -> Outcome:
    """Prepare, launch the ranks, and merge what they made."""
    acceleration = accelerate(job.launch, job.base, job.machine)
    job = job.within(launch=acceleration.launch)
    stage = job.stage
    if stage.ranks.finish is None and job.launch.num_processes > 1:
        raise StageFailed(
            f"kind {stage.kind} runs as ranks but has no `finish`", "several ranks need one to merge them"
        )
    supervisor = supervise(job, cpu=acceleration.cpu, defaults=acceleration.environment(job.machine))
    if stage.ranks.prepare is not None:
        supervisor.outcome("prepare")
    results = _run_ranks(supervisor, acceleration)
    peak = _peak(supervisor, results)
    result = results[0] if stage.ranks.finish is None else supervisor.outcome("finish")
    return result.model_copy(update={"peak_rss": max(peak, result.peak_rss)})


def _run_ranks(supervisor: Supervisor, acceleration: Acceleration) -> list[Outcome]:
    """Launch, watch, and give the results in order of rank.

    Raises the error of the rank that failed first; StageFailed for crashed ones and a wrong number of ranks.
    """
    acceleration.write(supervisor.job.folder.acceleration)
    if acceleration.launch.num_machines > 1:
        _invite(supervisor)
    watch = _RankWatch(supervisor)
    with _output_pipes(supervisor, acceleration.local_ranks) as pipes:
        code = supervisor.run("launch", pipes=pipes, look=watch.look)
    return watch.results(code, acceleration)


def _peak(supervisor: Supervisor, results: list[Outcome]) -> int:
    """Sum over ranks of each one's largest resident size, in bytes."""
    sampled = {worker.rank: supervisor.memory.get(worker.pid, 0) for worker in supervisor.workers()}
    return sum(max(sampled.get(rank, 0), result.peak_rss) for rank, result in enumerate(results))


@contextmanager
def _output_pipes(supervisor: Supervisor, ranks: range) -> Iterator[Mapping[int, int]]:
    """A named pipe for each rank's output: torchrun hands no descriptors on. Opened for both directions, so that it is
    not at its end before the rank has come, nor when it has gone. Where there are none, ranks share the launcher's."""
    opened = {}
    for rank in ranks:
        path = supervisor.job.folder.output_pipe(rank)
        try:
            os.mkfifo(path)
            opened[rank] = os.open(path, os.O_RDWR | os.O_NONBLOCK)
        except OSError:
            break
    try:
        yield opened
    finally:
        for rank in ranks:
            supervisor.job.folder.output_pipe(rank).unlink(missing_ok=True)


def _invite(supervisor: Supervisor) -> None:
    """Say what to start on the other machines; only there can it be started."""
    job = supervisor.job
    command = shlex.join(worker_command(job.folder.job, "launch"))
    machines = ", ".join(str(number) for number in range(1, job.launch.num_machines))
    supervisor.say(LogLine(job.node, f"waiting for the other machines; start on each: {command} N   (N: {machines})"))


class _RankWatch:
    """Follows the ranks while the launcher runs."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._job = supervisor.job
        self._dead_since: dict[int, float] = {}

    def look(self) -> None:
        """Raises for a rank that has been dead for a while without the launcher's noticing."""
        now = time.monotonic()
        for worker in self._supervisor.workers():
            if worker.rank is None or worker.alive:
                continue
            result = Outcome.read(self._job.folder.outcome("rank", worker.rank))
            if result is None or result.failure is not None:
                since = self._dead_since.setdefault(worker.rank, now)
                if now - since > LAG_SECONDS:
                    raise self._error(0)

    def results(self, code: int, acceleration: Acceleration) -> list[Outcome]:
        world = range(acceleration.launch.num_processes)
        elsewhere = [rank for rank in world if rank not in acceleration.local_ranks]
        if code == 0:
            self._await(elsewhere)
        found = self._read(world)
        if code != 0 or any(result.failure for result in found.values()):
            raise self._error(code)
        missing = sorted(set(world) - set(found))
        if missing and set(missing) <= set(elsewhere):
            raise StageFailed(
                f"{self._job.node}: no results of the other machines' ranks {missing} in {self._job.folder.path}",
                "the store must lie on a file system that all machines share: set --store or BIGPIPE_HOME",
            )
        if missing:
            raise self._crash(missing[0], code)
        return [found[rank] for rank in world]

    def _await(self, ranks: list[int]) -> None:
        deadline = time.monotonic() + SHARE_SECONDS
        while time.monotonic() < deadline and len(self._read(ranks)) < len(ranks):
            self._supervisor.check()
            time.sleep(LOOK_SECONDS)

    def _read(self, ranks: range | list[int]) -> dict[int, Outcome]:
        read = ((rank, Outcome.read(self._job.folder.outcome("rank", rank))) for rank in ranks)
        return {rank: result for rank, result in read if result is not None}

    def _error(self, code: int) -> BigpipeError:
        """The error of the rank that failed first; the others' errors are what its loss did to them.

        In order of what tells most: an error meant for the user; a signal nobody here sent; a rank that left as if it
        were done, which the others then miss; an unexpected exception; a rank that just failed; the launcher's own end.
        """
        results = self._read(range(self._job.launch.num_processes))
        ended = sorted(results.items(), key=lambda item: item[1].ended)
        failures = {rank: result.failure for rank, result in ended if result.failure is not None}
        told = Outcome.read(self._job.folder.outcome("launch")) or Outcome()
        silent = {rank: number for rank, number in told.codes.items() if rank not in failures}
        errors = chain(
            (self._failed(rank, failure) for rank, failure in failures.items() if failure.expected),
            (self._crash(rank, number) for rank, number in silent.items() if number < 0 and number != -signal.SIGTERM),
            (self._crash(rank, 0) for rank in self._gone(told.codes) if rank not in results),
            (self._failed(rank, failure) for rank, failure in failures.items()),
            (self._crash(rank, number) for rank, number in silent.items()),
        )
        return next(errors, None) or self._launch_error(told.failure, code)

    def _failed(self, rank: int, failure: Failure) -> BigpipeError:
        if self._job.launch.num_processes > 1:
            failure = failure.model_copy(update={"cause": f"rank {rank}: {failure.cause}"})
        return self._supervisor.redactor.error(failure.error(self._job.node, self._job.folder.log))

    def _crash(self, rank: int, code: int) -> StageFailed:
        workers = [worker for worker in self._supervisor.workers() if worker.rank == rank]
        peak = max((self._supervisor.memory.get(worker.pid, 0) for worker in workers), default=0)
        return self._supervisor.crash(f"rank {rank}", code, peak)

    def _gone(self, failed: Mapping[int, int]) -> list[int]:
        """Ranks of this machine that ended with status 0, where the launcher told of others: it names all that failed,
        those too that it ended itself."""
        ranks = {worker.rank for worker in self._supervisor.workers() if worker.rank is not None and not worker.alive}
        return sorted(ranks - failed.keys()) if failed else []

    def _launch_error(self, told: Failure | None, code: int) -> BigpipeError:
        dead = sorted(self._dead_since)
        if dead and code >= 0:  # a launcher that is killed takes its ranks along
            return StageFailed(
                f"{self._job.node}: rank {dead[0]} died, and the others went on without it",
                f"its output is in {self._job.folder.log}",
            )
        if told is None:
            return self._supervisor.crash("the launcher of the ranks", code, 0)
        if told.expected:
            return told.error(self._job.node, self._job.folder.log)
        return StageFailed(
            f"{self._job.node}: the ranks could not be launched: {told.cause.splitlines()[0]}",
            f"the launcher's output is in {self._job.folder.log}",
        )

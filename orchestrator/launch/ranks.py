"""Runs the ranks of a node through accelerate's launcher, and finds out who failed first where it goes wrong."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

import yaml

from bigpipe.errors import BigpipeError, StageFailed
from bigpipe.files import write_file
from bigpipe.orchestrator.contract import LogLine, Stage, Surroundings
from bigpipe.programs import running_program
from bigpipe.redaction import printable

from .acceleration import Acceleration, accelerate
from .environment import worker_environment
from .jobs import AttemptFolder, Failure, Job, Outcome
from .lifeline import GRACE_SECONDS
from .output import LineSplitter, Log
from .processes import worker_command
from .supervision import LOOK_SECONDS, Supervisor, how_it_ended, supervise

LAG_SECONDS = 5.0
"""How long the launcher may take to notice that a rank died. torchrun gives the others 30 s to end; we do not wait."""
SHARE_SECONDS = 60.0
"""How long a result of another machine may take to show up on the shared file system."""


def run(job: Job) -> Outcome:
    """Prepare, launch the ranks, and merge what they made."""
    stage = job.stage
    meets = job.meeting is not None
    acceleration = accelerate(job.launch, job.base, job.machine, meets=meets, mixes=stage.ranks.mixes)
    job = job.within(launch=acceleration.launch)
    if stage.ranks.finish is None and job.launch.num_processes > 1:
        raise StageFailed(
            f"kind {stage.kind} runs as ranks but has no `finish`", "several ranks need one to merge them"
        )
    supervisor = supervise(job, cpu=acceleration.cpu, defaults=acceleration.environment(job.machine))
    results = _run_replacing(supervisor, acceleration)
    peak = sum(max(supervisor.peak(rank), result.peak_rss) for rank, result in enumerate(results))
    result = results[0] if stage.ranks.finish is None else supervisor.outcome("finish")
    return result.model_copy(update={"peak_rss": max(peak, result.peak_rss)})


def _run_replacing(supervisor: Supervisor, acceleration: Acceleration) -> list[Outcome]:
    """Prepare and run the ranks; where some died, again, as the kind and `max_restarts` allow. torch brings ranks
    together once, so that all of them start anew. What a person started on further machines nobody could again."""
    job, ranks = supervisor.job, supervisor.job.stage.ranks
    again = ranks.replaced and (job.launch.num_machines == 1 or job.meeting is not None)
    restarts = job.launch.max_restarts if again else 0
    for restart in count(1):
        if ranks.prepare is not None:
            supervisor.outcome("prepare")
        started = _Ranks(supervisor, acceleration)
        try:
            return started.run()
        except StageFailed:
            lost = started.lost()
            if not lost or restart > restarts:
                raise
        told = " and ".join(f"rank {rank} {how}" for rank, how in lost.items())
        supervisor.say(LogLine(job.node, f"{told}; the ranks are started again ({restart} of {restarts})"))
        started.settle()
        job.folder.replace_ranks(lost)
    raise AssertionError  # `count` has no end


def _to_standard_error(line: str) -> None:
    sys.stderr.write(f"{printable(line)}\n")
    sys.stderr.flush()


def start_here(
    stage: Stage[Any], surroundings: Surroundings, parent: Mapping[str, str], job_file: Path, over: Callable[[], None],
    tell: Callable[[str], None] = _to_standard_error,
) -> int:  # fmt: skip
    """Start this machine's ranks of a job that machine 0 calls to; return the exit status of their launcher. over:
    called now and then; raises when the ranks are to end. tell: gets the lines that they print, which also go to this
    machine's log of the attempt."""
    launch = surroundings.launch
    acceleration = Acceleration(launch, cpu=False, settings={})
    environment = worker_environment(stage, surroundings, parent)
    log = Log(AttemptFolder(job_file.parent).log_of(launch.machine_rank))

    def logged(line: str) -> None:
        log.write(line)
        tell(line)

    with (
        closing(_Lines(logged)) as lines,
        running_program(
            worker_command(job_file, "launch", str(launch.machine_rank)),
            folder=surroundings.base,
            environment={**acceleration.environment(surroundings.machine), **environment},
            output=lines,
            grace=GRACE_SECONDS,
            apart=True,  # it signs in, and who ends a worker ends its session; this process may share one with others
        ) as program,
    ):
        while (ended := program.ended(LOOK_SECONDS)) is None:
            over()
    return ended.status


class _Lines:
    """Passes on whole lines, secrets masked; of one that is drawn again and again its last state."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._splitter = LineSplitter()

    def write(self, data: bytes, *, final: bool = False) -> None:
        for line in self._splitter.feed(data, final=final):
            self._tell(line)

    def flush(self) -> None:
        """Every line was passed on when it was whole."""

    def close(self) -> None:
        """Pass on a last line that has no end."""
        self.write(b"", final=True)


class _Ranks:
    """Starts the launcher, and follows the ranks while it runs."""

    def __init__(self, supervisor: Supervisor, acceleration: Acceleration) -> None:
        self._supervisor = supervisor
        self._job = supervisor.job
        self._folder = supervisor.job.folder
        self._acceleration = acceleration
        self._dead_since: dict[int, float] = {}
        self._call = 0

    def run(self) -> list[Outcome]:
        """Launch, watch, and return the results in order of rank. Raise the error of the rank that failed first; ranks
        on other machines are then told to end: they may hear of it by nothing else."""
        try:
            return self._run()
        except BaseException:
            if self._job.meeting is not None and self._call:
                self._job.meeting.end(self._call)
            raise

    def settle(self) -> None:
        """Wait until the ranks on other machines have ended, too: what they still write is not of the next ones."""
        if self._job.meeting is not None and self._call:
            self._job.meeting.settle(self._call, self._supervisor.check)

    def _run(self) -> list[Outcome]:
        write_file(self._folder.acceleration, yaml.safe_dump(dict(self._acceleration.settings)), durable=False)
        if self._job.launch.num_machines > 1:
            self._invite()
        with self._output_pipes() as pipes:
            code = self._supervisor.run("launch", pipes=pipes, look=self._look)
        world = range(self._job.launch.num_processes)
        elsewhere = [rank for rank in world if rank not in self._acceleration.local_ranks]
        if code == 0:
            self._await_machines()
            self._await(elsewhere)
        found = self._read(world)
        if code != 0 or any(result.failure for result in found.values()):
            raise self._error(code)
        missing = [rank for rank in world if rank not in found]
        if missing and set(missing) <= set(elsewhere):
            raise StageFailed(
                f"{self._job.node}: no results of the other machines' ranks {missing} in {self._folder.path}",
                "the store must lie on a file system that all machines share: set --store or BIGPIPE_HOME",
            )
        if missing:
            raise self._crash(missing[0], code)
        return [found[rank] for rank in world]

    def _invite(self) -> None:
        """Call the other machines, or say what to start there; only there can it be started."""
        if self._job.meeting is not None:
            self._call = self._job.meeting.call(self._folder.job, self._job.node, self._supervisor.check)
            return
        command = shlex.join(worker_command(self._folder.job, "launch"))
        others = ", ".join(str(number) for number in range(1, self._job.launch.num_machines))
        line = f"waiting for the other machines; start on each: {command} N   (N: {others})"
        self._supervisor.say(LogLine(self._job.node, line))

    @contextmanager
    def _output_pipes(self) -> Iterator[Mapping[int, int]]:
        """A named pipe for each rank's output: torchrun hands no descriptors on. Where there are none, ranks share the
        launcher's. Opened for both directions: not at its end before the rank has come, nor when it has gone."""
        paths = {rank: self._folder.output_pipe(rank) for rank in self._acceleration.local_ranks}
        opened = {}
        for rank, path in paths.items():
            try:
                os.mkfifo(path)
                opened[rank] = os.open(path, os.O_RDWR | os.O_NONBLOCK)
            except OSError:
                break
        try:
            yield opened
        finally:
            for path in paths.values():
                path.unlink(missing_ok=True)

    def _look(self) -> None:
        """Raise for a rank that has been dead for a while without the launcher's noticing, and for other machines."""
        self._look_elsewhere()
        now = time.monotonic()
        for worker in self._supervisor.workers():
            if worker.rank is None or worker.alive:
                continue
            result = Outcome.read(self._folder.outcome("rank", worker.rank))
            if result is None or result.failure is not None:
                since = self._dead_since.setdefault(worker.rank, now)
                if now - since > LAG_SECONDS:
                    raise self._error(0)

    def _look_elsewhere(self) -> None:
        """Raise where the launcher of another machine has failed, or the machine has gone."""
        if self._job.meeting is not None and self._call:
            for machine, status in self._job.meeting.done(self._call).items():
                if status != 0:
                    raise self._error(status, machine)

    def _await_machines(self) -> None:
        """Their ranks may take longer than those here."""
        while self._job.meeting is not None and self._call and not self._job.meeting.has_all(self._call):
            self._look_elsewhere()
            self._supervisor.check()
            time.sleep(LOOK_SECONDS)

    def _await(self, ranks: list[int]) -> None:
        deadline = time.monotonic() + SHARE_SECONDS
        while time.monotonic() < deadline and len(self._read(ranks)) < len(ranks):
            self._supervisor.check()
            time.sleep(LOOK_SECONDS)

    def _read(self, ranks: Iterable[int]) -> dict[int, Outcome]:
        read = ((rank, Outcome.read(self._folder.outcome("rank", rank))) for rank in ranks)
        return {rank: result for rank, result in read if result is not None}

    def _told(self) -> Outcome:
        """What the launchers of all machines tell of their ranks, and the failure of the first that has one."""
        found = [Outcome.read(self._folder.outcome("launch", each)) for each in range(self._job.launch.num_machines)]
        told = [outcome for outcome in found if outcome is not None]
        failures = [outcome.failure for outcome in told if outcome.failure]
        codes = {rank: code for outcome in told for rank, code in outcome.codes.items()}
        return Outcome(codes=codes, failure=failures[0] if failures else None)

    def _error(self, code: int, machine: int = 0) -> BigpipeError:
        """The error of the rank that failed first; the others' errors are what its loss did to them.

        In order of what tells most: an error meant for the user; a signal nobody here sent; a rank that left as if it
        were done, which the others then miss; an unexpected exception; a rank that just failed; the launcher's own end.
        """
        results = self._read(range(self._job.launch.num_processes))
        ended = sorted(results.items(), key=lambda item: item[1].ended)
        failures = {rank: result.failure for rank, result in ended if result.failure is not None}
        told = self._told()
        silent = {rank: number for rank, number in told.codes.items() if rank not in failures}
        errors = chain(
            (self._failed(rank, failure) for rank, failure in failures.items() if failure.expected),
            (self._crash(rank, number) for rank, number in silent.items() if number < 0 and number != -signal.SIGTERM),
            (self._crash(rank, 0) for rank in self._gone(told.codes) if rank not in results),
            (self._failed(rank, failure) for rank, failure in failures.items()),
            (self._crash(rank, number) for rank, number in silent.items()),
        )
        return next(errors, None) or self._launch_error(told.failure, code, machine)

    def lost(self) -> dict[int, str]:
        """Return the ranks that died on their own, and how; none where one told an error, which it would tell again."""
        results = self._read(range(self._job.launch.num_processes))
        if any(result.failure for result in results.values()):
            return {}
        told = self._told()
        codes = dict.fromkeys(self._dead_since, -signal.SIGKILL) if not told.codes else told.codes
        died = {rank: code for rank, code in codes.items() if rank not in results and code != -signal.SIGTERM}
        return {rank: how_it_ended(code) for rank, code in sorted(died.items())}

    def _gone(self, failed: Mapping[int, int]) -> list[int]:
        """Ranks here that ended with status 0 where others failed: the launcher names these, also those it ended."""
        ranks = {worker.rank for worker in self._supervisor.workers() if worker.rank is not None and not worker.alive}
        return sorted(ranks - failed.keys()) if failed else []

    def _failed(self, rank: int, failure: Failure) -> BigpipeError:
        if self._job.launch.num_processes > 1:
            failure = failure.model_copy(update={"cause": f"rank {rank}: {failure.cause}"})
        return self._supervisor.error(failure, self._machine_of(rank))

    def _crash(self, rank: int, code: int) -> StageFailed:
        return self._supervisor.crash(f"rank {rank}", code, rank, self._machine_of(rank))

    def _machine_of(self, rank: int) -> int:
        """The machine whose log holds what a rank prints; of one that a person started, this one: nobody else does."""
        return rank // self._acceleration.launch.local_processes if self._call else 0

    def _launch_error(self, told: Failure | None, code: int, machine: int) -> BigpipeError:
        node, dead = self._job.node, sorted(self._dead_since)
        if dead and code >= 0:  # a launcher that is killed takes its ranks along
            cause = f"{node}: rank {dead[0]} died, and the others went on without it"
            return StageFailed(cause, f"its output is in {self._folder.log}")
        if told is None:
            there = f" on machine {machine}" if machine else ""
            return self._supervisor.crash(f"the launcher of the ranks{there}", code, machine=machine)
        if told.expected:
            return self._supervisor.error(told)
        cause = f"{node}: the ranks could not be launched: {told.cause.splitlines()[0]}"
        return StageFailed(cause, f"the launcher's output is in {self._folder.log_of(machine)}")

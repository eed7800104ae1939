"""Watches the workers of one attempt from start to end: events, output, memory, deadline, cancellation.

Supervisor.run(mode)
    start a worker in a session of its own
    until it has ended: relay events and lines, sample memory, look at the clock and the cancel flag
    end whatever is left of its sessions
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping

from bigpipe.errors import BigpipeError, Interrupted, StageFailed
from bigpipe.orchestrator.contract import Event, LogLine
from bigpipe.redaction import conceal_environment
from bigpipe.sizes import format_size

from . import processes
from .bounds import Bounds
from .environment import worker_environment
from .jobs import Failure, Job, JobFile, Mode, Outcome
from .lifeline import ORPHANED, UNTOLD
from .output import EventTail, Log, OutputReader, last_lines
from .processes import Worker, out_of_memory_kills, peak_resident

FIRST_PAUSE, LONGEST_PAUSE = 0.005, 0.05
"""Seconds between two looks at a worker: short ones are not kept waiting, long ones cost nothing."""
LOOK_SECONDS = 0.2


def run(job: Job) -> Outcome:
    """Run a stage in one child process."""
    return supervise(job).outcome("run")


def supervise(job: Job, *, cpu: bool = False, defaults: Mapping[str, str] = {}) -> Supervisor:
    """Write the job file and return what watches the workers. Raise UsageError where the node's `env` is refused. cpu:
    ranks run on the CPU. defaults: variables of the workers, where nothing else sets them."""
    environment = worker_environment(job.stage, job.surroundings, job.parent_environment)
    JobFile.of(job, cpu=cpu).write(job.folder.job)
    return Supervisor(job, {**defaults, **environment})


class Supervisor:
    """Runs the workers of one attempt, one after another (a launcher and its ranks count as one), and tells of them."""

    def __init__(self, job: Job, environment: Mapping[str, str] = {}) -> None:
        self.job = job
        self.environment = environment
        self.log = Log(job.folder.log)
        self.memory: dict[int, int] = {}
        """Largest resident size of each worker's process so far, in bytes, as far as the kernel told."""
        conceal_environment({**job.parent_environment, **job.environment}, job.secrets)
        self._deadline = float("inf") if job.timeout is None else time.monotonic() + job.timeout
        self._tail = EventTail(job.folder.events)
        self._bounds = Bounds(job.trust.limits, job.launch.local_ranks)
        self._kills = out_of_memory_kills()
        self._looked = 0.0

    def run(self, mode: Mode, *, pipes: Mapping[int, int] = {}, look: Callable[[], None] = lambda: None) -> int:
        """Run a worker to its end and return its exit status (negative: the signal that ended it).

        pipes: rank → descriptor to read its output from. look: called every `LOOK_SECONDS`; may raise to end all. Raise
        Interrupted, and StageFailed at the deadline.
        """
        self.check()
        child = self.job.warm.take(self.job.folder.job, self.environment) if self.job.warm and mode == "run" else None
        if child is None:
            child = processes.start(self.job.folder.job, mode, environment=self.environment, directory=self.job.base)
        first, reader = Worker.of(child), None
        try:
            reader = self._read(child, pipes)
            self._watch(child, reader, look)
        finally:
            self._end(child, first)
            if reader is not None:
                self._relay(reader.finish())
        return child.returncode

    def check(self) -> None:
        """Raise Interrupted or StageFailed when this attempt is to stop: once cancelled, and at its deadline."""
        node, timeout = self.job.node, self.job.timeout
        if self.job.cancelled.is_set():
            raise Interrupted("interrupted", "the same command continues where it stopped")
        if time.monotonic() > self._deadline:
            cure = f"raise `timeout`, or look where it stood: {self.log.path}{self._last_lines()}"
            raise StageFailed(f"{node}: not done after its timeout of {timeout:g} s", cure)

    def report(self, event: Event) -> None:
        """Pass on what a stage in this process tells, and stop it there when this attempt is to stop."""
        self.check()
        self.say(event)

    def say(self, event: Event) -> None:
        """Pass an event on; lines also go to the log."""
        if isinstance(event, LogLine):
            self.log.write(event.line, rank=event.rank if self.job.launch.num_processes > 1 else None)
        self.job.report(event)

    def outcome(self, mode: Mode) -> Outcome:
        """Run a worker to its end; return what it left, or raise the error it ended with."""
        code = self.run(mode)
        found = Outcome.read(self.job.folder.outcome(mode))
        if found is not None and found.failure is not None:
            raise self.error(found.failure)
        if found is None or code != 0:
            raise self.crash(f"the worker ({mode})", code)
        return found.model_copy(update={"peak_rss": max([found.peak_rss, *self.memory.values()])})

    def error(self, failure: Failure, machine: int = 0) -> BigpipeError:
        """Return the error that a worker on a machine ended with."""
        return failure.error(self.job.node, self.job.folder.log_of(machine))

    def crash(self, who: str, code: int, rank: int | None = None, machine: int = 0) -> StageFailed:
        """Return the error for a process on a machine that ended without saying why."""
        hint = f"its output is in {self.job.folder.log_of(machine)}{self._last_lines(machine)}"
        elsewhere = machine != 0 or (rank is not None and rank not in self.job.launch.local_ranks)
        if code == -signal.SIGKILL and elsewhere:
            hint = f"memory ran out on its machine, if `dmesg` there says so; else somebody killed it; {hint}"
        elif code == -signal.SIGKILL:
            hint = f"{self._who_kills(self.peak(rank))}; {hint}"
        if code == -signal.SIGBUS:
            hint = f"a file that it had mapped was cut short, or its disk failed; {hint}"
        return StageFailed(f"{self.job.node}: {who} {how_it_ended(code)}", hint)

    def workers(self) -> list[Worker]:
        return list(processes.signed_in(self.job.folder.processes))

    def peak(self, rank: int | None) -> int:
        """Return the largest resident size of a rank, or of the workers that are none, in bytes."""
        return max((self.memory.get(worker.pid, 0) for worker in self.workers() if worker.rank == rank), default=0)

    def _read(self, child: subprocess.Popen[bytes], pipes: Mapping[int, int]) -> OutputReader:
        assert child.stdout is not None  # noqa: S101 (always a pipe)
        with child.stdout:
            own = os.dup(child.stdout.fileno())
        return OutputReader(self.log, {own: None, **{pipes[rank]: rank for rank in pipes}})

    def _watch(self, child: subprocess.Popen[bytes], reader: OutputReader, look: Callable[[], None]) -> None:
        pause = FIRST_PAUSE
        while child.poll() is None:
            self._relay(reader.take())
            if time.monotonic() - self._looked > LOOK_SECONDS:
                self._looked = time.monotonic()
                for process in {child.pid, *(worker.pid for worker in self.workers())}:
                    self.memory[process] = max(self.memory.get(process, 0), peak_resident(process))
                look()
            self.check()
            self._bounds.check()
            self.job.cancelled.wait(pause)
            pause = min(pause * 1.1, LONGEST_PAUSE)

    def _relay(self, lines: Iterable[tuple[int | None, str]]) -> None:
        for event in self._tail.new():
            if not self._bounds.take(event):
                self.say(event)
        for rank, line in lines:
            self.job.report(LogLine(self.job.node, line, True, rank or 0))
        fault, self.log.fault = self.log.fault, None
        if fault is not None:
            line = f"its log is not written, and lines are lost: {fault.cause}; {fault.cure}"
            self.job.report(LogLine(self.job.node, line))

    def _end(self, child: subprocess.Popen[bytes], first: Worker) -> None:
        left = processes.end([first, *self.workers()], reap=child.poll)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(processes.GONE_SECONDS)
        if left:
            self.log.write(f"processes {left} do not end although killed")

    def _who_kills(self, peak: int) -> str:
        total = self.job.machine.memory
        sizes = f"its memory peaked at {format_size(peak)} of {format_size(total)}"
        if out_of_memory_kills() > self._kills:
            return f"the kernel killed it because memory ran out ({sizes}): use a smaller batch, or fewer `--jobs`"
        if total and peak > 0.8 * total:
            return f"probably memory ran out ({sizes}): use a smaller batch, or fewer `--jobs`"
        return f"somebody killed it ({sizes})"

    def _last_lines(self, machine: int = 0) -> str:
        lines = self.log.last if machine == 0 else last_lines(self.job.folder.log_of(machine))
        return "".join(f"\n    {line}" for line in lines)


def how_it_ended(code: int) -> str:
    """Return what became of a process, by its exit status (negative: the signal that ended it)."""
    if code == ORPHANED:
        return "gave up: its parent had ended, or another run holds its work folder"
    if code == UNTOLD:
        return "could not write what came of it"
    if code >= 0:
        return f"ended with exit status {code} and no result"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was ended by {name}"

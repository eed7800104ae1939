"""A worker that starts before its job is known: it imports what its kind will need, and waits.

It is a worker like any other: tied to the command first of all, signed in, with the environment of its node's first
attempt and of no other, its output in a pipe. It is told to go on through its standard input, whose end means that
nobody needs it. Whatever does not hold when its turn comes (it has died, the environment would be another one) makes it
worthless: it is ended, and a fresh worker starts in its place.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigpipe.orchestrator.contract import Stage, Surroundings

from . import processes
from .attemptfolder import AttemptFolder
from .environment import worker_environment
from .lifeline import start_mark
from .processes import Worker

MEMORY = 1 << 30
"""Bytes that a waiting worker is reckoned with (a bound): torch, transformers and accelerate take 420 MB."""
GO = b"go\n"


@dataclass(slots=True)
class WarmWorker:
    """Used by one thread after another."""

    job_file: Path
    _environment: Mapping[str, str]
    _child: subprocess.Popen[bytes]
    _mark: str | None = field(init=False)
    _gone: bool = field(init=False, default=False)
    """Taken, or ended."""

    def __post_init__(self) -> None:
        self._mark = start_mark(self._child.pid)

    def take(self, job_file: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes] | None:
        """The worker, at work on this job; None (and ended) where it is not the right one for it any more."""
        fits = not self._gone and self.job_file == job_file and self._environment == environment
        if not fits or self._child.poll() is not None or not self._go():
            self.end()
            return None
        self._gone = True
        return self._child

    def _go(self) -> bool:
        assert self._child.stdin is not None  # noqa: S101 (always a pipe)
        try:
            with self._child.stdin as told:
                told.write(GO)
        except BrokenPipeError:
            return False
        return True

    def end(self) -> None:
        """End it and all its children, unless it was taken. May be called again."""
        if self._gone:
            return
        self._gone = True
        processes.end([Worker(self._child.pid, self._child.pid, self._mark)], grace=0, reap=self._child.poll)
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                pipe.close()


def start_warm(
    stage: Stage[Any],
    modules: Sequence[str],
    surroundings: Surroundings,
    folder: AttemptFolder,
    parent_environment: Mapping[str, str],
) -> WarmWorker:
    """Start a worker that imports `modules` and waits for the job of this attempt.

    The calling thread must live until the worker has ended, whoever takes it (see lifeline). Raises UsageError where
    the node's `env` is refused.
    """
    folder.path.mkdir(parents=True, exist_ok=True)
    environment = worker_environment(stage, surroundings, parent_environment)
    arguments = processes.worker_command(folder.job, "run", "--warm", *modules)
    return WarmWorker(folder.job, environment, processes.start(arguments, environment, surroundings.base, told=True))

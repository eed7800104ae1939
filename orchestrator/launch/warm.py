"""A worker that starts before its job is known: it imports what its kind will need, and waits.

It is a worker like any other: tied to the command first of all, signed in, with the environment of its node's first
attempt and of no other, its output in a pipe. It is told to go on through its standard input, whose end means that
nobody needs it. Whatever does not hold when its turn comes (it has died, the environment would be another one) makes it
worthless: it is ended, and a fresh worker starts in its place.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bigpipe.orchestrator.contract import Stage, Surroundings

from . import processes
from .environment import worker_environment
from .processes import Worker

MEMORY = 1 << 30
"""Bytes that a waiting worker is reckoned with (a bound): torch, transformers and accelerate take 420 MB."""
GO = b"go\n"


class WarmWorker:
    """Used by one thread after another. The one that starts it must live until it has ended, whoever takes it (see
    lifeline)."""

    def __init__(
        self,
        stage: Stage[Any],
        modules: Sequence[str],
        surroundings: Surroundings,
        job_file: Path,
        parent_environment: Mapping[str, str],
    ) -> None:
        """Start a worker that imports `modules` and waits until this job is there.

        Raise UsageError where the node's `env` is refused.
        """
        job_file.parent.mkdir(parents=True, exist_ok=True)
        self._job_file = job_file
        self._environment = worker_environment(stage, surroundings, parent_environment)
        mode, directory = ("run", "--warm", *modules), surroundings.base
        self._child = processes.start(job_file, *mode, environment=self._environment, directory=directory, told=True)
        self._worker = Worker.of(self._child)
        self._gone = False
        """Taken, or ended."""

    def take(self, job_file: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes] | None:
        """The worker, at work on this job; None (and ended) where it is not the right one for it any more."""
        fits = not self._gone and self._job_file == job_file and self._environment == environment
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
        if not self._gone:
            self._gone = True
            processes.end([self._worker], grace=0, reap=self._child.poll)
            for pipe in filter(None, (self._child.stdin, self._child.stdout)):
                pipe.close()

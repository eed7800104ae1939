"""The ways to run one attempt of a node, by name: a kind's `runs_in` names one.

    inline    in this process, which it may not bring torch into
    process   in a child process
    ranks     as ranks of accelerate's launcher, between a `prepare` and a `finish`

Others come through the entry-point group `bigpipe.executors`, as values of `Executor`.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bigpipe.errors import StageFailed, UsageError
from bigpipe.modules import foreign
from bigpipe.orchestrator.contract import Stage, StageContext, Surroundings, late

if TYPE_CHECKING:
    from .jobs import Job, Outcome

GROUP = "bigpipe.executors"
HEAVY = frozenset({"torch", "transformers", "accelerate", "bitsandbytes"})
"""What a kind that runs inline may not import."""
_barred: ContextVar[bool] = ContextVar("_barred", default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Executor:
    """One way to run an attempt."""

    run: Callable[[Job], Outcome]
    """Does the attempt, and leaves no process of it behind when it returns or raises."""
    takes_launch: bool = False
    """The recipe's `launch` says how it starts."""
    waits: bool = False
    """It runs one process that can start before its turn, wait for files that are still being made, and be ended."""

    def start(self, job: Job) -> Outcome:
        """Run the attempt to its end. Call it from a thread that lives until then: workers die with it. Raise the
        stage's own BigpipeError; StageFailed for crashes, unexpected errors and the timeout; Interrupted."""
        started = time.monotonic()
        for folder in (job.out, job.scratch, job.parts, job.memo, job.folder.path):
            folder.mkdir(parents=True, exist_ok=True)
        job.folder.clear()
        return self.run(job).model_copy(update={"seconds": time.monotonic() - started})


def run_inline(job: Job) -> Outcome:
    """Call the stage in this thread. Nobody can end it there: it stops when it reports something."""
    from .jobs import Failure, Outcome
    from .leaving import write_out
    from .processes import own_peak
    from .supervision import Supervisor

    supervisor = Supervisor(job)
    supervisor.check()
    try:
        with heavy_imports_barred(job.stage.kind):
            result = job.stage.run(job.params, StageContext.of(job, reporter=supervisor))
        write_out(job.out, job.scratch)
        outcome = Outcome.of(result, job.stage)
    except Exception as error:
        supervisor.log.write(traceback.format_exc())
        raise supervisor.error(Failure.of(error)) from error
    return outcome.model_copy(update={"peak_rss": own_peak()})


@contextmanager
def heavy_imports_barred(kind: str) -> Iterator[None]:
    """Within, in this thread, importing one of HEAVY raises StageFailed. What was imported before stays usable."""
    if _Bar not in sys.meta_path:
        sys.meta_path.insert(0, _Bar)
    token = _barred.set(True)
    try:
        yield
    except HeavyImport as error:
        raise StageFailed(
            f"kind {kind} runs inline and imports {error.name}",
            'give the Stage runs_in="process": the command\'s own process stays light',
        ) from error
    finally:
        _barred.reset(token)


class HeavyImport(ImportError):
    pass


class _Bar:
    """Asked for every module that is imported (importlib's `MetaPathFinder`)."""

    @staticmethod
    def find_spec(fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if _barred.get() and fullname in HEAVY:
            raise HeavyImport(f"{fullname} may not be imported here", name=fullname)
        return None


EXECUTORS = {
    "inline": Executor(run=run_inline),
    "process": Executor(run=late("bigpipe.orchestrator.launch.supervision:run"), waits=True),
    "ranks": Executor(run=late("bigpipe.orchestrator.launch.ranks:run"), takes_launch=True),
}


@cache
def executor(name: str) -> Executor:
    """Return the executor of this name. Raise UsageError where nobody offers one."""
    if name in EXECUTORS:
        return EXECUTORS[name]
    from importlib.metadata import entry_points

    for entry in entry_points(group=GROUP, name=name):
        with foreign(f"the executor {name!r} cannot be loaded from {entry.value}", "mend its distribution"):
            found = entry.load()
        if isinstance(found, Executor):
            return replace(found, run=partial(_run_of_others, name, found.run))
        raise UsageError(f"{entry.value} is a {type(found).__name__}, not an Executor", "correct its entry point")
    known = ", ".join(EXECUTORS)
    raise UsageError(f"there is no executor {name!r}", f"a kind runs in one of {known}, or install the one it needs")


def distributions_with(name: str) -> set[str]:
    """Return the distributions that offer an executor of this name; those that are built in are nobody's."""
    from importlib.metadata import entry_points

    entries = () if name in EXECUTORS else entry_points(group=GROUP, name=name)
    return {entry.dist.name for entry in entries if entry.dist}


def _run_of_others(name: str, run: Callable[[Job], Outcome], job: Job) -> Outcome:
    with foreign(f"{job.node}: the executor {name} fails", "mend it", StageFailed):
        return run(job)


def run_alone(
    stage: Stage[Any], module: str, params: Mapping[str, Any], surroundings: Surroundings, folder: Path, **job: Any
) -> Outcome:
    """Run one attempt of a stage to its end, without recipe or store: for `doctor`, and for tests of kinds.

    module: `module:attribute` of the stage, which is run as what it is with these params. params: as in a manifest.
    folder: takes `out` and what it works with. job: further fields of the `Job`. Raise what `Executor.start` does, and
    ValidationError for wrong params.
    """
    from .jobs import AttemptFolder, Job

    given = {"inputs": {}, "parent_environment": os.environ, "report": lambda event: None, **job}
    read = stage.params.model_validate(dict(params))
    stage = stage.with_params(read)
    attempt = Job(
        surroundings=surroundings,
        node=stage.kind,
        stage=stage,
        module=module,
        params=read,
        out=folder / "out",
        scratch=folder / "scratch",
        parts=folder / "parts",
        folder=AttemptFolder(folder / "attempt"),
        **given,
    )
    return executor(stage.runs_in).start(attempt)

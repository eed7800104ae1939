"""Runs light stages in the command's own process, which stays free of torch."""

from __future__ import annotations

import importlib.abc
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.machinery import ModuleSpec
from types import ModuleType

from bigpipe.errors import BigpipeError, StageFailed
from bigpipe.orchestrator.contract import StageContext

from .jobs import Failure, Job, Outcome
from .processes import own_peak
from .supervision import Supervisor

HEAVY = frozenset({"torch", "transformers", "accelerate", "bitsandbytes"})
"""What a kind that runs inline may not import."""
_barred: ContextVar[bool] = ContextVar("_barred", default=False)


def run(job: Job) -> Outcome:
    """Call the stage in this thread. It cannot be ended from outside: the cancel flag and the timeout are obeyed
    whenever it reports something."""
    supervisor = Supervisor(job)
    supervisor.check()
    context = StageContext.of(job, reporter=supervisor)
    try:
        with heavy_imports_barred(job.stage.kind):
            outcome = Outcome.of(job.stage.run(job.params, context), job.stage)
    except Exception as error:
        supervisor.log.write(supervisor.redactor.text(traceback.format_exc()))
        failure = Failure.of(error)
        if isinstance(error, BigpipeError) and failure.expected:
            raise supervisor.redactor.error(error) from None
        raise supervisor.redactor.error(failure.error(job.node, job.folder.log)) from error
    return outcome.model_copy(update={"peak_rss": own_peak()})


@contextmanager
def heavy_imports_barred(kind: str) -> Iterator[None]:
    """Within, in this thread, importing one of HEAVY raises StageFailed. What was imported before stays usable."""
    with _finder_lock:
        if _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
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


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if _barred.get() and fullname in HEAVY:
            raise HeavyImport(f"{fullname} may not be imported here", name=fullname)
        return None


_finder = _Finder()
_finder_lock = threading.Lock()

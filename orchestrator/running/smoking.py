"""A smoke run: the small recipe that `planning.smoke` makes, planned and run over a store of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp

from bigpipe.orchestrator.contract import OneAtATime
from bigpipe.orchestrator.planning import Plan, Session, make_plan, smaller
from bigpipe.orchestrator.store import explained

from .result import RunResult
from .runner import run_plan

PREFIX = "bigpipe-smoke-"


def plan_small(session: Session, *, preflight: bool = True) -> Plan:
    """Return what a smoke run would do."""
    with TemporaryDirectory(prefix=PREFIX) as folder:
        tried, smoke = smaller(session, Path(os.path.realpath(folder)))
        return replace(make_plan(tried, preflight=preflight), smoke=smoke)


def run_small(session: Session, accept: Callable[[Plan], None], *, jobs: int | None, keep_going: bool) -> RunResult:
    """Run a recipe small. Its folder stays where it failed, for a look at the logs. accept: raises for a plan that
    cannot be run."""
    folder, kept = Path(os.path.realpath(mkdtemp(prefix=PREFIX))), None
    try:
        result = _ran(session, folder, accept, jobs=jobs, keep_going=keep_going)
        kept = result.smoke.kept if result.smoke else None
        return result
    finally:
        if kept is None:
            shutil.rmtree(folder, ignore_errors=True)


def _ran(
    session: Session, folder: Path, accept: Callable[[Plan], None], *, jobs: int | None, keep_going: bool
) -> RunResult:
    tried, smoke = smaller(session, folder)
    with tried.store.enter(), explained(tried.store.root):
        tried.side_by_side = jobs != 1 and tried.store.keeps_others_out
        planned = make_plan(tried)
        accept(planned)
        result = run_plan(tried, planned, tried.reporter or OneAtATime(), jobs=jobs, keep_going=keep_going)
    judged = smoke.judged({name: state.metrics for name, state in result.nodes.items() if state.done})
    errors = (*result.errors, *smoke.undecided(judged, tried.machine))
    status = "failed" if errors and result.status == "succeeded" else result.status
    if status == "interrupted":
        errors[0].cure = "a smoke run begins anew each time"
    smoke = replace(smoke, kept=tried.store.root if status == "failed" else None)
    return replace(result, smoke=smoke, gates=judged, errors=errors, status=status)

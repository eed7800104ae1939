"""What each command about a manifest does, as functions from arguments to plain values."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from bigpipe.errors import BigpipeError, GateFailed, Offline, Stale, UsageError
from bigpipe.files import without_detours
from bigpipe.fit import as_parameters
from bigpipe.machine import MACHINE
from bigpipe.names import Given, as_names, checked
from bigpipe.redaction import conceal_environment
from bigpipe.versions import not_installed

from . import launch, lock as lock_file
from .contract import Event, Json, LogLine, Machine, OneAtATime, Reporter
from .planning import (
    Plan,
    Session,
    lock_path,
    make_plan,
    open_session,
    with_parameters,
)
from .recipe import Recipe, load_recipe, written
from .running import RunRecord, RunResult, records, run_plan
from .store import Store, default_root, explained

if TYPE_CHECKING:
    from .export import Exported
    from .running.sharing import Exchange

REPORTER = Given((Reporter,), "an object with `report(event)`")
PROGRESS = Given((bool, Callable), "True, or a function that takes an event")  # type: ignore[arg-type]  # as isinstance


@checked(reporter=REPORTER, progress=PROGRESS)
def run(
    manifest: str | Path,
    nodes: Sequence[str] = (),
    *,
    params: Mapping[str, Any] | None = None,
    store: str | Path | None = None,
    remote: str | Path | None = None,
    force: Collection[str] = (),
    locked: bool = False,
    offline: bool = False,
    jobs: int | None = None,
    keep_going: bool = False,
    executor: str | None = None,
    reporter: Reporter | None = None,
    progress: bool | Callable[[Event], None] = False,
    check: bool = True,
    smoke: bool = False,
    text: str | None = None,
    typed: Mapping[tuple[str | int, ...], str] = MappingProxyType({}),
) -> RunResult:
    """Run a recipe; nodes already in the store are not run again.

    nodes: stage or node names; only they and their ancestors run. force: run these whatever the store holds.
    progress: True: bars on a terminal, else lines, on standard error, as the command has them; or what is called with
      each event. reporter: the same as an object with `report(event)`.
    remote: address or path of a store that others share, in place of $BIGPIPE_REMOTE and the recipe's; empty: none.
    executor: a cluster whose machines the nodes run on: `ray`, or `ray:HOST:PORT`; else they run here.
    check: raise the first error (GateFailed, StageFailed, …); otherwise errors are in the result.
    smoke: run all of it small, on made-up models and a few rows, in a store of its own that is gone afterwards, unless
      it failed. Gates are told, and fail nothing.
    text: the recipe, where no file holds it; `manifest` then says what it is called, and what its paths start from.
    typed: path in that text → what was typed on a command line to make that part: errors name it in place of a line.
    Raises, before anything runs, ManifestError, UsageError, DoesNotFit, NotAuthorised and GateFailed for what can be
    known by then.
    """
    with closing(Following.of(progress, reporter)) as following:
        result = _run(
            manifest, nodes, jobs=jobs, keep_going=keep_going, executor=executor, params=params, store=store,
            remote=remote, force=force, offline=offline, locked=locked, smoke=smoke, reporter=following.reporter,
            text=text, typed=typed,
        )  # fmt: skip
    if check and result.errors:
        raise result.errors[0]
    return result


def _run(
    manifest: str | Path, nodes: Sequence[str], *, jobs: int | None, keep_going: bool, locked: bool, smoke: bool,
    executor: str | None, **options: Any,
) -> RunResult:  # fmt: skip
    _require_jobs(jobs)
    session = _open(manifest, nodes, locked=locked, **options)
    if smoke:
        from .running import run_small  # of what is only tried

        if executor:
            raise UsageError("a smoke run is small, and runs here", "leave out --executor")
        if locked:
            lock_file.enforce(session)
        return run_small(session, refuse, jobs=jobs, keep_going=keep_going)
    reporter = session.reporter
    with session.store.enter(), explained(session.store.root), _machines(session, executor):
        session.side_by_side &= jobs != 1 and session.store.keeps_others_out
        if locked:
            lock_file.enforce(session)
        planned = with_parameters(make_plan(session))
        refuse(planned, keep_going=keep_going)
        with _telling(session, reporter or OneAtATime()) as hearing:
            held = {"accept": lock_file.enforcing_outputs(session)} if locked else {}
            result = run_plan(session, planned, hearing, jobs=jobs, keep_going=keep_going, **held)
        if session.lock and result.status == "succeeded":
            _fill_lock(session, result)
        if session.meeting is not None and result.errors:
            session.meeting.status = result.errors[0].status
    return result


def _fill_lock(session: Session, result: RunResult) -> None:
    """A lock file that cannot be written fails no run that has succeeded: it costs a line."""
    try:
        lock_file.record_outputs(session, result.records)
    except BigpipeError as error:
        if session.reporter is not None:
            session.reporter.report(LogLine("lock file", f"not filled in: {error.cause}; {error.cure}"))


def _telling(session: Session, reporter: Reporter) -> AbstractContextManager[Reporter]:
    """Who hears of a run: the recipe's sinks too, where it names some."""
    if not session.recipe.sinks:
        return nullcontext(reporter)
    from .running import telling_sinks

    return telling_sinks(session, reporter)


def _machines(session: Session, executor: str | None) -> AbstractContextManager[None]:
    """While it is open, those of a cluster run the nodes, and others that a scheduler started wait to be called."""
    if not executor and not session.may_span_machines:
        return nullcontext()
    from .machines import several

    return several(session, executor)


@checked(reporter=REPORTER)
def attend(
    manifest: str | Path,
    nodes: Sequence[str] = (),
    *,
    params: Mapping[str, Any] | None = None,
    store: str | Path | None = None,
    offline: bool = False,
    reporter: Reporter | None = None,
) -> int | None:
    """Where a scheduler started this on several machines, and this is not the one that drives: start the ranks of the
    nodes that are to run on all of them, when they are called for, until the run has ended. Return the exit status of
    the run, None where there is nothing to attend: then `run` is what to call. Raise ManifestError, UsageError, and
    Transient where machine 0 does not come, or has gone."""
    if not launch.may_attend(os.environ):
        return None
    session = _open(manifest, nodes, params=params, store=store, offline=offline, reporter=reporter)
    if not session.may_span_machines:
        return None
    from .machines import attend as attend_run

    with explained(session.store.root):
        return attend_run(session)


@dataclass(frozen=True, slots=True)
class Following:
    """Who hears of a run that somebody calls from Python."""

    reporter: Reporter | None
    close: Callable[[], None]

    @classmethod
    def of(cls, progress: bool | Callable[[Event], None], reporter: Reporter | None) -> Following:
        """Raise UsageError for both at once."""
        if progress is False:
            return cls(reporter, lambda: None)
        if reporter is not None:
            raise UsageError("progress and reporter hear the same", "give one of them")
        if progress is True:
            from .report import choose_reporter

            chosen = choose_reporter(sys.stderr)
            return cls(chosen, chosen.close)
        return cls(_Calling(progress), lambda: None)


@dataclass(frozen=True, slots=True)
class _Calling:
    function: Callable[[Event], None]

    def report(self, event: Event) -> None:
        self.function(event)


@checked()
def runs(*, store: str | Path | None = None) -> list[RunRecord]:
    """Return the records of all runs over a store, oldest first, but for those that cannot be read:
    `runs()[-1].nodes["quantize"].metrics`."""
    conceal_environment(os.environ)  # what is looked back on may be of a run that did not know of it
    return records.list_runs(Store(Path(store) if store else default_root()).runs)


def _open(
    manifest: str | Path, nodes: Sequence[str] = (), *, params: Mapping[str, Any] | None,
    illegible: Callable[[UsageError], None] | None = None, **options: Any,
) -> Session:  # fmt: skip
    """A session that knows what the lock file beside the manifest pins. illegible: what is done about one that cannot
    be read."""
    path = lock_path(without_detours(manifest))
    # Without a lock file nothing is imported for it.
    if os.path.exists(path) and (lock := lock_file.read_lock(path, illegible or lock_file.refuse)):
        pins, asked = ({name: getattr(item, of) for name, item in lock.inputs.items()} for of in ("pins", "asked"))
        options |= {"lock": lock.path, "locked_pins": pins, "locked_asked": asked}
        options["locked_answers"] = lock_file.read_answers(path, illegible or lock_file.refuse)
    names = {"force": as_names(options["force"])} if "force" in options else {}
    return open_session(manifest, as_names(nodes), params=written(params), **{**options, **names})


def _require_jobs(jobs: int | None) -> None:
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs is {jobs}", "give 1 or more, or leave it out", field="jobs")


def refuse(plan: Plan, *, keep_going: bool = False) -> None:
    """Raise, with the plan, what makes a run pointless now, and UsageError where a node that may run needs packages
    that are not installed here. A failing gate, or a source that cannot be asked, is left to the run where it may be
    survived."""
    for error in chain(plan.errors(), _lacking(plan)):
        if not isinstance(error, GateFailed | Offline) or not (keep_going or _survivable(plan, error)):
            error.plan = plan
            raise error


def _lacking(plan: Plan) -> Iterator[BigpipeError]:
    for name, packages in plan.not_installed.items():
        node = plan.nodes[name].node
        error = not_installed(f"{name} ({node.kind.kind})", packages)
        error.place, error.node = node.places.of("uses"), name
        yield error


def _survivable(plan: Plan, error: BigpipeError) -> bool:
    return error.node in plan.nodes and plan.nodes[error.node].node.on_fail == "continue"


@checked(machine=MACHINE, reporter=REPORTER)
def plan(
    manifest: str | Path,
    nodes: Sequence[str] = (),
    *,
    params: Mapping[str, Any] | None = None,
    store: str | Path | None = None,
    remote: str | Path | None = None,
    offline: bool = False,
    machine: Machine | None = None,
    jobs: int | None = None,
    executor: str | None = None,
    preflight: bool = True,
    smoke: bool = False,
    reporter: Reporter | None = None,
) -> Plan:
    """Return what `run` would do now, what it costs and whether it fits; `Plan.errors()` says why it is refused.
    preflight: also ask each running kind's `check`, which may use the network for metadata. smoke: say it of
    `run(smoke=True)`. executor: plan for the machines of this cluster, as `run` names it."""
    _require_jobs(jobs)
    if executor and (machine or smoke):
        raise UsageError("a plan is for a machine, for a cluster or of a smoke run", "give one of the options")
    session = _open(
        manifest, nodes, params=params, store=store, remote=remote, offline=offline, given_machine=machine,
        side_by_side=jobs != 1, reporter=reporter,
    )  # fmt: skip
    with _machines(session, executor) if executor else nullcontext():
        if not smoke:
            return with_parameters(make_plan(session, preflight=preflight))
        from .running import plan_small

        return plan_small(session, preflight=preflight)


def stale(plan_: Plan) -> Stale | None:
    """Return what `status --exit-code` answers with where something would run."""
    names = [node.node.name for node in plan_.to_run]
    if not names:
        return None
    cause = f"{len(names)} of {len(plan_.nodes)} nodes are not up to date: {', '.join(names)}"
    session = plan_.session
    return Stale(
        cause, f"bigpipe run {shlex.quote(str(session.recipe.path))} {as_parameters(session.arguments)}".rstrip()
    )


def why(
    manifest: str | Path,
    node: str,
    *,
    params: Mapping[str, Any] | None = None,
    store: str | Path | None = None,
    remote: str | Path | None = None,
    offline: bool = False,
) -> dict[str, Json]:
    """Return per node meant by `node`: what it would do, the reason, every change old → new with its place, and the
    producers whose changes reach it."""
    from .planning import explain  # of what asks why

    session = _open(manifest, params=params, store=store, remote=remote, offline=offline)
    names = session.recipe.meant(node)
    planned = make_plan(session, preflight=False)
    return {name: explain(planned, name) for name in session.recipe.nodes if name in names}


def lock(
    manifest: str | Path,
    *,
    check: bool = False,
    params: Mapping[str, Any] | None = None,
    store: str | Path | None = None,
    offline: bool = False,
    note: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write `<manifest>.lock`, or check that it still says what a run would use (Stale where not). note: told, in a
    line, of what cannot be read and is written anew."""
    anew = None if check else lambda error: note(f"{error.cause}: it is written anew")
    session = _open(manifest, params=params, store=store, offline=offline, illegible=anew)
    return lock_file.check_lock(session) if check else lock_file.write_lock(session)


def export(
    target: str,
    manifest: str | Path,
    *,
    params: Mapping[str, Any] | None = None,
    machine: Machine | None = None,
    offline: bool = False,
    out: Path | None = None,
    reporter: Reporter | None = None,
) -> Exported:
    """Return a recipe as the file of a target, such as `github`; `out`: where it will lie. machine: the one that its
    tasks are sized for. Raise ManifestError, and UsageError for what the target cannot hold or do, or where a file of
    somebody else's lies at `out`."""
    from tempfile import TemporaryDirectory

    from .export import export as export_to

    with TemporaryDirectory(prefix="bigpipe-export-") as empty:  # what this machine has made makes no other file
        session = _open(
            manifest, params=params, store=empty, remote="", offline=offline, given_machine=machine, reporter=reporter
        )
        return export_to(target, session, out)


def push(
    manifest: str | Path,
    nodes: Sequence[str] = (),
    *,
    params: Mapping[str, Any] | None = None,
    store: str | Path | None = None,
    remote: str | Path | None = None,
    reporter: Reporter | None = None,
) -> Exchange:
    """Give to the remote store what the store has of a recipe's nodes. Raise UsageError where none is named."""
    from .running import sharing  # of what has a remote store

    session = _open(manifest, nodes, params=params, store=store, remote=remote, reporter=reporter)
    sharing.require_remote(session)
    with session.store.enter(), explained(session.store.root):
        return sharing.push(session, make_plan(replace(session, remote=None), preflight=False))


def pull(
    manifest: str | Path,
    nodes: Sequence[str] = (),
    *,
    params: Mapping[str, Any] | None = None,
    store: str | Path | None = None,
    remote: str | Path | None = None,
    reporter: Reporter | None = None,
) -> Exchange:
    """Bring to the store what the remote store has of a recipe's nodes; nothing runs. Raise UsageError where none is
    named."""
    from .running import sharing

    session = _open(manifest, nodes, params=params, store=store, remote=remote, reporter=reporter)
    sharing.require_remote(session)
    with session.store.enter(), explained(session.store.root):
        return sharing.pull(session, make_plan(session, preflight=False))


def shared(planned: Plan) -> dict[str, bool | None]:
    """Return of each node whether the remote store has it; None: not known, or it is never shared. Raise UsageError
    where no remote store is named."""
    from .running import sharing

    return sharing.there(planned.session, planned)


@checked()
def load_manifest(path: str | Path, *, params: Mapping[str, Any] | None = None) -> Recipe:
    """Return a manifest, checked and expanded into its graph of nodes. Raise ManifestError with all problems."""
    return load_recipe(without_detours(path), written(params))


def validate(
    manifests: Sequence[Path], params: Mapping[str, Any] | None = None, note: Callable[[str], None] = lambda line: None
) -> dict[Path, UsageError]:
    """Return what is wrong with each manifest that is not right: its problems, files and modules that are not there
    among them; or that it is not there itself. Of several, each is given those of the params that it declares, and
    those that none does. note: told, in a line, of what fails no run, and of parameters that have no value yet."""
    from .planning import examined  # of what is not run

    return examined(manifests, params, note)

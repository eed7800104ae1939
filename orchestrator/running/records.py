"""What happened in a run: its record in `<store>/runs/<id>/`.

run.json                  the record: what ran, what it was, how it ended; replaced at once as nodes end
events.jsonl              every event
nodes/NODE/ATTEMPT/       what the launcher left: log.txt, log-N.txt of machine N of several, job.json, rank-N.json
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from io import BufferedReader
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from bigpipe.errors import UsageError
from bigpipe.files import Damaged, LogFile, is_held, open_regular, parse_json, read_sealed, write_sealed
from bigpipe.git import Checkout
from bigpipe.names import did_you_mean
from bigpipe.orchestrator.contract import (
    Event,
    Json,
    LogLine,
    NodeFinished,
    NodeStarted,
    Progress,
    RunFinished,
    RunStarted,
)
from bigpipe.orchestrator.planning import Difference, changed, node_folder
from bigpipe.orchestrator.recipe import Node, Recipe, is_meant, parts_of
from bigpipe.orchestrator.store import explained, make_directory, names_in
from bigpipe.redaction import redact_fields
from bigpipe.tables import html_table

from .nodes import HEADS, NodeRun, node_rows, run_line

EVENTS = "events.jsonl"
LAST = "last"
"""Names the newest run wherever an id is asked for."""
SAVE_SECONDS = 1.0
"""What happened is on record after this long. Nodes that end quickly one after the other share one writing."""
RUN_ID = re.compile(r"\d{8}-\d{6}-[0-9a-f]{9}")
"""What `new_run_id` gives."""
DEAD = "dead"
"""The status of a run that was killed, and of the nodes that it was at: nobody was left to write it."""


def new_run_id(now: datetime | None = None, *, after: str = "") -> str:
    """`20260103-174500-1f43f9a2c`: UTC, milliseconds in three hexadecimal digits, six of chance.
    Unique without the clock. Sorts by time, also where a clock was ahead before: then it has the moment behind `after`,
    the largest id that is there."""
    moment = max(now or datetime.now(UTC), _next_moment(after))
    return f"{moment:%Y%m%d-%H%M%S}-{moment.microsecond // 1000:03x}{os.urandom(3).hex()}"


def _next_moment(run: str) -> datetime:
    """The first millisecond behind that of an id; the beginning of time for what is none."""
    try:
        second = datetime.fromisoformat(f"{run[:8]}T{run[9:15]}+00:00")
        return second + timedelta(milliseconds=int(run[16:19], 16) + 1)
    except (ValueError, OverflowError):
        return datetime(1, 1, 1, tzinfo=UTC)


def latest_run(runs: Path) -> str:
    """Return the largest id of the runs that have begun; "" where there is none."""
    with explained(runs):
        return max(filter(RUN_ID.fullmatch, names_in(runs)), default="")


class RunRecord(BaseModel):
    """A run as it is on disk, readable while it goes on."""

    run: str
    manifest: str
    recipe: str
    """The recipe's name."""
    params: dict[str, Any] = Field(default_factory=dict)
    git: dict[str, Any] | None = None
    """`commit` and `dirty` of the checkout that the manifest lies in, if it lies in one."""
    status: str = "running"
    """running, succeeded, failed, interrupted; dead, which is not on the disk: there such a run is running."""
    started: str
    """ISO 8601 in UTC."""
    seconds: float = 0.0
    """How long it took; of one that goes on, so far; of a dead one, until it last said something."""
    process: int = 0
    nodes: dict[str, NodeRun] = Field(default_factory=dict)
    text: str = ""
    """The manifest as it was."""

    def __getitem__(self, node: str) -> NodeRun:
        """Return what a node did, or the only variant of a stage. Raise UsageError for any other name."""
        return self.nodes[meant(self.run, self.nodes, node)[0]]

    def __repr__(self) -> str:
        return run_line("Run", self.run, self.status, self.seconds, self.nodes)

    __str__ = __repr__

    def _repr_html_(self) -> str:
        return html_table(repr(self), HEADS, node_rows(self.nodes))


def meant(run: str, nodes: Collection[str], node: str, *, several: bool = False) -> list[str]:
    """Return the node of a run that is called so, or the only one that is meant, as a recipe's nodes are (`x`,
    `x@a=1`); if `several`, all of them. Raise UsageError."""
    found = [node] if node in nodes else [name for name in nodes if is_meant(str(node), *parts_of(name))]
    if not found:
        raise UsageError(f"run {run} has no node {node!r}", did_you_mean(str(node), nodes, otherwise="it has"))
    if len(found) > 1 and not several:
        raise UsageError(f"run {run} has {len(found)} variants of {node}", f"name one: {', '.join(found)}")
    return found


def place_of(node: Node) -> dict[str, Json]:
    """Return the fields of a NodeRun that the recipe alone tells."""
    return {"kind": node.kind.kind, "after": list(node.predecessors)}


class RunRecorder:
    """A Reporter that writes the record of one run. Safe for threads."""

    def __init__(self, folder: Path, run: str, recipe: Recipe, checkout: Checkout | None = None) -> None:
        self._folder, self._checkout = folder, checkout
        self._nodes = recipe.nodes
        self._events: LogFile | None = None
        self._saved = time.monotonic()
        self._behind = False
        """Does what is on disk lack something?"""
        self._news: dict[str, NodeStarted | NodeFinished] = {}
        """The last event of each node that the record does not tell yet."""
        self._worked = False
        self._lock = threading.Lock()
        self.record = RunRecord(
            run=run,
            manifest=str(recipe.path),
            recipe=recipe.name,
            params=json.loads(json.dumps(dict(recipe.params), default=str)),
            started=datetime.now(UTC).isoformat(timespec="seconds"),
            process=os.getpid(),
            text=recipe.text,
        )

    def report(self, event: Event) -> None:
        with self._lock, explained(self._folder):
            self._log(event)
            match event:
                case RunStarted():
                    self.record.nodes = {name: self._node(name) for name in event.nodes}
                case NodeStarted():
                    self._news[event.node] = event
                    if not self._worked:
                        self._worked, self._saved = True, float("-inf")  # work that begins is on record at once
                case NodeFinished():
                    self._news[event.node] = event
                case _:
                    return
            self._behind = True
        self.flush()

    def _node(self, name: str, /, **found: Json) -> NodeRun:
        return NodeRun(**{**found, **place_of(self._nodes[name])})

    def flush(self) -> None:
        """Write what has waited for `SAVE_SECONDS`."""
        if time.monotonic() - self._saved > SAVE_SECONDS:
            with self._lock, explained(self._folder):
                if self._events is not None:
                    self._events.append(b"")
                if self._behind:
                    self._take_in()
                    self._save()
                self._saved = time.monotonic()

    def _take_in(self) -> None:
        """Let the record tell the news."""
        for name, event in self._news.items():
            match event:
                case NodeStarted():
                    run = self._node(name, status="running", reason=event.reason)
                case NodeFinished():
                    facts = json.loads(json.dumps(event.as_json(), default=str))
                    run = self._node(name, **{**facts, "seconds": round(event.seconds, 3)})
            self.record.nodes[name] = run
        self._news.clear()

    def finish(self, status: str, nodes: dict[str, NodeRun], seconds: float) -> None:
        """Completes the record of a run that is over."""
        with self._lock, explained(self._folder):
            self.record.status, self.record.nodes, self.record.seconds = status, nodes, round(seconds, 3)
            self._save(durable=self._worked)
            self.close()

    def close(self) -> None:
        """Ends the log of events. Of a run that broke off, the record stays as it was."""
        if self._events is not None:
            self._events.close()
            self._events = None

    def _log(self, event: Event) -> None:
        if self._events is None:
            make_directory(self._folder, durable=False)
            self._events = LogFile(self._folder / EVENTS)
            self._events.hold()  # before there is a record that says that it runs
        stamp = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": stamp, **event.as_json()}
        now = (not isinstance(event, Progress | LogLine) and self._worked) or isinstance(event, RunFinished)
        self._events.append(json.dumps(line, default=str).encode() + b"\n", later=not now)

    def _save(self, *, durable: bool = False) -> None:
        if self._checkout is not None:
            self.record.git = self._checkout.state
        make_directory(self._folder, durable=durable)
        write_sealed(self._folder / "run.json", redact_fields(self.record.model_dump(mode="json")), durable=durable)
        self._behind = False


def load_run(runs: Path, run: str = LAST) -> RunRecord:
    """The record of a run by its id, the start of one, or `last`. UsageError where that is none, or several."""
    names = run_ids(runs)
    found = [run] if run in names else named_so(names, run)
    if not found and not names:
        cause = f"no run is on record: the store {runs.parent} {'has none' if runs.parent.exists() else 'is not there'}"
        raise UsageError(cause, "`bigpipe run` makes one; another store is named with --store DIR or BIGPIPE_HOME")
    if not found:
        is_node = any(is_meant(run, *parts_of(name)) for name in _nodes(runs / names[-1]))
        cure = f"{run} is a node of it: write `last {run}`" if is_node else "`bigpipe ls` lists them"
        raise UsageError(f"there is no run {run!r}; the latest is {names[-1]}", cure)
    if len(found) > 1:
        raise UsageError(f"several runs start with {run}: {', '.join(found[-5:])}", "write more of the id")
    return _read(runs / found[0])


def named_so(names: Sequence[str], run: str) -> list[str]:
    """Return those of some ids, oldest first, that are meant by the start of one, or by `last`."""
    return list(names[-1:]) if run == LAST else [name for name in names if run and name.startswith(run)]


def _nodes(folder: Path) -> Collection[str]:
    """The nodes of a run; none where its record cannot be read."""
    with suppress(UsageError):
        return _read(folder).nodes
    return ()


def _read(folder: Path) -> RunRecord:
    path = folder / "run.json"
    alive = is_held(folder / EVENTS)  # before its last word is read
    try:
        record = RunRecord.model_validate(read_sealed(path))
        if record.status == "running":
            record.seconds = _so_far(record.started, time.time() if alive else _last_word(folder))
        if not alive:
            all_of_it: list[RunRecord | NodeRun] = [record, *record.nodes.values()]
            for one in all_of_it:
                one.status = DEAD if one.status == "running" else one.status
        return record
    except (OSError, Damaged, ValidationError) as error:
        cause = f"the record of run {folder.name} is damaged: {path}"
        cure = "`bigpipe verify --repair` sets it aside; its logs may still be readable"
        raise UsageError(cause, cure) from error


def _last_word(folder: Path) -> float:
    """When something of a run was last written."""
    return max(path.stat().st_mtime for path in (folder / "run.json", folder / EVENTS) if path.exists())


def _so_far(started: str, now: float) -> float:
    """Return the seconds since a run began; 0 for a time that is none."""
    with suppress(ValueError, OverflowError):
        return round(max(0.0, now - datetime.fromisoformat(started).timestamp()), 3)
    return 0.0


def run_ids(runs: Path) -> list[str]:
    """The ids of all runs on record, oldest first."""
    return sorted(path.parent.name for path in runs.glob("*/run.json"))


def list_runs(runs: Path) -> list[RunRecord]:
    """Every readable record, oldest first."""
    records = []
    for name in run_ids(runs):
        with suppress(UsageError):
            records.append(_read(runs / name))
    return records


def node_times(runs: Path, run: str) -> dict[str, tuple[float, float]]:
    """Return node → when it started and when it ended, in seconds after the run began; of attempts, the first and the
    last. A node that has not ended, ends with what happened last."""
    began: dict[str, float] = {}
    ended: dict[str, float] = {}
    first, last = None, 0.0
    with suppress(OSError, Damaged), open_regular(runs / run / EVENTS) as lines:
        for now, event, node in filter(None, map(_timed, lines)):
            first = now if first is None else first
            last = now - first
            if event == "node_started":
                began.setdefault(node, last)
            elif event == "node_finished":
                ended[node] = last
    return {name: (start, ended.get(name, last)) for name, start in began.items()}


def _timed(line: bytes) -> tuple[float, str, str] | None:
    """Time, event and node of a line of the log. None for one that lost power tore, or that is none."""
    try:
        event = parse_json(line)
        return datetime.fromisoformat(event["time"]).timestamp(), event["event"], str(event.get("node"))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


@contextmanager
def reading(log: Path) -> Iterator[BufferedReader]:
    """Give a node's log, open. Raise UsageError for what is no log."""
    try:
        with open_regular(log) as file:
            yield file
    except (OSError, Damaged) as error:
        raise UsageError(f"{log} is no log that can be read", "remove it: nothing depends on it") from error


def log_files(runs: Path, run: str, node: str | None = None) -> Iterator[tuple[str, int, Path]]:
    """(Node, attempt from 1, log file) of a run, nodes in the order of its record; of an attempt over several machines
    one file for each. node: as it is called, or its stage for all its variants. UsageError for an unknown one."""
    from bigpipe.orchestrator.launch import AttemptFolder

    record = load_run(runs, run)
    for name in meant(record.run, record.nodes, node, several=True) if node is not None else record.nodes:
        folder = node_folder(runs / record.run, name)
        attempts = {int(each.name): each for each in folder.glob("*") if each.name.isdecimal()}
        for attempt in sorted(attempts):
            for log in AttemptFolder(attempts[attempt]).logs().values():
                yield name, attempt, log


def diff(
    one: RunRecord, other: RunRecord, causes: Mapping[str, list[Difference]] | None = None
) -> dict[str, list[Difference]]:
    """Return what differs between two runs, by node, and of the runs themselves (`manifest`, `params.gpu`, `nodes.x`: a
    node that only one of them has) under "": status, digests and metrics, and times where work was done.
    causes: per node what made its key change (`keys.differences` over the stored records)."""
    own = [*changed("manifest", one.manifest, other.manifest), *changed("params", one.params, other.params)]
    own += changed("status", one.status, other.status)
    found = {"": own}
    for name in dict.fromkeys([*one.nodes, *other.nodes]):
        before, after = one.nodes.get(name), other.nodes.get(name)
        if before is None or after is None:
            own.append(Difference(f"nodes.{name}", before and before.status, after and after.status))
        else:
            found[name] = [*(causes or {}).get(name, ()), *_node_changes(before, after)]
    return {name: changes for name, changes in found.items() if changes}


def _node_changes(before: NodeRun, after: NodeRun) -> Iterator[Difference]:
    statuses, names = {before.status, after.status}, ["key", "digest", "metrics"]
    if not statuses <= {"succeeded", "cached"}:
        names.insert(0, "status")
    if statuses == {"succeeded"}:
        names += ["seconds", "peak_rss"]
    for name in names:
        yield from changed(name, getattr(before, name), getattr(after, name))

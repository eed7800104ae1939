"""Runs while they go on: which there are, where they stand, what their nodes print."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from bigpipe.files import Damaged, open_regular, parse_json
from bigpipe.orchestrator.contract import Json, Progress
from bigpipe.orchestrator.running import RunRecord, records
from bigpipe.sizes import format_duration
from bigpipe.tables import PLAIN, Screen, columns

from .inspection import Inspection, absence, heading, open_store, show_run
from .progress import ProgressMeter, Reading

RUNNING = "running"
LOOK_SECONDS = 0.3
"""Between two looks at a run. Its record is written once a second, its logs at once."""
TAIL = 64 * 1024
"""Bytes of a run's events, from their end, in which the progress of what runs is looked for."""
OVER = frozenset({"succeeded", "cached", "skipped", "failed", "interrupted", records.DEAD})


def run_ids(store: str | Path | None = None) -> list[str]:
    """Return the ids of all runs on record, oldest first."""
    return records.run_ids(open_store(store).runs)


def running(*, store: str | Path | None = None, screen: Screen = PLAIN) -> Inspection:
    """Return the runs that go on over a store, oldest first."""
    opened = open_store(store)
    runs = opened.runs
    found = [record for record in records.list_runs(runs) if record.status == RUNNING]
    told = [_told(runs, record) for record in found]
    rows = [("run", "process", "since", "nodes", "recipe", "at")]
    rows += [
        (each["run"], str(each["process"]), format_duration(each["seconds"], whole=True),
         f"{each['done']}/{each['nodes']}", each["recipe"],
         ", ".join(f"{node} {text}".rstrip() for node, text in each["at"].items()))
        for each in told
    ]  # fmt: skip
    text = columns(rows, screen) if told else "; ".join(filter(None, ["nothing is running", absence(opened)]))
    return Inspection({"schema": "bigpipe.ps/1", "runs": told}, text)


def positions(run: str, *, store: str | Path | None = None) -> dict[str, str]:
    """Return node that runs → how far it is, as far as it has told."""
    runs = open_store(store).runs
    return _at(runs, records.load_run(runs, run))


def _told(runs: Path, record: RunRecord) -> dict[str, Json]:
    since = datetime.now(UTC) - datetime.fromisoformat(record.started)
    return {
        "run": record.run,
        "process": record.process,
        "started": record.started,
        "seconds": max(0, round(since.total_seconds())),
        "manifest": record.manifest,
        "recipe": record.recipe,
        "nodes": len(record.nodes),
        "done": sum(node.status in OVER for node in record.nodes.values()),
        "at": _at(runs, record),
    }


def _at(runs: Path, record: RunRecord) -> dict[str, str]:
    """Node that runs → how far it is, as far as it has told."""
    progress = _readings(runs / record.run / records.EVENTS)
    at_work = [name for name, node in record.nodes.items() if node.status == RUNNING]
    return {name: progress[name].text() if name in progress else "" for name in at_work}


def _readings(events: Path) -> dict[str, Reading]:
    """Node → how far it was when it last told. The time is that of the events, so that rates are those of then."""
    now = 0.0
    meters: dict[str, ProgressMeter] = defaultdict(lambda: ProgressMeter(lambda: now))
    found: dict[str, Reading] = {}
    for event in _last_events(events):
        with suppress(TypeError, KeyError, ValueError, OverflowError):  # an event of another version
            if event["event"] == Progress.name:
                now = datetime.fromisoformat(event["time"]).timestamp()
                own = {name: value for name, value in event.items() if name not in ("event", "time")}
                found[event["node"]] = meters[event["node"]].update(Progress(**own))
    return found


def _ranks_text(run: str, runs: Path) -> str:
    """A line for each rank of what runs in several, and counts tokens; before them how far the node is."""
    record, lines = records.load_run(runs, run), []
    for name, reading in _readings(runs / run / records.EVENTS).items():
        if name in record.nodes and record.nodes[name].status == RUNNING and reading.paces:
            ranks = [f"  {pace.text()}" for pace in reading.paces] if len(reading.paces) > 1 else []
            lines += [f"{name}: {reading.text()}", *ranks]
    return "\n".join(["", "", *lines]) if lines else ""


def _last_events(events: Path) -> Iterator[dict[str, Json]]:
    with suppress(OSError, Damaged), open_regular(events) as file:
        start = max(0, file.seek(0, 2) - TAIL)
        file.seek(start)
        lines = file.read().split(b"\n")
        for line in lines[1:] if start else lines:
            with suppress(ValueError):  # the last one may be under way
                event = parse_json(line)
                if isinstance(event, dict):
                    yield event


def follow_run(run: str, *, store: str | Path | None = None, screen: Screen = PLAIN) -> Iterator[Inspection]:
    """Give the record of a run again and again, until it is over: whenever it says something else."""
    run = records.load_run(open_store(store).runs, run).run
    before = None
    while True:
        found = show_run(run, store=store, screen=screen)
        found = replace(found, text=found.text + _ranks_text(run, open_store(store).runs))
        if found.text != before:
            yield found
        before = found.text
        if found.data["status"] != RUNNING:
            return
        time.sleep(LOOK_SECONDS)


def follow_log(run: str, node: str | None = None, *, store: str | Path | None = None) -> Iterator[str]:
    """Give what the nodes of a run print, from the start on, as they print it, until the run is over."""
    runs = open_store(store).runs
    run = records.load_run(runs, run).run
    read: dict[Path, int] = defaultdict(int)
    shown: Path | None = None
    while True:
        over = records.load_run(runs, run).status != RUNNING  # what it wrote before it ended is there by then
        for name, attempt, path in records.log_files(runs, run, node):
            lines, read[path] = _further(path, read[path], whole=not over)
            if lines and shown != path:
                shown = path
                yield heading(name, attempt, path)
            yield from lines
        if over:
            return
        time.sleep(LOOK_SECONDS)


def _further(path: Path, start: int, *, whole: bool) -> tuple[list[str], int]:
    """The lines after the first `start` bytes, and how many bytes that makes. whole: without one that has not ended."""
    with records.reading(path) as file:
        file.seek(start)
        text = file.read()
    text = text[: text.rfind(b"\n") + 1] if whole else text
    return text.decode("utf-8", "replace").splitlines(), start + len(text)

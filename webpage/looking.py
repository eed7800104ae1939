"""Recipes in the page's directory, and runs on record, as the page shows them."""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from bigpipe.errors import StageFailed, UsageError
from bigpipe.files import Damaged, open_regular
from bigpipe.names import is_text
from bigpipe.orchestrator.report import MARKS, Drawn, graph, open_store, positions
from bigpipe.orchestrator.running import RunRecord, node_rows, records

DEEPEST, MOST_RECIPES, MOST_RUNS, MOST_DRAWN = 3, 200, 50, 200
LARGEST_RECIPE = 2**20
TAIL = 16 * 2**10
"""Bytes of a log."""
LINES = 200
RUNNING = "running"
RECIPE = tuple(re.compile(rb"(?:\A\xef\xbb\xbf|^)" + key, re.MULTILINE) for key in (b"version:", b"stages:"))
"""What a recipe begins lines with; a byte order mark may come before the first."""


def recipes(directory: Path) -> list[str]:
    """Return the recipes below a directory, as paths in it. What only a link leads to lies elsewhere; a name that is no
    UTF-8 is no address, and no command takes it."""
    return list(islice((name for name in _files(directory) if _is_recipe(directory / name)), MOST_RECIPES))


def _files(directory: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(directory):
        depth = len(Path(folder).relative_to(directory).parts)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "_"))) if depth < DEEPEST else []
        for name in sorted(names):
            found = Path(folder, name).relative_to(directory).as_posix()
            if name.endswith((".yaml", ".yml")) and not name.startswith(".") and is_text(found):
                yield found


def _is_recipe(path: Path) -> bool:
    with suppress(OSError, Damaged), open_regular(path) as file:
        text = file.read(LARGEST_RECIPE)
        return all(part.search(text) for part in RECIPE)
    return False


def require_recipe(directory: Path, name: str) -> Path:
    """Return the file of a recipe. Raise UsageError for what is none, or lies deeper than the list goes."""
    if name not in _files(directory) or not _is_recipe(directory / name):
        raise UsageError(f"there is no recipe {name} here", "choose one of the list")
    return directory / name


def recipe_graph(nodes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the drawing of `bigpipe graph --json`; "" where there are too many nodes to follow."""
    drawn = [Drawn(name, node["kind"], after=node["after"]) for name, node in nodes.items()]
    return graph(drawn) if len(drawn) <= MOST_DRAWN else ""


def runs(store: Path | None) -> list[RunRecord]:
    """Return the latest runs, the newest first. What cannot be read is left out."""
    opened, found = open_store(store), []
    for name in reversed(records.run_ids(opened.runs)[-MOST_RUNS:]):
        with suppress(UsageError):
            found.append(records.load_run(opened.runs, name))
    return found


def require_run(run: str, store: Path | None) -> RunRecord:
    """Return a run by its whole id. Raise UsageError."""
    found = records.load_run(open_store(store).runs, run)
    if found.run != run:
        raise UsageError(f"there is no run {run}", "choose one of the list")
    return found


def run_now(run: str, store: Path | None) -> dict[str, Any]:
    """Return where a run stands: its record, its graph, what its nodes are at, the end of its log."""
    record = require_run(run, store)
    at = positions(record.run, store=store)
    rows = [
        {"name": name, "kind": record.nodes[name].kind, "status": status, "mark": MARKS.get(status, ""),
         "result": at.get(name) or result, "time": time, "peak": peak}
        for name, status, time, peak, result in node_rows(record.nodes)
    ]  # fmt: skip
    drawn = [Drawn(r["name"], r["kind"], r["status"], r["mark"], record.nodes[r["name"]].after) for r in rows]
    errors = {name: node.error for name, node in record.nodes.items() if node.error}
    return {
        "record": record,
        "over": record.status != RUNNING,
        "rows": rows,
        "graph": graph(drawn) if len(drawn) <= MOST_DRAWN else "",
        "errors": errors,
        "log": _log(record, store),
    }


def _log(record: RunRecord, store: Path | None) -> str:
    """The end of what the nodes printed, last the one that printed last."""
    found: list[str] = []
    files = records.log_files(open_store(store).runs, record.run)
    for name, _, path in sorted(files, key=lambda file: _written(file[2])):
        with suppress(UsageError), records.reading(path) as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            lines = file.read().decode("utf-8", "replace").splitlines()
            found += [f"── {name}", *lines[-LINES:]] if lines else []
    return "\n".join(found[-LINES:])


def _written(path: Path) -> float:
    """When, in seconds; 0 for what is gone."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def cancel(run: str, store: Path | None) -> None:
    """Interrupt a run, as Ctrl-C does, or where it does not hear that, with SIGTERM: shells without job control start
    what runs in the background with SIGINT ignored. Raise UsageError where it is over, StageFailed where it is not ours
    to end."""
    record = require_run(run, store)
    if record.status != RUNNING:
        raise UsageError(f"run {record.run} is over: {record.status}", "nothing is left to cancel")
    log = open_store(store).runs / record.run / records.EVENTS
    if not _writes(record.process, log):
        raise StageFailed(f"run {record.run} is not a process of this machine", "interrupt it where it was started")
    os.kill(record.process, signal.SIGTERM if _ignores(record.process, signal.SIGINT) else signal.SIGINT)


def _ignores(process: int, number: int) -> bool:
    """As Linux tells it: `SigIgn` in proc_pid_status(5), a mask in hex."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("SigIgn:"):
                return bool(int(line.partition(":")[2], 16) >> (number - 1) & 1)
    return False


def _writes(process: int, log: Path) -> bool:
    """Does that process have the run's own log open? Its number alone may be another's by now."""
    if process <= 1:
        return False
    if not sys.platform.startswith("linux"):
        return True
    with suppress(OSError):
        return any(_leads_to(link, log) for link in Path(f"/proc/{process}/fd").iterdir())
    return False


def _leads_to(link: Path, log: Path) -> bool:
    with suppress(OSError):
        return link.samefile(log)
    return False

"""Letting go: garbage, and what somebody names; each thing with the node that made it, and when."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from bigpipe.errors import Transient, UsageError
from bigpipe.files import is_held
from bigpipe.orchestrator.contract import Json
from bigpipe.orchestrator.lock import locked_digests
from bigpipe.orchestrator.running import records
from bigpipe.orchestrator.store import RUNS, Freed, GcReport, Keeping, Store
from bigpipe.sizes import counted, format_transfer
from bigpipe.tables import PLAIN, Screen, columns

from .inspection import Inspection, absence, open_store

NOUNS = {"work": "work folder", "temporary": "temporary file", "quarantine": "quarantined file"}
"""What garbage is called where its kind is no noun that can be counted."""
SHORTEST = 6
"""Hexadecimal digits that name an artifact."""


def collect_garbage(
    dry_run: bool,
    older_than: timedelta | None = None,
    keep_runs: int | None = None,
    *,
    store: str | Path | None = None,
    screen: Screen = PLAIN,
) -> Inspection:
    """Free what no existing manifest or lock file names. older_than: and was made longer ago than this."""
    with open_store(store) as opened:
        keeping = Keeping(age=older_than, runs=RUNS if keep_runs is None else keep_runs)
        report = opened.gc(locked_digests, keeping, dry_run=dry_run)
    kept = absence(opened) or f"kept {counted(report.kept_artifacts, 'artifact')}, {format_transfer(report.kept_bytes)}"
    data = {"kept_artifacts": report.kept_artifacts, "kept_bytes": report.kept_bytes}
    return _told("bigpipe.gc/1", report.freed, dry_run, data, kept, screen)


def remove(
    targets: Sequence[str],
    dry_run: bool,
    *,
    run: str = records.LAST,
    store: str | Path | None = None,
    screen: Screen = PLAIN,
) -> Inspection:
    """Free what runs left behind (their records and logs), and artifacts: as `ls` names them, or as nodes of a run.

    Raise UsageError for what is none of these or could be several; Transient for a run that goes on, and for artifacts
    while another process uses the store.
    """
    with open_store(store) as opened:
        runs, digests = _meant(opened, targets, run)
        for name in runs:
            if is_held(opened.runs / name / records.EVENTS):
                raise Transient(f"run {name} goes on", "end it first, or wait until it is over")
        report = opened.remove(digests, dry_run=dry_run) if digests else GcReport(dry_run, (), 0, 0)
        freed = (*report.freed, *opened.remove_runs(runs, dry_run=dry_run))
    return _told("bigpipe.rm/1", freed, dry_run, {}, "", screen)


def _meant(store: Store, targets: Sequence[str], run: str) -> tuple[list[str], set[str]]:
    """The runs, and the digests of the artifacts, that are named."""
    runs, digests = [], set()
    ids, known = records.run_ids(store.runs), {artifact.digest for artifact, _ in store.ls()}
    for target in targets:
        of_runs = records.named_so(ids, target)
        digits = target.removeprefix("sha256:")
        of_artifacts = [one for one in known if len(digits) >= SHORTEST and one[7:].startswith(digits)]
        of_nodes = [] if of_runs or of_artifacts else _given(store, target, run)
        if len(of_runs) + len(of_artifacts) > 1:
            several = ", ".join([*of_runs, *of_artifacts][:5])
            raise UsageError(f"{target} could be {several}", "write more of it")
        runs += of_runs
        digests |= {*of_artifacts, *of_nodes}
    return runs, digests


def _given(store: Store, node: str, run: str) -> list[str]:
    """The digests of what a node, or all variants of a stage, gave in a run."""
    try:
        record = records.load_run(store.runs, run)
        names = records.meant(record.run, record.nodes, node, several=True)
    except UsageError as error:
        cause = f"{node!r} is no run and no artifact of the store, and no node: {error.cause}"
        raise UsageError(cause, error.cure) from error
    found = [digest for name in names if (digest := record.nodes[name].digest)]
    if not found:
        raise UsageError(
            f"{node} gave nothing in run {record.run}", "name another run with --run; `bigpipe ls` lists them"
        )
    return found


def _told(
    schema: str, freed: Sequence[Freed], dry_run: bool, data: dict[str, Json], last: str, screen: Screen
) -> Inspection:
    total = sum(item.bytes for item in freed)
    counts = Counter(item.kind for item in freed)
    what = ", ".join(counted(count, NOUNS.get(kind, kind)) for kind, count in counts.items()) or "nothing"
    lines = [_by_node(freed, screen), f"{'would free' if dry_run else 'freed'} {format_transfer(total)}: {what}", last]
    listed = [{name: value if value != "" else None for name, value in asdict(item).items()} for item in freed]
    answer = {"schema": schema, "dry_run": dry_run, "freed": listed, "freed_bytes": total, **data}
    return Inspection(answer, "\n".join(line for line in lines if line))


def _by_node(freed: Sequence[Freed], screen: Screen) -> str:
    """What goes, per computation; the rest, where it has bytes, by what it is."""
    sizes: dict[tuple[str, str, str], int] = defaultdict(int)
    for item in freed:
        if item.node:
            sizes[item.node, item.created[:16].replace("T", " "), os.path.basename(item.manifest)] += item.bytes
    for kind, size in _others(freed).items():
        sizes[f"({NOUNS.get(kind, kind)}s)", "", ""] += size
    rows = [(*named, format_transfer(size)) for named, size in sizes.items()]
    return columns([("node", "made", "recipe", "size"), *rows], screen) if rows else ""


def _others(freed: Sequence[Freed]) -> dict[str, int]:
    sizes: dict[str, int] = defaultdict(int)
    for item in freed:
        if item.bytes and not item.node:
            sizes[item.kind] += item.bytes
    return sizes

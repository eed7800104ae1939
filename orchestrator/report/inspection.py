"""Looking back: what the store holds, what runs did, how two of them differ; and letting go, and checking."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bigpipe.errors import BigpipeError, StageFailed, UsageError
from bigpipe.orchestrator.contract import Json
from bigpipe.orchestrator.planning import Difference, differences
from bigpipe.orchestrator.running import RunRecord, records
from bigpipe.orchestrator.store import Artifact, KeyRecord, Store, default_root
from bigpipe.redaction import conceal_environment
from bigpipe.sizes import counted, format_duration, format_size, format_transfer
from bigpipe.tables import PLAIN, Screen, columns

from .rendering import GATE_HEADS, gate_rows, nodes_table


@dataclass(frozen=True, slots=True)
class Inspection:
    """One answer twice: for programs and for people; and what is wrong, if something is."""

    data: Json
    text: str
    error: BigpipeError | None = None


def open_store(store: str | Path | None) -> Store:
    """Return the store, to look back on; it need not be there. Raise UsageError where something else is."""
    conceal_environment(os.environ)  # what is looked back on may be of a run that did not know of it
    opened = Store(Path(store) if store else default_root())
    opened.refuse_foreign()
    return opened


def absence(store: Store) -> str:
    """Return what is said where there is no store yet; else nothing."""
    return "" if store.there else f"there is no store at {store.root}: the first run makes it"


def list_store(*, store: str | Path | None = None, screen: Screen = PLAIN) -> Inspection:
    opened = open_store(store)
    entries, runs = opened.ls(), records.list_runs(opened.runs)
    rows = [("artifact", "type", "size", "files", "node", "made", "")]
    rows += [
        (
            artifact.digest[7:19],
            artifact.type,
            format_transfer(artifact.bytes),
            str(len(artifact.files)),
            record.node,
            record.created[:16].replace("T", " "),
            "bytes dropped" if artifact.dropped else "",
        )
        for artifact, record in entries
    ]
    run_rows = [("run", "status", "time", "recipe")]
    run_rows += [(run.run, run.status, format_duration(run.seconds), run.recipe) for run in runs]
    held = sum(item.bytes - item.referenced_bytes for item, _ in entries if not item.dropped)
    parts = [
        absence(opened) or f"{opened.root}: {counted(len(entries), 'artifact')}, {format_transfer(held)}",
        columns(rows, screen) if entries else "",
        columns(run_rows, screen) if runs else "no runs on record",
    ]
    data = {
        "schema": "bigpipe.ls/1",
        "store": str(opened.root),
        "artifacts": [_listed(opened, artifact, record) for artifact, record in entries],
        "runs": [{"run": r.run, "status": r.status, "seconds": r.seconds, "recipe": r.recipe} for r in runs],
    }
    return Inspection(data, "\n\n".join(part for part in parts if part))


def _listed(store: Store, artifact: Artifact, record: KeyRecord) -> dict[str, Json]:
    return {
        "digest": artifact.digest,
        "type": artifact.type,
        "path": str(store.artifact_path(artifact.digest)),
        "files": len(artifact.files),
        "bytes": artifact.bytes,
        "referenced_bytes": artifact.referenced_bytes,
        "present": not artifact.dropped,
        **{name: getattr(record, name) for name in ("key", "node", "kind", "manifest", "created")},
    }


def show_run(run: str, *, store: str | Path | None = None, screen: Screen = PLAIN) -> Inspection:
    record = records.load_run(open_store(store).runs, run)
    head = [
        f"run {record.run}: {record.status} in {format_duration(record.seconds)}, started {record.started}",
        f"{record.manifest} ({record.recipe})",
        *(f"  {name} = {value}" for name, value in record.params.items()),
    ]
    tables = [nodes_table(record.nodes, screen)]
    if gates := gate_rows(record.nodes):
        tables.append(columns([GATE_HEADS, *gates], screen))
    text = "\n\n".join(["\n".join(head), *tables])
    return Inspection({"schema": "bigpipe.record/1", **record.model_dump(mode="json")}, text)


def log_lines(run: str, node: str | None, store: str | Path | None = None) -> Iterator[str]:
    """Return what the nodes of a run printed, each attempt under its own heading."""
    for name, attempt, path in records.log_files(open_store(store).runs, run, node):
        yield heading(name, attempt, path)
        with records.reading(path) as lines:
            for line in lines:
                yield line.decode("utf-8", "replace").rstrip("\r\n")


def logged(run: str, node: str | None, *, store: str | Path | None = None) -> Json:
    """Return the same for programs: `bigpipe.log/1`."""
    lines = []
    for name, attempt, path in records.log_files(open_store(store).runs, run, node):
        with records.reading(path) as found:
            lines += [
                {"node": name, "attempt": attempt, "line": line.decode("utf-8", "replace").rstrip("\r\n")}
                for line in found
            ]
    return {"schema": "bigpipe.log/1", "lines": lines}


def heading(node: str, attempt: int, log: Path) -> str:
    """Return the line above what an attempt printed: on which machine, where that is not the one that drives."""
    machine = log.stem.partition("-")[2]
    return f"── {node}" + (f", attempt {attempt}" if attempt > 1 else "") + (f", machine {machine}" if machine else "")


def diff_runs(run: str, other: str, *, store: str | Path | None = None) -> Inspection:
    opened = open_store(store)
    one, two = records.load_run(opened.runs, run), records.load_run(opened.runs, other)
    found = records.diff(one, two, _causes(opened, one, two))
    return differing([one.run, two.run], found, f"runs {one.run} and {two.run} are the same")


def differing(names: Sequence[str], found: Mapping[str, Sequence[Difference]], same: str) -> Inspection:
    """Return `bigpipe.diff/1` of two that are called so. found: by node, "" for what belongs to none. same: the words
    where nothing differs."""
    told = {name: [asdict(change) for change in changes] for name, changes in found.items()}
    data = {"schema": "bigpipe.diff/1", "runs": list(names), "changes": told.pop("", []), "nodes": told}
    lines = [line for name, changes in found.items() for line in _lines(name, changes)]
    return Inspection(data, "\n".join(lines) or same)


def _lines(name: str, changes: Sequence[Difference]) -> list[str]:
    return [f"{name}:", *(f"  {change}" for change in changes)] if name else [*map(str, changes)]


def _causes(store: Store, one: RunRecord, two: RunRecord) -> Mapping[str, list[Difference]]:
    """Per node whose key differs, what of its identity does."""
    causes = {}
    for name in one.nodes.keys() & two.nodes.keys():
        keys = one.nodes[name].key, two.nodes[name].key
        before, after = (store.find(key) if key else None for key in keys)
        if keys[0] != keys[1] and before and after:
            causes[name] = differences(before.identity, after.identity, before.inputs, after.inputs)
    return causes


def get_artifact(node: str, directory: Path, *, run: str = records.LAST, store: str | Path | None = None) -> Inspection:
    """Copy what a node gave in a run to a directory, as real files."""
    with open_store(store) as opened:
        record = records.load_run(opened.runs, run)
        (name,) = records.meant(record.run, record.nodes, node)
        digest = record.nodes[name].digest
        if digest is None:
            cause = f"{name} gave nothing in run {record.run}: it is {record.nodes[name].status}"
            raise UsageError(cause, "name another run with --run; `bigpipe ls` lists them")
        sizes = opened.take_out(digest, directory)
    size = format_transfer(sum(sizes.values()))
    text = f"{directory}: {counted(len(sizes), 'file')}, {size} of {name}, run {record.run}"
    place = str(directory.absolute())
    found = {"run": record.run, "node": name, "digest": digest, "path": place, "files": sizes}
    return Inspection({"schema": "bigpipe.get/1", **found}, text)


def verify_store(repair: bool, *, store: str | Path | None = None) -> Inspection:
    with open_store(store) as opened:
        report = opened.verify(repair=repair)
    head = f"{counted(report.artifacts, 'artifact')}, {counted(report.files, 'file')}, {format_size(report.bytes)} read"
    lines = [
        absence(opened)
        or head + (": all as recorded" if report.clean else f": {counted(len(report.findings), 'finding')}")
    ]
    for finding in report.findings:
        detail = f" ({finding.detail})" if finding.detail else ""
        lines.append(f"{finding.problem}: {finding.path}{detail}{', repaired' if finding.repaired else ''}")
    findings = [{**asdict(finding), "path": str(finding.path)} for finding in report.findings]
    data = {"schema": "bigpipe.verify/1", **asdict(report), "findings": findings}
    left = [finding for finding in report.findings if not finding.repaired]
    cure = "bigpipe verify --repair sets them aside, and they are made again"
    error = StageFailed(f"the store has {counted(len(left), 'finding')}", cure) if left else None
    return Inspection(data, "\n".join(lines), error)

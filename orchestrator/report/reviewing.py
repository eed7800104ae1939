"""For whoever reviews a change: a plan, and what differs between two runs or lock files, as Markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from bigpipe.errors import UsageError
from bigpipe.orchestrator.contract import Json
from bigpipe.orchestrator.lock import LockFile, lock_differences, read_lock
from bigpipe.orchestrator.planning import Difference, Plan, machine_line, plan_rows, totals
from bigpipe.orchestrator.running import Held, NodeRun, RunRecord, records
from bigpipe.orchestrator.store import Store
from bigpipe.sizes import format_figure, format_size, format_transfer

from .comparing import gates_of, told_apart
from .firstrows import first_results
from .inspection import Inspection, diff_runs, differing, open_store
from .page import TEXTS, written
from .rendering import PROBE_HEADS, probe_rows
from .sections import Section, Table, markdown_page, short

HEADS = ("node", "what", "before", "after")
APART = ("metrics.", "seconds", "peak_rss", "key")
"""Numbers of a run, which stand in tables of their own; and keys, which follow from the rest."""
TIMES = "timeline."
"""When ranks were at work, which is never twice the same."""
MADE_BY = ("tools.", "packages.", "facts.")
CAME_OUT = ("digest", "review.")


def plan_markdown(plan: Plan, probed: Sequence[Held] | None = None) -> str:
    """Return a plan as a table of Markdown, with its totals; what is smaller in a smoke run, and what could be had
    where it was `probed`, as further ones."""
    tables = [Table("Nodes", ("node", "action", "why, and what it costs"), plan_rows(plan))]
    if plan.smoke is not None:
        smaller = [(name, str(change)) for name, changes in plan.smoke.changes.items() for change in changes]
        tables.append(Table("Smoke run: smaller than the recipe", ("node", "value"), smaller))
    if probed is not None:
        tables.append(Table("Probed", PROBE_HEADS, probe_rows(probed)))
    about = f"{totals(plan)}; {machine_line(plan.session.machine)}"
    return markdown_page([Section(f"Plan of {plan.session.recipe.name}", about, tables)]).rstrip("\n")


def diff(one: str, other: str, *, store: str | Path | None = None) -> Inspection:
    """Return what differs between two runs (ids, starts of ids, or `last`), or two lock files (paths)."""
    return _diff_locks(*_locks(one, other)) if _are_locks(one, other) else diff_runs(one, other, store=store)


def review(one: str, other: str, *, store: str | Path | None = None) -> str:
    """Return the same as Markdown tables, of runs with bytes, memory, metrics and texts side by side."""
    if _are_locks(one, other):
        section = _locks_reviewed(*_locks(one, other))
    else:
        opened = open_store(store)
        section = _runs_reviewed(records.load_run(opened.runs, one), records.load_run(opened.runs, other), opened)
    return markdown_page([section]).rstrip("\n")


def _are_locks(one: str, other: str) -> bool:
    """A run's id is no name of a file. Raise UsageError for one of each."""
    locks = [name.endswith(".lock") or Path(name).is_file() for name in (one, other)]
    if any(locks) and not all(locks):
        raise UsageError(f"one of {one} and {other} is a lock file, the other is a run", "name two of a kind")
    return all(locks)


def _locks(one: str, other: str) -> tuple[LockFile, LockFile]:
    found = [read_lock(Path(name)) for name in (one, other)]
    for name, lock in zip((one, other), found, strict=True):
        if lock is None:
            raise UsageError(f"there is no lock file {name}", "write it with `bigpipe lock`, or take it from git")
    before, after = (lock for lock in found if lock is not None)
    return before, after


def _diff_locks(one: LockFile, two: LockFile) -> Inspection:
    names = [str(one.path), str(two.path)]
    return differing(names, lock_differences(one, two), f"{names[0]} and {names[1]} say the same")


def _locks_reviewed(one: LockFile, two: LockFile) -> Section:
    rows = [(name, change) for name, changes in lock_differences(one, two).items() for change in changes]
    tables = [
        _changes("What goes in", [row for row in rows if not row[1].path.startswith((*MADE_BY, *CAME_OUT))]),
        _changes("What came out", [row for row in rows if row[1].path.startswith(CAME_OUT)]),
        _changes("Versions and machine", [row for row in rows if row[1].path.startswith(MADE_BY)]),
    ]
    return _section(f"{two.recipe}: the lock", tables)


def _section(heading: str, tables: list[Table]) -> Section:
    kept = [table for table in tables if table.rows]
    return Section(heading, "" if kept else "Nothing differs.", kept)


def _changes(title: str, rows: list[tuple[str, Difference]]) -> Table:
    told = [(name or "recipe", each.path, *told_apart(each.old, each.new)) for name, each in rows]
    return Table(title, HEADS, told)


def _runs_reviewed(one: RunRecord, two: RunRecord, store: Store) -> Section:
    data = diff_runs(one.run, two.run, store=store.root).data
    found = {"": data["changes"], **data["nodes"]}
    rows = [(name, Difference(**change)) for name, changes in found.items() for change in changes]
    both = {name: (one.nodes[name], two.nodes[name]) for name in one.nodes if name in two.nodes}
    tables = [
        _changes("What changed", [row for row in rows if not row[1].path.startswith(APART)]),
        gates_of([one, two]),
        _figures("Bytes", both, lambda node: {"written": _written(store, node)}, format_transfer),
        _figures("Memory", both, lambda node: {"peak RAM": node.peak_rss or 0}, format_size),
        _figures("Metrics", both, lambda node: _numbers_of(node.metrics), format_figure, all_rows=False),
        _texts(store, both),
    ]
    return _section(f"{two.recipe}: {one.run} → {two.run}", tables)


def _figures(
    title: str,
    both: Mapping[str, tuple[NodeRun, NodeRun]],
    figures: Callable[[NodeRun], Mapping[str, float]],
    text: Callable[[int], str] | Callable[[float], str],
    *,
    all_rows: bool = True,
) -> Table:
    """Numbers of nodes before and after, with by how much they changed. all_rows: those that did not, too."""
    rows = []
    for name, (before, after) in both.items():
        old, new = figures(before), figures(after)
        for what in dict.fromkeys([*old, *new]):
            values = old.get(what), new.get(what)
            if any(values) and (all_rows or values[0] != values[1]):
                shown = ["" if value is None else text(value) for value in values]  # type: ignore[arg-type]
                rows.append((name, what, *shown, _by(*values)))
    return Table(title, (*HEADS, "change"), rows, 2)


def _by(before: float | None, after: float | None) -> str:
    if not before or after is None or before == after:
        return ""
    return f"{(after - before) / abs(before):+.1%}"


def _numbers_of(metrics: Mapping[str, Json]) -> dict[str, float]:
    return {path: number for path, number in _numbers("", metrics) if not path.startswith(TIMES)}


def _numbers(path: str, value: Json) -> Iterator[tuple[str, float]]:
    """Those in the metrics of a node, by path."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(f"{path}.{name}".strip("."), inner)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def _written(store: Store, node: NodeRun) -> int:
    record = store.find(node.key) if node.key else None
    return written(node, record) if record else 0


def _texts(store: Store, both: Mapping[str, tuple[NodeRun, NodeRun]]) -> Table:
    """The first results that differ, by their prompts."""
    rows: list[tuple[str, ...]] = []
    for name, nodes in both.items():
        before, after = (_results(store, node) for node in nodes)
        found = [(prompt, before.get(prompt, ""), after.get(prompt, "")) for prompt in dict.fromkeys([*before, *after])]
        rows += [(name, *map(short, texts)) for texts in found if texts[1] != texts[2]]
    return Table("Texts that differ", ("node", "prompt", "before", "after"), rows)


def _results(store: Store, node: NodeRun) -> dict[str, str]:
    record = store.find(node.key) if node.key else None
    if record is None or record.artifact_type != "results" or not record.digest:
        return {}
    return dict(first_results(store.artifact_path(record.digest), TEXTS))

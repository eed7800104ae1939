"""What runs did as one page: HTML that needs no network and no script, or Markdown for a review.

    report_runs(["last"])                 one run: graph, nodes, budgets, gates, texts, time, parameters, versions
    report_runs(["20260103", "last"])     several, and what differs between them

The tables come first; a drawing says nothing that a table does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from bigpipe.errors import UsageError
from bigpipe.files import flows_on, write_named
from bigpipe.orchestrator.contract import Json
from bigpipe.orchestrator.running import NodeRun, RunRecord, node_rows, records
from bigpipe.orchestrator.store import KeyRecord, Store
from bigpipe.sizes import MOST, counted, format_duration, format_figure, format_size, format_transfer

from .comparing import compared
from .drawing import Bar, bars, graph, line
from .firstrows import first_results
from .graphs import MARKS, drawn, mermaid_text
from .inspection import Inspection, open_store
from .rendering import GATE_HEADS, gate_rows
from .sections import Section, Table, cell, form_of, html_page, markdown_page, short, shown

FORMS = {"html": html_page, "markdown": markdown_page}
ENDINGS = {".html": "html", ".md": "markdown"}
TEXTS = 20
"""Rows of results."""
FEW_NODES = 200
"""More are not drawn: nobody could read it."""


def report_runs(
    runs: Sequence[str] = (records.LAST,),
    *,
    form: str = "html",
    store: str | Path | None = None,
) -> str:
    """Return a report on runs (ids, starts of ids, or `last`): an HTML page, or Markdown with its graph for Mermaid.
    Raise UsageError for a run that is not on record."""
    if form not in FORMS:
        raise UsageError(f"{form!r} is no form of a report", "use html or markdown")
    opened = open_store(store)
    found = [records.load_run(opened.runs, run) for run in dict.fromkeys(runs)]
    first = [Section(counted(len(found), "run"), tables=compared(found, store))] if len(found) > 1 else []
    return FORMS[form]([*first, *(_section(opened, record) for record in found)])


def write_report(runs: Sequence[str], out: Path, *, store: str | Path | None = None) -> Inspection:
    """Write a report to a file, HTML or Markdown by the ending of its name. Raise UsageError for another ending."""
    form = form_of(out, ENDINGS, "a report")
    flows_on(out)
    size = write_named(out, report_runs(runs or (records.LAST,), form=form, store=store))
    data = {"schema": "bigpipe.report/1", "path": str(out.absolute()), "bytes": size}
    return Inspection(data, f"{out}: {format_transfer(size)}")


def _section(store: Store, record: RunRecord) -> Section:
    kept = {name: found for name, node in record.nodes.items() if node.key and (found := store.find(node.key))}
    tables = [
        _nodes(record, kept),
        Table("Gates", GATE_HEADS, gate_rows(record.nodes)),
        *_tried(record),
        _memory(record),
        _disk(record, kept),
        *_devices(record),
        *_figures(record),
        *_curves(record),
        _texts(store, kept),
        _timeline(store, record),
        *_ranks(record),
        Table("Parameters", ("parameter", "value"), [(name, shown(value)) for name, value in record.params.items()]),
        _origin(record, kept),
    ]
    few = record.nodes if len(record.nodes) <= FEW_NODES else {}
    return Section(
        record.recipe,
        f"Run {record.run}, started {record.started}, {format_duration(record.seconds)}",
        [table for table in tables if table.rows],
        graph=graph([drawn(name, node) for name, node in few.items()]) if few else "",
        mermaid=_mermaid(few) if few else "",
        status=record.status,
        errors={name: node.error for name, node in record.nodes.items() if node.error},
        texts={"The recipe as it was": record.text} if record.text else {},
    )


def _nodes(record: RunRecord, kept: Mapping[str, KeyRecord]) -> Table:
    rows = []
    for (name, status, time, peak, result), node in zip(node_rows(record.nodes), record.nodes.values(), strict=True):
        kind = node.kind or (kept[name].kind if name in kept else "")
        rows.append((name, kind, f"{MARKS.get(status, '')} {status}", result, time, peak))
    return Table("Nodes", ("node", "kind", "status", "result", "time", "peak RAM"), rows, 4)


def _tried(record: RunRecord) -> Iterator[Table]:
    """Of nodes that take the first variant that passes: what became of each."""
    for name, node in record.nodes.items():
        columns = ("value", "judge", "came_to", "why")
        rows = [tuple(str(row.get(column, "")) for column in columns) for row in node.tried]
        yield Table(f"What {name} takes", ("variant", "judged by", "came to", "why"), rows)


def _memory(record: RunRecord) -> Table:
    """Of nodes that ran: what the plan said, and what was measured."""
    found = [
        (name, _count(node.foreseen.get("ram")) or 0, node.peak_rss or 0)
        for name, node in record.nodes.items()
        if node.status == "succeeded" and node.peak_rss
    ]
    return _pairs("Memory of the nodes", "node", found)


def _disk(record: RunRecord, kept: Mapping[str, KeyRecord]) -> Table:
    """Of nodes that ran and gave files: what the plan said that they write, and what they wrote."""
    found = [
        (name, _count(node.foreseen["write_bytes"]) or 0, written(node, kept[name]))
        for name, node in record.nodes.items()
        if node.status == "succeeded" and node.foreseen.get("write_bytes") and name in kept and kept[name].files
    ]
    return _pairs("Disk of the nodes", "node", found, format_transfer)


def written(node: NodeRun, record: KeyRecord) -> int:
    """Return the bytes of its artifact; where that is only a receipt, of what it wrote elsewhere, by its metric."""
    return max(sum(int(file["size"]) for file in record.files.values()), _count(node.metrics.get("bytes")) or 0)


def _devices(record: RunRecord) -> Iterator[Table]:
    """What a kind predicted for each device and measured there, under the names `predicted` and `measured`."""
    for name, node in record.nodes.items():
        told, held = (_counts(node.metrics.get(side)) for side in ("predicted", "measured"))
        if told and held:
            devices = dict.fromkeys([*told, *held])
            yield _pairs(f"What {name} placed", "device", [(d, told.get(d, 0), held.get(d, 0)) for d in devices])


def _counts(value: Json) -> Mapping[str, int]:
    """Bytes by name; what holds anything else was not meant by `predicted` and `measured`."""
    found = value if isinstance(value, dict) else {}
    return found if all(_count(count) is not None for count in found.values()) else {}


def _count(value: Json) -> int | None:
    """Bytes; None for what a record of anybody may hold in their place."""
    return value if type(value) is int and 0 <= value <= MOST else None


def _pairs(
    title: str, what: str, found: Sequence[tuple[str, int, int]], text: Callable[[float], str] = format_size
) -> Table:
    rows = [(name, text(told) if told else "", text(held) if held else "") for name, told, held in found]
    spans = [
        (name, [Bar(0, told, "predicted", f"{name}: {text(told)} predicted"),
                Bar(0, held, "measured", f"{name}: {text(held)} measured")])
        for name, told, held in found
    ]  # fmt: skip
    most = max((size for _, told, held in found for size in (told, held)), default=0)
    drawing = bars(f"{title}: predicted above, measured below", spans, most) if found else ""
    return Table(title, (what, "predicted", "measured"), rows, 1, drawing, PAIR)


PAIR = {"predicted": "predicted, above", "measured": "measured, below"}
PARTS = {
    "weights": "weights", "kv_cache": "KV cache", "activations": "activations",
    "runtime": "what the device's own libraries hold",
}  # fmt: skip
"""Columns that are parts of a whole, in bytes, and how a drawing calls them."""


def _figures(record: RunRecord) -> Iterator[Table]:
    """Metrics that are tables themselves: rows of figures with the same columns, such as an estimate by dtype."""
    for name, node in record.nodes.items():
        rows = _alike(node.metrics)
        heads = list(dict.fromkeys(head for row in rows.values() for head in _numbers(row)))
        if len(rows) > 1 and len(heads) > 1 and not {"predicted", "measured"} & rows.keys():
            cells = [(key, *(_bytes(head, row.get(head)) for head in heads)) for key, row in rows.items()]
            title, whole = f"What {name} found", PARTS.keys() <= {*heads}
            drawing, key = (_stacked(title, rows), PARTS) if whole else ("", {})
            yield Table(title, ("", *(head.replace("_", " ") for head in heads)), cells, 1, drawing, key)


def _alike(metrics: Mapping[str, Json]) -> dict[str, Mapping[str, Json]]:
    """Those metrics that are rows of figures, and have columns in common with the longest of them."""
    rows = {key: value for key, value in metrics.items() if isinstance(value, dict) and _numbers(value)}
    columns = max((set(_numbers(row)) for row in rows.values()), key=len, default=set())
    return {key: row for key, row in rows.items() if columns & {*_numbers(row)}}


def _stacked(title: str, rows: Mapping[str, Mapping[str, Json]]) -> str:
    """Each row's PARTS as one bar, one behind the other."""
    drawn = [(name, list(_parts(name, row))) for name, row in rows.items()]
    most = max((spans[-1].end for _, spans in drawn if spans), default=0)
    return bars(f"{title}: {', '.join(PARTS.values())}", drawn, most, stacked=True)


def _parts(name: str, row: Mapping[str, Json]) -> Iterator[Bar]:
    at = 0
    for part, words in PARTS.items():
        if size := _count(row.get(part)):
            yield Bar(at, at + size, part, f"{name}: {format_size(size)} of {words}")
            at += size


def _curves(record: RunRecord) -> Iterator[Table]:
    """Metrics with a `curve` of (x, y), such as the loss by step: drawn, and told at a dozen places."""
    for name, node in record.nodes.items():
        for metric, value in node.metrics.items():
            points = _points(value.get("curve")) if isinstance(value, dict) else []
            if len(points) > 1:
                some = [*points[: -1 : -(-len(points) // 11)], points[-1]]
                rows = [(f"{x:g}", f"{y:.4g}") for x, y in some]
                drawing = line(f"{metric} of {name}", points)
                yield Table(f"Curve of {metric}: {name}", ("step", metric), rows, 0, drawing)


def _points(value: Json) -> list[tuple[float, float]]:
    """Pairs of finite numbers; nothing where anything else is among them."""
    pairs = value if isinstance(value, list) else []
    sound = all(isinstance(each, list) and len(each) == 2 and all(map(_is_drawn, each)) for each in pairs)
    return [(float(x), float(y)) for x, y in pairs] if sound else []


def _is_drawn(value: Json) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -MOST <= value <= MOST


def _figure(value: Json) -> str:
    return format_figure(value) if isinstance(value, int | float) and not isinstance(value, bool) else shown(value)


def _numbers(row: Mapping[str, Json]) -> list[str]:
    return [name for name, value in row.items() if isinstance(value, int | float) and not isinstance(value, bool)]


def _bytes(head: str, value: Json) -> str:
    """Metrics do not say what they are of; a whole number this large, of anything but parameters, is taken as bytes."""
    if not isinstance(value, int | float):
        return ""
    is_size = isinstance(value, int) and value > 2**16 and head != "parameters"
    return format_size(value) if is_size else format_figure(value)


def _texts(store: Store, kept: Mapping[str, KeyRecord]) -> Table:
    """The first results of all nodes that gave some, side by side: a row per prompt."""
    found: dict[str, dict[str, str]] = {}
    for name, record in kept.items():
        if record.artifact_type == "results" and record.digest:
            results = first_results(store.artifact_path(record.digest), TEXTS)
            found[name] = {short(prompt): short(text) for prompt, text in results}
    prompts = dict.fromkeys(prompt for texts in found.values() for prompt in texts)
    rows = [(prompt, *(texts.get(prompt, "") for texts in found.values())) for prompt in islice(prompts, TEXTS)]
    return Table("Results", ("prompt", *found), rows)


def _timeline(store: Store, record: RunRecord) -> Table:
    times = records.node_times(store.runs, record.run)
    spans = [
        (name, [_span(name, start, end, record.nodes[name].status)])
        for name, (start, end) in times.items()
        if name in record.nodes
    ]
    rows = [(name, *map(format_duration, times[name])) for name in times]
    most = max((end for _, end in times.values()), default=0)
    return Table("Time", ("node", "began after", "ended after"), rows, 1, bars("When each node ran", spans, most))


def _ranks(record: RunRecord) -> Iterator[Table]:
    """Of nodes with a metric `timeline`, rank → `began` and `ended`, in seconds, and other figures: when each rank was
    at work, and what else is told of it."""
    for name, node in record.nodes.items():
        given = node.metrics.get("timeline")
        found = {rank: row for rank, row in given.items() if _has_times(row)} if isinstance(given, dict) else {}
        if not found:
            continue
        heads = list(dict.fromkeys(head for row in found.values() for head in _numbers(row)))
        spans = [
            (f"rank {rank}", [_span(f"rank {rank}", row["began"], row["ended"], node.status)])
            for rank, row in found.items()
        ]
        rows = [(rank, *(_figure(row.get(head, "")) for head in heads)) for rank, row in found.items()]
        most = max(row["ended"] for row in found.values())
        yield Table(f"Ranks of {name}", ("rank", *heads), rows, 1, bars(f"When ranks of {name} worked", spans, most))


def _has_times(row: Json) -> bool:
    if not isinstance(row, dict) or not all(_is_drawn(row.get(name)) for name in ("began", "ended")):
        return False
    return bool(0 <= row["began"] <= row["ended"])


def _span(name: str, began: float, ended: float, status: str) -> Bar:
    return Bar(began, ended, status, f"{name}: from {format_duration(began)} to {format_duration(ended)}")


def _origin(record: RunRecord, kept: Mapping[str, KeyRecord]) -> Table:
    git = record.git or {}
    commit = f"{git['commit']}{' with changes' if git.get('dirty') else ''}" if git.get("commit") else ""
    tools = {name: version for found in kept.values() for name, version in found.tools.items()}
    pins = {f"{name}: {pin}": value for name, found in kept.items() for pin, value in found.pins.items()}
    rows = [("run", record.run), ("manifest", record.manifest), ("git commit", commit), *pins.items(), *tools.items()]
    return Table("Where it comes from", ("", ""), [(name, str(value)) for name, value in rows if value])


def _mermaid(nodes: Mapping[str, NodeRun]) -> str:
    numbers = {name: f"n{number}" for number, name in enumerate(nodes)}
    boxes = [
        f'    {numbers[name]}["{MARKS.get(node.status, "")} {mermaid_text(cell(name))}"]'.replace("@", "#64;")
        for name, node in nodes.items()
    ]
    edges = [f"    {numbers[a]} --> {numbers[b]}" for b, node in nodes.items() for a in node.after if a in numbers]
    return "\n".join(["graph LR", *boxes, *edges])

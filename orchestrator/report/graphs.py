"""The graph of a recipe: as text, in languages that draw it, as SVG, as a page, and what a run made of it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from bigpipe.errors import UsageError
from bigpipe.files import flows_on, without_detours, write_named
from bigpipe.orchestrator.contract import Json
from bigpipe.orchestrator.running import NodeRun, records
from bigpipe.sizes import counted, format_duration
from bigpipe.tables import PLAIN, Screen, columns

from .drawing import STYLE, Drawn, graph
from .inspection import open_store
from .sections import Section, Table, form_of, html_page

if TYPE_CHECKING:
    from bigpipe.orchestrator.recipe import Node, Recipe

MARKS = {"succeeded": "✓", "cached": "✓", "failed": "✗", "skipped": "–", "running": "…", "dead": "✗", "pending": "·"}
ENDINGS = {
    ".txt": "text", ".mmd": "mermaid", ".mermaid": "mermaid", ".dot": "dot", ".gv": "dot", ".svg": "svg",
    ".html": "html",
}  # fmt: skip
UNKNOWN: Mapping[str, NodeRun] = MappingProxyType({})
"""Of a recipe that nobody asked a run of."""


def became_of(recipe: Recipe, run: str, *, store: str | Path | None = None) -> Mapping[str, NodeRun]:
    """Return what a run (an id, the start of one, or `last`) made of the recipe's nodes. Raise UsageError where there
    is no such run, or it is one of another recipe: of another file and another name, or without any of the nodes."""
    record = records.load_run(open_store(store).runs, run)
    found = {name: node for name, node in record.nodes.items() if name in recipe.nodes}
    same = without_detours(record.manifest) == without_detours(recipe.path) or record.recipe == recipe.own_name
    if not (found and same):
        why = f"not of {recipe.path}" if found else f"and knows none of the nodes of {recipe.path}"
        cause = f"run {record.run} is one of {record.manifest}, {why}"
        raise UsageError(cause, "name a run of this recipe: the directory `runs` of the store holds them")
    return found


def drawn(name: str, node: NodeRun) -> Drawn:
    """Return a node as a drawing shows it, with what became of it."""
    became = f", {format_duration(node.seconds)}" if node.status == "succeeded" else f": {node.status}"
    became = ": left" if node.verdict.startswith("left: ") else became
    return Drawn(name, f"{node.kind or 'node'}{became}", node.status, MARKS.get(node.status, ""), node.after)


def graph_json(recipe: Recipe, became: Mapping[str, NodeRun] = UNKNOWN, out: Path | None = None) -> dict[str, Json]:
    """Return `bigpipe.graph/1`. became: what a run made of the nodes; out: where it was drawn."""
    nodes = {
        name: {"kind": node.kind.kind, "inputs": {port: list(wired) for port, wired in node.inputs.items()},
               "needs": list(node.needs), "after": list(node.predecessors),
               "first": _first_json(node), **_became_json(became.get(name))}
        for name, node in recipe.nodes.items()
    }  # fmt: skip
    path = str(out.absolute()) if out else None
    return {"schema": "bigpipe.graph/1", "manifest": str(recipe.path), "path": path, "nodes": nodes}


def _became_json(node: NodeRun | None) -> dict[str, Json]:
    return {name: getattr(node, name, None) for name in ("status", "verdict", "tried")}


def _first_json(node: Node) -> Json:
    first = node.first
    return {"axis": first.axis, "of": first.of, "values": [each.value for each in first.choices]} if first else None


def _edge_labels(recipe: Recipe) -> dict[tuple[str, str], str]:
    """Return `scheme: nf4` of each edge from a variant that may be taken to the node that takes the first."""
    found: dict[tuple[str, str], list[str]] = {}
    for node in recipe.nodes.values():
        for choice in node.first.choices if node.first else ():
            for name in {*choice.own, choice.judge}:
                found.setdefault((name, node.name), []).append(f"{node.first and node.first.axis}: {choice.value}")
    return {edge: texts[0] for edge, texts in found.items() if len(texts) == 1}


def mermaid_text(text: str) -> str:
    """Return a text as it stands between quotes in Mermaid
    (https://mermaid.js.org/syntax/flowchart.html#entity-codes-to-escape-characters)."""
    return text.replace('"', "#quot;")


def _escaped(text: str) -> str:
    """A text as it stands between quotes in dot."""
    return text.replace("\\", r"\\").replace('"', r"\"")


def graph_text(
    recipe: Recipe, form: str = "text", became: Mapping[str, NodeRun] = UNKNOWN, *, screen: Screen = PLAIN
) -> str:
    """Return the graph as text for a screen, in a language that draws it (mermaid, dot), or drawn: svg, or html, which
    is a page. became: what a run made of the nodes."""
    drawings = {"mermaid": _mermaid, "dot": _dot, "svg": _svg, "html": _page}
    return drawings[form](recipe, became) if form in drawings else columns(_rows(recipe, became), screen)


def write_graph(recipe: Recipe, out: Path, form: str | None = None, became: Mapping[str, NodeRun] = UNKNOWN) -> int:
    """Write the graph to a file and return its bytes. form: as `graph_text` takes it; None: by the ending of the
    file's name. Raise UsageError for an ending that says nothing, for one that stands for another form, and for
    the recipe's own file."""
    if form and ENDINGS.get(out.suffix, form) != form:
        cause = f"{out} ends as {ENDINGS[out.suffix]} does, and --format is {form}"
        ending = next(ending for ending, stands_for in ENDINGS.items() if stands_for == form)
        raise UsageError(cause, f"leave --format out, or name a file with -o that ends in {ending}")
    if os.path.realpath(out) == os.path.realpath(recipe.path):
        raise UsageError(f"{out} is the recipe itself", "name another file with -o, such as graph.svg")
    form = form or form_of(out, ENDINGS, "a graph")
    flows_on(out)
    text = graph_text(recipe, form, became)
    return write_named(out, text if text.endswith("\n") else text + "\n")


HEADS = ("node", "kind", "takes")


def _rows(recipe: Recipe, became: Mapping[str, NodeRun]) -> list[tuple[str, ...]]:
    """Return per node its name, its kind, what came of it where a run is asked, and what it takes."""
    rows = []
    for name, node in recipe.nodes.items():
        wires = [f"{port}: {', '.join(names)}" for port, names in node.inputs.items()]
        wires += [f"needs: {', '.join(node.needs)}"] if node.needs else []
        wires += [f"the first {node.first.axis} that passes {node.first.of}"] if node.first else []
        told = [f"{MARKS.get(became[name].status, '')} {_outcome(became[name])}"] if name in became else [""]
        rows.append((name, node.kind.kind, *told * bool(became), "; ".join(wires)))
    return rows


def _page(recipe: Recipe, became: Mapping[str, NodeRun]) -> str:
    heads = (*HEADS[:-1], *["came to"] * bool(became), HEADS[-1])
    about = f"{recipe.path.name}, {counted(len(recipe.nodes), 'node')}"
    table = Table("Nodes", heads, _rows(recipe, became))
    return html_page([
        Section(recipe.name, about, [table], _drawing(recipe, became), texts={"The recipe": recipe.text})
    ])  # fmt: skip


def _outcome(node: NodeRun) -> str:
    """`succeeded, takes scheme int8; nf4 is left: …`."""
    return ", ".join(filter(None, (node.status, node.verdict)))


def _lines(recipe: Recipe, became: Mapping[str, NodeRun]) -> dict[str, list[str]]:
    """Return what each box says, line by line."""
    return {
        name: [name, node.kind.kind, *([_outcome(became[name])] if name in became else [])]
        for name, node in recipe.nodes.items()
    }


def _mermaid(recipe: Recipe, became: Mapping[str, NodeRun]) -> str:
    ids = {name: f"n{index}" for index, name in enumerate(recipe.nodes)}
    said = {name: [lines[0], *lines[2:]] for name, lines in _lines(recipe, became).items()}
    lines = [f'    {ids[name]}["{"<br>".join(map(mermaid_text, texts))}"]' for name, texts in said.items()]
    arrows = {edge: f'-. "{mermaid_text(text)}" .->' for edge, text in _edge_labels(recipe).items()}
    edges = [f"    {ids[a]} {arrows.get((a, b), '-->')} {ids[b]}" for a, b in recipe.graph.edges]
    return "\n".join(["graph TD", *lines, *edges])


def _dot(recipe: Recipe, became: Mapping[str, NodeRun]) -> str:
    said = {name: r"\n".join(map(_escaped, lines)) for name, lines in _lines(recipe, became).items()}
    lines = [f'    "{_escaped(name)}" [label="{text}"];' for name, text in said.items()]
    told = {edge: f' [style=dashed, label="{_escaped(text)}"]' for edge, text in _edge_labels(recipe).items()}
    edges = [f'    "{_escaped(a)}" -> "{_escaped(b)}"{told.get((a, b), "")};' for a, b in recipe.graph.edges]
    return "\n".join(["digraph recipe {", *lines, *edges, "}"])


def _svg(recipe: Recipe, became: Mapping[str, NodeRun]) -> str:
    return _drawing(recipe, became, STYLE)


def _drawing(recipe: Recipe, became: Mapping[str, NodeRun], style: str = "") -> str:
    boxes = [
        drawn(name, became[name])
        if name in became
        else Drawn(name, node.kind.kind + (f", the first {node.first.axis}" if node.first else ""))
        for name, node in recipe.nodes.items()
    ]
    after = {name: node.predecessors for name, node in recipe.nodes.items()}
    return graph([replace(box, after=after[box.name]) for box in boxes], style)

"""Drawings of runs as SVG: the graph with what became of each node, budgets as bars, time as a timeline.

They take their colours from classes that the page defines, so that they follow its theme, and say in a title what they
show; every number in them also stands in a table.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from html import escape
from itertools import pairwise
from statistics import fmean

from bigpipe.tables import shortened

BOX, GAP = (180, 44), (44, 18)
"""Width and height of a node, and what lies between two."""
ROW, LABEL, WIDTH, CURVE = 22, 190, 900, 160
"""Of bars: the height of one, the width of its name, and the width of all, in pixels."""
THINNEST = 7
"""Pixels of a bar with its gap."""
WIDEST = 1400
"""Pixels of a drawing that may shrink to a page's width and can still be read; a wider one is moved about."""
MOST_PASSED = 20_000
"""Columns that all lines together pass. Where they pass more, nobody can follow them, and each goes straight."""
CHARACTERS, UNDER = 22, 25
"""Of a name with its mark, in a box or beside a bar, and of what stands below: as many as there is room for in the
widest of the usual fonts."""
STYLE = """\
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --quiet: #57606a; --line: #d0d7de; --good: #1a7f37;
  --bad: #b3261e; --still: #57606a; --told: #8250df; --held: #0969da; --soft: #f6f8fa;
  --weights: #0969da; --kv: #8250df; --act: #b35900; --run: #57606a; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117; --quiet: #9aa4af; --line: #3d444d;
  --good: #3fb950; --bad: #ff7b72; --still: #9aa4af; --told: #bc8cff; --held: #58a6ff; --soft: #161b22;
  --weights: #58a6ff; --kv: #bc8cff; --act: #f0a35e; --run: #9aa4af; } }
svg { font: 12px system-ui, sans-serif; max-width: 100%; height: auto; display: block; }
svg.wide { max-width: none; } @media (max-width: 40rem) { svg { max-width: none; } }
svg text { fill: var(--ink); }
svg text.under { fill: var(--quiet); font-size: 11px; } svg text.name { text-anchor: end; }
svg .edge { fill: none; stroke: var(--quiet); stroke-width: 1.3; }
svg rect { fill: var(--still); } svg rect.node { fill: var(--soft); stroke: var(--still); stroke-width: 1.5; }
svg rect.succeeded, svg rect.cached { fill: var(--good); } svg rect.failed, svg rect.dead { fill: var(--bad); }
svg rect.node.succeeded, svg rect.node.cached { fill: var(--soft); stroke: var(--good); }
svg rect.node.failed, svg rect.node.dead { fill: var(--soft); stroke: var(--bad); }
svg rect.predicted { fill: var(--told); } svg rect.measured { fill: var(--held); }
svg rect.weights { fill: var(--weights); } svg rect.kv_cache { fill: var(--kv); }
svg rect.activations { fill: var(--act); } svg rect.runtime { fill: var(--run); }
"""
"""Colours in light and dark, by what a node came to; of a page, and of a drawing that stands alone."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """A node of a graph. after: names of nodes; mark: a sign beside the name, so that colour alone tells nothing."""

    name: str
    under: str = ""
    status: str = ""
    mark: str = ""
    after: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Bar:
    """A span of a row: where it begins and ends, in the row's unit, and which of the classes draws it."""

    start: float
    end: float
    drawn: str
    title: str


def graph(nodes: Sequence[Drawn], style: str = "") -> str:
    """Return the nodes from left to right, each in a column behind the last it waits for. A line that passes a column
    has a place of its own there. style: for a drawing that no page gives its colours."""
    routes, columns = _laid_out({node.name: node.after for node in nodes})
    width = len(columns) * (BOX[0] + GAP[0])
    height = max(map(len, columns), default=0) * (BOX[1] + GAP[1])
    spots = {
        place: (x * (BOX[0] + GAP[0]) + GAP[0] // 2, y * (BOX[1] + GAP[1]) + GAP[1] // 2)
        for x, column in enumerate(columns)
        for y, place in enumerate(column)
    }
    edges = [_edge([spots[place] for place in route]) for route in routes]
    return _svg(width, height, "The nodes and what they wait for", [*edges, *(_box(n, spots) for n in nodes)], style)


Stop = str | tuple[str, str, int]
"""A node, or where the line from one to another passes a column."""


def _laid_out(after: Mapping[str, Sequence[str]]) -> tuple[list[list[Stop]], list[list[Stop]]]:
    """Return the stops of each line, and those of each column from top to bottom. Within a column, those that come from
    high up stand high."""
    depth: dict[str, int] = {}
    for name in TopologicalSorter(after).static_order():
        if name in after:
            depth[name] = 1 + max((depth[before] for before in after[name] if before in depth), default=-1)
    spans = sum(depth[name] - depth[before] for name in after for before in after[name] if before in depth)
    columns: list[list[Stop]] = [[] for _ in range(1 + max(depth.values(), default=-1))]
    routes, behind = [], defaultdict(list)
    for name in sorted(after, key=lambda name: depth[name]):
        columns[depth[name]].append(name)
        for before in (before for before in after[name] if before in depth):
            passed = range(depth[before] + 1, depth[name] if spans <= MOST_PASSED else 0)
            route: list[Stop] = [before, *((before, name, number) for number in passed), name]
            routes.append(route)
            for number, stop in zip(passed, route[1:], strict=False):
                columns[number].append(stop)
            for one, other in pairwise(route):
                behind[other].append(one)
    height: dict[Stop, float] = {}
    for column in columns:
        column.sort(key=lambda stop: fmean([height[before] for before in behind[stop]] or [0]))
        height.update((stop, place) for place, stop in enumerate(column))
    return routes, columns


def _edge(spots: Sequence[tuple[int, int]]) -> str:
    path = ""
    for (x, y), (right, below) in pairwise((x, y + BOX[1] // 2) for x, y in spots):
        middle = right - GAP[0] // 2
        path += f"{'L' if path else 'M'}{x + BOX[0]} {y}C{middle} {y} {middle} {below} {right} {below}"
    return f'<path class="edge" d="{path}"/>'


def _box(node: Drawn, spots: Mapping[Stop, tuple[int, int]]) -> str:
    x, y = spots[node.name]
    return (
        f"<g><title>{escape(f'{node.name}: {node.status or node.under}')}</title>"
        f'<rect class="node {escape(node.status)}" x="{x}" y="{y}" width="{BOX[0]}" height="{BOX[1]}" rx="6"/>'
        f'<text x="{x + 10}" y="{y + 19}">{escape(shortened(f"{node.mark} {node.name}".strip(), CHARACTERS))}</text>'
        f'<text class="under" x="{x + 10}" y="{y + 35}">{escape(shortened(node.under, UNDER))}</text></g>'
    )


def bars(title: str, rows: Iterable[tuple[str, Sequence[Bar]]], most: float, *, stacked: bool = False) -> str:
    """Return rows of spans on a common scale from 0 to `most`. Spans of a row lie one below the other, the row is as
    high as they need; stacked: they lie in one line."""
    scale, drawn, top = (WIDTH - LABEL) / (most or 1), [], 0
    for name, spans in rows:
        drawn.append(f'<text x="{LABEL - 8}" y="{top + 15}" class="name">{escape(shortened(name, CHARACTERS))}</text>')
        lines = 1 if stacked else max(1, len(spans))
        height = max((ROW - 6) / lines, THINNEST)
        for number, span in enumerate(spans):
            if not span.end:
                continue  # nothing is a bar without length; what begins and ends at once can still be seen
            x, width = LABEL + span.start * scale, max(1.5, (span.end - span.start) * scale)
            drawn.append(
                f'<rect class="{escape(span.drawn)}" x="{x:.1f}" y="{top + 3 + number % lines * height:.1f}" '
                f'width="{width:.1f}" height="{height - 1:.1f}"><title>{escape(span.title)}</title></rect>'
            )
        top += max(ROW, round(6 + lines * height))
    return _svg(WIDTH, top, title, drawn)


def line(title: str, points: Sequence[tuple[float, float]]) -> str:
    """Return points, in the order of their x, joined by a line from the left to the right edge, lowest to highest."""
    (left, right), low, high = (points[0][0], points[-1][0]), min(y for _, y in points), max(y for _, y in points)
    across, up = WIDTH / ((right - left) or 1), (CURVE - 8) / ((high - low) or 1)
    path = " ".join(f"{(x - left) * across:.1f},{CURVE - 4 - (y - low) * up:.1f}" for x, y in points)
    return _svg(WIDTH, CURVE, title, [f'<polyline points="{path}" fill="none" stroke="currentColor"/>'])


def _svg(width: int, height: int, title: str, drawn: Iterable[str], style: str = "") -> str:
    colours = f"<style>{style}</style>" if style else ""
    wide = ' class="wide"' if width > WIDEST else ""
    return (
        f'<svg{wide} viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{escape(title)}" '
        f'xmlns="http://www.w3.org/2000/svg"><title>{escape(title)}</title>{colours}{"".join(drawn)}</svg>'
    )

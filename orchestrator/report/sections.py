"""What a page is made of, and how it is written: HTML that needs no network and no script, or Markdown for a review.

A section is a heading, tables and drawings. The tables come first; a drawing says nothing that a table does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bigpipe.errors import UsageError
from bigpipe.orchestrator.contract import Json
from bigpipe.redaction import printable
from bigpipe.tables import as_text, shortened

from .drawing import STYLE
from .shown import clean
from .templates import page_environment

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass(frozen=True, slots=True)
class Table:
    """heads: of the columns. numbers: the columns from this one on are numbers, and stand to the right. key: of the
    drawing, the class of what is drawn → words."""

    title: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: int = 99
    drawing: str = ""
    key: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Section:
    """A part of a page. about: a line below the heading; graph: SVG, and mermaid: the same in that language; errors:
    node → why it failed; status: what it came to, said behind the heading; texts: what unfolds, by its title."""

    heading: str
    about: str = ""
    tables: Sequence[Table] = ()
    graph: str = ""
    mermaid: str = ""
    status: str = ""
    errors: Mapping[str, str] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return ": ".join(filter(None, [self.heading, self.status]))


def html_page(sections: Sequence[Section]) -> str:
    """Return a page that is one file, in light and dark as its reader has it, and can be printed."""
    template = page_environment().from_string(TEMPLATE.read_text(encoding="utf-8"))
    title = "; ".join(dict.fromkeys(section.title for section in sections))
    return template.render(sections=sections, title=title, style=STYLE)


def markdown_page(sections: Sequence[Section]) -> str:
    """Return the same as Markdown, with its graphs for Mermaid; texts to unfold are left out."""
    lines: list[str] = []
    for section in sections:
        lines += [f"## {cell(section.title)}", "", *([cell(section.about), ""] if section.about else [])]
        lines += ["```mermaid", section.mermaid, "```", ""] if section.mermaid else []
        for name, error in section.errors.items():
            lines += [f"**{cell(name)}** failed:", "", *(f"    {line}" for line in error.splitlines()), ""]
        for table in section.tables:
            lines += _markdown_table(table)
    return clean("\n".join(lines))


def _markdown_table(table: Table) -> list[str]:
    rule = ["---" if number < table.numbers else "---:" for number in range(len(table.heads))]
    rows = [table.heads, rule, *table.rows]
    return [f"### {cell(table.title)}", "", *(f"| {' | '.join(map(cell, row))} |" for row in rows), ""]


LONGEST = 400
"""Characters of a text of others."""


def shown(value: Json) -> str:
    """Return a value of others as it stands in a table."""
    return "" if value is None else as_text(value)


def short(text: str) -> str:
    return shortened(text, LONGEST)


def cell(text: str) -> str:
    """Return a text of others as it stands in Markdown: no line ends, no markup."""
    flat = " ".join(printable(text).split())
    return "".join(f"\\{sign}" if sign in "\\`*_[]<>|#" else sign for sign in flat) if flat.strip("-:") else flat


def form_of(out: Path, endings: Mapping[str, str], what: str) -> str:
    """Return what the ending of a file's name stands for. Raise UsageError for another ending."""
    if out.suffix not in endings:
        one_of = " or ".join(filter(None, [", ".join([*endings][:-1]), [*endings][-1]]))
        raise UsageError(f"{out} is no file for {what}", f"name one with -o that ends in {one_of}")
    return endings[out.suffix]

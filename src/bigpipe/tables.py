"""Tables as text, as wide as a screen and coloured where it can be, and as HTML for notebooks."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from shutil import get_terminal_size
from typing import Any, TextIO

from .redaction import printable, redact_value

COLOURS = {"red": "31", "green": "32", "yellow": "33", "dim": "2", "bold": "1"}
WORDS = {
    "run": "yellow", "maybe": "yellow", "running": "yellow", "interrupted": "yellow", "dead": "red", "failed": "red",
    "refused": "red", "cached": "dim", "skipped": "dim", "pending": "dim", "succeeded": "green",
}  # fmt: skip
"""The colour of a cell that says how something stands."""
NARROWEST = 24
"""Characters of a last column that is worth wrapping into."""
HANGING = "    "
"""What lines begin with that go on with a row for which there are too few columns."""
_NONCE = os.urandom(8).hex()
"""Text of others cannot know it, so it cannot colour anything."""


@dataclass(frozen=True, slots=True)
class Screen:
    """What text is drawn on."""

    width: int | None = None
    """Characters of a line; None: without end, as in files and pipes."""
    colours: bool = False

    @classmethod
    def of(cls, stream: TextIO, environment: Mapping[str, str] = os.environ) -> Screen:
        """Return what a stream is: `NO_COLOR` and `FORCE_COLOR` decide of colours, else whether it is a terminal
        (https://no-color.org, https://force-color.org)."""
        terminal = stream.isatty()
        forced, none = environment.get("FORCE_COLOR"), environment.get("NO_COLOR")
        can = terminal and environment.get("TERM", "") not in ("dumb", "unknown")
        return cls(get_terminal_size().columns if terminal else None, not none and bool(forced or can))

    def paint(self, text: str, colour: str | None) -> str:
        """Return the text, marked; `coloured` makes that a colour once all that others wrote is cleaned."""
        return f"<{_NONCE}:{COLOURS[colour]}>{text}<{_NONCE}:0>" if self.colours and colour and text else text


PLAIN = Screen()


def coloured(text: str) -> str:
    """Return a cleaned text with what `Screen.paint` marked as escape sequences of a terminal (ECMA-48, SGR)."""
    if _NONCE not in text:
        return text
    for code in (*COLOURS.values(), "0"):
        text = text.replace(f"<{_NONCE}:{code}>", f"\x1b[{code}m")
    return text


def columns(rows: Sequence[Sequence[str]], screen: Screen = PLAIN) -> str:
    """Return rows as left-aligned columns, no line of them wider than the screen: the last column is wrapped under
    itself; where there is no room for that, below its row; and where the others have none, each row as running text."""
    if not rows:
        return ""
    rows = [[cell if index == len(row) - 1 else _one_line(cell) for index, cell in enumerate(row)] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    indent = sum(widths) + 2 * len(widths)
    room = None if screen.width is None else screen.width - indent
    if room is None or room >= NARROWEST or all(len(row[-1]) <= room for row in rows):
        return "\n".join(_row(row, widths, screen, room) for row in rows)
    if indent - 2 <= (screen.width or 0):
        return "\n".join(_head(row, widths, screen).rstrip() + _below(row[-1], screen) for row in rows)
    return "\n".join(_wrapped("  ".join(filter(None, row)), screen.width or 1, "", HANGING) for row in rows)


def _one_line(cell: str) -> str:
    """As it will be shown: what is spelled out then is wider."""
    return printable(redact_value(cell)).replace("\n", " ")


def _head(row: Sequence[str], widths: Sequence[int], screen: Screen) -> str:
    """All cells but the last."""
    return "".join(
        screen.paint(cell, WORDS.get(cell)) + " " * (width + 2 - len(cell))
        for cell, width in zip(row, widths, strict=False)
    )


def _row(row: Sequence[str], widths: Sequence[int], screen: Screen, room: int | None) -> str:
    head, last = _head(row, widths, screen), row[-1]
    if room is None or len(last) <= room:
        return head + screen.paint(last, WORDS.get(last))
    indent = " " * (sum(widths) + 2 * len(widths))
    return head + _wrapped(last, len(indent) + room, indent, indent)[len(indent) :]


def _below(last: str, screen: Screen) -> str:
    return "\n" + _wrapped(last, screen.width or 1, HANGING, HANGING) if last else ""


def _wrapped(text: str, width: int, first: str, others: str) -> str:
    """first, others: what lines begin with."""
    import textwrap  # of narrow terminals

    lines = textwrap.wrap(text, width, initial_indent=first, subsequent_indent=others, break_on_hyphens=False)
    return "\n".join(lines) or first


def as_text(value: Any) -> str:
    """Return a JSON value as it stands in a cell."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def shortened(text: str, most: int) -> str:
    """Return at most so many characters; the last of a longer text is `…`."""
    return text if len(text) <= most else text[: most - 1] + "…"


def html_table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], note: str = "") -> str:
    """Return a table for a notebook: what others wrote is text in it, and no secret is shown. note: lines below."""
    cells = "".join(f'<th style="text-align:left">{_text(cell)}</th>' for cell in head)
    body = "".join(
        "<tr>" + "".join(f'<td style="text-align:left">{_text(cell)}</td>' for cell in row) + "</tr>" for row in rows
    )
    below = f"<pre>{_text(note)}</pre>" if note else ""
    return (
        f'<table><caption style="text-align:left">{_text(caption)}</caption><thead><tr>{cells}</tr></thead>'
        f"<tbody>{body}</tbody></table>{below}"
    )


def _text(text: str) -> str:
    import html  # of notebooks

    return html.escape(printable(redact_value(text)))

"""Texts, JSON and errors as they may be shown."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from bigpipe.errors import BigpipeError, ManifestError, Place
from bigpipe.redaction import printable, printable_json, redact, redact_fields, redact_value
from bigpipe.tables import PLAIN, Screen

if TYPE_CHECKING:
    from bigpipe.orchestrator.contract import Json  # what answers a question needs no kinds

COMMAND = re.compile(r"^\s*:(?=:)|##(?=\[)", re.MULTILINE)
"""What GitHub's runner obeys where it stands in a job's output
(https://docs.github.com/en/actions/reference/workflows-and-actions/workflow-commands)."""


def clean(text: str) -> str:
    """Return a text as it may be shown: no secret is in it, nothing of it moves the terminal, and no line is a command
    to GitHub's runner."""
    text = printable(redact_value(text))
    return COMMAND.sub(r"\g<0> ", text) if os.environ.get("GITHUB_ACTIONS") == "true" else text


def json_text(value: Json, indent: int | None = None, *, ascii_only: bool = False) -> str:
    """Return JSON as it may be shown: no secret is in it, and nothing that moves a terminal. ascii_only: for what takes
    no UTF-8, which all JSON is in."""
    text = json.dumps(redact_fields(value), indent=indent, ensure_ascii=ascii_only, default=str)
    return printable_json(text)


_HEAD = re.compile(r"^(.*?)(error(?:\[\w+\])?:)", re.DOTALL)
_CARETS = re.compile(r"^( *\| *)(\^+)$", re.MULTILINE)


def _painted(text: str, screen: Screen) -> str:
    """An error with its first word and its carets in red, its place in bold."""
    text = _HEAD.sub(lambda found: screen.paint(found[1], "bold") + screen.paint(found[2], "red"), text, count=1)
    return _CARETS.sub(lambda found: found[1] + screen.paint(found[2], "red"), text)


def error_text(error: BigpipeError, environment: Mapping[str, str], screen: Screen = PLAIN) -> str:
    """Return an error as a command prints it; under GITHUB_ACTIONS each placed one is an annotation of its line too."""
    if isinstance(error, ManifestError):
        lines = [str(problem) for problem in error.problems]
        told = [(problem.place, f"{problem.cause}; {problem.cure}".rstrip("; ")) for problem in error.problems]
    else:
        lines = [f"error: {_with_node(error)}"]
        told = [(error.place, f"{error.cause}\n{error.cure}".rstrip())] if error.place else []
    lines = [_painted(clean(line), screen) for line in lines]
    if environment.get("GITHUB_ACTIONS") == "true":
        top = environment.get("GITHUB_WORKSPACE", "")
        lines += [annotation(place, message, top) for place, message in told if not place.argument]
    return "\n".join(lines)


def _with_node(error: BigpipeError) -> str:
    """An error with the node that it is about, unless it begins with it."""
    typed = error.place is not None and error.place.argument
    named = not error.node or typed or error.cause.startswith(error.node)
    return str(error) if named else str(error).replace(error.cause, f"{error.node}: {error.cause}", 1)


def annotation(place: Place, message: str, top: str = "") -> str:
    """Return GitHub's workflow command for an error at a place, as it may be shown, newlines and separators escaped as
    it undoes them. top: the directory that the names of files start from there, whatever the working directory is."""
    inside = top and os.path.abspath(place.file).startswith(os.path.join(os.path.abspath(top), ""))
    file = os.path.relpath(place.file, top) if inside else place.file
    file = _escape(file).replace(":", "%3A").replace(",", "%2C")
    return f"::error file={file},line={place.line},col={place.column}::{_escape(printable(redact(message)))}"


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")

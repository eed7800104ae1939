"""What commands print: data on stdout, talk and errors on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import click

from bigpipe.errors import BigpipeError, Interrupted
from bigpipe.orchestrator import report


def show(as_json: bool, data: Callable[[], Any], text: Callable[[], str]) -> None:
    """Print the answer of a command: for programs, or for people."""
    if as_json:
        show_json(data())
    else:
        say(text())


def say(text: str, *, err: bool = False) -> None:
    """Print a text, whoever wrote it: all that commands print goes through here or `show_json`."""
    click.echo(report.clean(text), err=err)


def show_json(data: Any, indent: int | None = 2) -> None:
    click.echo(report.json_text(data, indent))


def fail(error: BigpipeError) -> NoReturn:
    """Print cause, place and cure, also as an annotation where GitHub reads it, and exit."""
    click.echo(report.error_text(error, os.environ), err=True)
    sys.exit(error.status if isinstance(error, Interrupted) else error.exit_code)


def fail_all(errors: Sequence[BigpipeError]) -> None:
    """Print all of them; the first decides the exit code. None: go on."""
    for error in errors[1:]:
        say(str(error), err=True)
    if errors:
        fail(errors[0])

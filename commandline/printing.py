"""What commands print: data on stdout, talk and errors on stderr. What others print meanwhile, such as a kind that runs
in this process, is no data: it goes to stderr, cleaned as all that is shown."""

from __future__ import annotations

import codecs
import io
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TextIO

import click

from bigpipe.errors import BigpipeError
from bigpipe.orchestrator import report
from bigpipe.redaction import plain, redact, unfinished
from bigpipe.tables import Screen, coloured

from .streams import below

CLEAR = "\x1b[H\x1b[2J"
"""What empties a terminal and starts at its top."""
LONGEST_LINE = 64 * 1024
"""Characters after which a line of others is shown, ended or not."""


class Others(io.TextIOBase):
    """Stands in for `sys.stdout` and `sys.stderr` while a command works."""

    def __init__(self, screen: TextIO) -> None:
        self._screen, self._open, self._lock = screen, "", threading.Lock()

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._open = (self._open + text).split("\n")
            if "\r" in self._open[:-1]:  # a bar that is drawn over and over: its last state counts
                self._open = self._open[self._open.rstrip("\r").rfind("\r") + 1 :]
            if len(self._open) > LONGEST_LINE:
                cut = len(self._open) - unfinished(self._open)
                lines, self._open = [*lines, self._open[:cut]], self._open[cut:]
            self._show(lines)
        return len(text)

    def end(self) -> None:
        """Show the line that has not ended."""
        with self._lock:
            self._show([self._open] if self._open else [])
            self._open = ""

    def _show(self, lines: Sequence[str]) -> None:
        for line in lines:
            self._screen.write(report.clean(plain(redact(line.rstrip("\r").rpartition("\r")[2]))) + "\n")
        self._screen.flush()

    def fileno(self) -> int:
        return self._screen.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._screen.encoding


_streams: list[tuple[TextIO, TextIO]] = []
"""The command's own stdout and stderr, while others have stand-ins."""


@contextmanager
def others_apart() -> Iterator[None]:
    """Within, what anybody prints but the command itself goes to stderr, cleaned."""
    own = sys.stdout, sys.stderr
    others = Others(sys.stderr)
    _streams.append(own)
    sys.stdout = sys.stderr = others
    try:
        yield
    finally:
        sys.stdout, sys.stderr = own
        _streams.pop()
        others.end()


def own_stdout() -> TextIO:
    return _streams[-1][0] if _streams else sys.stdout


def own_stderr() -> TextIO:
    return _streams[-1][1] if _streams else sys.stderr


def screen(*, err: bool = False) -> Screen:
    """Return what the command prints on: how wide it is, and whether it has colours."""
    return Screen.of(own_stderr() if err else own_stdout())


def show(
    as_json: bool, data: Callable[[], Any], text: Callable[[], str], errors: Sequence[BigpipeError] = (), *,
    as_file: bool = False,
) -> None:  # fmt: skip
    """Print the answer of a command: for programs, one JSON object with the errors in it, or for people. Errors are
    also printed, and the first is the exit code. as_file: the text is to be a file."""
    if as_json:
        show_json(report.answered(data(), errors))
    elif told := text():
        (hand_over if as_file else say)(told)
    fail_all(errors)


def say(text: str, *, err: bool = False) -> None:
    """Print a text, whoever wrote it: all that commands print goes through here or `show_json`."""
    click.echo(coloured(report.clean(text)), file=own_stderr() if err else own_stdout(), color=True)


def hand_over(text: str) -> None:
    """Print what is to be a file: in UTF-8, whatever the terminal reads."""
    stream = own_stdout()
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding="utf-8")
    say(text)


def say_each(texts: Iterable[str], say: Callable[[str], None] = say) -> None:
    """Print what may come for hours, each as it comes, as long as somebody reads: `log -f | head -1` ends then."""
    for text in texts:
        say(text)
        if (stream := below(own_stdout())) is not None and stream.gone:
            return


def confirmed(question: str) -> bool:
    """Return whether whoever sits at the terminal says yes."""
    click.echo(f"{report.clean(question)} [y/N] ", nl=False, file=own_stderr())
    own_stderr().flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def redraw(text: str) -> None:
    """Print a text in place of all that stands on the screen; where there is none, below what was printed before."""
    screen = own_stdout()
    if screen.isatty():
        screen.write(CLEAR)
    say(text)


def show_json(data: Any, indent: int | None = 2) -> None:
    stream = own_stdout()
    utf8 = codecs.lookup(stream.encoding or "utf-8").name == "utf-8"
    click.echo(report.json_text(data, indent, ascii_only=not utf8), file=stream)


def show_refusal(command: str, error: BigpipeError, options: Mapping[str, Any], *, indent: int | None = 2) -> None:
    """Print why a command has no answer, for programs. options: what it was given."""
    show_json(report.refused(command, error, options), indent=indent)


def fail(*errors: BigpipeError) -> NoReturn:
    """Print cause, place and cure of each, also as an annotation where GitHub reads it, and exit as the first says."""
    for error in errors:
        click.echo(coloured(report.error_text(error, os.environ, screen(err=True))), file=own_stderr(), color=True)
    sys.exit(errors[0].status)


def fail_all(errors: Sequence[BigpipeError]) -> None:
    """Fail with all of them. None: go on."""
    if errors:
        fail(*errors)

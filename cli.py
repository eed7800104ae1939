"""The `bigpipe` command. Parses, calls, prints; holds no logic. What each command takes stands in `commandline/`.

main → command → cli, a click group over
  commandline.recipes      run plan validate status why graph lock export push pull
  commandline.questions    estimate init schema kinds doctor completion
  commandline.stored       ls ps show log diff report get rm gc
  commandline.published    verify attest
  commandline.single       quantize shard place generate …: a stage kind about one model
  commandline.pages        ui
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from bigpipe.commandline import pages, published, questions, recipes, single, stored, streams
from bigpipe.commandline.completing import VARIABLE
from bigpipe.commandline.options import require_values
from bigpipe.commandline.printing import fail, others_apart, say, show_refusal
from bigpipe.errors import BigpipeError, UsageError
from bigpipe.names import is_text
from bigpipe.orchestrator import report


class InOrder(click.Group):
    """Commands in the order of work, not of the alphabet; those of a kind where there is that kind."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in self.commands if self.get_command(ctx, name)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        found = super().get_command(ctx, cmd_name)
        return None if isinstance(found, single.KindCommand) and not found.offered else found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, found, rest = super().resolve_command(ctx, args)
        if found is not None and not ctx.resilient_parsing:
            require_values(found, rest)
        return name, found, rest


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="bigpipe-ml", prog_name="bigpipe")
def cli() -> None:
    """Recipes in git that download, size, shard, quantize, place and run models larger than memory."""


given: dict[str, Any] = {}
"""What the command was given, once all of it was understood."""


def apart(command: click.Command) -> Callable[..., None]:
    """Return the function of a command, kept apart from what others print while it works."""
    callback = command.callback
    assert callback is not None  # noqa: S101  every command has one

    @wraps(callback)
    def run(*arguments: Any, **options: Any) -> None:
        given.update(options)
        with others_apart():
            callback(*arguments, **options)

    return run


for one in (
    *recipes.COMMANDS,
    *questions.COMMANDS,
    *single.COMMANDS,
    *stored.COMMANDS,
    *published.COMMANDS,
    *pages.COMMANDS,
):
    one.callback = apart(one)
    cli.add_command(one)


def main() -> None:
    """Entry point. Leaves at once: taking the interpreter apart lasts as long as all the work of a cached run."""
    threading.excepthook = lambda died: show_bug(died.exc_value) if died.exc_value else None
    streams.listen()
    sys.unraisablehook = unheard
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, end)
    status: Any = 0
    try:
        command()
    except SystemExit as leaving:
        status = leaving.code or 0
    except KeyboardInterrupt as interrupted:
        status = report.as_bigpipe_error(interrupted).status
    if (error := streams.lost()) is not None:
        say(f"error: {error}", err=True)
        status = status or error.exit_code
    os._exit(status)


def end(number: int, frame: FrameType | None) -> None:
    """End in order, and at once where it comes again. A run has its own way, and hears it first."""
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt(number)


def unheard(lost: Any) -> None:
    """Let a signal come again whose exception Python dropped, since it came in what may raise nothing, such as the
    callback of a weak reference. What else is dropped is shown, as ever."""
    if not isinstance(lost.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    number = next(iter(lost.exc_value.args), signal.SIGINT)
    signal.signal(number, end)
    threading.Timer(0.01, os.kill, (os.getpid(), number)).start()  # by then the callback has returned


def command() -> None:
    """Every BigpipeError becomes its message and exit code; only bugs show a traceback."""
    try:
        require_directory()
        for argument in sys.argv[1:]:
            if not is_text(argument):
                raise UsageError(f"{argument!a} is no UTF-8", "write it in UTF-8, or rename the file")
        cli.main(standalone_mode=False, complete_var=VARIABLE)
    except click.exceptions.Exit as leaving:
        sys.exit(leaving.exit_code)
    except (Exception, KeyboardInterrupt) as error:
        refuse(error)


def refuse(error: BaseException) -> NoReturn:
    """Say why there is no answer, with `--json` in JSON too, and exit."""
    told = _told(error)
    if wants_json():
        name = next(iter(sys.argv[1:]), "")
        lines = name == "run" or name in single.SINGLES  # their answers are lines too
        show_refusal(name, told or report.as_bigpipe_error(error), given, indent=None if lines else 2)
    if isinstance(error, click.ClickException):
        shown = io.StringIO()
        error.show(shown)
        say(shown.getvalue().rstrip(), err=True)
        sys.exit(2)
    if told is not None:
        fail(told)
    show_bug(error)
    sys.exit(1)


def wants_json() -> bool:
    """Return whether the answer is to be JSON, also where what was typed was not understood."""
    typed = sys.argv[1 : sys.argv.index("--")] if "--" in sys.argv else sys.argv[1:]
    return bool(given["as_json"]) if "as_json" in given else "--json" in typed


def _told(error: BaseException) -> BigpipeError | None:
    """An error as it is told; None: it is a bug."""
    if isinstance(error, BigpipeError):
        return error
    if isinstance(error, click.Abort | KeyboardInterrupt):
        return report.as_bigpipe_error(error.__cause__ or error)
    if isinstance(error, click.ClickException):
        context = getattr(error, "ctx", None)
        return UsageError(error.format_message(), f"see `{context.command_path if context else 'bigpipe'} --help`")
    from bigpipe.orchestrator.launch import ran_out

    return ran_out(error) or _named(error)


def require_directory() -> None:
    """Raise UsageError where the directory that paths start from is gone."""
    try:
        os.getcwd()
    except OSError as error:
        cause = f"the working directory cannot be used: {error.strerror}"
        raise UsageError(cause, "change to a directory that is there") from error


def _named(error: BaseException) -> BigpipeError | None:
    """A file that cannot be what it was named for is no bug: the name came from outside."""
    from bigpipe.files import explain

    if not isinstance(error, OSError) or not error.filename or isinstance(error, FileNotFoundError):
        return None
    return explain(error, Path())


def show_bug(error: BaseException) -> None:
    """Print the traceback, without what may not be shown."""
    say("".join(traceback.format_exception(error)), err=True)

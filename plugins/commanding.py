"""How `command` does it: lays its files out in an empty directory, runs the tool there, checks what that made."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bigpipe.errors import StageFailed, Transient, UsageError
from bigpipe.files import let_in
from bigpipe.names import did_you_mean
from bigpipe.orchestrator.stage import CheckContext, Forecast, ForecastContext, StageContext, StageResult
from bigpipe.programs import Ended, laid_out, laid_out_at, run_program, signal_in_words

from .command import PLACEHOLDER, CommandMetrics, CommandParams
from .command_output import check_output, described, lead_links_back, read_metrics
from .library import about

SHOWN = 10
"""Names of what is no metric that are told."""
TRY_AGAIN = 75
"""The exit status that asks for another attempt: EX_TEMPFAIL of sysexits.h."""
OWN = frozenset({"PYTHONSAFEPATH", "PYTHONFAULTHANDLER", "PYTHONIOENCODING"})
"""Variables of our workers that a tool does not expect: `python tool.py` is to find the modules beside it."""


def check(params: CommandParams, context: CheckContext) -> None:
    """Raise UsageError where the program, or a port that an argument names, is not there, and for files of which two
    would lie at one place."""
    for number, argument in enumerate(params.argv):
        for _, port, _ in PLACEHOLDER.findall(argument):
            if port and port not in context.inputs:
                cure = (
                    did_you_mean(port, context.inputs, otherwise="its ports are") or f"wire it: inputs: {{{port}: …}}"
                )
                cause = f"nothing is wired to the port {port!r}, which ${{input.{port}}} names"
                raise UsageError(cause, cure, field=f"argv[{number}]")
            if port and len(context.inputs[port]) > 1 and not PLACEHOLDER.fullmatch(argument):
                raise UsageError(*_several(argument, port, len(context.inputs[port])), field=f"argv[{number}]")
    _require_program(params, context)
    _require_fetched(params, context)


def _require_fetched(params: CommandParams, context: CheckContext) -> None:
    """Files that are named by themselves, or by a glob: of those in a directory, the tool may need others."""
    from bigpipe.bigmodel.tasks import Wording, named_files

    for number, name in enumerate(params.files):
        field = f"files[{number}]"
        if not os.path.isdir(context.base / name):
            with about(field):
                named_files(name, context.base, Wording(field, "file"))


def _several(argument: str, port: str, number: int) -> tuple[str, str]:
    cause = f"{number} are gathered on the port {port!r}, and {argument!r} is one argument"
    return cause, f"let ${{input.{port}}} stand alone: it becomes an argument for each"


def _require_program(params: CommandParams, context: CheckContext) -> None:
    places = laid_out(params.files, context.base)
    program = params.argv[0]
    if program == "${python}":
        return
    if "/" not in program:
        if shutil.which(program, path=os.environ.get("PATH")) is None:
            cure = "install it, or name your own by its path and list it under `files`"
            raise UsageError(f"there is no program {program!r} on the PATH", cure, field="argv[0]")
        return
    if not os.path.isabs(program) and laid_out_at(program) not in places:
        cure = f"list it, or the directory it lies in: files: [{program}]"
        raise UsageError(f"{program} is not among the files of the command", cure, field="argv[0]")
    path = context.base / program
    if not path.is_file() or not os.access(path, os.X_OK):
        cause = f"{program} is {'no program: it cannot be executed' if path.exists() else 'not there'}"
        raise UsageError(cause, f"chmod +x {program}, or name what runs it: [${{python}}, …]", field="argv[0]")


def forecast(params: CommandParams, context: ForecastContext) -> Forecast:
    output = described(params, context.artifact) if context.artifact is not None else None
    told = " ".join(params.argv[:3])[:60]
    unknown = ("what the program downloads, writes and takes of memory",)
    return Forecast(output=output, summary=told, unknown=unknown)


def run(params: CommandParams, context: StageContext) -> StageResult:
    folder = context.scratch / "work"
    for emptied in (folder, context.out):
        empty(emptied)
    lay_out(params.files, context.base, folder)
    environment = {name: value for name, value in os.environ.items() if name not in OWN}
    environment.setdefault("PYTHONUNBUFFERED", "1")  # what it prints is in the log while it runs, and in order
    argv = list(_filled_in([_started(params.argv[0]), *params.argv[1:]], context))
    try:
        ended = run_program(argv, folder=folder, environment=environment)
    except OSError as error:
        cure = "name a program that this machine can run"
        raise StageFailed(f"{params.argv[0]} cannot be started: {error.strerror}", cure, field="argv[0]") from error
    for written in (folder, context.out):
        let_in(written)  # who publishes and removes what is there need not be root
    _require_success(params, ended)
    if context.out.is_dir() and not context.out.is_symlink():
        lead_links_back(context)
    check_output(params, context.out)
    metrics, others = read_metrics(context.out / params.metrics) if params.metrics else ({}, [])
    if others:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        told = ", ".join(f"{name!r:.100}" for name in others[:SHOWN])
        context.log(f"{params.metrics}: gates read finite numbers with plain names of their own, and not {told}{more}")
    return StageResult(CommandMetrics.model_validate(metrics), type=params.produces)


def empty(folder: Path) -> None:
    """Make an empty directory of it: what an attempt of this run that broke off left is nothing a tool expects (the
    store does it for a new run). Raise StageFailed, naming the directory, where it cannot be removed."""
    try:
        if folder.is_symlink() or not folder.is_dir():
            folder.unlink(missing_ok=True)
        else:
            let_in(folder)
            shutil.rmtree(folder)
    except OSError as error:
        left, why = error.filename or folder, error.strerror or error
        cause = f"{left}, which an attempt before left, cannot be removed: {why}"
        raise StageFailed(cause, f"remove {folder} yourself") from error
    folder.mkdir(parents=True)


def lay_out(files: Sequence[str], base: Path, folder: Path) -> None:
    """Copy the files into a working directory, with their modes and times."""
    for place, source in laid_out(files, base).items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, folder / place)


def _started(program: str) -> str:
    """A program among `files` lies in the working directory, without the `..` that it may be written with."""
    return f"./{laid_out_at(program)}" if "/" in program and not os.path.isabs(program) else program


def _filled_in(argv: Sequence[str], context: StageContext) -> Iterator[str]:
    """The arguments with the directories in them; one that is nothing but a gathered input becomes several."""
    own = {"out": str(context.out), "python": sys.executable}
    for argument in argv:
        whole = PLACEHOLDER.fullmatch(argument)
        if whole and whole[2] is not None:
            yield from map(str, context.inputs.get(whole[2], ()))
            continue
        for _, port, _ in PLACEHOLDER.findall(argument):
            if port and len(context.inputs.get(port, ())) != 1:
                cause, cure = _several(argument, port, len(context.inputs.get(port, ())))
                raise StageFailed(cause, cure, field="argv")
        yield PLACEHOLDER.sub(lambda found: own[found[3]] if found[3] else str(context.input(found[2])), argument)


def _require_success(params: CommandParams, ended: Ended) -> None:
    if ended.status == 0:
        return
    how = f"ended with exit status {ended.status}"
    if ended.status < 0:
        how = f"was ended by {signal_in_words(-ended.status)}"
    said = "".join(f"\n    {line}" for line in ended.last) or " and printed nothing"
    cause = f"{params.argv[0]} {how}{':' if ended.last else ''}{said}"
    if ended.status == TRY_AGAIN:
        raise Transient(cause, "try again, or let the run do so: `retries:`", field="argv")
    raise StageFailed(cause, "the log of the node has all that it printed", field="argv")

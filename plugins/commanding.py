"""How `command` does it: lays its files out in an empty directory, runs the tool there, checks what that made."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bigpipe.errors import StageFailed, Transient, UsageError
from bigpipe.files import parse_json, read_file
from bigpipe.names import did_you_mean
from bigpipe.orchestrator.stage import CheckContext, Forecast, ForecastContext, StageContext, StageResult
from bigpipe.programs import Ended, laid_out, laid_out_at, run_program

from .command import PLACEHOLDER, CommandMetrics, CommandParams

TRY_AGAIN = 75
"""The exit status that asks for another attempt: EX_TEMPFAIL of sysexits.h."""
LARGEST_METRICS = 2**20
LARGEST_ROW = 2**24
RESULTS = "results.jsonl"
OWN = frozenset({"PYTHONSAFEPATH", "PYTHONFAULTHANDLER", "PYTHONIOENCODING"})
"""Variables of our workers that a tool does not expect: `python tool.py` is to find the modules beside it."""


def check(params: CommandParams, context: CheckContext) -> None:
    """Raise UsageError where the program, or a port that an argument names, is not there."""
    for number, argument in enumerate(params.argv):
        for _, port, _ in PLACEHOLDER.findall(argument):
            if port and port not in context.inputs:
                cure = (
                    did_you_mean(port, context.inputs, otherwise="its ports are") or f"wire it: inputs: {{{port}: …}}"
                )
                cause = f"nothing is wired to the port {port!r}, which ${{input.{port}}} names"
                raise UsageError(cause, cure, field=f"argv[{number}]")
    _require_program(params, context)


def _require_program(params: CommandParams, context: CheckContext) -> None:
    program = params.argv[0]
    if program == "${python}":
        return
    if "/" not in program:
        if shutil.which(program, path=os.environ.get("PATH")) is None:
            cure = "install it, or name your own by its path and list it under `files`"
            raise UsageError(f"there is no program {program!r} on the PATH", cure, field="argv[0]")
        return
    if not os.path.isabs(program) and laid_out_at(program) not in dict(laid_out(params.files, context.base)):
        cure = f"list it, or the directory it lies in: files: [{program}]"
        raise UsageError(f"{program} is not among the files of the command", cure, field="argv[0]")
    path = context.base / program
    if not path.is_file() or not os.access(path, os.X_OK):
        cause = f"{program} is {'no program: it cannot be executed' if path.exists() else 'not there'}"
        raise UsageError(cause, f"chmod +x {program}, or name what runs it: [${{python}}, …]", field="argv[0]")


def forecast(params: CommandParams, context: ForecastContext) -> Forecast:
    output = None
    if context.artifact is not None and params.produces == "checkpoint":
        from bigpipe.bigmodel.checkpoint import describe_checkpoint

        output = describe_checkpoint(context.artifact)
    return Forecast(download_bytes=0, output=output, summary=" ".join(params.argv[:3])[:60])


def run(params: CommandParams, context: StageContext) -> StageResult:
    folder = context.scratch / "work"
    for emptied in (folder, context.out):  # what an attempt that broke off left is nothing a tool expects
        if emptied.is_symlink() or emptied.is_file():  # of an attempt of this run; the store does it for a new run
            emptied.unlink()
        shutil.rmtree(emptied, ignore_errors=True)
        emptied.mkdir(parents=True)
    for place, source in laid_out(params.files, context.base):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, folder / place)
    environment = {name: value for name, value in os.environ.items() if name not in OWN}
    environment.setdefault("PYTHONUNBUFFERED", "1")  # what it prints is in the log while it runs, and in order
    argv = list(_filled_in(params.argv, context))
    try:
        ended = run_program(argv, folder=folder, environment=environment)
    except OSError as error:
        cure = "name a program that this machine can run"
        raise StageFailed(f"{params.argv[0]} cannot be started: {error.strerror}", cure, field="argv[0]") from error
    _require_success(params, ended)
    if context.out.is_dir() and not context.out.is_symlink():
        _lead_links_back(context)
    _check_output(params, context.out)
    metrics = read_metrics(context.out / params.metrics) if params.metrics else {}
    return StageResult(CommandMetrics.model_validate(metrics), type=params.produces)


def _filled_in(argv: Sequence[str], context: StageContext) -> Iterator[str]:
    """The arguments with the directories in them; one that is nothing but a gathered input becomes several."""
    own = {"out": str(context.out), "python": sys.executable}
    for argument in argv:
        whole = PLACEHOLDER.fullmatch(argument)
        if whole and whole[2] is not None:
            yield from map(str, context.inputs.get(whole[2], ()))
        else:
            yield PLACEHOLDER.sub(lambda found: own[found[3]] if found[3] else str(context.input(found[2])), argument)


def _lead_links_back(context: StageContext) -> None:
    """The files of an input may be links, relative to where they lie. A tool that copies them as such, like `cp -r`,
    means what they lead to."""
    links = [path for folders in context.inputs.values() for folder in folders for path in _links_below(folder)]
    meant = {os.readlink(path): os.path.realpath(path) for path in links}
    for path in _links_below(context.out):
        if not path.exists() and (target := meant.get(os.readlink(path))) is not None:
            path.unlink()
            path.symlink_to(target)


def _links_below(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_symlink()]


def _require_success(params: CommandParams, ended: Ended) -> None:
    if ended.status == 0:
        return
    how = f"ended with exit status {ended.status}"
    if ended.status < 0:
        how = f"was ended by signal {-ended.status} ({signal.Signals(-ended.status).name})"
    said = "".join(f"\n    {line}" for line in ended.last) or " and printed nothing"
    cause = f"{params.argv[0]} {how}{':' if ended.last else ''}{said}"
    if ended.status == TRY_AGAIN:
        raise Transient(cause, "try again, or let the run do so: `retries:`", field="argv")
    raise StageFailed(cause, "the log of the node has all that it printed", field="argv")


def _check_output(params: CommandParams, out: Path) -> None:
    """Raise StageFailed (InvalidCheckpoint, NoWeights) where that is not what the command is said to produce."""
    if out.is_symlink() or not out.is_dir():
        cure = "write into the directory that is passed as ${out}, and leave it where it is"
        raise StageFailed("the command replaced or removed ${out}", cure, field="argv")
    if not any(path.is_symlink() or not path.is_dir() for path in out.rglob("*")):
        cure = "write the result under ${out}, which is passed as an argument"
        raise StageFailed("the command wrote nothing under ${out}", cure, field="argv")
    if params.produces == "checkpoint":
        from bigpipe.bigmodel.checkpoint import describe_checkpoint

        describe_checkpoint(out)
    elif params.produces == "results":
        _check_rows(out / RESULTS)


def _check_rows(path: Path) -> None:
    cure = "write one JSON object on each line, or set `produces: directory`"
    if not path.is_file():
        raise StageFailed(f"the command wrote no {RESULTS} under ${{out}}", cure, field="produces")
    with path.open("rb") as rows:
        for number, row in enumerate(iter(lambda: rows.readline(LARGEST_ROW), b""), 1):
            try:
                fine = isinstance(parse_json(row), dict)
            except ValueError:
                fine = False
            if not fine:
                raise StageFailed(f"{RESULTS}:{number} is no JSON object", cure, field="produces")


def _is_finite(value: float) -> bool:
    """Is it a number that a gate can compare? Whole numbers of JSON have no largest."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def read_metrics(path: Path) -> Mapping[str, int | float]:
    """Return what a file of metrics holds: names and finite numbers. Raise StageFailed for anything else."""
    cure = 'write one JSON object of names and numbers: {"perplexity": 12.5}'
    try:
        found = parse_json(read_file(path, LARGEST_METRICS))
    except OSError as error:
        cause = f"the file of metrics, ${{out}}/{path.name}, cannot be read: {error.strerror}"
        raise StageFailed(cause, cure, field="metrics") from error
    except ValueError as error:
        raise StageFailed(f"{path.name} is no JSON: {error}", cure, field="metrics") from error
    if not isinstance(found, dict):
        raise StageFailed(f"{path.name} holds no object", cure, field="metrics")
    for name, value in found.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise StageFailed(f"{path.name}: gates cannot name {name!r}", "use letters, digits and _", field="metrics")
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
            raise StageFailed(f"{path.name}: {name} is {value!r:.60}, and no finite number", cure, field="metrics")
    return found

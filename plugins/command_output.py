"""What a `command` left behind: is it what it is said to produce, and what did it measure?"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bigpipe.errors import StageFailed
from bigpipe.files import parse_json, read_file
from bigpipe.orchestrator.stage import Json, StageContext, late

from .command import CommandParams

LARGEST_METRICS = 2**20
LARGEST_ROW = 2**24
RESULTS = "results.jsonl"
METRIC = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")
"""What gates can name."""
READERS = {
    "checkpoint": late("bigpipe.bigmodel.checkpoint:describe_checkpoint"),
    "adapter": late("bigpipe.bigmodel.checkpoint:describe_adapter"),
}
"""By what is produced, who reads it."""


def lead_links_back(context: StageContext) -> None:
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


def check_output(params: CommandParams, out: Path) -> None:
    """Raise StageFailed (InvalidCheckpoint, NoWeights) where that is not what the command is said to produce."""
    if out.is_symlink() or not out.is_dir():
        cure = "write into the directory that is passed as ${out}, and leave it where it is"
        raise StageFailed("the command replaced or removed ${out}", cure, field="argv")
    if not any(path.is_symlink() or not path.is_dir() for path in out.rglob("*")):
        cure = "write the result under ${out}, which is passed as an argument"
        raise StageFailed("the command wrote nothing under ${out}", cure, field="argv")
    described(params, out)
    if params.produces == "results":
        _check_rows(out / RESULTS)


def described(params: CommandParams, out: Path) -> Any:
    """Return what is known of a model or an adapter that the command made; None where it makes none. Raise
    InvalidCheckpoint or NoWeights where it is not one."""
    return READERS[params.produces](out) if params.produces in READERS else None


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


def read_metrics(path: Path) -> tuple[dict[str, int | float], list[str]]:
    """Return what gates can read of a file of metrics, finite numbers by name, those of maps by dotted path, and the
    names of what they cannot, also those that two values have. Raise StageFailed for what holds no JSON object."""
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
    values: dict[str, list[Json]] = {}
    for name, value in _flat(found):
        values.setdefault(name, []).append(value)
    single = {name: each[0] for name, each in values.items() if len(each) == 1 and METRIC.fullmatch(name)}
    numbers = {name: value for name, value in single.items() if _is_finite(value)}
    return numbers, [name for name in values if name not in numbers]


def _flat(found: Mapping[str, Json]) -> Iterator[tuple[str, Json]]:
    """Yield what is no map, by its dotted path, in order."""
    waiting = [*found.items()][::-1]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{path}.{name}", inner) for name, inner in value.items()][::-1]
        else:
            yield path, value


def _is_finite(value: Json) -> bool:
    """Is it a number that a gate can compare? Whole numbers of JSON have no largest."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False

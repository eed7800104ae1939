"""Files that a task makes of rows, such as pictures: kept by their content beside the records of the rank that made
them, and named by the row's index beside the results.

rank-N/files/SHA256       written before the record that names it, so that a record never names what is not there
files/000017.png          of row 17; files/000017-1.png, -2 … where it made several
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from itertools import repeat
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.tasks import ResultFile
from bigpipe.files import make_folders, write_file

FILES = "files"
DIGITS = 6
"""Of an index in a file's name: at least."""


def kept_file(folder: Path, digest: str) -> Path:
    """Return where a rank keeps the file of this sha256."""
    return folder / FILES / digest


def keep_files(
    folder: Path, index: int, rows: int, payload: Mapping[str, Any]
) -> tuple[dict[str, Any], list[list[Any]]]:
    """Write the files of a payload to a rank's folder; on return they are on the disk. rows: how many there are in all.

    Return the payload with their names in their place, and [name, hex sha256, bytes] of each. A file is a value of the
    payload, or an element of a list that is one.
    """
    files = _files(payload)
    if not files:
        return dict(payload), []
    number = f"{index:0{max(DIGITS, len(str(rows - 1)))}}"
    stems = [number] if len(files) == 1 else [f"{number}-{place}" for place in range(1, len(files) + 1)]
    names = [f"{FILES}/{stem}{file.ending}" for stem, file in zip(stems, files, strict=True)]
    kept = [[name, *_keep(folder, file)] for name, file in zip(names, files, strict=True)]
    return _replaced(payload, iter(names)), kept


def without_files(payload: Mapping[str, Any]) -> dict[str, Any]:
    """Return the payload with null in place of each file."""
    return _replaced(payload, repeat(None)) if _files(payload) else dict(payload)


def _files(payload: Mapping[str, Any]) -> list[ResultFile]:
    made: list[ResultFile] = []
    for value in payload.values():
        if isinstance(value, ResultFile):
            made.append(value)
        elif isinstance(value, list):
            made += [each for each in value if isinstance(each, ResultFile)]
    return made


def _replaced(payload: Mapping[str, Any], names: Iterator[Any]) -> dict[str, Any]:
    def named(value: Any) -> Any:
        return next(names) if isinstance(value, ResultFile) else value

    return {
        field: [named(each) for each in value] if isinstance(value, list) else named(value)
        for field, value in payload.items()
    }


def _keep(folder: Path, file: ResultFile) -> tuple[str, int]:
    digest = hashlib.sha256(file.content).hexdigest()
    path = kept_file(folder, digest)
    if not path.exists():
        make_folders(path.parent)
        write_file(path, file.content)
    return digest, len(file.content)

"""Records that tell whether they are damaged, and the ways in which the store writes.

A record is one line of JSON in an envelope that holds the sha256 of that line, so any changed byte is seen.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bigpipe import files

if TYPE_CHECKING:
    from bigpipe.orchestrator.contract import Json

PRIVATE = 0o700
explained = partial(
    files.explained,
    owner="the store",
    free="free space (`bigpipe gc` drops what no manifest names)",
    other="choose another store with --store DIR or BIGPIPE_HOME",
)
"""Turns every OSError within into an error with a cure."""
make_directory = partial(files.make_directory, mode=PRIVATE)
"""Creates a directory of the store and its parents, readable by its owner alone."""


class Damaged(Exception):
    """A sealed file whose bytes are not those that were written."""


_HEAD, _MIDDLE, _TAIL = b'{"sha256": "', b'", "record":\n', b"\n}\n"


def seal(value: Json) -> bytes:
    """Return a JSON document that holds `value` on a line of its own and the sha256 of that line."""
    body = json.dumps(value, separators=(",", ":")).encode()
    return _HEAD + hashlib.sha256(body).hexdigest().encode() + _MIDDLE + body + _TAIL


def unseal(data: bytes) -> Json:
    """Return the inverse of `seal`. Raise Damaged where any byte has changed."""
    start = len(_HEAD) + 64
    body = data[start + len(_MIDDLE) : -len(_TAIL)]
    expected = _HEAD + hashlib.sha256(body).hexdigest().encode() + _MIDDLE
    if data[: start + len(_MIDDLE)] != expected or data[-len(_TAIL) :] != _TAIL:
        raise Damaged
    return json.loads(body)


def write_sealed(path: Path, value: Json) -> None:
    """Write a record durably, in a directory that is made where it is missing."""
    make_directory(path.parent)
    files.write_file(path, seal(value), mode=0o600)


def read_sealed(path: Path) -> Json:
    """Return the value sealed in a file. Raise Damaged, or OSError (a missing file and an I/O error among them)."""
    try:
        with path.open("rb", buffering=0) as file:
            return unseal(file.read())
    except IsADirectoryError:
        raise Damaged from None


def names_in(folder: Path) -> list[str]:
    """Return the names in a directory of the store, which need not be there, sorted."""
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def sealed_digests(folder: Path) -> list[str]:
    """Return `sha256:HEX` of the records `HEX.json` in a directory of the store, sorted."""
    return [f"sha256:{name[:-5]}" for name in names_in(folder) if name.endswith(".json") and len(name) == 69]

"""Finished files, kept by what they depend on, for runs that follow: after a crash, or after an edit."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.writing.shards import sync_directory, write_file

FOLDER = "quantize"


class Shelf:
    """A folder of weight files under `parts`, each with a note of its sha256.

    A store may have taken a file in and left a link to its own copy there; that is named by its sha256 then.
    """

    def __init__(self, parts: Path) -> None:
        self.folder = Path(os.path.abspath(parts)) / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)

    def fetch(self, key: str, link: Path) -> tuple[str, int] | None:
        """Links to a finished file of this key, if there is one whose bytes are still what they were."""
        kept = self._file(key)
        expected = self._expected(key, kept)
        if expected is None or not kept.is_file():
            return None
        with open(kept, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            return None
        _relink(kept, link)
        return found, kept.stat().st_size

    def _expected(self, key: str, kept: Path) -> str | None:
        if kept.is_symlink():
            return Path(os.path.realpath(kept)).name
        try:
            return str(json.loads(self._note(key).read_bytes())["sha256"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def unfinished(self, key: str, link: Path) -> Path:
        """Where to write a file that will be linked to as `link`. The same again after a crash, nobody else's."""
        mark = hashlib.sha256(os.fsencode(os.path.abspath(link))).hexdigest()[:12]
        return self.folder / f"{key}.{mark}.safetensors"

    def keep(self, key: str, written: Path, link: Path, sha256: str) -> None:
        """Takes in a file that is whole and on the disk, and links to it."""
        write_file(self._note(key), json.dumps({"sha256": sha256}).encode())
        os.replace(written, self._file(key))
        sync_directory(self.folder)
        _relink(self._file(key), link)

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _note(self, key: str) -> Path:
        return self.folder / f"{key}.json"


def shelf_key(source: Sequence[object], facts: Mapping[str, Any], tensors: Sequence[Any]) -> str:
    """Of everything the bytes of a file depend on; `source` is what `Checkpoint.identity` says."""
    return hashlib.sha256(json.dumps([source, facts, tensors], sort_keys=True).encode()).hexdigest()


def _relink(target: Path, link: Path) -> None:
    if link.is_symlink() or link.exists():
        link.unlink()
    link.symlink_to(target)

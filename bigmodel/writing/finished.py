"""Which weight files are finished: by an attempt that was interrupted, or by an earlier run."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from bigpipe.files import (
    Damaged,
    explained,
    hash_file,
    link,
    make_directory,
    partial_name,
    read_sealed,
    write_sealed,
)


class Finished:
    """Notes of finished files, each under a key: a digest of everything the bytes of the file depend on.

    A note is sealed and holds the sha256 of its file, and counts only as long as the bytes have it. Without a folder
    for the notes nothing is remembered. shelved: the files are kept beside their notes for further runs, and the output
    holds links to them; a store may have taken one in and left a link to its own copy, which is named by its sha256.
    """

    def __init__(self, out: Path, notes: Path | None, *, shelved: bool = False) -> None:
        self.out = out
        self.notes = Path(os.path.abspath(notes)) if notes is not None else None
        self.shelved = shelved and notes is not None
        if self.notes is not None:
            make_directory(self.notes)

    @property
    def inside(self) -> bool:
        """Do finished files wait in the output itself, under the names that they will have?"""
        return self.notes is not None and not self.shelved

    def seems(self, name: str, key: str) -> bool:
        """Return whether there is a finished file, as far as can be told without reading it."""
        return self._file(name, key).is_file() and self._expected(name, key) is not None

    def find(self, name: str, key: str) -> tuple[str, int] | None:
        """Return the (hex sha256, size) of a file that need not be written again, and see to it that it is in `out`."""
        file, expected = self._file(name, key), self._expected(name, key)
        if expected is None or not file.is_file() or hash_file(file) != expected:
            return None
        self.show(name, key)
        return expected, file.stat().st_size

    def _expected(self, name: str, key: str) -> str | None:
        if self.notes is None:
            return None
        try:
            noted, sha256 = read_sealed(self.notes / f"{key}.json")
        except (OSError, Damaged, ValueError, TypeError):
            return None
        file = self._file(name, key)
        # In the output nobody leaves links to what is not shelved; on the shelf they lead to objects of these bytes.
        strange = file.is_symlink() and not (self.shelved and Path(os.path.realpath(file)).name == sha256)
        return str(sha256) if noted == key and not strange else None

    def place(self, name: str, key: str) -> tuple[Path, Path]:
        """Return where to write the file, and the name it has until it is whole: in the output, where whoever writes
        there next removes what was left, if that is on the same disk."""
        file = self._file(name, key)
        same_disk = self.out.stat().st_dev == file.parent.stat().st_dev
        return file, partial_name((self.out / name) if same_disk else file)

    def note(self, key: str, sha256: str) -> None:
        """Say durably what the file of this key will be; it may take its name only then."""
        if self.notes is not None:
            with explained(self.notes):
                write_sealed(self.notes / f"{key}.json", [key, sha256])

    def show(self, name: str, key: str) -> None:
        """Let a finished file be in `out`."""
        if self.shelved:
            link(self._file(name, key), self.out / name)

    def _file(self, name: str, key: str) -> Path:
        if self.shelved and self.notes is not None:
            return self.notes / f"{key}{Path(name).suffix}"
        return self.out / name


def key_of(*facts: Any) -> str:
    """Return the digest of values that JSON can hold: everything the bytes of a file depend on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

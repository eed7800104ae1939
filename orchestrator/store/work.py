"""The folders in which the work of a key is done, until it is published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .artifacts import remove_tree
from .hashing import digest_of
from .layout import explained


def fetching_key(key: str) -> str:
    """Return the key under which what a remote store has of `key` is brought here."""
    return digest_of("fetch", key)


@dataclass(frozen=True, slots=True)
class Work:
    """The folders of one key, held exclusively. They survive crashes: what is found in them is earlier work."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch"

    def done(self) -> None:
        """Remove both: what was to be kept is published."""
        with explained(self.folder):
            remove_tree(self.folder)

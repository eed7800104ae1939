"""The files of a checkpoint that are open while its tensors are read, in any order."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from .bytesource import FileSource
from .view import Checkpoint


class OpenFiles:
    """Opens each file when it is first asked for, and closes those that are left at the end.

    most: how many stay open at a time; beyond it, the one that was opened first is closed.
    """

    def __init__(self, checkpoint: Checkpoint, most: int | None = None) -> None:
        self._checkpoint = checkpoint
        self._most = most
        self._sources: dict[Path, FileSource] = {}

    def source(self, file: Path) -> FileSource:
        """Of a checkpoint that is still being made: waits until the file is there."""
        if file not in self._sources:
            if self._most is not None and len(self._sources) >= self._most:
                self.close(list(self._sources)[0])  # noqa: RUF015 (another thread may close one meanwhile)
            self._sources[file] = self._checkpoint.open(file)
        return self._sources[file]

    def close(self, file: Path) -> None:
        """Lets go of a file that nobody reads any more; from any thread."""
        if (source := self._sources.pop(file, None)) is not None:
            source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in list(self._sources):
            self.close(file)

"""Checkpoints that pass from one step to the next file by file, while they are being written.

    Delivery    the writing side: what will come, room for the next file, a file that is whole
    Arrivals    the reading side: what will come, waiting for a file, a file that is not needed again

What will come is known from the head of each weight file: the bytes of its safetensors header, and its size. So the
reading side plans everything at once, and waits only where it reads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bigpipe.errors import StageFailed

from .bytesource import ByteSource, FileSource
from .files import is_hub_blob
from .headers import read_header
from .tensors import FETCH_AGAIN, invalid

PATIENCE = 30.0
"""Seconds for a file to be found again whose name is just being led to another place."""
PAUSE = 0.01


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of a safetensors file up to its data, as a `ByteSource` of the whole."""

    content: bytes
    size: int
    """Of the whole file."""
    name: str = "the head of a file to come"

    @classmethod
    def of(cls, source: ByteSource, file: Path) -> Head:
        """Reads and checks it. Raises InvalidCheckpoint."""
        length = read_header(source, file).length
        return cls(source.read(0, length), source.size, file.name)

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > len(self.content):
            raise invalid(self.name, f"ends at byte {len(self.content)}", FETCH_AGAIN, offset=offset)
        return self.content[offset : offset + length]


class Delivery(Protocol):
    """Where finished files are told of. Safe for threads."""

    def announce(self, heads: Mapping[str, tuple[bytes, int]]) -> None:
        """File name → (head, size) of all weight files. All other files must be in the output already."""

    def begin(self, name: str) -> None:
        """Waits until there is room for one more file."""

    def finished(self, name: str, sha256: str, size: int) -> None:
        """The file is in the output, whole and on the disk."""


class Arrivals(Protocol):
    """Where finished files come from. Safe for threads."""

    @property
    def folder(self) -> Path:
        """Holds the other files from the start, and each weight file from when it has arrived."""

    def heads(self) -> Mapping[str, tuple[bytes, int]]:
        """File name → (head, size) of all weight files."""

    def wait(self, name: str) -> str:
        """Returns once the file is there; its sha256 in hex."""

    def taken(self, name: str) -> None:
        """The file is not needed again: everything made of it is on the disk."""


def open_arrived(arrivals: Arrivals, file: Path) -> FileSource:
    """Waits for a file, opens it and makes sure that it begins as was announced. Raises InvalidCheckpoint."""
    arrivals.wait(file.name)
    source = _open(file)
    head, size = arrivals.heads()[file.name]
    if source.size != size or source.read(0, len(head)) != head:
        source.close()
        raise invalid(file, "has another header than was announced", "run again")
    return source


def _open(file: Path) -> FileSource:
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return FileSource(file)
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise StageFailed(f"{file}: was there and is gone", "run again") from None
            time.sleep(PAUSE)


def arrived_identity(arrivals: Arrivals, file: Path) -> list[object] | None:
    """What tells the bytes of a file from others, by their content; None for one that stays where it is for good."""
    sha256 = arrivals.wait(file.name)
    return None if is_hub_blob(file.resolve()) else ["sha256", sha256]


class Uses:
    """Which files to come are still needed by which files that are made of them."""

    def __init__(
        self, arrivals: Arrivals, outputs: Mapping[str, Iterable[Path]], close: Callable[[Path], None]
    ) -> None:
        self._arrivals = arrivals
        self._close = close
        self._lock = threading.Lock()
        self._sources = {output: set(sources) for output, sources in outputs.items()}
        self._left = {arrivals.folder / name: 0 for name in arrivals.heads()}
        for sources in self._sources.values():
            for source in sources:
                self._left[source] += 1

    def settled(self, output: str) -> None:
        """This file is whole and on the disk: what it was made of may go, if nothing else needs it."""
        with self._lock:
            for source in self._sources.pop(output, ()):
                self._left[source] -= 1
            free = [source for source, count in self._left.items() if count == 0]
            for source in free:
                del self._left[source]
        for source in free:
            self._close(source)
            self._arrivals.taken(source.name)

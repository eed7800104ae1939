"""Checkpoints that pass from one step to the next file by file, while they are being written.

    Delivery    the writing side: what will come, room for the next file, a file that is whole
    Arrivals    the reading side: what will come, waiting for a file, a file that is not needed again

What will come is known from the head of each weight file, and its size: the bytes of a safetensors header, or what
`torchheads` says of a torch file. So the reading side plans everything at once, and waits only where it reads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bigpipe.errors import InvalidCheckpoint, StageFailed

from .bytesource import ByteSource, FileSource
from .files import format_of, is_hub_blob
from .headers import read_header
from .tensors import FETCH_AGAIN, TensorInfo, invalid

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

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > len(self.content):
            raise invalid(self.name, f"ends at byte {len(self.content)}", FETCH_AGAIN, offset=offset)
        return self.content[offset : offset + length]


def read_head(source: ByteSource, file: Path) -> tuple[bytes, int]:
    """What to announce of a weight file: (head, size). Reads and checks it. Raises InvalidCheckpoint."""
    if format_of(file) == "safetensors":
        return source.read(0, read_header(source, file).length), source.size
    from .torchheads import read_torch_head

    return read_torch_head(source), source.size


class Delivery(Protocol):
    """Where finished files are told of. Safe for threads."""

    @property
    def lets_go(self) -> bool:
        """May files go as soon as they are taken, so that not all are there at a time?"""

    @property
    def ahead(self) -> int:
        """How many may lie there at a time then, unless those who take them need more."""

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
    """Waits for a file, opens it and makes sure that it is as was announced. Raises InvalidCheckpoint."""
    arrivals.wait(file.name)
    source = _open(file)
    head, size = arrivals.heads()[file.name]
    # What a torch file holds is looked at once, where the places of its tensors are asked for.
    if source.size != size or (format_of(file) == "safetensors" and source.read(0, len(head)) != head):
        source.close()
        raise _other(file)
    return source


def arrived_places(arrivals: Arrivals, file: Path) -> Mapping[str, TensorInfo]:
    """The tensors of a torch file with their places, once it is there and found as announced."""
    from .torchheads import places_as_told

    with open_arrived(arrivals, file) as source:
        places = places_as_told(source, file, arrivals.heads()[file.name][0])
    if places is None:
        raise _other(file)
    return places


def _other(file: Path) -> InvalidCheckpoint:
    return invalid(file, "has another header than was announced", "run again")


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

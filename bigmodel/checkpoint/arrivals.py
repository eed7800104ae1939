"""Checkpoints that pass from one step to the next file by file, while they are being written (see `bigpipe.passing`).

What will come is known from the head of each weight file, and its size: the bytes of a safetensors header, or what
`torchheads` says of a torch file. So the reading side plans everything at once, and waits only where it reads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bigpipe.errors import InvalidCheckpoint, StageFailed
from bigpipe.passing import OpenInlet

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


def open_arrived(inlet: OpenInlet, file: Path) -> FileSource:
    """Waits for a file, opens it and makes sure that it is as was announced. Raises InvalidCheckpoint."""
    inlet.wait(file.name)
    source = _open(file)
    head, size = inlet.heads[file.name]
    # What a torch file holds is looked at once, where the places of its tensors are asked for.
    if source.size != size or (format_of(file) == "safetensors" and source.read(0, len(head)) != head):
        source.close()
        raise _other(file)
    return source


def arrived_places(inlet: OpenInlet, file: Path) -> Mapping[str, TensorInfo]:
    """The tensors of a torch file with their places, once it is there and found as announced."""
    from .torchheads import places_as_told

    with open_arrived(inlet, file) as source:
        places = places_as_told(source, file, inlet.heads[file.name][0])
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


def arrived_identity(inlet: OpenInlet, file: Path) -> list[object] | None:
    """What tells the bytes of a file from others, by their content; None for one that stays where it is for good."""
    sha256 = inlet.sha256(file.name)
    return None if is_hub_blob(file.resolve()) else ["sha256", sha256]


class Uses:
    """Which files to come are still needed by which files that are made of them."""

    def __init__(self, inlet: OpenInlet, outputs: Mapping[str, Iterable[Path]], close: Callable[[Path], None]) -> None:
        self._inlet = inlet
        self._close = close
        self._lock = threading.Lock()
        self._sources = {output: set(sources) for output, sources in outputs.items()}
        self._left = {inlet.folder / name: 0 for name in inlet.heads}
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
            self._inlet.taken(source.name)

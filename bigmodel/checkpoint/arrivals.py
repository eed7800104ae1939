"""Checkpoints that pass from one step to the next file by file, while they are being written (see `bigpipe.passing`).

What will come is known from the head of each weight file, and its size, so the reading side plans everything at once,
and waits only where it reads. A safetensors file begins with its head. A torch file ends with it, so it is told in
words of our own: JSON, of which the same tensors always give the same bytes. Where the bytes of these tensors lie is
known only once the file is there.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from bigpipe.errors import InvalidCheckpoint, StageFailed
from bigpipe.passing import OpenInlet

from .bytesource import ByteSource, FileSource
from .choosing import is_index
from .contents import read_contents
from .files import WeightFiles, file_format_of, find_weight_files
from .tensors import FETCH_AGAIN, Contents, TensorInfo, Tensors, invalid

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
    """Return what to announce of a weight file: (head, size). It is read and checked. Raise InvalidCheckpoint."""
    contents = read_contents(source, file, placed=False)
    if file_format_of(file) == "bin":
        return encode_torch_head(contents.outline, contents.tied), source.size
    return source.read(0, 8 + int.from_bytes(source.read(0, 8), "little")), source.size


def encode_torch_head(tensors: Tensors, tied: Mapping[str, str]) -> bytes:
    """Return what is announced of a torch file. tied: alias → stored name."""
    listed = [[name, dtype, list(shape)] for name, (dtype, shape) in tensors.items()]
    return json.dumps({"tensors": listed, "tied": dict(tied)}, sort_keys=True).encode()


def announced_contents(inlet: OpenInlet, file: Path) -> Contents:
    """Return what a file to come will hold. Where the tensors of a torch file lie is not known: offset -1, no view."""
    head, size = inlet.heads[file.name]
    if file_format_of(file) == "safetensors":
        return read_contents(Head(head, size, file.name), file)
    told = json.loads(head)
    tensors = {name: TensorInfo(name, dtype, tuple(shape), file, -1) for name, dtype, shape in told["tensors"]}
    return Contents(tensors, told["tied"])


def arriving_files(inlet: OpenInlet) -> WeightFiles:
    """Return the files to come, with their index where it is there; who makes its own may write it last."""
    names = inlet.heads.keys()
    if any(is_index(name) for name in os.listdir(inlet.folder)):
        return find_weight_files(inlet.folder, names)
    files = tuple(inlet.folder / name for name in sorted(names))
    return WeightFiles(file_format_of(files[0]), files)


def open_arrived(inlet: OpenInlet, file: Path) -> FileSource:
    """Wait for a file, open it and make sure that it is as was announced. Raise InvalidCheckpoint."""
    inlet.wait(file.name)
    source = _open(file)
    head, size = inlet.heads[file.name]
    # What a torch file holds is looked at once, where the places of its tensors are asked for.
    if source.size != size or (file_format_of(file) == "safetensors" and source.read(0, len(head)) != head):
        source.close()
        raise _other(file)
    return source


def arrived_contents(inlet: OpenInlet, file: Path) -> Contents:
    """Return what a torch file holds, places included, once it is there and found as announced."""
    with open_arrived(inlet, file) as source:
        found = read_contents(source, file)
    if encode_torch_head(found.outline, found.tied) != inlet.heads[file.name][0]:
        raise _other(file)
    return found


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
        """Let go of what this file was made of, now that it is whole and on the disk, if nothing else needs it."""
        with self._lock:
            for source in self._sources.pop(output, ()):
                self._left[source] -= 1
            free = [source for source, count in self._left.items() if count == 0]
            for source in free:
                del self._left[source]
        for source in free:
            self._close(source)
            self._inlet.taken(source.name)

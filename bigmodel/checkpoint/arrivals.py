"""Checkpoints that pass from one step to the next file by file, while they are being written (see `bigpipe.passing`).

What will come is known from the head of each weight file, and its size, so the reading side plans everything at once,
and waits only where it reads. A safetensors file begins with its head. A torch file ends with it, so it is told in
words of our own: JSON, of which the same tensors always give the same bytes. Where the bytes of these tensors lie is
known only once the file is there.
"""

from __future__ import annotations

import json
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
from .tensors import FETCH_AGAIN, TensorInfo, Tensors, invalid, tensor_nbytes

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
    from .pickles import read_torch_names

    return encode_torch_head(*read_torch_names(source)), source.size


def encode_torch_head(tensors: Tensors, tied: Mapping[str, str]) -> bytes:
    """tied: alias → stored name."""
    listed = [[name, dtype, list(shape)] for name, (dtype, shape) in tensors.items()]
    return json.dumps({"tensors": listed, "tied": dict(tied)}, sort_keys=True).encode()


def decode_torch_head(content: bytes, file: Path) -> tuple[tuple[TensorInfo, ...], dict[str, str]]:
    """As `read_torch_file`, but the tensors' places are not known: offset -1 and no view."""
    told = json.loads(content)
    tensors = tuple(
        TensorInfo(name, dtype, tuple(shape), file, -1, tensor_nbytes(dtype, shape))
        for name, dtype, shape in told["tensors"]
    )
    return tensors, told["tied"]


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
    from .pickles import read_torch_file

    with open_arrived(inlet, file) as source:
        tensors, tied = read_torch_file(source, file)
    found = encode_torch_head({tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}, tied)
    if found != inlet.heads[file.name][0]:
        raise _other(file)
    return {tensor.name: tensor for tensor in tensors}


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

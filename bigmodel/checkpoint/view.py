"""One view of a checkpoint, whatever its format: named tensors as byte ranges of files, validated to the byte.

`open_checkpoint` reads headers only; no weights move and torch is not needed. safetensors files are read by `headers`,
torch zip files (`.bin`, `.pt`, `.pth`) by the restricted reader in `pickles`, which runs no code from the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from bigpipe.passing import Inlet, OpenInlet

from .arrivals import Head, arrived_identity, arrived_places, decode_torch_head, open_arrived
from .bytesource import ByteSource, FileSource
from .files import (
    MAX_CONFIG,
    Format,
    WeightFiles,
    files_to_come,
    find_weight_files,
    format_of,
    is_index,
    is_object,
    read_json,
    side_files,
)
from .headers import read_header
from .tensors import TensorInfo, invalid

CHUNK = 4 * 2**20
"""Bytes moved at a time: large enough for the disk, small enough to stay in the cache of a CPU on its way through."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A validated checkpoint. Its files are read when tensors are, never mapped."""

    path: Path
    """The directory, or the single weight file."""
    format: Format
    files: tuple[Path, ...]
    """Weight files, sorted by name."""
    tensors: Mapping[str, TensorInfo]
    """By name, in the order of their bytes. Each stored tensor once: aliases are in `tied`."""
    tied: Mapping[str, str]
    """Alias → the stored name it shares its bytes with. Only torch files can hold these."""
    config: dict[str, Any] | None
    """config.json."""
    extras: tuple[Path, ...]
    """Side files to carry along, somewhere under `path`: configs, tokenizer, licence, code."""
    metadata: dict[str, str]
    """`__metadata__` of the safetensors files, merged."""
    inlet: OpenInlet | None = None
    """Where its files come from, if they are still being made."""
    _places: dict[Path, Mapping[str, TensorInfo]] = field(default_factory=dict, compare=False)
    """Of the torch files that have come."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def open(self, file: Path) -> FileSource:
        """One of its files, once it is there."""
        return FileSource(file) if self.inlet is None else open_arrived(self.inlet, file)

    def placed(self, name: str) -> TensorInfo:
        """A stored tensor with the place of its bytes, which of a torch file that is to come nobody knows before.

        Waits for it then. Raises InvalidCheckpoint where another file came than was announced.
        """
        tensor = self.tensors[name]
        if self.inlet is None or self.format == "safetensors":
            return tensor
        if tensor.file not in self._places:
            self._places[tensor.file] = arrived_places(self.inlet, tensor.file)
        return self._places[tensor.file][name]

    def identity(self, file: Path) -> list[object]:
        """What tells the bytes of one of its files from others: their sha256 where a store named them by it, else real
        path, size and time of change."""
        known = arrived_identity(self.inlet, file) if self.inlet is not None else None
        if known is not None:
            return known
        real = Path(os.path.realpath(file))
        if is_object(real):
            return ["sha256", real.name]
        facts = real.stat()
        return [str(real), facts.st_size, facts.st_mtime_ns]

    def read(self, name: str) -> bytes:
        """The contiguous bytes of one tensor or alias. KeyError for an unknown name."""
        content = bytearray()
        for piece in self.chunks(name):  # not join: each piece is overwritten by the next
            content += piece
        return bytes(content)

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[memoryview]:
        """The contiguous bytes of one tensor, at most `size` at a time; each piece is valid until the next is taken."""
        tensor = self.placed(self.tied.get(name, name))
        with self.open(tensor.file) as source:
            if tensor.view is not None:
                from .strided import compact_chunks

                yield from compact_chunks(source, tensor, size)
                return
            buffer = memoryview(bytearray(min(size, tensor.nbytes)))
            for start in range(0, tensor.nbytes, size):
                piece = buffer[: min(size, tensor.nbytes - start)]
                source.read_into(piece, tensor.offset + start)
                yield piece


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


def open_checkpoint(source: str | Path | Inlet) -> Checkpoint:
    """Opens a checkpoint directory, a single weight file or an index file; or what comes through an inlet.

    Reads `model.safetensors`, `pytorch_model.bin` and others of these kinds, single or sharded with transformers' or
    accelerate's index. Of weight files that are still being made it reads the announced headers; reading a tensor then
    waits for its file. Raises InvalidCheckpoint, naming file, tensor, byte offset and cure, on anything that is not
    exactly what it says it is.
    """
    if isinstance(source, OpenInlet):
        return _open_arriving(source)
    path = source.folder if isinstance(source, Inlet) else Path(source)
    return _assemble(path, find_weight_files(path), _read_here)


def _open_arriving(inlet: OpenInlet) -> Checkpoint:
    def read(file: Path) -> Contents:
        head, size = inlet.heads[file.name]
        if format_of(file) == "safetensors":
            return _read_safetensors(Head(head, size, file.name), file)
        return *decode_torch_head(head, file), {}

    return replace(_assemble(inlet.folder, _arriving_files(inlet), read), inlet=inlet)


def _arriving_files(inlet: OpenInlet) -> WeightFiles:
    """With their index, where it is there already; a producer that makes its own may write it last."""
    names = inlet.heads.keys()
    if any(is_index(name) for name in os.listdir(inlet.folder)):
        return files_to_come(inlet.folder, names)
    files = tuple(inlet.folder / name for name in sorted(names))
    return WeightFiles(format_of(files[0]), files)


Contents = tuple[tuple[TensorInfo, ...], dict[str, str], dict[str, str]]
"""Of one file: tensors, aliases, metadata."""


def _read_here(file: Path) -> Contents:
    with FileSource(file) as source:
        if format_of(file) == "safetensors":
            return _read_safetensors(source, file)
        from .pickles import read_torch_file

        return *read_torch_file(source, file), {}


def _read_safetensors(source: ByteSource, file: Path) -> Contents:
    header = read_header(source, file)
    return header.tensors, {}, header.metadata


def _assemble(path: Path, weights: WeightFiles, read: Callable[[Path], Contents]) -> Checkpoint:
    directory = path if path.is_dir() else path.parent
    tensors, tied, metadata = _read_files(weights, read)
    _check_index(weights, tensors, tied)
    config = directory / "config.json"
    whole = path.is_dir()
    return Checkpoint(
        path=path,
        format=weights.format,
        files=weights.files,
        tensors=tensors,
        tied=tied,
        config=read_json(config, directory, MAX_CONFIG) if whole and config.exists() else None,
        extras=side_files(directory) if whole else (),
        metadata=metadata,
    )


def _read_files(
    weights: WeightFiles, read: Callable[[Path], Contents]
) -> tuple[dict[str, TensorInfo], dict[str, str], dict[str, str]]:
    tensors: dict[str, TensorInfo] = {}
    tied: dict[str, str] = {}
    metadata: dict[str, str] = {}
    for file in weights.files:
        found, aliases, own = read(file)
        metadata.update(own)
        for name in [*(tensor.name for tensor in found), *aliases]:
            if name in tensors or name in tied:
                raise invalid(file, "stands in another file of this checkpoint too", "save the model anew", tensor=name)
        tensors.update((tensor.name, tensor) for tensor in found)
        tied.update(aliases)
    return tensors, tied, metadata


def _check_index(weights: WeightFiles, tensors: Mapping[str, TensorInfo], tied: Mapping[str, str]) -> None:
    if weights.weight_map is None or weights.index is None:
        return
    for name, file_name in weights.weight_map.items():
        stored = tensors.get(tied.get(name, name))
        if stored is None or stored.file.name != file_name:
            where = f"it is in {stored.file.name}" if stored else "it is nowhere"
            raise invalid(
                weights.index, f"says this tensor is in {file_name}, but {where}", "save the model anew", tensor=name
            )

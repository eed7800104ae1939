"""One view of a checkpoint, whatever its format: named tensors as byte ranges of files, validated to the byte.

`open_checkpoint` reads headers only; no weights move and torch is not needed. safetensors files are read by `headers`,
torch zip files (`.bin`, `.pt`, `.pth`) by the restricted reader in `pickles`, which runs no code from the file.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from bigpipe.errors import NoWeights, UsageError
from bigpipe.names import PATH, Given, checked
from bigpipe.passing import Inlet, OpenInlet
from bigpipe.sizes import counted, format_size

from .arrivals import announced_contents, arrived_contents, arriving_files, open_arrived
from .bytesource import FileSource, compact_chunks
from .contents import check_weight_map, join_contents, read_contents
from .files import MAX_CONFIG, FileFormat, WeightFiles, find_weight_files, is_hub_blob, is_object, read_json, side_files
from .tensors import DECODED, Contents, TensorInfo, Tensors, tensor_nbytes

CHUNK = 4 * 2**20
"""Bytes moved at a time: large enough for the disk, small enough to stay in the cache of a CPU on its way through."""


@dataclass(frozen=True, slots=True, repr=False)
class Checkpoint:
    """A validated checkpoint. Its files are read when tensors are, never mapped."""

    path: Path
    """The directory, or the single weight file."""
    format: FileFormat
    files: tuple[Path, ...]
    """Weight files, sorted by name."""
    tensors: Mapping[str, TensorInfo]
    """As in `Contents`, and so are `tied` and `metadata`."""
    tied: Mapping[str, str]
    config: dict[str, Any] | None
    extras: tuple[Path, ...]
    """Side files to carry along, somewhere under `path`: configs, tokenizer, licence, code."""
    metadata: dict[str, str]
    inlet: OpenInlet | None = None
    """Where its files come from, if they are still being made."""
    _places: dict[Path, Mapping[str, TensorInfo]] = field(default_factory=dict, compare=False)
    """Of the torch files that have come."""

    def __repr__(self) -> str:
        what = (
            f"{counted(len(self.tensors), 'tensor')} in {counted(len(self.files), 'file')}, {format_size(self.nbytes)}"
        )
        return f"<Checkpoint {self.path}: {self.format}, {what}>"

    @property
    def folder(self) -> Path:
        """The directory of its side files."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def open(self, file: Path) -> FileSource:
        """Open one of its files, once it is there."""
        return FileSource(file) if self.inlet is None else open_arrived(self.inlet, file)

    def placed(self, name: str) -> TensorInfo:
        """Return a stored tensor with the place of its bytes, which nobody knows before a torch file has come.
        Wait for it then. Raise InvalidCheckpoint where another file came than was announced."""
        return self._place(self.tensors[name])

    def _place(self, tensor: TensorInfo) -> TensorInfo:
        if tensor.made is not None or self.inlet is None or self.format == "safetensors":
            return tensor
        if tensor.file not in self._places:
            there = arrived_contents(self.inlet, tensor.file)
            aliases = {alias: there.tensors[kept] for alias, kept in there.tied.items()}
            self._places[tensor.file] = {**there.tensors, **aliases}
        return self._places[tensor.file][tensor.name]

    def identity(self, file: Path) -> list[object]:
        """Return what tells the bytes of one of its files from others.
        The sha256 where a store names them by it or they are still coming, else real path, size and time of change."""
        sha256 = self.inlet.sha256(file.name) if self.inlet is not None else None
        real = Path(os.path.realpath(file))
        if sha256 is not None and not is_hub_blob(real):
            return ["sha256", sha256]
        if is_object(real):
            return ["sha256", real.name]
        facts = real.stat()
        return [str(real), facts.st_size, facts.st_mtime_ns]

    def read(self, name: str) -> bytes:
        """Return the contiguous bytes of one tensor or alias. Raise KeyError for an unknown name."""
        content = bytearray()
        for piece in self.chunks(name):  # not join: each piece is overwritten by the next
            content += piece
        return bytes(content)

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[memoryview]:
        """Give the contiguous bytes of one tensor, at most `size` at a time, each valid until the next is taken."""
        name = self.tied.get(name, name)
        with OpenFiles(self) as files:
            buffer = memoryview(bytearray(min(size, self.tensors[name].nbytes)))
            yield from self.pieces(name, files, size, itertools.repeat(buffer))

    def pieces(self, name: str, files: OpenFiles, size: int, buffers: Iterator[memoryview]) -> Iterator[memoryview]:
        """Give a tensor's contiguous bytes from its open files, at most `size` at a time, in these buffers."""
        tensor = self.placed(name)
        if tensor.made is not None:
            for start, stop in tensor.runs(min(size, DECODED)):
                made = self.rows(tensor, files, start, stop)
                yield from (made[first : first + size] for first in range(0, len(made), size))
            return
        source = files.source(tensor.file)
        if tensor.view is not None:
            yield from compact_chunks(source, tensor, size)
            return
        for start in range(0, tensor.nbytes, size):
            piece = next(buffers)[: min(size, tensor.nbytes - start)]
            source.read_into(piece, tensor.offset + start)
            yield piece

    def rows(self, tensor: TensorInfo, files: OpenFiles, start: int, stop: int) -> memoryview:
        """Return the bytes of the entries start:stop of the outermost dimension of a tensor that is decoded."""
        assert tensor.made is not None  # noqa: S101
        parts = []
        for stored, (first, size) in zip(tensor.made.parts, tensor.made.decoder.ranges(start, stop), strict=True):
            part = self._place(stored)
            source = files.source(part.file)
            if part.view is None:
                parts.append(memoryview(source.read(part.offset + first, size)))
            else:
                whole = b"".join(bytes(chunk) for chunk in compact_chunks(source, part, CHUNK))
                parts.append(memoryview(whole)[first : first + size])
        return tensor.decode(start, stop, parts)


class OpenFiles:
    """Opens each file when it is first asked for, and closes those that are left at the end.
    most: how many stay open at a time; beyond it, the one that was opened first is closed."""

    def __init__(self, checkpoint: Checkpoint, most: int | None = None) -> None:
        self._checkpoint = checkpoint
        self._most = most
        self._sources: dict[Path, FileSource] = {}

    def source(self, file: Path) -> FileSource:
        """Return the open file; of a checkpoint that is still being made, once it is there."""
        if file not in self._sources:
            if self._most is not None and len(self._sources) >= self._most:
                self.close(list(self._sources)[0])  # noqa: RUF015 (another thread may close one meanwhile)
            self._sources[file] = self._checkpoint.open(file)
        return self._sources[file]

    def close(self, file: Path) -> None:
        """Let go of a file that nobody reads any more; from any thread."""
        if (source := self._sources.pop(file, None)) is not None:
            source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in list(self._sources):
            self.close(file)


@checked(source=Given((*PATH.kinds, Inlet), PATH.words))
def open_checkpoint(source: str | Path | Inlet) -> Checkpoint:
    """Open a checkpoint directory, a single weight file or an index file; or what comes through an inlet.

    Reads `model.safetensors`, `pytorch_model.bin` and others of these kinds, single or sharded with transformers' or
    accelerate's index. Of weight files that are still being made it reads the announced headers; reading a tensor then
    waits for its file. Raise InvalidCheckpoint, naming file, tensor, byte offset and cure, on anything that is not
    exactly what it says it is.
    """
    if isinstance(source, OpenInlet):
        opened = _assemble(source.folder, arriving_files(source), partial(announced_contents, source))
        return replace(opened, inlet=source)
    path = source.folder if isinstance(source, Inlet) else Path(source)
    return _assemble(path, find_weight_files(path), _contents_here)


def _contents_here(file: Path) -> Contents:
    with FileSource(file) as source:
        return read_contents(source, file)


def _assemble(path: Path, weights: WeightFiles, read: Callable[[Path], Contents]) -> Checkpoint:
    contents = join_contents({file: read(file) for file in weights.files})
    if weights.index is not None:
        check_weight_map(weights.index, weights.weight_map, contents)
    folder = path if path.is_dir() else path.parent
    config = folder / "config.json"
    # A weight file by itself is no model, unless what says so lies beside it
    whole = path.is_dir() or config.exists() or (folder / ARCHITECTURE_FILE).exists()
    return Checkpoint(
        path=path,
        format=weights.format,
        files=weights.files,
        tensors=contents.tensors,
        tied=contents.tied,
        config=read_json(config, folder, MAX_CONFIG) if config.exists() else None,
        extras=side_files(folder) if whole else (),
        metadata=contents.metadata,
    )


ARCHITECTURE_FILE = "bigpipe_architecture.json"
"""Names the Python class of a model that has no transformers config; travels inside the artifact."""


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """What is known of a checkpoint without its weights: what one stage's forecast tells the next. Answers of functions
    are kept with it (`memo.kept`)."""

    config: Mapping[str, Any] | None
    tensors: Tensors | None = None
    """In the order of their bytes. None: not known."""
    format: str | None = None
    """safetensors or bin."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Alias → stored name."""
    path: Path | None = None
    """Where side files (config, tokenizer, custom class) can be read, if anywhere yet."""
    custom: Mapping[str, Any] | None = None
    """Contents of `bigpipe_architecture.json`. One that names no class says how the weights of one are packed."""
    names: frozenset[str] | None = None
    """Relative paths of all files that come with it; None: not known, or those in `path`."""

    @property
    def own_class(self) -> str | None:
        """The class of the user's own that `custom` names, as `module:Class`."""
        named: str | None = (self.custom or {}).get("class")
        return named

    @property
    def says_class(self) -> bool:
        """Is there a config, or a class of the user's own, that says what the weights are of?"""
        return self.config is not None or self.own_class is not None

    @property
    def quantization(self) -> Mapping[str, Any] | None:
        """`quantization_config` of the config, of the part of it that is about text, or of a custom description."""
        config = self.config or {}
        for holder in (config, config.get("text_config"), self.custom):
            for name in ("quantization_config", "compression_config"):  # the second: compressed-tensors before 2025
                found = holder.get(name) if isinstance(holder, Mapping) else None
                if isinstance(found, Mapping) and found:
                    return found
        return None

    @property
    def nbytes(self) -> int | None:
        """Bytes of all stored tensors, without headers. None where the tensors are not known."""
        if self.tensors is None:
            return None
        return sum(tensor_nbytes(dtype, shape) for dtype, shape in self.tensors.values())


def describe_checkpoint(path: str | Path, *, among: Collection[str] | None = None) -> ModelDescription:
    """Describe a checkpoint directory from its headers. Raise InvalidCheckpoint as `open_checkpoint` does.
    among: the files that count, by relative path; None: all."""
    path = Path(path)
    found = describe_opened(_assemble(path, find_weight_files(path, among=among), _contents_here))
    if among is None:
        return found
    config, custom = "config.json" in among, ARCHITECTURE_FILE in among
    return replace(
        found, config=found.config if config else None, custom=found.custom if custom else None, names=frozenset(among)
    )


def describe_if_single(path: Path, *, among: Collection[str] | None = None) -> ModelDescription | None:
    """As `describe_checkpoint`; None for what has no single checkpoint, such as a diffusers pipeline."""
    try:
        return describe_checkpoint(path, among=among)
    except (UsageError, NoWeights):
        return None


def describe_opened(checkpoint: Checkpoint) -> ModelDescription:
    """As `describe_checkpoint`, of a checkpoint that is open."""
    file = checkpoint.folder / ARCHITECTURE_FILE
    custom = read_json(file, checkpoint.folder, MAX_CONFIG) if file in checkpoint.extras else None
    return ModelDescription(
        config=checkpoint.config,
        tensors={name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()},
        format=checkpoint.format,
        tied=checkpoint.tied,
        path=checkpoint.folder,
        custom=custom,
    )

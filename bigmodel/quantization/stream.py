"""Writes a quantized checkpoint: one or more output files per input file, in constant memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from bigpipe.bigmodel.architecture import library_of
from bigpipe.bigmodel.checkpoint import Checkpoint, FileSource, itemsize, read_header
from bigpipe.bigmodel.formats import version_of
from bigpipe.bigmodel.writing import (
    Files,
    Finished,
    OutputFile,
    PlannedTensor,
    Produce,
    RangeReader,
    ReportProgress,
    SafetensorsFile,
    ShardPlan,
    Traffic,
    WriteBeside,
    file_name,
    key_of,
    prepare,
    write_files,
    write_index,
)
from bigpipe.machine import cores

from .encoding import Piece, WeightEncoder
from .outline import Converted, Kept, Outline, Settings, stored_bytes

Bytes = memoryview | bytes
VERSION = 1
"""Raised when the same input and settings give other bytes."""
FOLDER = "quantize"
"""Where finished files are kept, under `parts`."""
WORKERS = 4
"""Threads that encode, at most; one per core. Each takes about 20 MB."""


def split(outlined: Outline, checkpoint: Checkpoint, max_shard_size: int) -> list[tuple[Path, list[Converted | Kept]]]:
    """Return what goes into each output file, and the input file that it is made from. The tensors of one input file
    stay together, cut where they would grow beyond the limit. A weight and what is stored beside it are never
    parted."""
    groups: list[tuple[Path, list[Converted | Kept]]] = []
    filled = 0
    for part in outlined.parts:
        size, source = stored_bytes([part]), checkpoint.tensors[part.source].file
        if not groups or groups[-1][0] != source or (filled and filled + size > max_shard_size):
            groups.append((source, []))
            filled = 0
        groups[-1][1].append(part)
        filled += size
    return groups


class ShardSource:
    """Produces the tensors of one file. What is computed beside a weight waits until its turn comes."""

    def __init__(
        self, parts: Sequence[Converted | Kept], encoder: WeightEncoder, reader: RangeReader, settings: Settings
    ) -> None:
        self.settings = settings
        self._encoder = encoder
        self._reader = reader
        self._waiting: dict[str, Bytes] = {}
        self._pieces: Iterator[Piece] = iter(())
        self._parts = [self._measured(p) if _is_open(p) else p for p in parts]
        self._of = {tensor.name: part for part in self._parts for tensor in part.outputs}

    def file(self) -> SafetensorsFile:
        """The file with exact sizes: `produce` must be called in its order. Tensors of odd lengths come last."""
        tensors = [tensor for part in self._parts for tensor in part.outputs]
        tensors.sort(key=lambda tensor: -itemsize(tensor.dtype) if tensor.nbytes % 8 else -math.inf)
        met = dict.fromkeys(self._of[tensor.name] for tensor in tensors)
        self._pieces = self._encoder.encode(part for part in met if isinstance(part, Converted))
        return SafetensorsFile(tensors)

    def produce(self, tensor: PlannedTensor) -> Iterator[Bytes]:
        part = self._of[tensor.name]
        if isinstance(part, Kept):
            yield from self._reader.produce(replace(tensor, name=part.source))
        elif tensor.name in self._waiting:
            yield self._waiting.pop(tensor.name)
        elif tensor.name == part.outputs[0].name:
            yield from self._encode(part)
        else:
            # A weight of an odd length lies behind what belongs to it.
            self._waiting[part.outputs[0].name] = b"".join(self._encode(part))
            yield self._waiting.pop(tensor.name)

    def _encode(self, weight: Converted) -> Iterator[Bytes]:
        scales = []
        for piece in self._pieces:
            scales.append(piece.scales)
            yield piece.codes.data
            if piece.last:
                break
        self._waiting.update(self._beside(weight, np.concatenate(scales)))

    def _beside(self, weight: Converted, scales: NDArray[np.float32]) -> dict[str, bytes]:
        """Everything that is stored beside a weight's codes."""
        found = weight.packing.beside(weight.shape, weight.dtype, scales, weight.measured, self.settings.threads)
        return {f"{weight.module}.{suffix}": content for suffix, content in found.items()}

    def _measured(self, weight: Converted) -> Converted:
        """The weight with what must be known of all of it, and with true sizes."""
        return replace(weight, measured=weight.packing.measure(_largest(self._encoder, weight), self.settings.threads))


def _is_open(part: Converted | Kept) -> TypeGuard[Converted]:
    """Must it be measured before its sizes are known?"""
    return isinstance(part, Converted) and part.packing.measures and part.measured is None


def largest_magnitudes(
    checkpoint: Checkpoint, weights: Sequence[Converted], settings: Settings
) -> Iterator[NDArray[np.float32]]:
    """Give, for each of these weights, the largest magnitude of each of its blocks, or rows."""
    with WeightEncoder(checkpoint, settings, min(WORKERS, cores())) as encoder:
        for weight in weights:
            yield _largest(encoder, weight)


def _largest(encoder: WeightEncoder, weight: Converted) -> NDArray[np.float32]:
    return np.concatenate([piece.scales for piece in encoder.encode([weight], codes=False)])


def recompute(
    checkpoint: Checkpoint, parts: Sequence[Converted | Kept], settings: Settings
) -> Iterator[tuple[PlannedTensor, Iterator[Bytes]]]:
    """Give every tensor that these parts become with its bytes in pieces, as they would be written; part after part, in
    constant memory. The bytes of one must be taken before the next. Raise as `quantize_checkpoint`."""
    with WeightEncoder(checkpoint, settings, min(WORKERS, cores())) as encoder, RangeReader(checkpoint) as reader:
        for part in parts:
            source = ShardSource([part], encoder, reader, settings)
            for tensor in source.file().tensors:
                yield tensor, source.produce(tensor)


def write_quantized(
    checkpoint: Checkpoint,
    groups: Sequence[tuple[Path, Sequence[Converted | Kept]]],
    out: Path,
    settings: Settings,
    parts: Path | None,
    progress: ReportProgress | None,
    beside: WriteBeside,
) -> tuple[Files, list[ShardPlan]]:
    """Write a file per group, their index and what lies beside them into `out`; return all with the exact plans. parts:
    where finished files are kept for later runs, if anywhere."""
    library, count = library_of(checkpoint.config or {}), len(groups)
    names = [file_name("safetensors", number, count, library) for number in range(count)]
    finished = Finished(out, parts and parts / FOLDER, shelved=True)
    sizes = [stored_bytes(group) if parts is None and checkpoint.inlet is None else 0 for _, group in groups]
    prepare(finished, dict(zip(names, sizes, strict=True)))
    others = beside()
    with WeightEncoder(checkpoint, settings, min(WORKERS, cores())) as encoder, RangeReader(checkpoint) as reader:

        def content(group: Sequence[Converted | Kept]) -> tuple[SafetensorsFile, Produce]:
            source = ShardSource(group, encoder, reader, settings)
            return source.file(), source.produce

        def close(file: Path) -> None:
            encoder.close(file)
            reader.close(file)

        outputs = [
            OutputFile(
                name=name,
                nbytes=stored_bytes(group),
                key=partial(_key, checkpoint, source, group, settings),
                content=partial(content, group),
                sources=frozenset().union(*(checkpoint.tensors[part.source].files for part in group)),
            )
            for name, (source, group) in zip(names, groups, strict=True)
        ]
        files = write_files(outputs, finished, traffic=Traffic(progress, inlet=checkpoint.inlet, close=close))
    plans = [_plan_of(out / name) for name in names]
    return files | write_index(out, plans) | others, plans


def _key(checkpoint: Checkpoint, source: Path, group: Sequence[Converted | Kept], settings: Settings) -> str:
    facts: dict[str, Any] = {"version": VERSION, "scheme": settings.scheme, "dtype": settings.dtype}
    if (bound := settings.packing.computes_in) is not None:
        facts["computes_in"] = bound  # what it has no room for is refused
    if (offered := version_of(settings.scheme)) is not None:
        facts["format"], facts["packing"] = offered, repr(settings.packing)
    if settings.packing.measures:
        facts["threads"] = settings.threads
    outputs = [[(tensor.name, tensor.dtype, tensor.shape) for tensor in part.outputs] for part in group]
    turned = [isinstance(part, Converted) and part.transposed for part in group]
    tensors = [[part.source, part.dtype, *made] for part, *made in zip(group, outputs, turned, strict=True)]
    decoded = [tensor for part in group if (tensor := checkpoint.tensors[part.source]).made]
    beside = sorted({file for tensor in decoded for file in tensor.files} - {source})
    ways = [repr(tensor.made.decoder) for tensor in decoded if tensor.made]
    return key_of(checkpoint.identity(source), facts, tensors, *map(checkpoint.identity, beside), *ways)


def _plan_of(path: Path) -> ShardPlan:
    """The plan of a finished file, from its own header."""
    with FileSource(path) as source:
        tensors = read_header(source, path).outline
    return ShardPlan(path.name, tuple(PlannedTensor(name, *tensor) for name, tensor in tensors.items()))

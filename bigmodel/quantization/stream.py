"""Writes a quantized checkpoint: one or more output files per input file, in constant memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigpipe.bigmodel.checkpoint import Checkpoint, FileSource, itemsize, read_header
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
    file_name,
    key_of,
    prepare,
    write_files,
    write_index,
)

from .encoding import Piece, WeightEncoder
from .outline import Converted, Kept, Outline
from .settings import Settings

Bytes = memoryview | bytes
VERSION = 1
"""Raised when the same input and settings give other bytes."""
FOLDER = "quantize"
"""Where finished files are kept, under `parts`."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file. The tensors' sizes are exact but for the JSON of double quantization."""

    file: str
    parts: tuple[Converted | Kept, ...]
    source: Path

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for part in self.parts for tensor in part.outputs)


def split(outlined: Outline, files: Mapping[str, Path], max_shard_size: int) -> list[Shard]:
    """Output files: the tensors of one input file together, cut where they would grow beyond the limit.

    files: stored name → input file. A weight and what is stored beside it stay together.
    """
    groups: list[tuple[Path, list[Converted | Kept]]] = []
    filled = 0
    for part in outlined.parts:
        size = sum(tensor.nbytes for tensor in part.outputs)
        source = files[part.source]
        if not groups or groups[-1][0] != source or (filled and filled + size > max_shard_size):
            groups.append((source, []))
            filled = 0
        groups[-1][1].append(part)
        filled += size
    return [
        Shard(file_name("safetensors", number, len(groups)), tuple(parts), source)
        for number, (source, parts) in enumerate(groups)
    ]


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
        self._parts = [self._measured(p) if isinstance(p, Converted) and p.packing.measures else p for p in parts]
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
        absmax = np.concatenate([piece.scales for piece in self._encoder.absmax([weight])])
        return replace(weight, measured=weight.packing.measure(absmax, self.settings.threads))


def write_quantized(
    checkpoint: Checkpoint,
    shards: list[Shard],
    out: Path,
    settings: Settings,
    *,
    parts: Path | None,
    workers: int,
    progress: ReportProgress | None,
) -> tuple[Files, list[ShardPlan]]:
    """Write the files and their index into `out`; return them with their exact plans.

    parts: where finished files are kept for later runs, if anywhere. workers: threads that encode.
    """
    prepare(out, "safetensors", {shard.file for shard in shards})
    finished = Finished(out, parts and parts / FOLDER, shelved=True)
    with WeightEncoder(checkpoint, settings, workers) as encoder, RangeReader(checkpoint) as reader:

        def content(shard: Shard) -> tuple[SafetensorsFile, Produce]:
            source = ShardSource(shard.parts, encoder, reader, settings)
            return source.file(), source.produce

        def close(file: Path) -> None:
            encoder.close(file)
            reader.close(file)

        outputs = [
            OutputFile(
                name=shard.file,
                nbytes=shard.nbytes,
                key=partial(_key, checkpoint, shard, settings),
                content=partial(content, shard),
                sources=frozenset([shard.source]),
            )
            for shard in shards
        ]
        files = write_files(outputs, finished, traffic=Traffic(progress, inlet=checkpoint.inlet, close=close))
    plans = [_plan_of(out / shard.file) for shard in shards]
    return files | write_index(out, plans), plans


def _key(checkpoint: Checkpoint, shard: Shard, settings: Settings) -> str:
    facts: dict[str, Any] = {"version": VERSION, "scheme": settings.scheme, "dtype": settings.dtype}
    if settings.packing.measures:
        facts["threads"] = settings.threads
    tensors = [
        [part.source, part.dtype, [(tensor.name, tensor.dtype, tensor.shape) for tensor in part.outputs]]
        for part in shard.parts
    ]
    return key_of(checkpoint.identity(shard.source), facts, tensors)


def _plan_of(path: Path) -> ShardPlan:
    """The plan of a finished file, from its own header."""
    with FileSource(path) as source:
        tensors = read_header(source, path).outline
    return ShardPlan(path.name, tuple(PlannedTensor(name, *tensor) for name, tensor in tensors.items()))

"""Writes a quantized checkpoint file by file: one or more output files per input file, in constant memory.

split             which tensors go into which file: an edit that concerns one module changes one file only
for each file:
    Shelf         a file that an earlier run finished from the same input and settings is verified and linked to
    ShardSource   reads and encodes, in threads of their own
    ShardWriter   writes and hashes, in threads of their own; syncs; gives the name
index
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.checkpoint.arrivals import Uses
from bigpipe.bigmodel.checkpoint.bytesource import FileSource
from bigpipe.bigmodel.checkpoint.headers import read_header
from bigpipe.bigmodel.checkpoint.view import Checkpoint
from bigpipe.bigmodel.writing.containers import container
from bigpipe.bigmodel.writing.plans import PlannedTensor, ShardPlan, encode_index, file_name, index_file
from bigpipe.bigmodel.writing.ranges import RangeReader
from bigpipe.bigmodel.writing.shards import Lanes, ShardWriter, write_file
from bigpipe.bigmodel.writing.writer import Meter, ReportProgress, check_space, remove_leftovers

from .encoding import WeightEncoder
from .outline import Converted, Kept, Outline
from .pieces import ShardSource
from .settings import Settings
from .shelf import Shelf, shelf_key

METADATA = {"format": "pt"}
VERSION = 1
"""Raised when the same input and settings give other bytes."""


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


@dataclass
class Streaming:
    """One writing of all files into `out`. `parts`: where finished files are kept for later runs, if anywhere."""

    checkpoint: Checkpoint
    out: Path
    settings: Settings
    parts: Path | None
    workers: int
    progress: ReportProgress | None
    files: dict[str, tuple[str, int]] = field(default_factory=dict)
    """What was written or found, with (hex sha256, size)."""

    def write(self, shards: Sequence[Shard]) -> list[ShardPlan]:
        """The files and their index; gives the exact plans."""
        self.out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.out, "safetensors", {shard.file for shard in shards})
        shelf = Shelf(self.parts) if self.parts is not None else None
        todo = list(shards)
        if self.checkpoint.arrivals is None:
            todo = [shard for shard in shards if not self._found(shard, shelf)]
            check_space(self.out, sum(shard.nbytes for shard in todo))
        total = sum(shard.nbytes for shard in shards)
        meter = Meter(total, total - sum(shard.nbytes for shard in todo), self.progress)
        with (
            Lanes() as lanes,
            WeightEncoder(self.checkpoint, self.settings, self.workers) as encoder,
            RangeReader(self.checkpoint, self.settings.dtype) as reader,
        ):
            settled = self._releasing(shards, encoder, reader)
            for shard in todo:
                if self.checkpoint.arrivals is not None and self._found(shard, shelf):
                    meter.skip(shard.nbytes)
                else:
                    source = ShardSource(shard.parts, encoder, reader, self.settings)
                    self._write_shard(shard, source, shelf, lanes, meter)
                settled(shard.file)
        plans = [_plan_of(self.out / shard.file) for shard in shards]
        if len(plans) > 1:
            name = index_file("safetensors")
            self.files[name] = write_file(self.out / name, encode_index(plans))
        return plans

    def _found(self, shard: Shard, shelf: Shelf | None) -> bool:
        """Is the file on the shelf? Waits for the file it is made of."""
        found = shelf.fetch(self._key(shard), self.out / shard.file) if shelf is not None else None
        if found is not None:
            self.files[shard.file] = found
        return found is not None

    def _releasing(self, shards: Sequence[Shard], encoder: WeightEncoder, reader: RangeReader) -> Callable[[str], None]:
        """What is told the name of each file that is done, so that files it was made of can go."""
        if self.checkpoint.arrivals is None:
            return lambda file: None

        def close(file: Path) -> None:
            encoder.close(file)
            reader.close(file)

        return Uses(self.checkpoint.arrivals, {shard.file: {shard.source} for shard in shards}, close).settled

    def _write_shard(self, shard: Shard, source: ShardSource, shelf: Shelf | None, lanes: Lanes, meter: Meter) -> None:
        plan = source.plan(shard.file)
        file = container(plan, "safetensors", METADATA, "planned")
        link, key = self.out / shard.file, self._key(shard)
        target = shelf.unfinished(key, link) if shelf is not None else link

        def settled(sha256: str) -> None:
            if shelf is not None:
                shelf.keep(key, target, link, sha256)
            self.files[shard.file] = sha256, file.size

        with ShardWriter(target, file, lanes) as writer:
            for tensor in plan.tensors:
                writer.write(tensor.name, meter.count(source.produce(tensor)), tensor.nbytes)
            writer.all_written()
            # Not while the next file is written: a crash then costs the work of one file, never of two.
            writer.settle(settled)

    def _key(self, shard: Shard) -> str:
        settings = self.settings
        facts: dict[str, Any] = {"version": VERSION, "scheme": settings.scheme, "dtype": settings.dtype}
        if settings.double_quant:
            facts["threads"] = settings.threads
        tensors = [
            [part.source, part.dtype, [(tensor.name, tensor.dtype, tensor.shape) for tensor in part.outputs]]
            for part in shard.parts
        ]
        return shelf_key(self.checkpoint.identity(shard.source), facts, tensors)


def _plan_of(path: Path) -> ShardPlan:
    """The plan of a finished file, from its own header."""
    with FileSource(path) as source:
        tensors = read_header(source, path).tensors
    return ShardPlan(path.name, tuple(PlannedTensor(t.name, t.dtype, t.shape, t.nbytes) for t in tensors))

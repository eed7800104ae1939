"""Reshards, converts or casts a checkpoint: byte ranges through reused buffers, without torch; and its side files."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

from bigpipe.bigmodel.architecture import BUFFERS, library_of, untied, untied_checkpoint
from bigpipe.bigmodel.checkpoint import (
    CASTABLE,
    CHUNK,
    SAFETENSORS_NAMES,
    Checkpoint,
    Decoder,
    FileFormat,
    Made,
    ModelDescription,
    OpenFiles,
    TensorInfo,
    Tensors,
    beyond,
    describe_opened,
    itemsize,
)
from bigpipe.bigmodel.formats import castable, decode, decoded, format_of, left_out
from bigpipe.errors import UsageError, first_few
from bigpipe.files import copy_file, explained, link, make_folders, refuse_overlap, write_file
from bigpipe.machine import cores
from bigpipe.names import is_text
from bigpipe.passing import NOBODY, Outlet

from .containers import container
from .plans import USUAL, PlannedTensor, ShardPlan, is_ours, plan_shards
from .shards import PIECES_IN_FLIGHT
from .writer import Files, ReportProgress, SavedCheckpoint, Traffic, write_checkpoint

IN_HEADERS = "torchao"
"""The method whose `__metadata__` says which stored tensors are one weight, and how; no loader does without."""
WORKERS = 4
"""Files written side by side at most, one per core: one sha256 is slower than a disk. Each takes about 20 MB."""
MAX_OPEN = 16
BLOCK = 65_536
"""Elements converted at a time: 256 KiB of float32, which stay in a core's second-level cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """How weights are written anew."""

    max_shard_size: int
    """Bytes of a file, unless one tensor alone has more."""
    dtype: str | None = None
    """Of floating-point tensors; None: as they are."""
    format: FileFormat = "safetensors"

    def plans(
        self, tensors: Tensors, tied: Mapping[str, str], config: Mapping[str, Any] | None = None
    ) -> list[ShardPlan]:
        """Return the files of tensors of these (dtype, shape), as the library of the config calls them. Raise
        UsageError for what cannot be written."""
        if self.dtype is not None and self.dtype not in CASTABLE:
            raise UsageError(f"dtype {self.dtype} cannot be cast to", f"choose one of {', '.join(sorted(CASTABLE))}")
        if self.format not in USUAL:
            raise UsageError(f"format {self.format!r} is not known", f"choose one of {', '.join(USUAL)}")
        for name in (name for name in (*tensors, *tied) if not _may_be_called(name)):
            raise UsageError(f"no tensor can be called {name!r}", "give it a name that is a text")
        planned = [
            PlannedTensor(name, self.dtype if self.dtype and is_cast(stored, self.dtype) else stored, shape)
            for name, (stored, shape) in tensors.items()
        ]
        odd = next((tensor for tensor in planned if tensor.dtype not in SAFETENSORS_NAMES), None)
        if odd is not None and self.format == "safetensors":
            cure = "write format: bin, or cast the tensor first"
            raise UsageError(f"tensor {odd.name!r}: safetensors has no {odd.dtype}", cure)
        return plan_shards(planned, self.max_shard_size, self.format, tied, library_of(config or {}))

    def notes(self, source: ModelDescription) -> tuple[str, ...]:
        """Return what a user should know of a cast of weights whose tensors are known, in words. Whether a class keeps
        a tensor in float32 is not asked here, where all are cast."""
        if self.dtype is None:
            return ()
        sizes: Counter[str] = Counter()
        floats = {n: each for n, each in (decoded(source).tensors or {}).items() if each[0] in CASTABLE}
        for stored, shape in floats.values():
            sizes[stored] += math.prod(shape)
        usual = max((itemsize(stored) for stored, _ in sizes.most_common(1)), default=0)
        wide = [name for name, (stored, _) in floats.items() if itemsize(stored) > max(usual, itemsize(self.dtype))]
        told = f"stored wider than the rest, and rounded to {self.dtype}: {first_few(wide)}"
        kept = "some classes keep such tensors in float32, as the biases by which experts are chosen"
        return (*left_out(source), *([f"{told}; {kept}"] if wide else ()))

    def of(self, source: ModelDescription) -> tuple[list[ShardPlan], ModelDescription]:
        """Return the files that `source` becomes, whose tensors are known, and the checkpoint they make.
        Raise UsageError for what cannot be cast or written, InvalidCheckpoint for a config of other weights."""
        if format_of(source).method == IN_HEADERS:
            raise UsageError(
                "its weights are torchao's, and what they are made of stands in the headers of their own files alone",
                "save them as they are, or shard the weights before they were quantized",
            )
        if self.dtype is not None:
            source = decoded(source)
            castable(source, self.dtype)
        if self.format == "safetensors":
            source = untied(source)
        plans, config = self.plans(source.tensors or {}, source.tied, source.config), source.config
        if self.dtype is not None and config is not None:
            config = config_with_dtype(config, self.dtype)
        return plans, replace(
            source,
            config=config,
            tensors={tensor.name: (tensor.dtype, tensor.shape) for plan in plans for tensor in plan.tensors},
            format=self.format,
            tied=source.tied if self.format == "bin" else {},
        )


def _may_be_called(name: object) -> bool:
    """Can a file keep a tensor of this name? safetensors keeps one for its metadata."""
    return isinstance(name, str) and is_text(name) and name != "__metadata__"


def planned_bytes(plans: Iterable[ShardPlan]) -> int:
    """Bytes of the planned weight files, headers included."""
    return sum(container(plan).size for plan in plans)


def convert(
    checkpoint: Checkpoint,
    out: Path,
    conversion: Conversion,
    *,
    linked: bool = False,
    progress: ReportProgress | None = None,
    journal: Path | None = None,
    outlet: Outlet = NOBODY,
    restated: bool = False,
) -> SavedCheckpoint:
    """Write a checkpoint's weights anew into `out`, with its config, tokenizer and other files.
    A cast changes the config too; restated: it is written in any case, as the checkpoint has it and not its file.
    Aliases are kept as shared storages in `.bin`; safetensors has none of those that the class ties, and the others as
    tensors of their own. linked: the other files
    become links. `journal` as in `write_checkpoint`, `outlet` as in `Traffic`."""
    refuse_in_place(checkpoint, out)
    if conversion.dtype is not None:
        checkpoint = decode(checkpoint)
    if conversion.format == "safetensors":
        checkpoint = untied_checkpoint(checkpoint)
    plans, converted = conversion.of(describe_opened(checkpoint))
    config = converted.config if conversion.dtype or restated else None
    parts = {plan.file: [checkpoint.tensors[tensor.name] for tensor in plan.tensors] for plan in plans}
    sources = {file: {source for tensor in tensors for source in tensor.files} for file, tensors in parts.items()}

    def fingerprint(file: str) -> str:
        decoders = [repr(tensor.made.decoder) for tensor in parts[file] if tensor.made]
        return repr(sorted((source.name, checkpoint.identity(source)) for source in sources[file])) + "".join(decoders)

    with RangeReader(checkpoint) as reader:
        return write_checkpoint(
            out,
            plans,
            reader.produce,
            metadata={"format": checkpoint.metadata.get("format", "pt")},
            journal=journal,
            fingerprint=fingerprint,
            workers=min(WORKERS, cores()),
            sources=sources,
            traffic=Traffic(progress, outlet, checkpoint.inlet, reader.close),
            beside=partial(carry_side_files, checkpoint, out, config=config, linked=linked),
        )


def refuse_in_place(checkpoint: Checkpoint, out: Path) -> None:
    """Raise UsageError where `out` is the directory of the checkpoint, lies in it, holds it, or holds a file that it is
    made of, by whatever names: a checkpoint is never changed in place."""
    refuse_overlap(out, [checkpoint.path, *checkpoint.files, *checkpoint.extras])


def carry_side_files(
    checkpoint: Checkpoint, out: Path, *, config: Mapping[str, Any] | None = None, linked: bool = False
) -> Files:
    """Bring the side files of a checkpoint into `out`; return those that were written, links not among them.
    config: written as config.json in place of the checkpoint's. linked: as absolute links, not copies; but a checkpoint
    that is still being made is copied, as its folder does not last. `out` is then one attempt's own: what another one,
    perhaps of other side files, carried there goes first."""
    if linked:
        _drop_carried(out)
    written = {}
    for extra in checkpoint.extras:
        name = extra.relative_to(checkpoint.folder)
        make_folders((out / name).parent)
        if config is not None and name == Path("config.json"):
            continue
        if linked and checkpoint.inlet is None:
            link(os.path.abspath(extra), out / name)
        else:
            written[str(name)] = copy_file(extra, out / name)
    if config is not None:
        written["config.json"] = write_file(out / "config.json", encode_config(config))
    return written


def _drop_carried(out: Path) -> None:
    with explained(out):
        for path in out.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif not is_ours(path.name):
                path.unlink()


def encode_config(config: Mapping[str, Any]) -> bytes:
    """Return a config as transformers writes it."""
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def config_with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """Return the config of a model whose weights are now of this dtype, as transformers states it: in its parts too.
    diffusers states none."""
    if library_of(config) == "diffusers":
        return dict(config)
    # `torch_dtype` is what transformers before 5 wrote; parts are text_config, vision_config, encoder and the like
    kept = {key: value for key, value in config.items() if key != "torch_dtype"}
    parts = {key: config_with_dtype(value, dtype) for key, value in kept.items() if _is_part(key, value)}
    return {**kept, **parts, "dtype": dtype}


def _is_part(key: str, value: Any) -> bool:
    """A config in a config. A vocabulary may hold such words as well, but as numbers."""
    telling = ("model_type", "dtype", "torch_dtype")
    nested = isinstance(value, Mapping) and any(isinstance(value.get(name), str) for name in telling)
    return nested and key != "quantization_config"


def is_cast(stored: str, wanted: str | None) -> bool:
    """Return whether a stored tensor changes when `wanted` is asked for. Integers and quantized formats never do."""
    return wanted is not None and stored != wanted and stored in CASTABLE


def cast(source: memoryview, stored: str, wanted: str, target: memoryview, *, bounded: bool = False) -> memoryview:
    """Convert the elements in `source` into `target`; return the part of `target` that was filled.
    Rounds to nearest even as torch's `.to()` does, through float32 where torch does too (float64 → half formats), bit
    for bit but for the payload of NaNs, where torch's own loops differ among each other. Overflow gives infinity; where
    it is bounded, raise OverflowError instead."""
    import numpy

    from bigpipe.bigmodel.formats.encoders.floats import BITS, convert, overflows

    filled = target[: len(source) // itemsize(stored) * itemsize(wanted)]
    bits, result = numpy.frombuffer(source, BITS[stored]), numpy.frombuffer(filled, BITS[wanted])
    for start in range(0, bits.size, BLOCK):
        block = bits[start : start + BLOCK]
        result[start : start + BLOCK] = made = convert(block, stored, wanted)
        if bounded and overflows(block, stored, made, wanted):
            raise OverflowError(wanted)
    return filled


@dataclass(frozen=True, slots=True)
class _Cast:
    """Decodes entries of `elements` numbers each, which `before` gives where they are decoded themselves."""

    stored: str
    wanted: str
    elements: int
    bounded: bool
    before: Decoder | None

    def ranges(self, start: int, stop: int) -> Sequence[tuple[int, int]]:
        if self.before is not None:
            return self.before.ranges(start, stop)
        entry = self.elements * itemsize(self.stored)
        return [(start * entry, (stop - start) * entry)]

    def decode(self, start: int, stop: int, parts: Sequence[memoryview]) -> memoryview:
        target = memoryview(bytearray((stop - start) * self.elements * itemsize(self.wanted)))
        numbers = parts[0] if self.before is None else self.before.decode(start, stop, parts)
        return cast(numbers, self.stored, self.wanted, target, bounded=self.bounded)


def cast_while_read(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """Return a checkpoint whose numbers are cast as they are read, as `convert` would have written them; once more
    where they are cast or decoded already. Nothing is held or written for it."""

    def seen(tensor: TensorInfo) -> TensorInfo:
        if not is_cast(tensor.dtype, dtype):
            return tensor
        before = tensor.made.decoder if tensor.made is not None else None
        bounded = not BUFFERS.search(tensor.name)
        decoder = _Cast(tensor.dtype, dtype, math.prod(tensor.shape[1:]), bounded, before)
        return TensorInfo(tensor.name, dtype, tensor.shape, tensor.file, -1, made=Made(tensor.stored, decoder))

    config = checkpoint.config and config_with_dtype(checkpoint.config, dtype)
    tensors = {name: seen(tensor) for name, tensor in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors, config=config)


class _Own(threading.local):
    """What each thread has for itself: it is made anew, with the same arguments, for every thread that asks."""

    def __init__(self, checkpoint: Checkpoint, opened: list[OpenFiles]) -> None:
        self.files = OpenFiles(checkpoint, MAX_OPEN)
        opened.append(self.files)

    @cached_property  # made when first asked for: the thread that makes the reader may never read
    def buffers(self) -> Iterator[memoryview]:
        return itertools.cycle([memoryview(bytearray(CHUNK)) for _ in range(PIECES_IN_FLIGHT + 1)])

    @cached_property
    def stored(self) -> memoryview:
        return memoryview(bytearray(CHUNK))


class RangeReader:
    """Gives the bytes of tensors in pieces of at most `CHUNK` bytes; each stays as it is until three more were taken.

    Fresh memory costs a page fault per 4 KiB, about as much as reading does, so buffers are made once in each thread.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._opened: list[OpenFiles] = []
        self._own = _Own(checkpoint, self._opened)

    def produce(self, planned: PlannedTensor) -> Iterator[memoryview]:
        """Give the contiguous bytes of the tensor of this name, as the planned dtype. Raise InvalidCheckpoint for a
        number that would become infinite, but in a mask or table that a class makes itself."""
        own, tensor = self._own, self.checkpoint.tensors[planned.name]
        if not is_cast(tensor.dtype, planned.dtype):
            yield from self.checkpoint.pieces(tensor.name, own.files, CHUNK, own.buffers)
            return
        widths = itemsize(tensor.dtype), itemsize(planned.dtype)
        size, bounded = CHUNK // max(widths) * widths[0], not BUFFERS.search(tensor.name)
        for piece in self.checkpoint.pieces(tensor.name, own.files, size, itertools.repeat(own.stored)):
            try:
                yield cast(piece, tensor.dtype, planned.dtype, next(own.buffers), bounded=bounded)
            except OverflowError:
                raise beyond(tensor.name, planned.dtype, tensor.file) from None

    def close(self, file: Path) -> None:
        """Let go of a file that nobody reads any more; from any thread."""
        for files in self._opened:
            files.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for files in self._opened:
            files.__exit__()

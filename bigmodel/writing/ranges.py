"""Reads the tensors of a checkpoint through a few reused buffers, changing their number format on the way."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Self

from bigpipe.bigmodel.checkpoint import CASTABLE, CHUNK, Checkpoint, OpenFiles, itemsize

from .plans import PlannedTensor
from .shards import PIECES_IN_FLIGHT

MAX_OPEN = 16
BLOCK = 65_536
"""Elements converted at a time: 256 KiB of float32, which stay in a core's second-level cache."""


def is_cast(stored: str, wanted: str | None) -> bool:
    """Return whether a stored tensor changes when `wanted` is asked for. Integers and quantized formats never do."""
    return wanted is not None and stored != wanted and stored in CASTABLE


def cast(source: memoryview, stored: str, wanted: str, target: memoryview) -> memoryview:
    """Convert the elements in `source` into `target`; return the part of `target` that was filled.
    Rounds to nearest even as torch's `.to()` does, through float32 where torch does too (float64 → half formats), bit
    for bit but for the payload of NaNs, where torch's own loops differ among each other. Overflow gives infinity."""
    import numpy

    from bigpipe.bigmodel.formats.encoders.floats import BITS, convert

    filled = target[: len(source) // itemsize(stored) * itemsize(wanted)]
    bits, result = numpy.frombuffer(source, BITS[stored]), numpy.frombuffer(filled, BITS[wanted])
    for start in range(0, bits.size, BLOCK):
        result[start : start + BLOCK] = convert(bits[start : start + BLOCK], stored, wanted)
    return filled


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
        """Give the contiguous bytes of the tensor of this name, as the planned dtype."""
        own, tensor = self._own, self.checkpoint.tensors[planned.name]
        source = own.files.source(tensor.file)
        if not is_cast(tensor.dtype, planned.dtype):
            yield from self.checkpoint.pieces(tensor.name, source, CHUNK, own.buffers)
            return
        widths = itemsize(tensor.dtype), itemsize(planned.dtype)
        size = CHUNK // max(widths) * widths[0]
        for piece in self.checkpoint.pieces(tensor.name, source, size, itertools.repeat(own.stored)):
            yield cast(piece, tensor.dtype, planned.dtype, next(own.buffers))

    def close(self, file: Path) -> None:
        """Let go of a file that nobody reads any more; from any thread."""
        for files in self._opened:
            files.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for files in self._opened:
            files.__exit__()

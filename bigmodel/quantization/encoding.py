"""Reads and encodes weights over several threads, a chunk at a time, giving the results in order.

numpy lets go of the interpreter lock inside its loops, so threads encode side by side; each has buffers of its own, a
few chunks are in flight, and the next weight is begun while the last one is being written. With a device in the
settings the threads read, send chunks there and fetch the results, each on a stream of its own.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from bigpipe.bigmodel.checkpoint import Checkpoint, FileSource, OpenFiles
from bigpipe.bigmodel.formats import Encoder, MeasuringEncoder
from bigpipe.bigmodel.formats.encoders import BLOCK
from bigpipe.bigmodel.formats.encoders.floats import BITS, Bits, convert

from .outline import Converted
from .settings import Settings

TASK = 1 << 20
"""Elements that one thread reads and encodes at a time."""
CHUNK = 1 << 18
"""Elements in a thread's buffers at a time; they stay in the core's own cache."""
DEVICE_CHUNK = 1 << 20
"""The same on a device: enough for a kernel launch to cost little beside its work."""
IN_FLIGHT = 3
"""Tasks per thread that may be done and not yet taken."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an encoded weight: bytes of its codes, and its scales (absmax per block, or per row)."""

    weight: Converted
    codes: NDArray[Any]
    scales: NDArray[np.float32]
    last: bool


Encode = Callable[[Bits, Converted], tuple[NDArray[Any], NDArray[np.float32]]]


class WeightEncoder:
    """Encodes weights of one checkpoint by one set of settings."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, workers: int = 2) -> None:
        self.checkpoint = checkpoint
        self.settings = settings
        self.workers = workers
        self._chunk = CHUNK if settings.device is None else DEVICE_CHUNK
        self._pool = ThreadPoolExecutor(workers, "encode")
        self._local = threading.local()
        self._files = OpenFiles(checkpoint)

    def encode(self, weights: Iterable[Converted]) -> Iterator[Piece]:
        """All pieces of all weights, in order."""
        return self._run(weights, self._encode_bits)

    def absmax(self, weights: Iterable[Converted]) -> Iterator[Piece]:
        """As `encode`, without codes: the absmax values alone, for whoever must know them before the codes."""
        return self._run(weights, self._absmax_bits)

    def _run(self, weights: Iterable[Converted], encode: Encode) -> Iterator[Piece]:
        waiting: deque[Future[Piece]] = deque()
        try:
            for weight in weights:
                for task in self._tasks(weight, encode):
                    waiting.append(self._pool.submit(task))
                    if len(waiting) > self.workers * IN_FLIGHT:
                        yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _tasks(self, weight: Converted, encode: Encode) -> Iterator[Callable[[], Piece]]:
        """The weight in runs of whole rows where rows have scales or lie apart, of whole blocks elsewhere."""
        rows, columns = weight.shape
        whole = self._whole(weight)
        flat = whole is None and not weight.packing.by_rows
        step = TASK if flat else _rows_per_task(columns) * columns
        for start in range(0, rows * columns, step):
            stop = min(start + step, rows * columns)
            read = self._reader(weight, whole, start, stop)
            yield lambda read=read, stop=stop: self._piece(weight, read, encode, stop == rows * columns)  # type: ignore[misc]

    def _piece(self, weight: Converted, read: Callable[[], Bits], encode: Encode, last: bool) -> Piece:
        bits, columns = read(), weight.shape[1]
        step = max(1, self._chunk // columns) * columns if weight.packing.by_rows else self._chunk
        pieces = [
            encode(self._prepared(bits[start : start + step], weight), weight) for start in range(0, bits.size, step)
        ]
        codes = [codes.reshape(-1).view(np.uint8) for codes, _ in pieces]
        scales = [scales for _, scales in pieces]
        return Piece(weight, np.concatenate(codes), np.concatenate(scales), last)

    def _prepared(self, bits: Bits, weight: Converted) -> Bits:
        """In the dtype that everything is cast to, then in the one that the packing goes through; perhaps as rows."""
        bits = convert(convert(bits, weight.stored_dtype, weight.dtype), weight.dtype, _encoded_dtype(weight))
        return bits.reshape(-1, weight.shape[1]) if weight.packing.by_rows else bits

    def _encode_bits(self, bits: Bits, weight: Converted) -> tuple[NDArray[Any], NDArray[np.float32]]:
        return self._encoder(weight).encode(bits, weight.measured)

    def _absmax_bits(self, bits: Bits, weight: Converted) -> tuple[NDArray[Any], NDArray[np.float32]]:
        return np.empty(0, np.uint8), cast(MeasuringEncoder, self._encoder(weight)).absmax(bits)

    def _encoder(self, weight: Converted) -> Encoder:
        """This thread's own, for numbers of this dtype; a row may be wider than a chunk."""
        dtype = _encoded_dtype(weight)
        size = max(self._chunk, weight.shape[1]) if weight.packing.by_rows else self._chunk
        made: tuple[int, str] = getattr(self._local, "made", (0, ""))
        if made[0] < size or made[1] != dtype:
            self._local.made = size, dtype
            self._local.encoder = weight.packing.encoder(dtype, size, self.settings.device)
        encoder: Encoder = self._local.encoder
        return encoder

    def _reader(self, weight: Converted, whole: Bits | None, start: int, stop: int) -> Callable[[], Bits]:
        if whole is not None:
            columns = weight.shape[1]
            rows = whole[start // columns : stop // columns]
            return lambda: np.ascontiguousarray(rows).reshape(-1)
        tensor = self.checkpoint.placed(weight.source)
        source, width = self._files.source(tensor.file), BITS[tensor.dtype].itemsize
        return lambda: self._read(source, tensor.offset + start * width, stop - start, BITS[tensor.dtype])

    def _read(self, source: FileSource, offset: int, count: int, dtype: np.dtype[Any]) -> Bits:
        """Into this thread's own buffer: fresh memory costs as much as the reading."""
        nbytes = count * dtype.itemsize
        buffer: NDArray[np.uint8] | None = getattr(self._local, "buffer", None)
        if buffer is None or buffer.size < nbytes:
            buffer = self._local.buffer = np.empty(max(nbytes, TASK * dtype.itemsize), np.uint8)
        filled = buffer[:nbytes]
        source.read_into(filled.data, offset)
        return filled.view(dtype)

    def _whole(self, weight: Converted) -> Bits | None:
        """All bits as (out, in) where they do not lie in that order in the file: Conv1D, and strided views."""
        tensor = self.checkpoint.placed(weight.source)
        if not weight.transposed and tensor.view is None:
            return None
        bits = np.frombuffer(self.checkpoint.read(weight.source), BITS[tensor.dtype]).reshape(tensor.shape)
        return bits.T if weight.transposed else bits

    def close(self, file: Path) -> None:
        """Lets go of a file that is not read any more."""
        self._files.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._files.__exit__()


def _encoded_dtype(weight: Converted) -> str:
    return weight.packing.through or weight.dtype


def _rows_per_task(columns: int) -> int:
    """Whole rows, of which any number holds whole blocks of 64 but perhaps at the end of the matrix."""
    unit = BLOCK // math.gcd(BLOCK, columns)
    return max(1, TASK // (columns * unit)) * unit

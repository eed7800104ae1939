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
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from bigpipe.bigmodel.checkpoint.bytesource import FileSource
from bigpipe.bigmodel.checkpoint.openfiles import OpenFiles
from bigpipe.bigmodel.checkpoint.view import Checkpoint

from .devices import CHUNK as DEVICE_CHUNK, DeviceFourBitEncoder, DeviceInt8Encoder
from .floats import BITS, Bits, convert
from .fourbit import BLOCK, FourBitEncoder
from .int8 import Int8Encoder
from .outline import Converted
from .settings import Settings

TASK = 1 << 20
"""Elements that one thread reads and encodes at a time."""
CHUNK = 1 << 18
"""Elements in a thread's buffers at a time; they stay in the core's own cache."""
IN_FLIGHT = 3
"""Tasks per thread that may be done and not yet taken."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an encoded weight: bytes of its codes, and its scales (absmax per block, or per row)."""

    weight: Converted
    codes: NDArray[Any]
    scales: NDArray[np.float32]
    last: bool


Encoder = FourBitEncoder | Int8Encoder | DeviceFourBitEncoder | DeviceInt8Encoder
Encode = Callable[[Bits, str], tuple[NDArray[Any], NDArray[np.float32]]]


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
        step = TASK if self.settings.four_bit and whole is None else _rows_per_task(columns) * columns
        for start in range(0, rows * columns, step):
            stop = min(start + step, rows * columns)
            read = self._reader(weight, whole, start, stop)
            yield lambda read=read, stop=stop: self._piece(weight, read, encode, stop == rows * columns)  # type: ignore[misc]

    def _piece(self, weight: Converted, read: Callable[[], Bits], encode: Encode, last: bool) -> Piece:
        bits, columns = read(), weight.shape[1]
        step = self._chunk if self.settings.four_bit else max(1, self._chunk // columns) * columns
        pieces = [
            encode(self._prepared(bits[start : start + step], weight, columns), weight.dtype)
            for start in range(0, bits.size, step)
        ]
        codes = [codes.reshape(-1).view(np.uint8) for codes, _ in pieces]
        scales = [scales for _, scales in pieces]
        return Piece(weight, np.concatenate(codes), np.concatenate(scales), last)

    def _prepared(self, bits: Bits, weight: Converted, columns: int) -> Bits:
        """In the dtype that everything is cast to; for int8 then in fp16, as rows."""
        bits = convert(bits, weight.stored_dtype, weight.dtype)
        if self.settings.four_bit:
            return bits
        return convert(bits, weight.dtype, "float16").reshape(-1, columns)

    def _encode_bits(self, bits: Bits, dtype: str) -> tuple[NDArray[Any], NDArray[np.float32]]:
        return self._encoder(bits.shape[-1], dtype).encode(bits)

    def _absmax_bits(self, bits: Bits, dtype: str) -> tuple[NDArray[Any], NDArray[np.float32]]:
        encoder = self._encoder(bits.shape[-1], dtype)
        assert isinstance(encoder, FourBitEncoder | DeviceFourBitEncoder)  # noqa: S101
        return np.empty(0, np.uint8), encoder.absmax(bits)

    def _encoder(self, width: int, dtype: str) -> Encoder:
        """This thread's own, for numbers of this dtype; a row of an int8 matrix may be wider than a chunk."""
        size = self._chunk if self.settings.four_bit else max(self._chunk, width)
        made: tuple[int, str] = getattr(self._local, "made", (0, ""))
        if made[0] < size or made[1] != dtype:
            self._local.made = size, dtype
            self._local.encoder = _make_encoder(self.settings, dtype, size)
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


def _make_encoder(settings: Settings, dtype: str, size: int) -> Encoder:
    device = settings.device
    if not settings.four_bit:
        return Int8Encoder(size) if device is None else DeviceInt8Encoder(device, size)
    if device is None:
        return FourBitEncoder(dtype, settings.scheme, size)
    return DeviceFourBitEncoder(device, dtype, settings.scheme, size)


def _rows_per_task(columns: int) -> int:
    """Whole rows, of which any number holds whole blocks of 64 but perhaps at the end of the matrix."""
    unit = BLOCK // math.gcd(BLOCK, columns)
    return max(1, TASK // (columns * unit)) * unit

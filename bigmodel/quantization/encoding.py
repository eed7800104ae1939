"""Reads and encodes weights over several threads, a chunk at a time, giving the results in order.

numpy lets go of the interpreter lock inside its loops, so threads encode side by side; each has buffers of its own, a
few chunks are in flight, and the next weight is begun while the last one is being written. With a device in the
settings the threads read, send chunks there and fetch the results, each on a stream of its own. A device is asked for a
sample first, which must come out as numpy encodes it.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from bigpipe.bigmodel.checkpoint import FETCH_AGAIN, Checkpoint, FileSource, OpenFiles, beyond, invalid
from bigpipe.bigmodel.formats import Encoder, MeasuringEncoder
from bigpipe.bigmodel.formats.encoders import BLOCK
from bigpipe.bigmodel.formats.encoders.floats import BITS, LARGEST, Bits, all_finite, convert, widen_any
from bigpipe.errors import BigpipeError, InvalidCheckpoint, StageFailed, UsageError
from bigpipe.names import listed

from .outline import Converted, Settings

TASK = 1 << 20
"""Elements that one thread reads and encodes at a time."""
CHUNK = 1 << 18
"""Elements in a thread's buffers at a time; they stay in the core's own cache."""
DEVICE_CHUNK = 1 << 20
"""The same on a device: enough for a kernel launch to cost little beside its work."""
IN_FLIGHT = 3
"""Tasks per thread that may be done and not yet taken."""
SAMPLE, COLUMNS = 1 << 15, 128
"""Numbers that a device encodes as numpy does before it may encode weights."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an encoded weight: bytes of its codes, and its scales (absmax per block, or per row)."""

    codes: NDArray[Any]
    scales: NDArray[np.float32]
    last: bool


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

    def encode(self, weights: Iterable[Converted], *, codes: bool = True) -> Iterator[Piece]:
        """Return all pieces of all weights, in order. Without codes: the absmax values that must be known before."""
        waiting: deque[Future[Piece]] = deque()
        try:
            for weight in weights:
                for task in self._tasks(weight, codes):
                    waiting.append(self._pool.submit(task))
                    if len(waiting) > self.workers * IN_FLIGHT:
                        yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def _tasks(self, weight: Converted, codes: bool) -> Iterator[Callable[[], Piece]]:
        """The weight in runs of whole rows where rows have scales or lie apart, of whole blocks elsewhere."""
        rows, columns = weight.shape
        whole = self._whole(weight)
        decoded = self.checkpoint.tensors[weight.source].made is not None
        step = (
            TASK if whole is None and not weight.packing.by_rows and not decoded else _rows_per_task(columns) * columns
        )
        for start in range(0, rows * columns, step):
            stop = min(start + step, rows * columns)
            read = self._reader(weight, whole, start, stop)
            yield partial(self._piece, weight, read, codes, stop == rows * columns)

    def _piece(self, weight: Converted, read: Callable[[], Bits], codes: bool, last: bool) -> Piece:
        bits, columns = read(), weight.shape[1]
        step = max(1, self._chunk // columns) * columns if weight.packing.by_rows else self._chunk
        encoded = [self._encode(bits[start : start + step], weight, codes) for start in range(0, bits.size, step)]
        made = np.concatenate([part.reshape(-1).view(np.uint8) for part, _ in encoded])
        return Piece(made, np.concatenate([scales for _, scales in encoded]), last)

    def _encode(self, stored: Bits, weight: Converted, codes: bool) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """From the dtype that everything is cast to, through the one that the packing goes through; perhaps as rows.
        Raise InvalidCheckpoint where a largest magnitude is NaN or infinite: nothing could be read from the codes."""
        bits = convert(convert(stored, weight.stored_dtype, weight.dtype), weight.dtype, weight.encoded_dtype)
        bits = bits.reshape(-1, weight.shape[1]) if weight.packing.by_rows else bits
        encoder = self._encoder(weight)
        if codes:
            made, scales = encoder.encode(bits, weight.measured)
        else:
            made, scales = np.empty(0, np.uint8), cast(MeasuringEncoder, encoder).absmax(bits)
        if not (scales <= LARGEST[weight.packing.computes_in or weight.encoded_dtype]).all():
            raise self._unscaled(weight, stored)
        return made, scales

    def _unscaled(self, weight: Converted, stored: Bits) -> InvalidCheckpoint:
        """The error for a weight whose largest magnitude is no number, or none that it can be computed with."""
        file = self.checkpoint.tensors[weight.source].stored[0].file
        if not all_finite(stored, weight.stored_dtype):
            cause = "holds NaN or infinity, of which no scale can be made"
            cure = f"{FETCH_AGAIN}; if it was trained so, take a save from before it went wrong"
            return invalid(file, cause, cure, tensor=weight.source)
        asked = {"dtype": weight.dtype, "bnb_4bit_compute_dtype": weight.packing.computes_in}
        narrow = [name for name, dtype in asked.items() if dtype == "float16" and not weight.packing.through]
        cure = f"take bfloat16 for {listed(narrow)}" if narrow else "take nf4 or fp4 in bfloat16, or skip this module"
        return beyond(weight.source, "float16", file, cure)

    def _encoder(self, weight: Converted) -> Encoder:
        """This thread's own, for numbers of this dtype; a row may be wider than a chunk."""
        dtype = weight.encoded_dtype
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
        if tensor.made is not None:
            first, last = start // weight.shape[1], stop // weight.shape[1]
            return lambda: np.frombuffer(self.checkpoint.rows(tensor, self._files, first, last), BITS[tensor.dtype])
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
        """Let go of a file that is not read any more."""
        self._files.close(file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._files.__exit__()


def _rows_per_task(columns: int) -> int:
    """Whole rows, of which any number holds whole blocks of 64 but perhaps at the end of the matrix."""
    unit = BLOCK // math.gcd(BLOCK, columns)
    return max(1, TASK // (columns * unit)) * unit


def usable_device(settings: Settings) -> str | None:
    """Return the GPU to encode on; None where torch can use none, or none gives the same bytes."""
    try:
        import torch

        if not torch.cuda.is_available():
            return None
        check_device("cuda", settings)
    except (BigpipeError, ImportError, RuntimeError):
        return None
    return "cuda"


def check_device(device: str, settings: Settings) -> None:
    """Raise UsageError where torch has no such device, StageFailed where it encodes a sample differently."""
    import torch

    cure = "leave device out to encode on the CPU"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:  # CPU builds of torch assert
        first = str(error).partition("\n")[0]
        raise UsageError(f"device {device!r} cannot be used: {first}", cure) from None
    if _encoded(device, settings) != _encoded(None, settings):
        raise StageFailed(f"device {device!r} rounds differently from the CPU in a sample of numbers", cure)


def _encoded(device: str | None, settings: Settings) -> tuple[bytes, bytes]:
    """(codes, scales) of a sample; device None: by numpy."""
    packing, dtype = settings.packing, settings.packing.through or settings.dtype
    sample = _sample(dtype)
    encoder = packing.encoder(dtype, sample.size, device)
    codes, scales = encoder.encode(sample.reshape(-1, COLUMNS) if packing.by_rows else sample)
    return codes.tobytes(), scales.tobytes()


def _sample(dtype: str) -> Bits:
    """Zeros, numbers of every finite magnitude, and such as weights are."""
    random = np.random.default_rng(0)
    width = BITS[dtype]
    wild = random.integers(0, 1 << 8 * width.itemsize, SAMPLE).astype(width)
    wild[~np.isfinite(widen_any(wild, dtype, np.empty(SAMPLE, np.float32)))] = 0
    tame = random.standard_normal(SAMPLE).astype(np.float32).view(np.uint32)
    return np.concatenate([np.zeros(2 * COLUMNS, width), wild, convert(tame, "float32", dtype)])

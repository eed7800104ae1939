"""Reading byte ranges: from a local file here, over HTTP in `hub`; and strided views as contiguous bytes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from bigpipe.errors import StageFailed

from .tensors import TensorInfo, invalid, itemsize

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, Any]

SPAN = 16 * 2**20


class ByteSource(Protocol):
    """Something with a size of which ranges can be read."""

    @property
    def name(self) -> str:
        """A path or URL for error messages."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes:
        """Return exactly `length` bytes. Raise InvalidCheckpoint where the source ends before."""


class FileSource:
    """A local file, opened once. Positions are absolute, so threads may share one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        # Without O_NONBLOCK a FIFO that replaced the file since it was checked would hang us.
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        self.size = os.fstat(self._file).st_size
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    @property
    def name(self) -> str:
        return str(self.path)

    def read(self, offset: int, length: int) -> bytes:
        if offset < 0 or offset + length > self.size:
            raise self._cut(offset + length)
        buffer = bytearray(length)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from `offset` on."""
        while buffer:
            try:
                count = os.preadv(self._file, [buffer], offset)
            except OSError as error:
                cause = f"{self.path}: cannot read byte {offset}: {error.strerror}"
                raise StageFailed(cause, "check the disk, then run again") from error
            if count == 0:
                raise self._cut(offset + len(buffer))
            buffer, offset = buffer[count:], offset + count

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _cut(self, end: int) -> Exception:
        cause = f"ends at byte {self.size}, but {end} bytes are needed"
        return invalid(self.path, cause, "fetch the file again; it was cut short")


def compact_chunks(source: FileSource, tensor: TensorInfo, size: int, span: int = SPAN) -> Iterator[memoryview]:
    """Give the elements of a view (a transposed or sliced matrix saved by torch.save) in row-major order.

    size: at most this many bytes at a time, but at least one element. span: at most so many of the file are in memory.
    """
    import numpy

    if tensor.view is None:
        raise ValueError(f"{tensor.name} is not a view")
    width = itemsize(tensor.dtype)
    strides = [stride * width for stride in tensor.view.strides]
    for offset, shape in _blocks(tensor.view.offset, tensor.shape, strides, max(1, size // width)):
        block = numpy.empty(shape, dtype=f"V{width}")
        _gather(source, block, offset, strides[len(strides) - len(shape) :], span)
        yield memoryview(block.reshape(-1).view(numpy.uint8).data)


def _blocks(
    offset: int, shape: tuple[int, ...], strides: Sequence[int], limit: int
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Cuts a view into (offset, shape) of at most `limit` elements whose contiguous forms follow each other."""
    axis, inner = len(shape) - 1, 1
    while axis >= 0 and inner * shape[axis] <= limit:
        inner *= shape[axis]
        axis -= 1
    if axis < 0:
        yield offset, shape
        return
    step = max(1, limit // inner)
    for outer in itertools.product(*(range(size) for size in shape[:axis])):
        base = offset + sum(index * stride for index, stride in zip(outer, strides, strict=False))
        for start in range(0, shape[axis], step):
            yield base + start * strides[axis], (min(step, shape[axis] - start), *shape[axis + 1 :])


def _gather(source: FileSource, block: Array, offset: int, strides: Sequence[int], span: int) -> None:
    """Fill `block` from the file, in halves along the widest stride until they span no more than `span`."""
    import numpy

    length = block.itemsize + sum((size - 1) * stride for size, stride in zip(block.shape, strides, strict=True))
    if length <= span:
        raw = source.read(offset, length)
        block[...] = numpy.ndarray(block.shape, block.dtype, raw, 0, tuple(strides))
        return
    axis = max((axis for axis, size in enumerate(block.shape) if size > 1), key=lambda axis: strides[axis])
    half = block.shape[axis] // 2
    first, second = numpy.split(block, [half], axis)
    _gather(source, first, offset, strides, span)
    _gather(source, second, offset + half * strides[axis], strides, span)

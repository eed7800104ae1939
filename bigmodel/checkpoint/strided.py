"""Tensors stored as strided views (a transposed or sliced matrix saved by torch.save), read as contiguous bytes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .bytesource import FileSource
from .tensors import TensorInfo, itemsize

if TYPE_CHECKING:
    import numpy

    Array = numpy.ndarray[Any, Any]

SPAN = 16 * 2**20


def compact_chunks(source: FileSource, tensor: TensorInfo, size: int, span: int = SPAN) -> Iterator[memoryview]:
    """Give the elements of a view in row-major order, at most `size` bytes at a time (at least one element).

    span: at most this many bytes of the file are in memory at once.
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

"""Weights as memory: files mapped once, tensors that are windows into them, hints to the kernel.

A window costs no copy, and its pages are the page cache's: several ranks on one machine share them, and the kernel may
take them back at any time. Maps are private and writable, so code that changes a weight in place changes its own copy
of that page and never the file.
"""

from __future__ import annotations

import ctypes
import errno
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from bigpipe.errors import StageFailed

from .tensors import DECODED, TensorInfo

if TYPE_CHECKING:
    import torch

NO_RESERVE = 0x4000 if os.uname().sysname == "Linux" else 0
"""MAP_NORESERVE: a private writable map of a file larger than memory is not a promise of that much memory."""
DROP = 4
"""MADV_DONTNEED."""
POPULATE = 22
"""MADV_POPULATE_READ, Linux 5.14: reads pages in, and reports a failing disk as an error instead of SIGBUS."""
HUGE = 14
"""MADV_HUGEPAGE: what is read in from here on lies in pages of 2 MiB, where the file system has them (XFS; ext4 since
Linux 6.16), and is in the process with one step for each instead of 512."""
READ_IN = (0, errno.EINVAL)
"""What populating may answer; the second comes from an older kernel, which reads pages in when they are touched."""
LONG = 32 * 2**20
"""Bytes in a row that are worth huge pages: at its ends some of what lies beside it is read too."""


@dataclass(frozen=True, slots=True)
class _Span:
    """Bytes of a file, and the first tensor that they belong to."""

    tensor: TensorInfo
    start: int
    stop: int


class _Map:
    """A weight file in memory, for as long as a tensor looks into it."""

    def __init__(self, path: Path) -> None:
        with path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            self.memory = mmap.mmap(
                file.fileno(), self.size, flags=mmap.MAP_PRIVATE | NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))


class MappedFiles:
    """The files of one checkpoint, each mapped when first asked for."""

    def __init__(self) -> None:
        self._maps: dict[Path, _Map] = {}

    def _map(self, tensor: TensorInfo) -> _Map:
        if tensor.file not in self._maps:
            self._maps.setdefault(tensor.file, _Map(tensor.file))  # of several threads one maps it
        return self._maps[tensor.file]

    def window(self, tensor: TensorInfo) -> torch.Tensor:
        """Return the stored tensor, in its stored dtype, on the CPU: a copy only where its bytes are not aligned."""
        import torch

        dtype = getattr(torch, tensor.dtype)
        if not tensor.nbytes:
            return torch.empty(tensor.shape, dtype=dtype)
        if tensor.made is not None:
            return self._decoded(tensor, dtype)
        start, length = _span(tensor)
        mapped = self._map(tensor)
        if start + length > mapped.size:
            raise _unreadable(tensor, "the file is shorter")
        flat = torch.frombuffer(mapped.memory, dtype=torch.uint8, count=length, offset=start)
        if (mapped.address + start) % dtype.itemsize:
            flat = flat.clone()
        if tensor.view is not None:
            return flat.view(dtype).as_strided(tensor.shape, tensor.view.strides)
        return flat.view(dtype).reshape(tensor.shape)

    def _decoded(self, tensor: TensorInfo, dtype: torch.dtype) -> torch.Tensor:
        import torch

        assert tensor.made is not None  # noqa: S101
        decoder, filled = tensor.made.decoder, 0
        stored = [self.window(part).contiguous().reshape(-1).view(torch.uint8) for part in tensor.made.parts]
        whole = torch.empty(tensor.nbytes, dtype=torch.uint8)
        for start, stop in tensor.runs(DECODED):
            ranges = zip(stored, decoder.ranges(start, stop), strict=True)
            parts = [part[first : first + size].numpy().data for part, (first, size) in ranges]
            made = torch.frombuffer(tensor.decode(start, stop, parts), dtype=torch.uint8)
            whole[filled : filled + made.numel()] = made
            filled += made.numel()
        return whole.view(dtype).reshape(tensor.shape)

    def populate(self, tensors: Sequence[TensorInfo], rows: Iterable[int] | None = None) -> None:
        """Read the tensors' pages in, or those of some of their rows, in the order of the files and without holding
        Python's lock. Raise StageFailed where the disk fails."""
        spans = _in_order(tensors, rows)
        for run in _runs(spans):
            if run.stop - run.start >= LONG:
                self._advise(run, HUGE)
            if self._advise(run, POPULATE) not in READ_IN:
                for span in spans:  # each by itself, to name the one that fails
                    if (error := self._advise(span, POPULATE)) not in READ_IN:
                        raise _unreadable(span.tensor, os.strerror(error))

    def drop(self, tensors: Sequence[TensorInfo]) -> None:
        """Take the tensors' pages out of this process; the next look reads them again."""
        for run in _runs(_in_order(tensors)):
            self._advise(run, DROP)

    def _advise(self, span: _Span, advice: int) -> int:
        """0 or an errno. Through ctypes, because `mmap.madvise` keeps Python's lock while the disk turns."""
        if span.start == span.stop:
            return 0
        first, mapped = span.start // mmap.PAGESIZE * mmap.PAGESIZE, self._map(span.tensor)
        if span.stop > mapped.size:  # of a file that was cut: what lies behind its map is other memory
            return errno.EFAULT
        failed = _libc().madvise(mapped.address + first, span.stop - first, advice)
        return ctypes.get_errno() if failed else 0


def _in_order(tensors: Sequence[TensorInfo], rows: Iterable[int] | None = None) -> list[_Span]:
    """As they lie in the files, in which order these are read ahead."""
    spans = (span for tensor in _stored(tensors) for span in _spans(tensor, rows))
    return sorted(spans, key=lambda span: (span.tensor.file, span.start))


def _spans(tensor: TensorInfo, rows: Iterable[int] | None = None) -> Iterator[_Span]:
    """Of the whole tensor, or of its rows that are asked for and there: others are the model's to refuse."""
    start, length = _span(tensor)
    if rows is None or tensor.view is not None:
        yield _Span(tensor, start, start + length)
        return
    size = tensor.nbytes // tensor.shape[0]
    there = (row for row in rows if 0 <= row < tensor.shape[0])
    yield from (_Span(tensor, start + row * size, start + (row + 1) * size) for row in there)


def _runs(spans: Iterable[_Span]) -> Iterator[_Span]:
    """Spans in order, what lies one after the other in a file as one."""
    run: _Span | None = None
    for span in spans:
        if run is None:
            run = span
        elif run.tensor.file == span.tensor.file and span.start <= run.stop + mmap.PAGESIZE:
            run = replace(run, stop=max(run.stop, span.stop))
        else:
            yield run
            run = span
    if run is not None:
        yield run


def overflows(made: torch.Tensor, stored: Iterable[torch.Tensor]) -> bool:
    """Return whether a number became infinite in what was cast from stored tensors, which are looked at only where
    something is infinite."""
    if not made.numel() or not any(bound.isinf() for bound in made.aminmax()):
        return False
    return int(made.isinf().sum()) > sum(int(tensor.isinf().sum()) for tensor in stored)


def _stored(tensors: Iterable[TensorInfo]) -> Iterator[TensorInfo]:
    return (part for tensor in tensors for part in tensor.stored)


def _unreadable(tensor: TensorInfo, reason: str) -> StageFailed:
    start, length = _span(tensor)
    return StageFailed(
        f"{tensor.file}: bytes {start}–{start + length} ({tensor.name}) cannot be read: {reason}",
        "the file was cut, or its disk fails: `bigpipe verify --repair` makes a damaged artifact again",
    )


def _span(tensor: TensorInfo) -> tuple[int, int]:
    """First byte and number of bytes that hold all elements, of a strided view too."""
    if tensor.view is None or not tensor.nbytes:
        return tensor.offset, tensor.nbytes
    item = tensor.nbytes // max(1, math.prod(tensor.shape))
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.view.strides, strict=True))
    return tensor.view.offset, (last + 1) * item


@cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return library

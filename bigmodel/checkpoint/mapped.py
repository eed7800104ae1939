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
        """Read the tensors' pages in, or those of some of their rows, without holding Python's lock.
        Raise StageFailed where the disk fails."""
        for tensor in _stored(tensors):
            start, length = _span(tensor)
            spans = [(start, length)]
            if rows is not None and tensor.view is None:
                size = tensor.nbytes // tensor.shape[0]
                # others are the model's to refuse
                spans = [(start + row * size, size) for row in rows if 0 <= row < tensor.shape[0]]
            for span in spans:
                error = self._advise(tensor, *span, POPULATE)
                if error not in (
                    0,
                    errno.EINVAL,
                ):  # EINVAL: an older kernel, which reads pages in when they are touched
                    raise _unreadable(tensor, os.strerror(error))

    def drop(self, tensors: Sequence[TensorInfo]) -> None:
        """Take the tensors' pages out of this process; the next look reads them again."""
        for tensor in _stored(tensors):
            self._advise(tensor, *_span(tensor), DROP)

    def _advise(self, tensor: TensorInfo, start: int, length: int, advice: int) -> int:
        """0 or an errno. Through ctypes, because `mmap.madvise` keeps Python's lock while the disk turns."""
        if not length:
            return 0
        first, mapped = start // mmap.PAGESIZE * mmap.PAGESIZE, self._map(tensor)
        if start + length > mapped.size:  # of a file that was cut: what lies behind its map is other memory
            return errno.EFAULT
        failed = _libc().madvise(mapped.address + first, start + length - first, advice)
        return ctypes.get_errno() if failed else 0


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

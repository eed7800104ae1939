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
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from bigpipe.errors import StageFailed

from .tensors import TensorInfo

if TYPE_CHECKING:
    import torch

NO_RESERVE = 0x4000 if os.uname().sysname == "Linux" else 0
"""MAP_NORESERVE: a private writable map of a file larger than memory is not a promise of that much memory."""
DROP = 4
"""MADV_DONTNEED."""
POPULATE = 22
"""MADV_POPULATE_READ, Linux 5.14: reads pages in, and reports a failing disk as an error instead of SIGBUS."""


class MappedFile:
    """A weight file in memory, for as long as a tensor looks into it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self.size = os.fstat(file.fileno()).st_size
            self._map = mmap.mmap(
                file.fileno(), self.size, flags=mmap.MAP_PRIVATE | NO_RESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def window(self, tensor: TensorInfo) -> torch.Tensor:
        """The stored tensor, in its stored dtype, on the CPU. A copy only where its bytes are not aligned."""
        import torch

        dtype = getattr(torch, tensor.dtype)
        if not tensor.nbytes:
            return torch.empty(tensor.shape, dtype=dtype)
        start, length = _span(tensor)
        if start + length > self.size:
            raise self._unreadable(tensor, "the file is shorter")
        flat = torch.frombuffer(self._map, dtype=torch.uint8, count=length, offset=start)
        if (self._address + start) % dtype.itemsize:
            flat = flat.clone()
        if tensor.view is not None:
            return flat.view(dtype).as_strided(tensor.shape, tensor.view.strides)
        return flat.view(dtype).reshape(tensor.shape)

    def populate(self, tensor: TensorInfo, rows: Iterable[int] | None = None) -> None:
        """Reads the tensor's pages in, or those of some of its rows, without holding Python's lock.

        Raises StageFailed where the disk fails.
        """
        start, length = _span(tensor)
        if rows is None or tensor.view is not None:
            self._read(tensor, start, length)
            return
        size = tensor.nbytes // tensor.shape[0]
        for row in rows:
            if 0 <= row < tensor.shape[0]:  # others are the model's to refuse
                self._read(tensor, start + row * size, size)

    def _read(self, tensor: TensorInfo, start: int, length: int) -> None:
        error = self._advise(start, length, POPULATE)
        if error not in (0, errno.EINVAL):  # EINVAL: an older kernel, which reads pages in when they are touched
            raise self._unreadable(tensor, os.strerror(error))

    def drop(self, tensor: TensorInfo) -> None:
        """Takes the tensor's pages out of this process; the next look reads them again."""
        self._advise(*_span(tensor), DROP)

    def _advise(self, start: int, length: int, advice: int) -> int:
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        return _madvise(self._address + first, start + length - first, advice) if length else 0

    def _unreadable(self, tensor: TensorInfo, reason: str) -> StageFailed:
        start, length = _span(tensor)
        return StageFailed(
            f"{self.path}: bytes {start}–{start + length} ({tensor.name}) cannot be read: {reason}",
            "the file was cut, or its disk fails: `bigpipe verify --repair` makes a damaged artifact again",
        )


class MappedFiles:
    """The files of one checkpoint, each mapped when first asked for."""

    def __init__(self) -> None:
        self._files: dict[Path, MappedFile] = {}

    def __getitem__(self, tensor: TensorInfo) -> MappedFile:
        if tensor.file not in self._files:
            self._files[tensor.file] = MappedFile(tensor.file)
        return self._files[tensor.file]

    def window(self, tensor: TensorInfo) -> torch.Tensor:
        return self[tensor].window(tensor)

    def populate(self, tensors: Sequence[TensorInfo], rows: Iterable[int] | None = None) -> None:
        for tensor in tensors:
            self[tensor].populate(tensor, rows)

    def drop(self, tensors: Sequence[TensorInfo]) -> None:
        for tensor in tensors:
            self[tensor].drop(tensor)


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


def _madvise(address: int, length: int, advice: int) -> int:
    """0 or an errno. Through ctypes, because `mmap.madvise` keeps Python's lock while the disk turns."""
    return ctypes.get_errno() if _libc().madvise(address, length, advice) else 0

"""The way of weights from RAM to a GPU, beside what it computes.

    stream of the forwards     … group k-1 | group k ──────────────────── | group k+1 …
    stream of the copies                   └ lay k+1 over k-1 ────┘ waited for by the CPU, then attached

Copies have a stream of their own, so that they and products go on at a time. A GPU cannot copy pages of a file itself:
they go through two blocks of pinned memory in turn, of which the CPU fills one while the other is copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import cycle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Copy = Callable[["torch.Tensor", "torch.Tensor"], object]
"""Called with a target and a source of the same shape, whose numbers are cast to the target's dtype."""
BLOCK = 16 * 2**20
"""Bytes of pinned memory, of which there are two: enough for a copy to take much longer than being asked for."""


def copy_at_once(target: torch.Tensor, source: torch.Tensor) -> None:
    """In one piece, on the stream that is current."""
    target.copy_(source)


class Crossing:
    """The way to one GPU. It is asked for by the thread that computes, and gone by one other."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.inference_mode(False):  # they are written to outside of the forward that needs them first
            blocks = [torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        self._blocks = cycle([(block, torch.cuda.Event()) for block in blocks])  # type: ignore[no-untyped-call]

    def after_this(self) -> AbstractContextManager[Copy]:
        """Return a context for the thread that copies. Inside, torch works on the stream of the copies, once the GPU
        has done all that it was asked for before this call: what that reads may be written over. At its end all copies
        are there."""
        import torch

        forwards = torch.cuda.current_stream(self._device)
        return self._open(forwards, forwards.record_event())

    @contextmanager
    def _open(self, forwards: torch.cuda.Stream, asked: torch.cuda.Event) -> Iterator[Copy]:
        import torch

        self._stream.wait_event(asked)
        try:
            with torch.cuda.stream(self._stream):
                yield partial(self._copy, forwards)
        finally:
            self._stream.synchronize()

    def _copy(self, forwards: torch.cuda.Stream, target: torch.Tensor, source: torch.Tensor) -> None:
        target.record_stream(forwards)  # its memory is nobody else's before they are done with it, whenever it is freed
        for there, here in pieces(target, source):
            block, copied = next(self._blocks)
            copied.synchronize()  # at once where nothing was copied from it yet
            pinned = block[: there.nbytes].view(there.dtype)
            pinned.copy_(here)
            there.copy_(pinned, non_blocking=True)
            copied.record(self._stream)


def pieces(target: torch.Tensor, source: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Return parts of both that are alike, flat, of at most `BLOCK` bytes of the target, which is contiguous."""
    import torch

    flat, count = source.reshape(-1), BLOCK // target.dtype.itemsize
    return zip(torch.split(target.view(-1), count), torch.split(flat, count), strict=True)

"""Recomputes every tensor and holds it against the published one, piece by piece."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from bigpipe.bigmodel.checkpoint import CHUNK, Checkpoint, OpenFiles, TensorInfo
from bigpipe.bigmodel.quantization import Converted, Kept, Settings, recompute
from bigpipe.bigmodel.writing import PlannedTensor

from .measuring import measured
from .results import Difference, What

Report = Callable[[int, int], None]
"""Called with the bytes that were compared, and all that are to be."""


@dataclass
class Comparison:
    """What was found so far."""

    published: Checkpoint
    total: int
    """Bytes of all that is expected."""
    progress: Report
    differences: list[Difference] = field(default_factory=list)
    equal: Counter[str] = field(default_factory=Counter)
    """By name of a weight file, the bytes of its tensors that are as they should be."""
    done: int = 0

    def file(self, name: str) -> str:
        """The published file that holds a tensor; "" where none does."""
        tensor = self.published.tensors.get(name)
        return tensor.file.name if tensor else ""

    def differs(self, name: str, what: What, detail: str) -> None:
        self.differences.append(Difference(name, self.file(name), what, detail))


def compare(
    published: Checkpoint, source: Checkpoint, parts: Sequence[Converted | Kept], settings: Settings, progress: Report
) -> tuple[Comparison, tuple[str, ...]]:
    """Recompute these parts of a source; return what is the same and what is not, in the order of the source, and notes
    on how it was summed."""
    weights, notes = measured(published, source, parts, settings)
    planned = [tensor for part in weights for tensor in part.outputs]
    comparison = Comparison(published, sum(tensor.nbytes for tensor in planned), progress)
    with OpenFiles(published) as files:
        for tensor, pieces in recompute(source, weights, settings):
            _compare(comparison, tensor, pieces, files)
    expected = {tensor.name for tensor in planned}
    for name in published.tensors:
        if name not in expected:
            comparison.differs(name, "extra", "the source gives no such tensor")
    return comparison, notes


def _compare(
    comparison: Comparison, wanted: PlannedTensor, pieces: Iterable[memoryview | bytes], files: OpenFiles
) -> None:
    """All pieces are taken, whatever there is to be compared: those of the next tensor come after them."""
    found = comparison.published.tensors.get(wanted.name)
    comparable = found is not None and (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    stored = _Stored(comparison.published, found, files) if found and comparable else None
    at = wrong = first = 0
    for piece in pieces:
        view = memoryview(piece).cast("B")
        if stored is not None:
            for start, count in stored.unlike(view, at):
                first, wrong = (start if not wrong else first), wrong + count
        at += len(view)
        comparison.done += len(view)
        comparison.progress(comparison.done, comparison.total)
    if found is None:
        comparison.differs(
            wanted.name, "missing", f"the source gives {wanted.dtype} {list(wanted.shape)}, and it is not there"
        )
    elif found.dtype != wanted.dtype:
        comparison.differs(wanted.name, "dtype", f"is {found.dtype}, and the source gives {wanted.dtype}")
    elif found.shape != wanted.shape:
        comparison.differs(wanted.name, "shape", f"is {list(found.shape)}, and the source gives {list(wanted.shape)}")
    else:
        comparison.equal[found.file.name] += at - wrong
        if wrong:
            comparison.differs(wanted.name, "bytes", f"{wrong:,} of {at:,} bytes differ, the first is byte {first:,}")


class _Stored:
    """The bytes of a published tensor, read where they lie."""

    def __init__(self, checkpoint: Checkpoint, tensor: TensorInfo, files: OpenFiles) -> None:
        self._tensor, self._files = tensor, files
        self._whole = checkpoint.read(tensor.name) if tensor.view is not None else None

    def unlike(self, piece: memoryview, at: int) -> Iterator[tuple[int, int]]:
        """Give (first, how many) of the bytes that differ in runs of `CHUNK` from byte `at` on."""
        for start in range(0, len(piece), CHUNK):
            ours = np.frombuffer(piece[start : start + CHUNK], np.uint8)
            theirs = np.frombuffer(self._read(at + start, ours.size), np.uint8)
            if (found := np.flatnonzero(ours != theirs)).size:
                yield at + start + int(found[0]), found.size

    def _read(self, start: int, size: int) -> memoryview | bytes:
        if self._whole is not None:
            return self._whole[start : start + size]
        return self._files.source(self._tensor.file).read(self._tensor.offset + start, size)

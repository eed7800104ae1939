"""Gives the bytes of every planned tensor of a file, in the order of the plan."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from bigpipe.bigmodel.checkpoint import itemsize
from bigpipe.bigmodel.writing import PlannedTensor, RangeReader, SafetensorsFile

from .encoding import Piece, WeightEncoder
from .outline import Converted, Kept
from .settings import Settings

Bytes = memoryview | bytes


class ShardSource:
    """Produces the tensors of one file. What is computed beside a weight waits until its turn comes."""

    def __init__(
        self, parts: Sequence[Converted | Kept], encoder: WeightEncoder, reader: RangeReader, settings: Settings
    ) -> None:
        self.settings = settings
        self._encoder = encoder
        self._reader = reader
        self._waiting: dict[str, Bytes] = {}
        self._pieces: Iterator[Piece] = iter(())
        self._parts = [self._measured(p) if isinstance(p, Converted) and p.packing.measures else p for p in parts]
        self._of = {tensor.name: part for part in self._parts for tensor in part.outputs}

    def file(self) -> SafetensorsFile:
        """The file with exact sizes: `produce` must be called in its order. Tensors of odd lengths come last."""
        tensors = [tensor for part in self._parts for tensor in part.outputs]
        tensors.sort(key=lambda tensor: -itemsize(tensor.dtype) if tensor.nbytes % 8 else -math.inf)
        met = dict.fromkeys(self._of[tensor.name] for tensor in tensors)
        self._pieces = self._encoder.encode(part for part in met if isinstance(part, Converted))
        return SafetensorsFile(tensors)

    def produce(self, tensor: PlannedTensor) -> Iterator[Bytes]:
        part = self._of[tensor.name]
        if isinstance(part, Kept):
            yield from self._reader.produce(replace(tensor, name=part.source))
        elif tensor.name in self._waiting:
            yield self._waiting.pop(tensor.name)
        elif tensor.name == part.outputs[0].name:
            yield from self._encode(part)
        else:
            # A weight of an odd length lies behind what belongs to it.
            self._waiting[part.outputs[0].name] = b"".join(self._encode(part))
            yield self._waiting.pop(tensor.name)

    def _encode(self, weight: Converted) -> Iterator[Bytes]:
        scales = []
        for piece in self._pieces:
            scales.append(piece.scales)
            yield piece.codes.data
            if piece.last:
                break
        self._waiting.update(self._beside(weight, np.concatenate(scales)))

    def _beside(self, weight: Converted, scales: NDArray[np.float32]) -> dict[str, bytes]:
        """Everything that is stored beside a weight's codes."""
        found = weight.packing.beside(weight.shape, weight.dtype, scales, weight.measured, self.settings.threads)
        return {f"{weight.module}.{suffix}": content for suffix, content in found.items()}

    def _measured(self, weight: Converted) -> Converted:
        """The weight with what must be known of all of it, and with true sizes."""
        absmax = np.concatenate([piece.scales for piece in self._encoder.absmax([weight])])
        return replace(weight, measured=weight.packing.measure(absmax, self.settings.threads))

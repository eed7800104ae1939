"""The one number of a double-quantized weight that depends on where it was made: the mean of its scales.

torch sums in an order of its own: on a CPU it depends on the number of threads, on a GPU on the GPU. The last bits of
the mean are then others, and with them the codes of scales. So the published mean is held against the sums of any
number of threads, and taken where it is one of them, or as near as a sum in another order comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bigpipe.bigmodel.checkpoint import Checkpoint
from bigpipe.bigmodel.formats import stored_offset
from bigpipe.bigmodel.quantization import Converted, Kept, Settings, largest_magnitudes
from bigpipe.sizes import counted

MOST_THREADS = 128
LARGEST_STATE = 10_000
"""Bytes."""
NEAR = 1e-6
"""Of the mean: so far may sums of float32 in different orders lie apart."""


def measured(
    published: Checkpoint, source: Checkpoint, parts: Sequence[Converted | Kept], settings: Settings
) -> tuple[list[Converted | Kept], tuple[str, ...]]:
    """Return the parts with what must be known of whole weights, and notes on what was taken as it is published."""
    weights = [part for part in parts if isinstance(part, Converted) and part.packing.measures]
    means = _Means([settings.threads, *range(1, MOST_THREADS + 1)])
    found: dict[str, Converted] = {}
    for weight, absmax in zip(weights, largest_magnitudes(source, weights, settings), strict=True):
        found[weight.source] = replace(weight, measured=means.of(weight, absmax, _published(published, weight)))
    near = f"the mean scale of {counted(means.taken, 'weight')} is taken as published: no CPU sums to its last bits"
    return [found.get(part.source, part) for part in parts], ((near,) if means.taken else ())


@dataclass
class _Means:
    threads: list[int]
    """How many may have summed, the likeliest first."""
    taken: int = 0
    """How many means are as published although no number of threads gives them."""

    def of(self, weight: Converted, absmax: NDArray[np.float32], told: float | None) -> Any:
        """The mean: the published one, `told`, where it may be."""
        ours = weight.packing.measure(absmax, self.threads[0])
        if told is None or told == ours:
            return ours
        for threads in self.threads[1:]:
            if weight.packing.measure(absmax, threads) == told:
                self.threads = [threads, *self.threads]
                return told
        self.threads = self.threads[:1]  # not made on a CPU: further weights need no search
        near = abs(told - ours) <= NEAR * abs(ours)
        self.taken += near
        return told if near else ours


def _published(published: Checkpoint, weight: Converted) -> float | None:
    """The mean that is stored for a weight, if one is."""
    state = published.tensors.get(weight.outputs[-1].name)
    return stored_offset(published.read(state.name)) if state and state.nbytes < LARGEST_STATE else None

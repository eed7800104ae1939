"""How many batches go through streamed layers together, so that one reading of the weights serves them all.

A decoding step of n batches lasts

    t(n) = max(bytes streamed(n) / bandwidth, c(n) · bytes of weights / memory bandwidth)

since each batch reads every weight from memory, c(n) = n, and the stream goes on beside it. Where a CPU computes plain
weights, the rows b of all batches meet a weight at once: c(n) = (64 + n·b) / (64 + b), as some 64 rows cost as much as
reading it. Of a mixture of experts a batch reads those that its tokens choose, and more batches stream more of them. Up
to n* where both are equal a batch more costs nothing, or less than another pass; beyond it nothing is gained. Every
batch has keys and values of its own, which must fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from bigpipe.bigmodel.architecture import Architecture
from bigpipe.bigmodel.footprint import WORKSPACE, Budget, Workload
from bigpipe.bigmodel.formats import PLAIN, Format
from bigpipe.machine import Machine
from bigpipe.sizes import format_size

from .budget import memory_of
from .devices import Device, is_computing
from .headroom import beyond_headroom
from .placement import Placement
from .products import gathers
from .speeds import Speeds, speeds_of
from .streaming import streamed

BEYOND = 1.25
"""Times n*: what is measured in a fraction of a second is not exact, and a few batches too many cost little."""
AS_READING = 64
"""Rows that cost a CPU as much as reading what they are multiplied by, measured in bfloat16; half of it in float32."""
MOST = 32
"""More than that do not go together only because their rows are multiplied at once. Each has a thread of its own; four
times as many made 1.2 times as many tokens of a small model, and held 2.2 times as many bytes."""
HELD = 4
"""Tensors as large as its hidden states that a batch holds between layers: these, what is added to them, mask and
positions."""


@dataclass(frozen=True, slots=True)
class Together:
    """Batches that go through streamed layers together."""

    count: int = 1
    size: int = 0
    """Bytes that each holds where the layers compute, while it waits."""
    why: str = ""

    @property
    def more(self) -> int:
        """Bytes beside those of a single batch."""
        return (self.count - 1) * self.size


def batches_together(
    placement: Placement,
    architecture: Architecture,
    workload: Workload,
    dtype: str,
    machine: Machine,
    *,
    asked: int | None = None,
    processes: int = 1,
    memo: Path | None = None,
    stored: Format = PLAIN,
    caching: bool = True,
) -> Together:
    """Return how many batches should go through the streamed layers of a placement together.

    workload: of one batch; beams count as its rows. dtype: what is computed in. machine: on which a GPU that is not
    there has no room, so that one batch goes alone. asked: so many, whatever would be best. processes: that share the
    machine, each with a model of its own. memo: where the speeds of this machine are kept; None: those of an ordinary
    one. stored: the format that the model's matrices are packed in. caching: does a batch keep keys and values?
    """
    main = placement.main
    size = _size(Budget(architecture, dtype, workload), main, caching, main == "cpu" and stored is PLAIN)
    if asked is not None:
        return Together(asked, size, f"as asked; {format_size(size)} each")
    speeds = (memo and speeds_of(machine, memo)) or Speeds()
    useful = _useful(placement, architecture, workload.batch_size, dtype, speeds, stored)
    beyond = beyond_headroom(placement, architecture, dtype, workload, stored, caching=caching)
    first = placement.needs[main].total + beyond[main]
    there = memory_of(machine).get(main, 0) / (processes if main == "cpu" else 1)
    most = 1 + max(0, int((there - first) // max(size, 1)))
    if most < useful:
        return Together(most, size, f"{useful} would hide the streaming, and {format_size(size)} of each must fit")
    return Together(useful, size, f"more would not be faster; {format_size(size)} each")


def _useful(
    placement: Placement, architecture: Architecture, rows: int, dtype: str, speeds: Speeds, stored: Format
) -> int:
    """n*, and some more. rows: of a batch, each of which decodes a token in a step."""
    main = placement.main
    away = {home: size for home, size in placement.weights.items() if not is_computing(home, main)}
    moved = streamed(architecture, placement, dtype, {})
    read = streamed(architecture, replace(placement, device_map={"": "disk"}), dtype, {})
    moving = BEYOND * sum(size / (speeds.disk if home == "disk" else speeds.link) for home, size in away.items())
    once = speeds.resident(main, sum(placement.weights.values())) * read.share(rows)
    apart = max(1, math.ceil(moving / once))
    if main != "cpu" or stored is not PLAIN or not gathers(rows):
        return next((n for n in range(1, apart) if n * once >= moving * moved.share(n * rows)), apart)
    first, each = (once * part / (AS_READING + rows) for part in (AS_READING, rows))
    most = max(apart, min(MOST, math.ceil((moving - first) / each)))
    return next((n for n in range(1, most) if first + n * each >= moving * moved.share(n * rows)), most)


def _size(budget: Budget, main: Device, caching: bool, at_once: bool) -> int:
    """Bytes that a batch holds while it waits. Each goes through the layers in a thread of its own, for which cuBLAS
    takes a workspace of its own. at_once: it waits within layers too, wherever its rows are multiplied with others'."""
    rows = budget.workload.batch_size * (budget.length if gathers(budget.workload.batch_size * budget.length) else 1)
    within = rows * (2 * budget.shape.inner + HELD * budget.shape.hidden) * budget.itemsize
    states = budget.workload.batch_size * budget.length * budget.shape.hidden * budget.itemsize
    kept = budget.cache.bytes if caching else 0
    return kept + HELD * states + within * (at_once and gathers(rows)) + (WORKSPACE if isinstance(main, int) else 0)

"""How fast a CPU multiplies matrices in each dtype: measured once, remembered. It decides what to compute in.

One CPU multiplies bfloat16 four times as fast as float32, another one, without instructions for it, several times as
slowly, and float16 is slow on most. Rates are of one core and in its own time, so that what else runs does not count.
Measured in a child process, since only torch tells.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from bigpipe.bigmodel.memo import recall, remember
from bigpipe.machine import Machine
from bigpipe.versions import missing, package_version

from .speeds import ask_child

WIDTH = 2048
"""Of the square matrix that rows are multiplied by."""
ROWS = (1, 8, 64)
"""Of a step of one text, of a step of a batch, of a prompt."""
HALVES = ("bfloat16", "float16")
DTYPES = ("float32", *HALVES)
GATHERED = 64
"""Rows of a batch at the most that are multiplied with those of other batches on a CPU. More keep it busy alone."""
ROUNDS = 2
GAIN = 1.5
"""Times as fast as the stored dtype must float32 be, to be chosen: less would not outweigh the casts."""
ANSWER_VERSION = 1


@dataclass(frozen=True, slots=True)
class Products:
    """Rates of products of one core."""

    rates: Mapping[str, Mapping[int, float]]
    """Dtype → rows → FLOP per second; a product of [n, k] and [k, m] is 2·n·k·m."""

    def rate(self, dtype: str, rows: int) -> float:
        """Return FLOP per second with so many rows: those of the next smaller number that was measured."""
        known = self.rates[dtype]
        return known[max((count for count in known if count <= rows), default=min(known))]

    def generating(self, dtype: str, rows: int) -> float:
        """Return FLOP per second of texts of which half is read, and half is made by so many rows at a time."""
        return 2 / (1 / self.rate(dtype, max(ROWS)) + 1 / self.rate(dtype, rows))

    def describe(self, stored: str, rows: int) -> str:
        """Return a sentence on what `computing_dtype` compares."""
        wide, own = (self.generating(dtype, rows) / 1e9 for dtype in ("float32", stored))
        return f"A core multiplies {wide:.0f} GFLOP/s in float32, {own:.0f} in {stored}."


def gathers(rows: int) -> bool:
    """Return whether a CPU multiplies the rows of a batch, one of each text, with those of the batches beside it. A row
    alone is added up in another order than several."""
    return 1 < rows <= GATHERED


def computing_dtype(stored: str, rows: int, products: Products) -> tuple[str, str]:
    """Return what a CPU should compute in, the stored half or float32, which holds its values exactly, and why.

    rows: of a batch."""
    if products.generating("float32", rows) >= GAIN * products.generating(stored, rows):
        return "float32", f"a core multiplies at least {GAIN} times as fast in it as in {stored}"
    return stored, f"a core multiplies less than {GAIN} times as fast in float32"


def products_of(machine: Machine, memo: Path) -> Products | None:
    """Return the rates of this machine, measured once and kept in `memo`; of another one, or without torch, nothing is
    known (None)."""
    if machine.name != os.uname().nodename or missing(["torch"]):
        return None
    file = memo / "speeds" / f"{machine.name}-products.json"
    known, key = recall(file), [ANSWER_VERSION, package_version("torch"), list(ROWS)]
    if not isinstance(known, dict) or known.get("key") != key:
        known = {"key": key, "rates": ask_child(__name__)}
        remember(file, known)
    with suppress(TypeError, KeyError, ValueError, AttributeError):
        rates = {
            dtype: {rows: float(known["rates"][dtype][str(rows)]) for rows in ROWS}
            for dtype in DTYPES
        }  # fmt: skip
        return Products(rates) if all(rate > 0 for each in rates.values() for rate in each.values()) else None
    return None


@cache
def products_here() -> Products:
    """Return the rates of this machine, measured once in this process, which may import torch."""
    return Products(measure())


def measure() -> dict[str, dict[int, float]]:
    """In a process that may import torch: the rates, in about half a second."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    found: dict[str, dict[int, float]] = {}
    with torch.inference_mode():
        matrix = torch.randn(WIDTH, WIDTH, generator=generator)
        for name in DTYPES:
            dtype = getattr(torch, name)
            weights, states = matrix.to(dtype), torch.randn(max(ROWS), WIDTH, generator=generator).to(dtype)
            found[name] = {rows: 2 * rows * WIDTH**2 / _seconds(weights, states[:rows]) for rows in ROWS}
    torch.set_num_threads(threads)
    return found


def _seconds(weights: object, states: object) -> float:
    """Of this thread; the fastest round counts."""
    from torch.nn.functional import linear

    rounds = []
    for _ in range(1 + ROUNDS):  # the first one compiles the kernel
        started = time.thread_time()
        linear(states, weights)  # type: ignore[arg-type]
        rounds.append(time.thread_time() - started)
    return max(min(rounds[1:]), 1e-9)


if __name__ == "__main__":
    print(json.dumps(measure()))  # noqa: T201 the answer to the parent

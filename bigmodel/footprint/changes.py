"""The smallest change that makes a model fit: tried one after the other with the whole budget, never guessed.

What changes least comes first: gradient checkpointing where it trains, fewer sequences at once, shorter ones, scales
that are quantized too, another dtype, a lighter optimizer. Several of these together only where none does alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bigpipe.bigmodel.architecture import Architecture
from bigpipe.bigmodel.formats import WORTHWHILE, has_double_quant, width
from bigpipe.fit import Cure, fits, nearest

from .budgets import Budget, Workload, budget

LIGHTER: dict[str, tuple[str, ...]] = {"adamw": ("adamw_8bit", "lora"), "adamw_8bit": ("lora",), "sgd": ("lora",)}
"""Optimizer → those that do its job in less memory, the nearest first."""
Change = Mapping[str, Any]
"""Option of `bigpipe estimate` → value: dtypes, train, double_quant and fields of a `Workload`, in this order."""


def needed(found: Budget, train: str | None) -> int | None:
    """Bytes at the upper end of what is not exact; None where this dtype cannot be trained so."""
    if train is None:
        return found.inference_high
    term = found.training[train]
    return term.high + found.runtime.high if term else None


@dataclass(frozen=True, slots=True)
class Question:
    """Does a model fit into so many bytes, used in this way?"""

    architecture: Architecture
    dtype: str
    workload: Workload
    train: str | None
    """The optimizer of a training step; None: inference."""
    memory: int

    def size(self, change: Change) -> int | None:
        """Bytes with the change; None where the dtype cannot be trained so."""
        work = {name: value for name, value in change.items() if name not in ("dtypes", "train")}
        found = budget(self.architecture, change.get("dtypes", self.dtype), replace(self.workload, **work))
        return needed(found, change.get("train", self.train))

    def holds(self, change: Change) -> bool:
        size = self.size(change)
        return size is not None and fits(size, self.memory)

    def smallest_change(self) -> tuple[Cure, int] | None:
        """Return the change and the bytes needed then; None where nothing that is tried fits."""
        for change, shrunk in self._attempts():
            found = self._shrunk(change, shrunk) if shrunk else change
            if found is not None and self.holds(found):
                return Cure(found), self.size(found) or 0
        return None

    def _shrunk(self, change: Change, name: str) -> Change | None:
        """With the largest smaller value of a number that fits."""
        asked = change.get(name, getattr(self.workload, name))
        found = nearest(1, asked, lambda value: self.holds({**change, name: value})) if asked > 1 else None
        return None if found is None else {**change, name: found}

    def _attempts(self) -> Iterator[tuple[Change, str | None]]:
        """(change, the number to make as small as needed), what changes least first."""
        kept = self.workload.gradient_checkpointing or not self.train
        saving: Change = {} if kept else {"gradient_checkpointing": True}
        if saving:
            yield saving, None
        yield {}, "batch_size"
        yield {}, "sequence_length"
        for other in self._others():
            yield other, None
        bases = [{**other, **saving} for other in ({}, *self._others())]
        for base in bases:
            yield base, None
            yield base, "batch_size"
        fewest = {} if self.workload.batch_size == 1 else {"batch_size": 1}
        for base in bases:
            yield {**base, **fewest}, "sequence_length"

    def _others(self) -> Iterator[Change]:
        """The same work in another dtype, with quantized scales, or under a lighter optimizer."""
        for optimizer in (None, *LIGHTER.get(self.train or "", ())):
            lighter = {"train": optimizer} if optimizer else {}
            if lighter:
                yield lighter
            for narrower in self._narrower():
                yield {**narrower, **lighter}

    def _narrower(self) -> Iterator[Change]:
        narrower = [name for name in WORTHWHILE if width(name) < width(self.dtype)]
        for name in (self.dtype, *sorted(narrower, key=lambda name: -width(name))):
            other: Change = {} if name == self.dtype else {"dtypes": name}
            if other:
                yield other
            if has_double_quant(name) and not self.workload.double_quant:
                yield {**other, "double_quant": True}

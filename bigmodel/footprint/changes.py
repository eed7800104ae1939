"""The smallest change that makes a model fit: tried one after the other with the whole budget, never guessed.

What changes least comes first: gradient checkpointing where it trains, fewer sequences at once, shorter ones, scales
that are quantized too, another dtype, a lighter optimizer. Several of these together only where none does alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bigpipe.bigmodel.formats import WORTHWHILE, has_double_quant, width
from bigpipe.fit import Cure, fits, nearest

from .budgets import Budget

LIGHTER: dict[str, tuple[str, ...]] = {"adamw": ("adamw_8bit", "lora"), "adamw_8bit": ("lora",), "sgd": ("lora",)}
"""Optimizer → those that do its job in less memory, the nearest first."""
Options = Mapping[str, Any]
"""Option of `bigpipe estimate` → value: dtypes, train, double_quant and fields of a `Workload`, in this order."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a budget fits into some memory, also at the upper end of what is not exact."""

    fits: bool
    cure: Cure | None = None
    """The smallest change that fits; None where it fits, or nothing here would."""
    bytes: int | None = None
    """Needed then, at the upper end of what is not exact."""


@dataclass(frozen=True, slots=True)
class Question:
    """Does a model fit into so many bytes, used in this way?"""

    budget: Budget
    train: str | None
    """The optimizer of a training step; None: inference."""
    memory: int

    def answer(self) -> Verdict:
        if self.holds({}):
            return Verdict(True)
        for change, shrunk in self._attempts():
            found = self._shrunk(change, shrunk) if shrunk else change
            if found is not None and self.holds(found):
                return Verdict(False, Cure(found), self.size(found))
        return Verdict(False)

    def size(self, change: Options) -> int | None:
        """Bytes with the change; None where the dtype cannot be trained so."""
        work = {name: value for name, value in change.items() if name not in ("dtypes", "train")}
        dtype = change.get("dtypes", self.budget.dtype)
        found = replace(self.budget, dtype=dtype, workload=replace(self.budget.workload, **work))
        return found.needed(change.get("train", self.train))

    def holds(self, change: Options) -> bool:
        size = self.size(change)
        return size is not None and fits(size, self.memory)

    def _shrunk(self, change: Options, name: str) -> Options | None:
        """With the largest smaller value of a number that fits."""
        asked = change.get(name, getattr(self.budget.workload, name))
        found = nearest(1, asked, lambda value: self.holds({**change, name: value})) if asked > 1 else None
        return None if found is None else {**change, name: found}

    def _attempts(self) -> Iterator[tuple[Options, str | None]]:
        """(change, the number to make as small as needed), what changes least first."""
        kept = self.budget.workload.gradient_checkpointing or not self.train
        saving: Options = {} if kept else {"gradient_checkpointing": True}
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
        fewest = {} if self.budget.workload.batch_size == 1 else {"batch_size": 1}
        for base in bases:
            yield {**base, **fewest}, "sequence_length"

    def _others(self) -> Iterator[Options]:
        """The same work in another dtype, with quantized scales, or under a lighter optimizer."""
        for optimizer in (None, *LIGHTER.get(self.train or "", ())):
            lighter = {"train": optimizer} if optimizer else {}
            if lighter:
                yield lighter
            for narrower in self._narrower():
                yield {**narrower, **lighter}

    def _narrower(self) -> Iterator[Options]:
        narrower = [name for name in WORTHWHILE if width(name) < width(self.budget.dtype)]
        for name in (self.budget.dtype, *sorted(narrower, key=lambda name: -width(name))):
            other: Options = {} if name == self.budget.dtype else {"dtypes": name}
            if other:
                yield other
            if has_double_quant(name) and not self.budget.workload.double_quant:
                yield {**other, "double_quant": True}

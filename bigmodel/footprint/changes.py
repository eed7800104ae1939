"""The smallest change that makes a model fit: tried one after the other with the whole budget, never guessed.

What changes least comes first: gradient checkpointing where it trains, fewer sequences at once, shorter ones, scales
that are quantized too, another dtype, a lighter optimizer. Several of these together only where none does alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from bigpipe.bigmodel.architecture import Architecture
from bigpipe.bigmodel.formats import WORTHWHILE, has_double_quant, width

from .budgets import Budget, Workload, budget

LIGHTER: dict[str, tuple[str, ...]] = {"adamw": ("adamw_8bit", "lora"), "adamw_8bit": ("lora",), "sgd": ("lora",)}
"""Optimizer → those that do its job in less memory, the nearest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What would have to be different for a model to fit."""

    option: str
    """As it is written on the command line: `--batch-size 1`."""
    bytes: int
    """Needed then, at the upper end of what is not exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to use a model."""

    dtype: str
    workload: Workload
    train: str | None = None
    """The optimizer of a training step; None: inference."""

    def options(self, asked: Setting) -> str:
        """How the command line says this, where it differs from what was asked."""
        ours, theirs = self.workload, asked.workload
        words = [f"--dtypes {self.dtype}"] if self.dtype != asked.dtype else []
        words += [f"--train {self.train}"] if self.train != asked.train else []
        words += ["--double-quant"] if ours.double_quant and not theirs.double_quant else []
        words += ["--gradient-checkpointing"] if ours.gradient_checkpointing > theirs.gradient_checkpointing else []
        for name in ("batch_size", "sequence_length"):
            if getattr(ours, name) != getattr(theirs, name):
                words.append(f"--{name.replace('_', '-')} {getattr(ours, name)}")
        return " ".join(words)


def needed(found: Budget, train: str | None) -> int | None:
    """Bytes at the upper end of what is not exact; None where this dtype cannot be trained so."""
    if train is None:
        return found.inference_high
    term = found.training[train]
    return term.high + found.runtime.high if term else None


def smallest_change(architecture: Architecture, asked: Setting, memory: int) -> Change | None:
    """None where nothing that is tried fits into `memory` bytes."""

    def size(setting: Setting) -> int | None:
        return needed(budget(architecture, setting.dtype, setting.workload), setting.train)

    for setting, shrunk in _attempts(asked):
        found = _largest(setting, shrunk, memory, size) if shrunk else setting
        taken = size(found) if found else None
        if found and taken is not None and taken <= memory:
            return Change(option=found.options(asked), bytes=taken)
    return None


def _attempts(asked: Setting) -> Iterator[tuple[Setting, str | None]]:
    """(setting, the number to make as small as needed), what changes least first."""
    saving = _with(asked, gradient_checkpointing=True) if asked.train else asked
    if saving != asked:
        yield saving, None
    yield asked, "batch_size"
    yield asked, "sequence_length"
    for other in _others(asked):
        yield other, None
    bases = (saving, *_others(saving))
    for base in bases:
        yield base, None
        yield base, "batch_size"
    for base in bases:
        yield _with(base, batch_size=1), "sequence_length"


def _others(setting: Setting) -> Iterator[Setting]:
    """The same work in another dtype, with quantized scales, or under a lighter optimizer."""
    yield from _narrower(setting)
    for optimizer in LIGHTER.get(setting.train or "", ()):
        lighter = replace(setting, train=optimizer)
        yield lighter
        yield from _narrower(lighter)


def _narrower(setting: Setting) -> Iterator[Setting]:
    narrower = [name for name in WORTHWHILE if width(name) < width(setting.dtype)]
    for name in (setting.dtype, *sorted(narrower, key=lambda name: -width(name))):
        other = replace(setting, dtype=name)
        if name != setting.dtype:
            yield other
        if has_double_quant(name) and not setting.workload.double_quant:
            yield _with(other, double_quant=True)


def _with(setting: Setting, **changes: Any) -> Setting:
    return replace(setting, workload=replace(setting.workload, **changes))


def _largest(setting: Setting, name: str, memory: int, size: Callable[[Setting], int | None]) -> Setting | None:
    """The largest smaller value of a number that fits; memory grows with it, so halving finds it."""
    best, low, high = None, 1, getattr(setting.workload, name) - 1
    while low <= high:
        middle = (low + high) // 2
        changed = _with(setting, **{name: middle})
        taken = size(changed)
        if taken is not None and taken <= memory:
            best, low = changed, middle + 1
        else:
            high = middle - 1
    return best

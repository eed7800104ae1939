"""Rows of a weight with an adapter's changes, computed as peft computes the whole: the same bits.

peft multiplies matrices in float32 and rounds once, when the product is added to the weight (`lora/layer.py`,
`lora/variants.py`). A row of a product depends on no other row, so some rows at a time give the same bits; torch
multiplies, because other libraries round otherwise. Where a norm goes over columns of what is stored (DoRA on Conv1D
and on embeddings), the whole is computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from bigpipe.bigmodel.checkpoint import Decoder, itemsize
from bigpipe.errors import InvalidCheckpoint

from .method import Combination

if TYPE_CHECKING:
    import torch

Parts = Sequence[memoryview]


class Change(Protocol):
    """What an adapter does to one stored tensor. Equal to others of the same settings."""

    @property
    def whole(self) -> bool:
        """Return whether it needs all rows at once."""

    @property
    def parts(self) -> int:
        """Return how many tensors of adapters it takes."""

    def ranges(self, start: int, stop: int) -> Sequence[tuple[int, int]]:
        """Return (first byte, bytes) of each of these that the rows start:stop need."""

    def apply(self, weight: torch.Tensor, start: int, stop: int, parts: Parts) -> torch.Tensor:
        """Return the rows start:stop, changed, in the dtype they have; `weight` may be changed in place."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The two matrices of one adapter for one module."""

    rank: int
    a_dtype: str
    b_dtype: str
    scaling: float
    weight: float | None = None
    """Of this adapter among several; None: it is alone, and taken as it is."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """W + (B A) · scaling. A is rank × inputs, B outputs × rank."""

    rows: int
    columns: int
    """Of the weight as it is stored."""
    pairs: tuple[Pair, ...]
    combination: Combination = "cat"
    turned: bool = False
    """Stored as inputs × outputs: transformers' Conv1D, and embeddings."""
    rounded: bool = False
    """Is the product rounded to the weight's dtype before it is added? That of embeddings is."""

    whole: ClassVar[bool] = False

    @property
    def parts(self) -> int:
        return 2 * len(self.pairs)

    def ranges(self, start: int, stop: int) -> Sequence[tuple[int, int]]:
        found = []
        for pair in self.pairs:
            a, b = itemsize(pair.a_dtype) * pair.rank, itemsize(pair.b_dtype) * pair.rank
            if self.turned:  # what is needed of A lies in columns
                found += [(0, a * self.rows), (0, b * self.columns)]
            else:
                found += [(0, a * self.columns), (b * start, b * (stop - start))]
        return found

    def apply(self, weight: torch.Tensor, start: int, stop: int, parts: Parts) -> torch.Tensor:
        delta = self.delta(weight, start, stop, parts)
        weight += delta.to(weight.dtype) if self.rounded else delta
        return weight

    def delta(self, weight: torch.Tensor, start: int, stop: int, parts: Parts) -> torch.Tensor:
        """Return what is added to the rows start:stop of a weight."""
        import torch

        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        matrices = []
        for index, pair in enumerate(self.pairs):
            outer = self.columns if self.turned else stop - start
            a = as_tensor(parts[2 * index], pair.a_dtype, (pair.rank, -1)).to(wide)
            b = as_tensor(parts[2 * index + 1], pair.b_dtype, (outer, pair.rank)).to(wide)
            matrices.append((a[:, start:stop] if self.turned else a, b))
        a, b, scaling = self._combined(matrices)
        product = b @ a
        added: torch.Tensor = (product.T if self.turned else product) * scaling
        return added

    def _combined(self, matrices: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor, float]:
        """As peft's `add_weighted_adapter` makes one adapter of several, whose scaling is 1."""
        import torch

        first = self.pairs[0]
        if first.weight is None:
            return *matrices[0], first.scaling
        weights = [(pair.weight or 0.0, pair.scaling) for pair in self.pairs]
        if self.combination == "cat":
            scaled = [a * weight * scaling for (a, _), (weight, scaling) in zip(matrices, weights, strict=True)]
            return torch.cat(scaled, dim=0), torch.cat([b for _, b in matrices], dim=1), 1.0
        products = [weight * scaling for weight, scaling in weights]
        roots = torch.tensor([math.sqrt(abs(each)) for each in products]).view(-1, 1, 1)
        signs = torch.tensor([1.0 if each >= 0 else -1.0 for each in products]).view(-1, 1, 1)
        summed_a = (torch.stack([a for a, _ in matrices]) * (roots * signs)).sum(dim=0)
        return summed_a, (torch.stack([b for _, b in matrices]) * roots).sum(dim=0), 1.0


@dataclass(frozen=True, slots=True)
class Dora:
    """magnitude · V / ‖V‖ with V = W + (B A) · scaling, and the norm of each output (arXiv 2402.09353)."""

    low_rank: LowRank
    dtype: str
    """Of the magnitudes."""

    @property
    def whole(self) -> bool:
        return self.low_rank.turned

    @property
    def parts(self) -> int:
        return self.low_rank.parts + 1

    def ranges(self, start: int, stop: int) -> Sequence[tuple[int, int]]:
        size = itemsize(self.dtype)
        own = (0, size * self.low_rank.columns) if self.low_rank.turned else (size * start, size * (stop - start))
        return [*self.low_rank.ranges(start, stop), own]

    def apply(self, weight: torch.Tensor, start: int, stop: int, parts: Parts) -> torch.Tensor:
        import torch

        low_rank = self.low_rank
        delta = low_rank.delta(weight, start, stop, parts[:-1])
        there, added = (weight.T, delta.T) if low_rank.turned else (weight, delta)
        norm = torch.linalg.norm(there + added, dim=1)
        factor = as_tensor(parts[-1], self.dtype, (-1,)).to(norm.dtype) / norm
        shaped = factor.view(1, -1) if low_rank.turned else factor.view(-1, 1)
        made: torch.Tensor = (shaped * (weight + delta)).to(weight.dtype)
        return made


@dataclass(frozen=True, slots=True)
class Added:
    """A bias of B, times the scaling, on top of the module's own."""

    dtype: str
    scaling: float

    whole: ClassVar[bool] = False
    parts: ClassVar[int] = 1

    def ranges(self, start: int, stop: int) -> Sequence[tuple[int, int]]:
        return [(itemsize(self.dtype) * start, itemsize(self.dtype) * (stop - start))]

    def apply(self, weight: torch.Tensor, start: int, stop: int, parts: Parts) -> torch.Tensor:
        import torch

        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        weight += as_tensor(parts[0], self.dtype, (-1,)).to(wide) * self.scaling
        return weight


@dataclass(frozen=True, slots=True)
class Replaced:
    """A tensor that was trained as a whole: `modules_to_save`, biases, embeddings that were saved."""

    dtype: str
    width: int
    """Elements of a row."""

    whole: ClassVar[bool] = False
    parts: ClassVar[int] = 1

    def ranges(self, start: int, stop: int) -> Sequence[tuple[int, int]]:
        row = itemsize(self.dtype) * self.width
        return [(row * start, row * (stop - start))]

    def apply(self, weight: torch.Tensor, start: int, stop: int, parts: Parts) -> torch.Tensor:
        return as_tensor(parts[0], self.dtype, weight.shape).to(weight.dtype)


@dataclass(frozen=True, slots=True)
class Unchanged:
    """A tensor that stays what it was, beside another that it was tied to."""

    whole: ClassVar[bool] = False
    parts: ClassVar[int] = 0

    def ranges(self, start: int, stop: int) -> Sequence[tuple[int, int]]:
        return []

    def apply(self, weight: torch.Tensor, start: int, stop: int, parts: Parts) -> torch.Tensor:
        return weight


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of an embedding that were trained by themselves: `trainable_token_indices`."""

    dtype: str
    width: int
    indices: tuple[int, ...]

    whole: ClassVar[bool] = False
    parts: ClassVar[int] = 1

    def ranges(self, start: int, stop: int) -> Sequence[tuple[int, int]]:
        return [(0, itemsize(self.dtype) * self.width * len(self.indices))]

    def apply(self, weight: torch.Tensor, start: int, stop: int, parts: Parts) -> torch.Tensor:
        trained = as_tensor(parts[0], self.dtype, (len(self.indices), self.width)).to(weight.dtype)
        for row, index in zip(trained, self.indices, strict=True):
            if start <= index < stop:
                weight[index - start] = row
        return weight


@dataclass(frozen=True, slots=True)
class Changed:
    """Decodes rows of a weight with its changes, one after the other."""

    name: str
    """For errors."""
    shape: tuple[int, ...]
    stored: str
    dtype: str
    """Of the weight as it is read, and as it is made: it is cast before anything is added."""
    base: Decoder | None
    base_parts: int
    """How the weight itself is decoded, and from how many tensors; None: it is stored as it is."""
    changes: tuple[Change, ...]

    @property
    def whole(self) -> bool:
        return any(change.whole for change in self.changes)

    def ranges(self, start: int, stop: int) -> Sequence[tuple[int, int]]:
        first, last = self._rows(start, stop)
        row = itemsize(self.stored) * math.prod(self.shape[1:])
        own = self.base.ranges(first, last) if self.base else [(row * first, row * (last - first))]
        return [*own, *(each for change in self.changes for each in change.ranges(first, last))]

    def _rows(self, start: int, stop: int) -> tuple[int, int]:
        return (0, self.shape[0]) if self.whole else (start, stop)

    def decode(self, start: int, stop: int, parts: Parts) -> memoryview:
        """Return the bytes of the rows start:stop. Raise OverflowError where a sum has no room in the dtype, and
        InvalidCheckpoint where the adapter holds NaN or infinity."""
        import torch

        first, last = self._rows(start, stop)
        own = self.base.decode(first, last, parts[: self.base_parts]) if self.base else parts[0]
        weight = as_tensor(own, self.stored, (last - first, *self.shape[1:])).to(getattr(torch, self.dtype))
        sound, taken = bool(torch.isfinite(weight).all()), self.base_parts
        for change in self.changes:
            weight = change.apply(weight, first, last, parts[taken : taken + change.parts])
            taken += change.parts
        if sound and not torch.isfinite(weight).all():
            self._refuse(parts[self.base_parts :])
        rows = weight[start - first : stop - first].contiguous()
        return memoryview(rows.view(torch.uint8).numpy().reshape(-1).data)

    def _refuse(self, parts: Parts) -> None:
        """Say why a change is not finite: the adapter is not, or the sum has no room."""
        import torch

        dtypes = [dtype for change in self.changes for dtype in dtypes_of(change)]
        for part, dtype in zip(parts, dtypes, strict=True):
            if not torch.isfinite(as_tensor(part, dtype, (-1,))).all():
                cause = f"the adapter's change of {self.name} holds NaN or infinity"
                raise InvalidCheckpoint(cause, "take a save from before its training went wrong")
        raise OverflowError(self.dtype)


def dtypes_of(change: Change) -> list[str]:
    """Return the dtypes of the tensors that a change takes, in their order."""
    if isinstance(change, LowRank):
        return [dtype for pair in change.pairs for dtype in (pair.a_dtype, pair.b_dtype)]
    if isinstance(change, Dora):
        return [*dtypes_of(change.low_rank), change.dtype]
    if isinstance(change, Unchanged):
        return []
    assert isinstance(change, Added | Replaced | Rows)  # noqa: S101
    return [change.dtype]


def as_tensor(content: memoryview, dtype: str, shape: Sequence[int]) -> torch.Tensor:
    """Return stored numbers as a tensor in memory of its own."""
    import torch

    return torch.frombuffer(bytearray(content), dtype=getattr(torch, dtype)).view(shape)


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let torch compute in the calling thread alone: rows are narrow, files are written by several threads, and torch's
    own would wait for each other. No bit of a product depends on how many share its rows."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)

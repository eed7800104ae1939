"""Weights that come and go: the place of each in its module and the stored bytes that fill it, and groups of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bigpipe.bigmodel.checkpoint import MappedFiles, TensorInfo, TensorRecipe, beyond, dtype_name, overflows, reaches
from bigpipe.bigmodel.formats import Packing

from .crossing import Copy, copy_at_once

if TYPE_CHECKING:
    import torch

Staged = Mapping[str, "torch.Tensor"]
"""The tensors of a slot, by suffix."""


@dataclass(slots=True)
class Slot:
    """A parameter, a stored buffer, or the packed weight of a module: its place, and what fills it. Its methods are
    called in the order stage, attach, detach; `stage` may run in another thread."""

    module: torch.nn.Module
    attribute: str
    recipes: Mapping[str, TensorRecipe]
    """By suffix: the parts of a packed weight, each as stored; else the one tensor."""
    dtype: torch.dtype
    """What the one tensor is cast to."""
    packing: Packing | None = None
    placeholder: torch.Tensor = field(init=False)
    """What stands there while it is empty, on meta. What fills it is a parameter with or without gradients, as this is:
    torch multiplies by those without in another way, which for some inputs copies the weight once for each sequence."""
    sources: Sequence[TensorInfo] = field(init=False)
    """The stored bytes it is made from."""
    content: object = field(init=False)
    """Equal where one tensor can stand in both."""
    fits: bool = field(init=False)
    """Is it known that its dtype has room for all that is stored? It is looked at once."""

    def __post_init__(self) -> None:
        there: torch.Tensor = getattr(self.module, self.attribute)
        self.placeholder = there if self.packing or there.device.type == "meta" else there.to("meta")
        self.sources = [source for recipe in self.recipes.values() for source in recipe.sources]
        self.content = id(self) if self.packing else (tuple(self.sources), self.dtype)
        roomy = all(reaches(dtype_name(self.dtype), source.dtype) for source in self.sources)
        self.fits = bool(self.packing) or roomy or self.attribute in self.module._buffers

    @property
    def fused(self) -> bool:
        return any(recipe.fuse for recipe in self.recipes.values())

    @property
    def decoded(self) -> bool:
        return any(source.made for source in self.sources)

    def entry(self, index: int) -> Sequence[TensorInfo]:
        """Return the stored tensors that one entry of its outermost dimension is made of; nothing where it cannot be
        made without the others."""
        return () if self.packing else next(iter(self.recipes.values())).entry(index)

    def windowed(self, device: torch.device) -> bool:
        """Return whether the files themselves can serve as the memory."""
        import torch

        plain = not self.fused and not self.decoded
        as_stored = self.packing or (plain and getattr(torch, self.sources[0].dtype) == self.dtype)
        return device.type == "cpu" and bool(as_stored)

    def scratch(self, device: torch.device) -> Sequence[int]:
        """Return the bytes of each piece of memory that `stage` takes; none where the files serve as memory."""
        if self.windowed(device):
            return ()
        one = math.prod(self.placeholder.shape) * self.dtype.itemsize
        return [source.nbytes for source in self.sources] if self.packing else [one]

    def read(self, files: MappedFiles) -> Staged:
        """Return the tensors on the CPU, as stored."""
        return {name: recipe.read(files.window, self.dtype) for name, recipe in self.recipes.items()}

    def stage(
        self,
        files: MappedFiles,
        device: torch.device,
        take: Callable[..., torch.Tensor],
        copy: Copy = copy_at_once,
    ) -> Staged:
        """Return the tensors on `device`, as they are attached. take: (shape, dtype=…) → memory there. copy: how they
        come there. Raise InvalidCheckpoint for what is cast and has no room in its dtype."""
        tensors = self.read(files)
        if self.windowed(device):
            return tensors
        dtypes = {name: tensor.dtype if self.packing else self.dtype for name, tensor in tensors.items()}
        staged = {name: take(tensor.shape, dtype=dtypes[name]) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            copy(staged[name], tensor)
        if not self.fits:
            self.check(staged.values(), map(files.window, self.sources))
            self.fits = True
        return staged

    def check(self, made: Iterable[torch.Tensor], stored: Iterable[torch.Tensor]) -> None:
        """Raise InvalidCheckpoint where a number that is stored became infinite in what was made of it. stored: looked
        at only where something is infinite."""
        if not self.fits and any(overflows(tensor, stored) for tensor in made):
            raise beyond(self.sources[0].name, dtype_name(self.dtype), self.sources[0].file)

    def attach(self, staged: Staged) -> None:
        import torch

        if self.packing:
            self.packing.attach(self.module, staged)
            return
        (tensor,) = staged.values()
        if self.attribute in self.module._buffers:
            self.module._buffers[self.attribute] = tensor
        else:
            self.module._parameters[self.attribute] = torch.nn.Parameter(tensor, self.placeholder.requires_grad)

    def detach(self) -> None:
        setattr(self.module, self.attribute, self.placeholder)
        if self.packing:
            self.packing.detach(self.module)


@dataclass(eq=False, slots=True)
class WeightGroup:
    """Weights that come and go together, with the forward of `module`."""

    module: torch.nn.Module
    slots: tuple[Slot, ...]
    device: torch.device
    """Where it computes."""
    evict: bool
    """Drop the file's pages after use: the weights are placed on disk, not in RAM."""
    experts: int = 0
    """How many the module holds in one, of which a forward reads only those that tokens chose."""
    among: int = 0
    """Of how many experts that are modules it is one; a pass may choose another, so it is not read ahead."""
    sources: list[TensorInfo] = field(init=False)
    nbytes: int = field(init=False)
    """Stored bytes."""
    table: Slot | None = field(init=False)
    """The weight of a plain embedding, of which a forward reads only the rows it is asked for."""

    def __post_init__(self) -> None:
        import torch

        self.sources = [source for slot in self.slots for source in slot.sources]
        self.nbytes = sum(source.nbytes for source in self.sources)
        module, slot = self.module, self.slots[0]
        plain = type(module) is torch.nn.Embedding and module.max_norm is None and slot.module is module
        self.table = slot if plain and not slot.packing and not slot.fused and not slot.decoded else None

    def moved(self, rows: int = 1) -> int:
        """Return the stored bytes that a forward moves, `rows` of them where it is a table. None, where it computes in
        RAM from RAM and is only cast."""
        if not self.evict and self.device.type == "cpu":
            return 0
        return self.nbytes if self.table is None else rows * self.nbytes // len(self.table.placeholder)

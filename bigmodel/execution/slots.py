"""Where one weight goes: a place in a module, the stored bytes that fill it, and how it is filled and emptied.

The methods of a slot are called in the order stage, attach, detach; `stage` may run in another thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.checkpoint import MappedFiles, TensorInfo, TensorRecipe
from bigpipe.bigmodel.formats import PackedWeight

if TYPE_CHECKING:
    import torch

Take = Callable[..., "torch.Tensor"]
"""(shape, dtype=…) → memory on the device that computes, for a tensor of this shape and dtype."""

ALIGNMENT = 64
"""Bytes; what vector instructions and GPU copies like."""


@dataclass(slots=True)
class PlainSlot:
    """A parameter or buffer that is stored as it is, or nearly: a cast, or transformers' fusing of several."""

    module: torch.nn.Module
    attribute: str
    recipe: TensorRecipe
    dtype: torch.dtype
    placeholder: torch.Tensor = field(init=False)
    """What stands there while it is empty, on meta."""

    def __post_init__(self) -> None:
        there: torch.Tensor = getattr(self.module, self.attribute)
        self.placeholder = there if there.device.type == "meta" else there.to("meta")

    @property
    def content(self) -> object:
        """Equal where one tensor can stand in both."""
        return tuple(self.sources), self.dtype

    @property
    def sources(self) -> Sequence[TensorInfo]:
        """The stored bytes it is made from."""
        return self.recipe.sources

    def windowed(self, device: torch.device) -> bool:
        """Return whether the file itself can serve as the tensor's memory."""
        import torch

        stored = getattr(torch, self.recipe.sources[0].dtype)
        return device.type == "cpu" and self.recipe.fuse is None and stored == self.dtype

    def scratch(self, device: torch.device) -> Sequence[int]:
        """Return the bytes of each piece of memory that `stage` takes; none where the file serves as memory."""
        return () if self.windowed(device) else (math.prod(self.placeholder.shape) * self.dtype.itemsize,)

    def stage(self, files: MappedFiles, device: torch.device, take: Take) -> torch.Tensor:
        """Return the tensor on `device`."""
        tensor = self.recipe.read(files.window, self.dtype)
        return tensor if self.windowed(device) else _copy(tensor, take, self.dtype)

    def attach(self, staged: Any) -> None:
        import torch

        if self.attribute in self.module._buffers:
            self.module._buffers[self.attribute] = staged
        else:
            self.module._parameters[self.attribute] = torch.nn.Parameter(staged, requires_grad=False)

    def detach(self) -> None:
        setattr(self.module, self.attribute, self.placeholder)


@dataclass(slots=True)
class PackedSlot:
    """The weight of a module that computes from packed weights, in its parts."""

    module: torch.nn.Module
    weight: PackedWeight[TensorInfo]
    placeholder: Any = field(init=False)
    attribute: str = field(init=False, default="weight")

    def __post_init__(self) -> None:
        self.placeholder = self.module._parameters[self.attribute]

    @property
    def content(self) -> object:
        return id(self)

    @property
    def sources(self) -> Sequence[TensorInfo]:
        return tuple(self.weight.parts.values())

    def scratch(self, device: torch.device) -> Sequence[int]:
        return () if device.type == "cpu" else tuple(part.nbytes for part in self.sources)

    def stage(self, files: MappedFiles, device: torch.device, take: Take) -> Mapping[str, torch.Tensor]:
        windows = {name: files.window(part) for name, part in self.weight.parts.items()}
        return windows if device.type == "cpu" else {name: _copy(part, take) for name, part in windows.items()}

    def attach(self, staged: Any) -> None:
        self.weight.packing.attach(self.module, staged)

    def detach(self) -> None:
        self.module.weight = self.placeholder
        self.weight.packing.detach(self.module)


Slot = PlainSlot | PackedSlot


class Arena:
    """Reused memory on one device that the weights of one group are laid into, one after the other."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._memory = torch.empty(0, dtype=torch.uint8, device=device)
        self._used = 0

    def reserve(self, nbytes: int) -> None:
        """Forget what was taken, and make room for `nbytes`."""
        if self._memory.numel() < nbytes:
            self._memory = self._memory.new_empty(0)  # not both at once
            self._memory = self._memory.new_empty(nbytes)
        self._used = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        flat = self._memory[self._used : self._used + nbytes]
        self._used += aligned(nbytes)
        return flat.view(dtype).reshape(tuple(shape))


def _copy(tensor: torch.Tensor, take: Take, dtype: torch.dtype | None = None) -> torch.Tensor:
    return take(tensor.shape, dtype=dtype or tensor.dtype).copy_(tensor)


def aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT

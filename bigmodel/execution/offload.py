"""Execution of a model whose weights are not all in the memory that computes.

Each weight has a slot: its place in a module, and the stored bytes that fill it. The model is cut into groups of them:
its blocks (no-split classes) and the leaves around them. A forward hook fills a group just before its module runs, from
the safetensors that exist, and empties it just after, while a thread reads the next group. Nothing is written.

    forward of group k:  wait for k's weights → attach → start reading k+1 → compute → detach → drop k's pages

A weight that is stored in the dtype it computes in and computes on the CPU needs no copy at all: the file's pages are
its memory, and are dropped when the module has run. Others are laid into a ring of reused buffers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from bigpipe.bigmodel.checkpoint import MappedFiles, TensorInfo, TensorRecipe
from bigpipe.bigmodel.formats import Packing
from bigpipe.bigmodel.placement import INDIVISIBLE

from .homes import Homes
from .kept import KeptStates
from .lanes import Item, Lanes

if TYPE_CHECKING:
    import torch

Staged = Mapping[str, "torch.Tensor"]
"""The tensors of a slot, by suffix."""
ALIGNMENT = 64
"""Bytes; what vector instructions and GPU copies like."""


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
    """What stands there while it is empty, on meta."""
    sources: Sequence[TensorInfo] = field(init=False)
    """The stored bytes it is made from."""
    content: object = field(init=False)
    """Equal where one tensor can stand in both."""

    def __post_init__(self) -> None:
        there: torch.Tensor = getattr(self.module, self.attribute)
        self.placeholder = there if self.packing or there.device.type == "meta" else there.to("meta")
        self.sources = [source for recipe in self.recipes.values() for source in recipe.sources]
        self.content = id(self) if self.packing else (tuple(self.sources), self.dtype)

    @property
    def fused(self) -> bool:
        return any(recipe.fuse for recipe in self.recipes.values())

    @property
    def decoded(self) -> bool:
        return any(source.made for source in self.sources)

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

    def stage(self, files: MappedFiles, device: torch.device, take: Callable[..., torch.Tensor]) -> Staged:
        """Return the tensors on `device`, as they are attached. take: (shape, dtype=…) → memory there."""
        tensors = self.read(files)
        if self.windowed(device):
            return tensors
        dtypes = {name: tensor.dtype if self.packing else self.dtype for name, tensor in tensors.items()}
        return {name: take(tensor.shape, dtype=dtypes[name]).copy_(tensor) for name, tensor in tensors.items()}

    def attach(self, staged: Staged) -> None:
        import torch

        if self.packing:
            self.packing.attach(self.module, staged)
            return
        (tensor,) = staged.values()
        if self.attribute in self.module._buffers:
            self.module._buffers[self.attribute] = tensor
        else:
            self.module._parameters[self.attribute] = torch.nn.Parameter(tensor, requires_grad=False)

    def detach(self) -> None:
        setattr(self.module, self.attribute, self.placeholder)
        if self.packing:
            self.packing.detach(self.module)


class Arena:
    """Reused memory on one device that the weights of one group are laid into, one after the other."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._memory = torch.empty(0, dtype=torch.uint8, device=device)
        self._used = 0

    def reserve(self, sizes: Iterable[int]) -> None:
        """Forget what was taken, and make room for tensors of so many bytes."""
        nbytes = sum(map(_aligned, sizes))
        if self._memory.numel() < nbytes:
            self._memory = self._memory.new_empty(0)  # not both at once
            self._memory = self._memory.new_empty(nbytes)
        self._used = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        nbytes = math.prod(shape) * dtype.itemsize
        flat = self._memory[self._used : self._used + nbytes]
        self._used += _aligned(nbytes)
        return flat.view(dtype).reshape(tuple(shape))


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


@dataclass(eq=False, slots=True)
class WeightGroup:
    """Weights that come and go together, with the forward of `module`."""

    module: torch.nn.Module
    slots: tuple[Slot, ...]
    device: torch.device
    """Where it computes."""
    evict: bool
    """Drop the file's pages after use: the weights are placed on disk, not in RAM."""
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


class WeightStream:
    """Fills and empties groups of weights around their forwards: of one thread, or of the lanes of `together`."""

    def __init__(self) -> None:
        self.files = MappedFiles()
        self.bytes_read = 0
        """Stored bytes that went through since the model was loaded."""
        self._lanes: Lanes[WeightGroup] = Lanes(self._bring, self._drop, lambda group: self._order[group])
        self._order: dict[WeightGroup, int] = {}
        """The order of modules: the first guess of the order in which they run."""
        self._successor: dict[WeightGroup, WeightGroup] = {}
        self._last: WeightGroup | None = None
        self._ahead: WeightGroup | None = None
        self._staged: dict[WeightGroup, tuple[Arena, Future[list[Staged]]]] = {}
        """Tensors made or being made, attached or not yet, and the memory they lie in."""
        self._free: dict[torch.device, list[Arena]] = defaultdict(list)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bigpipe-read-ahead")

    def add(self, groups: Sequence[WeightGroup]) -> None:
        """Hook the groups in."""
        whole = [group for group in groups if group.table is None]
        self._order.update(zip(whole, range(len(whole)), strict=True))
        self._successor.update(zip(whole, [*whole[1:], *whole[:1]], strict=True))
        for group in groups:
            before, after = (self._enter, self._leave) if group.table is None else (self._look_up, self._looked_up)
            group.module.register_forward_pre_hook(partial(before, group), prepend=True)
            group.module.register_forward_hook(partial(after, group), always_call=True)

    def together(self, model: torch.nn.Module, work: Callable[[Item], None], items: Iterable[Item], count: int) -> None:
        """Do the work of each item, up to `count` of them side by side, each with forwards of the model: its groups are
        filled once for all. Each item finds the model's modules as they are now, and gives what it gives alone."""
        streamed = {(slot.module, slot.attribute) for group in self._order for slot in group.slots}
        self._lanes.run(work, items, count, KeptStates(model, streamed).suspend)

    def _enter(self, group: WeightGroup, module: torch.nn.Module, arguments: Any) -> None:
        self._lanes.enter(group)

    def _leave(self, group: WeightGroup, module: torch.nn.Module, arguments: Any, output: Any) -> None:
        self._lanes.leave(group)

    def _bring(self, group: WeightGroup) -> None:
        import torch

        ahead, self._ahead = self._ahead, None
        if ahead is not group:
            if ahead is not None:
                self._staged[ahead][1].exception()  # until its thread is done with the buffer
                self._release(ahead)
            self._start(group)
        try:
            staged = self._staged[group][1].result()
        except BaseException:
            self._release(group)
            raise
        with torch.inference_mode(False):  # weights outlive the forward they were read for
            for slot, tensors in zip(group.slots, staged, strict=True):
                slot.attach(tensors)
        self.bytes_read += group.moved()
        if self._last is not None:
            self._successor[self._last] = group
        self._last, upcoming = group, self._successor[group]
        if upcoming not in self._staged:
            self._ahead = upcoming
            self._start(upcoming)

    def _drop(self, group: WeightGroup) -> None:
        for slot in group.slots:
            slot.detach()
        self._release(group)

    def _start(self, group: WeightGroup) -> None:
        free = self._free[group.device]
        arena = free.pop() if free else Arena(group.device)
        self._staged[group] = arena, self._thread.submit(self._stage, group, arena)

    def _stage(self, group: WeightGroup, arena: Arena) -> list[Staged]:
        import torch

        with torch.inference_mode(False), torch.no_grad():
            arena.reserve(size for slot in group.slots for size in slot.scratch(group.device))
            self.files.populate(group.sources)
            return [slot.stage(self.files, group.device, arena.take) for slot in group.slots]

    def _release(self, group: WeightGroup) -> None:
        arena, _ = self._staged.pop(group)
        self._free[group.device].append(arena)
        if group.evict:
            self.files.drop(group.sources)

    def _look_up(self, group: WeightGroup, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> Any:
        """An embedding is looked up where its table lies: only the rows asked for are read, cast and moved."""
        import torch

        rows, table = arguments[0].cpu(), cast(Slot, group.table)
        self.files.populate(group.sources, set(rows.flatten().tolist()))
        with torch.inference_mode(False):
            table.attach(table.read(self.files))
        self.bytes_read += group.moved(rows.numel())
        return (rows, *arguments[1:])

    def _looked_up(self, group: WeightGroup, module: torch.nn.Module, arguments: Any, output: Any) -> Any:
        table = cast(Slot, group.table)
        table.detach()
        if group.evict:
            self.files.drop(group.sources)
        return None if output is None else output.to(group.device, table.dtype)


def cut_into_groups(model: torch.nn.Module, slots: Mapping[str, Slot], homes: Homes) -> list[WeightGroup]:
    """Group the slots that are streamed by the block they belong to. A block of one of the model's no-split classes is
    one group. Elsewhere each module is one, with its direct weights alone. A block whose weights live in several places
    is cut further. slots: by parameter name."""
    whole = INDIVISIBLE.union(getattr(model, "_no_split_modules", None) or ())
    places = {name: (homes.execution(name), homes.placement.device_of(name) == "disk") for name in slots}
    by_module: dict[torch.nn.Module, list[str]] = defaultdict(list)
    for name, slot in slots.items():
        by_module[slot.module].append(name)

    def cut(module: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, list[str]]]:
        within = [name for found in module.modules() for name in by_module.get(found, ())]
        if type(module).__name__ in whole and len({places[name] for name in within}) == 1:
            yield module, within
            return
        if own := by_module.get(module):
            yield module, own
        for child in module.children():
            yield from cut(child)

    return [
        WeightGroup(module, tuple(slots[name] for name in names), *places[names[0]])
        for module, names in dict(cut(model)).items()
    ]


def follow_devices(model: torch.nn.Module, homes: Homes) -> None:
    """Bring the inputs of each module that the map names to where it computes; caches place their own tensors."""
    from accelerate.utils import send_to_device

    def bring(device: torch.device, module: torch.nn.Module, arguments: Any, named: Any) -> tuple[Any, Any]:
        return send_to_device(arguments, device), send_to_device(named, device)

    for name, module in model.named_modules():
        if name in homes.placement.device_map:
            module.register_forward_pre_hook(partial(bring, homes.execution(name)), with_kwargs=True)

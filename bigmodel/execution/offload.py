"""Execution of a model whose weights are not all in the memory that computes.

The model is cut into groups of weights: its blocks (no-split classes) and the leaves around them. A forward hook fills
a group just before its module runs, from the safetensors that exist, and empties it just after, while a thread reads
the next group. Nothing is written. A weight that is stored in the dtype it computes in and computes on the CPU needs no
copy at all: the file's pages are its memory, and are dropped when the module has run. Others are laid into a ring of
reused buffers.

    forward of group k:  wait for k's weights → attach → start reading k+1 → compute → detach → drop k's pages
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.checkpoint import MappedFiles, TensorInfo
from bigpipe.bigmodel.placement import INDIVISIBLE

from .homes import Homes
from .slots import Arena, PlainSlot, Slot, aligned

if TYPE_CHECKING:
    import torch


@dataclass(eq=False, slots=True)
class WeightGroup:
    """Weights that come and go together, with the forward of `module`."""

    module: torch.nn.Module
    slots: tuple[Slot, ...]
    device: torch.device
    """Where it computes."""
    evict: bool
    """Drop the file's pages after use: the weights are placed on disk, not in RAM."""

    @property
    def sources(self) -> list[TensorInfo]:
        return [source for slot in self.slots for source in slot.sources]

    @property
    def table(self) -> PlainSlot | None:
        """The weight of a plain embedding, of which a forward reads only the rows it is asked for."""
        import torch

        module, slot = self.module, self.slots[0]
        plain = type(module) is torch.nn.Embedding and module.max_norm is None and slot.module is module
        return slot if plain and isinstance(slot, PlainSlot) and slot.recipe.fuse is None else None

    def moved(self, rows: int = 1) -> int:
        """Return the stored bytes that a forward moves, `rows` of them where it is a table.

        None, where it computes in RAM from RAM and is only cast.
        """
        if not self.evict and self.device.type == "cpu":
            return 0
        nbytes, table = sum(source.nbytes for source in self.sources), self.table
        return nbytes if table is None else rows * nbytes // len(table.placeholder)

    @property
    def scratch(self) -> int:
        """Bytes of buffer that its weights are laid into."""
        return sum(aligned(size) for slot in self.slots for size in slot.scratch(self.device))


@dataclass(eq=False, slots=True)
class StagedGroup:
    """The tensors of a group, made or being made, and not yet attached."""

    group: WeightGroup
    arena: Arena
    tensors: Future[list[Any]]


class WeightStream:
    """Fills and empties groups of weights around their forwards. For one forward at a time."""

    def __init__(self) -> None:
        self.files = MappedFiles()
        self.bytes_read = 0
        """Stored bytes that went through since the model was loaded."""
        self._successor: dict[WeightGroup, WeightGroup] = {}
        self._last: WeightGroup | None = None
        self._ahead: StagedGroup | None = None
        self._active: dict[WeightGroup, StagedGroup] = {}
        self._free: dict[torch.device, list[Arena]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bigpipe-read-ahead")

    def add(self, groups: Sequence[WeightGroup]) -> None:
        """Hook the groups in. Their order is the first guess of the order in which they run."""
        whole = [group for group in groups if group.table is None]
        self._successor.update(zip(whole, [*whole[1:], *whole[:1]], strict=True))
        for group in whole:
            _hook(group.module, partial(self._enter, group), partial(self._leave, group))
        for group in groups:
            if table := group.table:
                _hook(group.module, partial(self._look_up, group, table), partial(self._looked_up, group, table))

    def _enter(self, group: WeightGroup, module: torch.nn.Module, arguments: Any) -> None:
        import torch

        staged = self._claim(group)
        with torch.inference_mode(False):  # weights outlive the forward they were read for
            for slot, tensors in zip(group.slots, staged.tensors.result(), strict=True):
                slot.attach(tensors)
        self._active[group] = staged
        self.bytes_read += group.moved()
        self._read_ahead(group)

    def _leave(self, group: WeightGroup, module: torch.nn.Module, arguments: Any, output: Any) -> None:
        staged = self._active.pop(group, None)
        if staged is None:  # reading it failed
            return
        for slot in group.slots:
            slot.detach()
        self._release(staged)

    def _claim(self, group: WeightGroup) -> StagedGroup:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.group is group:
            return ahead
        if ahead is not None:
            ahead.tensors.exception()  # until its thread is done with the buffer
            self._release(ahead)
        return self._start(group)

    def _read_ahead(self, group: WeightGroup) -> None:
        if self._last is not None:
            self._successor[self._last] = group
        self._last = group
        upcoming = self._successor[group]
        if upcoming not in self._active:
            self._ahead = self._start(upcoming)

    def _start(self, group: WeightGroup) -> StagedGroup:
        free = self._free.setdefault(group.device, [])
        arena = free.pop() if free else Arena(group.device)
        return StagedGroup(group, arena, self._thread.submit(self._stage, group, arena))

    def _stage(self, group: WeightGroup, arena: Arena) -> list[Any]:
        import torch

        with torch.inference_mode(False), torch.no_grad():
            arena.reserve(group.scratch)
            self.files.populate(group.sources)
            return [slot.stage(self.files, group.device, arena.take) for slot in group.slots]

    def _release(self, staged: StagedGroup) -> None:
        self._free[staged.group.device].append(staged.arena)
        if staged.group.evict:
            self.files.drop(staged.group.sources)

    def _look_up(
        self, group: WeightGroup, table: PlainSlot, module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        """An embedding is looked up where its table lies: only the rows asked for are read, cast and moved."""
        import torch

        rows = arguments[0].cpu()
        self.files.populate(group.sources, set(rows.flatten().tolist()))
        with torch.inference_mode(False):
            table.attach(table.recipe.read(self.files.window, table.dtype))
        self.bytes_read += group.moved(rows.numel())
        return (rows, *arguments[1:])

    def _looked_up(
        self, group: WeightGroup, table: PlainSlot, module: torch.nn.Module, arguments: Any, output: torch.Tensor | None
    ) -> torch.Tensor | None:
        table.detach()
        if group.evict:
            self.files.drop(group.sources)
        return None if output is None else output.to(group.device, table.dtype)


def _hook(module: torch.nn.Module, before: Callable[..., Any], after: Callable[..., Any]) -> None:
    module.register_forward_pre_hook(before, prepend=True)
    module.register_forward_hook(after, always_call=True)


def cut_into_groups(model: torch.nn.Module, slots: Mapping[str, Slot], homes: Homes) -> list[WeightGroup]:
    """Group the slots that are streamed by the block they belong to.

    A block of one of the model's no-split classes is one group. Elsewhere each module is one, with its direct weights
    alone. A block whose weights live in several places is cut further. slots: by parameter name.
    """
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

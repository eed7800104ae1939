"""Execution of a model whose weights are not all in the memory that computes.

The model is cut into units: its blocks (no-split classes) and the leaves around them. A forward hook fills a unit just
before it runs, from the safetensors that exist, and empties it just after, while a thread reads the next unit. Nothing
is written. A weight that is stored in the dtype it computes in and computes on the CPU needs no copy at all: the file's
pages are its memory, and are dropped when the unit has run. Others are laid into a ring of reused buffers.

    forward of unit k:  wait for k's weights → attach → start reading k+1 → compute → detach → drop k's pages
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bigpipe.bigmodel.checkpoint.mapped import MappedFiles
from bigpipe.bigmodel.checkpoint.view import TensorInfo
from bigpipe.bigmodel.placement.tree import INDIVISIBLE

from .slots import Arena, PlainSlot, Slot, aligned

if TYPE_CHECKING:
    import torch


@dataclass(eq=False, slots=True)
class Unit:
    """Weights that come and go together, with the forward of `module`."""

    name: str
    """Of the module with its first weight."""
    module: torch.nn.Module
    slots: tuple[Slot, ...]
    device: torch.device
    """Where it computes."""
    evict: bool
    """Drop the file's pages after use: the weights are placed on disk, not in RAM."""

    @property
    def sources(self) -> list[TensorInfo]:
        return [source for slot in self.slots for source in slot.sources]

    def moved(self, rows: int) -> int:
        """Stored bytes that a forward moves, `rows` of them where it is an embedding table.

        None, where it computes in RAM from RAM and is only cast.
        """
        if not self.evict and self.device.type == "cpu":
            return 0
        nbytes = sum(source.nbytes for source in self.sources)
        slot = self.slots[0]
        return rows * nbytes // len(slot.placeholder) if is_table(self) and isinstance(slot, PlainSlot) else nbytes

    @property
    def scratch(self) -> int:
        return sum(aligned(size) for slot in self.slots for size in slot.scratch(self.device))


@dataclass(eq=False, slots=True)
class Staged:
    """The tensors of a unit, made but not yet attached."""

    unit: Unit
    arena: Arena | None
    tensors: Future[list[Any]]


class Stream:
    """Fills and empties units around their forwards. For one forward at a time."""

    def __init__(self, files: MappedFiles) -> None:
        self.files = files
        self.bytes_read = 0
        """Stored bytes that went through since the model was loaded."""
        self._successor: dict[Unit, Unit] = {}
        self._last: Unit | None = None
        self._ahead: Staged | None = None
        self._active: dict[Unit, Staged] = {}
        self._free: dict[torch.device, list[Arena]] = {}
        self._thread: ThreadPoolExecutor | None = None

    def add(self, units: Sequence[Unit]) -> None:
        """Hooks the units in. Their order is the first guess of the order in which they run."""
        whole = [unit for unit in units if not is_table(unit)]
        for unit, successor in zip(whole, [*whole[1:], *whole[:1]], strict=True):
            self._successor[unit] = successor
            self._hook(unit)
        for table in units:
            if is_table(table):
                self._hook_table(table)

    def _hook(self, unit: Unit) -> None:
        def before(module: torch.nn.Module, arguments: Any) -> None:
            self._enter(unit)

        def after(module: torch.nn.Module, arguments: Any, output: Any) -> None:
            self._leave(unit)

        unit.module.register_forward_pre_hook(before, prepend=True)
        unit.module.register_forward_hook(after, always_call=True)

    def _enter(self, unit: Unit) -> None:
        import torch

        staged = self._claim(unit)
        with torch.inference_mode(False):  # weights outlive the forward they were read for
            for slot, tensors in zip(unit.slots, staged.tensors.result(), strict=True):
                slot.attach(tensors)
        self._active[unit] = staged
        self.bytes_read += unit.moved(0)
        self._read_ahead(unit)

    def _leave(self, unit: Unit) -> None:
        staged = self._active.pop(unit, None)
        if staged is None:  # reading it failed
            return
        for slot in unit.slots:
            slot.detach()
        self._release(staged)

    def _claim(self, unit: Unit) -> Staged:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.unit is unit:
            return ahead
        if ahead is not None:
            ahead.tensors.exception()  # until its thread is done with the buffer
            self._release(ahead)
        staged = Staged(unit, self._arena(unit), Future())
        staged.tensors.set_result(self._stage(staged))
        return staged

    def _read_ahead(self, unit: Unit) -> None:
        if self._last is not None:
            self._successor[self._last] = unit
        self._last = unit
        upcoming = self._successor[unit]
        if upcoming in self._active:
            return
        self._thread = self._thread or ThreadPoolExecutor(1, thread_name_prefix="bigpipe-read-ahead")
        staged = Staged(upcoming, self._arena(upcoming), Future())
        staged.tensors = self._thread.submit(self._stage, staged)
        self._ahead = staged

    def _stage(self, staged: Staged) -> list[Any]:
        import torch

        unit, arena = staged.unit, staged.arena
        with torch.inference_mode(False), torch.no_grad():
            if arena is not None:
                arena.reserve(unit.scratch)
            self.files.populate(unit.sources)
            take = arena.take if arena is not None else no_memory
            return [slot.stage(self.files, unit.device, take) for slot in unit.slots]

    def _arena(self, unit: Unit) -> Arena | None:
        if not unit.scratch:
            return None
        free = self._free.setdefault(unit.device, [])
        return free.pop() if free else Arena(unit.device)

    def _release(self, staged: Staged) -> None:
        if staged.arena is not None:
            self._free[staged.unit.device].append(staged.arena)
        if staged.unit.evict:
            self.files.drop(staged.unit.sources)

    def _hook_table(self, unit: Unit) -> None:
        """An embedding is looked up where its table lies: only the rows asked for are read, cast and moved."""
        import torch

        slot = unit.slots[0]
        assert isinstance(slot, PlainSlot)  # noqa: S101  see is_table
        host = torch.device("cpu")

        def before(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            rows = arguments[0].to(host)
            self.files.populate(unit.sources, set(rows.flatten().tolist()))
            with torch.inference_mode(False):
                slot.attach(slot.recipe.read(self.files.window, slot.dtype))
            self.bytes_read += unit.moved(rows.numel())
            return (rows, *arguments[1:])

        def after(module: torch.nn.Module, arguments: Any, output: torch.Tensor | None) -> torch.Tensor | None:
            slot.detach()
            if unit.evict:
                self.files.drop(unit.sources)
            return None if output is None else output.to(unit.device, slot.dtype)

        unit.module.register_forward_pre_hook(before, prepend=True)
        unit.module.register_forward_hook(after, always_call=True)


def no_memory(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    raise AssertionError("a unit without scratch asked for memory")


def is_table(unit: Unit) -> bool:
    """Is it a plain embedding, whose rows alone are read?"""
    import torch

    module, slot = unit.module, unit.slots[0]
    plain = type(module) is torch.nn.Embedding and module.max_norm is None and slot.module is module
    return plain and isinstance(slot, PlainSlot) and slot.recipe.fuse is None


def cut_into_units(
    model: torch.nn.Module,
    slots: Mapping[str, Slot],
    no_split: Iterable[str],
    device_of: Callable[[str], torch.device],
    evict: Callable[[str], bool],
) -> list[Unit]:
    """Groups the slots that are streamed by the block they belong to.

    A block of a no-split class is one unit. Elsewhere each module is one, with its direct weights alone. A block whose
    weights live in several places is cut further.

    slots, device_of and evict: by parameter name.
    """
    whole = INDIVISIBLE | frozenset(no_split)
    by_module: dict[int, list[str]] = {}
    for name, slot in slots.items():
        by_module.setdefault(id(slot.module), []).append(name)

    def unit(module: torch.nn.Module, names: Sequence[str]) -> Unit:
        path = names[0].rpartition(".")[0]
        return Unit(path, module, tuple(slots[name] for name in names), device_of(names[0]), evict(names[0]))

    def cut(module: torch.nn.Module) -> Iterable[Unit]:
        within = [name for found in module.modules() for name in by_module.get(id(found), ())]
        if not within:
            return
        if type(module).__name__ in whole and len({(device_of(name), evict(name)) for name in within}) == 1:
            yield unit(module, within)
            return
        if own := by_module.get(id(module)):
            yield unit(module, own)
        for child in module.children():
            yield from cut(child)

    units: dict[int, Unit] = {}
    for found in cut(model):
        units.setdefault(id(found.module), found)
    return list(units.values())


def move(value: Any, device: torch.device) -> Any:
    """Tensors inside tuples, lists and maps, moved. Other objects, such as caches, place their own tensors."""
    import torch

    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(move(entry, device) for entry in value))
    if isinstance(value, tuple | list):
        return type(value)(move(entry, device) for entry in value)
    if isinstance(value, dict):
        moved = {key: move(entry, device) for key, entry in value.items()}
        return moved if type(value) is dict else type(value)(**moved)
    return value


def follow_devices(model: torch.nn.Module, devices: Mapping[str, torch.device]) -> None:
    """Brings the inputs of each module in `devices` to where it computes, and the model's output back."""

    def attend(module: torch.nn.Module, device: torch.device) -> None:
        def before(module: torch.nn.Module, arguments: Any, named: Any) -> tuple[Any, Any]:
            return move(arguments, device), move(named, device)

        module.register_forward_pre_hook(before, with_kwargs=True)

    for name, device in devices.items():
        attend(model.get_submodule(name), device)

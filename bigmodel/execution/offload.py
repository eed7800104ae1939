"""Execution of a model whose weights are not all in the memory that computes.

Each weight has a slot: its place in a module, and the stored bytes that fill it. The model is cut into groups of them:
its blocks (no-split classes) and the leaves around them. A forward hook fills a group just before its module runs, from
the safetensors that exist, and empties it just after, while a thread reads the next group. Nothing is written.

    forward of group k:  wait for k's weights → attach → start reading k+1 → compute → detach → drop k's pages

A weight that is stored in the dtype it computes in and computes on the CPU needs no copy at all: the file's pages are
its memory, and are dropped when the module has run. Others are laid into a ring of reused buffers, on a GPU while it
computes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from bigpipe.bigmodel.architecture import lists_experts, stacked_experts
from bigpipe.bigmodel.checkpoint import MappedFiles
from bigpipe.bigmodel.placement import INDIVISIBLE

from .crossing import Copy, Crossing, copy_at_once
from .experts import ExpertWeights, chosen_experts
from .gathered import Trials, gathered
from .homes import Homes
from .kept import KeptStates
from .lanes import Item, Lanes
from .slots import Slot, Staged, WeightGroup

if TYPE_CHECKING:
    import torch

ALIGNMENT = 512
"""Bytes; what torch gives memory of its own on a GPU: libraries choose their way of multiplying by it, too
(`_getAlignment` of aten/src/ATen/cuda/CUDABlas.cpp), and a weight is to be multiplied alike wherever it comes from."""


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


class WeightStream:
    """Fills and empties groups of weights around their forwards: of one thread, or of the lanes of `together`."""

    def __init__(self) -> None:
        self.files = MappedFiles()
        self.bytes_read = 0
        """Stored bytes that went through since the model was loaded."""
        self._lanes: Lanes[Any] = Lanes(self._bring, self._drop, lambda need: self._order.get(need.module, 0))
        self._order: dict[torch.nn.Module, int] = {}
        """The order of modules: the first guess of the order in which they run."""
        self._groups: list[WeightGroup] = []
        """Those of which all weights come and go."""
        self._trials = Trials()
        self._successor: dict[WeightGroup, WeightGroup] = {}
        self._last: WeightGroup | None = None
        self._ahead: WeightGroup | None = None
        self._staged: dict[WeightGroup, tuple[Arena, Future[list[Staged]]]] = {}
        """Tensors made or being made, attached or not yet, and the memory they lie in."""
        self._free: dict[torch.device, list[Arena]] = defaultdict(list)
        self._crossings: dict[torch.device, Crossing] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bigpipe-read-ahead")
        self.experts = ExpertWeights(self.files)
        self._wanted: dict[WeightGroup, set[int]] = defaultdict(set)
        """Experts that lanes are waiting for."""

    def add(self, groups: Sequence[WeightGroup]) -> None:
        """Hook the groups in."""
        whole = [group for group in groups if group.table is None]
        self._groups += whole
        always = [group for group in whole if not group.experts and not group.among]
        self._successor.update(zip(always, [*always[1:], *always[:1]], strict=True))
        for group in groups:
            before, after = (self._enter, self._leave) if group.table is None else (self._look_up, self._looked_up)
            if group.experts:
                group.module.register_forward_pre_hook(partial(self._choose, group), prepend=True, with_kwargs=True)
            else:
                group.module.register_forward_pre_hook(partial(before, group), prepend=True)
            group.module.register_forward_hook(partial(after, group), always_call=True)

    def together(self, model: torch.nn.Module, work: Callable[[Item], None], items: Iterable[Item], count: int) -> None:
        """Do the work of each item, up to `count` of them side by side, each with forwards of the model: its groups are
        filled once for all. Each item finds the model's modules as they are now, and gives what it gives alone."""
        self._order = {module: number for number, module in enumerate(model.modules())}
        try:
            with gathered(_outside_experts(model), self._lanes, self._trials) if count > 1 else nullcontext():
                self._lanes.run(work, items, count, self._kept(model).suspend)
        finally:
            self._wanted.clear()

    def afresh(self, model: torch.nn.Module) -> Callable[[], None]:
        """Return what makes the model's modules as they are now, so that a text finds nothing of those before it."""
        kept = self._kept(model)

        def restore() -> None:
            kept.restore()

        return restore

    def _kept(self, model: torch.nn.Module) -> KeptStates:
        return KeptStates(model, {(slot.module, slot.attribute) for group in self._groups for slot in group.slots})

    def _enter(self, group: WeightGroup, module: torch.nn.Module, arguments: Any) -> None:
        self._lanes.enter(group)

    def _choose(self, group: WeightGroup, module: torch.nn.Module, arguments: Any, named: Any) -> None:
        """What all lanes that wait here chose is brought at once; who comes while it is here brings what it lacks."""
        given = (*arguments, *named.values())
        wanted = self._wanted[group]
        wanted |= chosen_experts(type(module).__name__, group.experts, given)
        self._lanes.enter(group)
        self._bring_experts(group)

    def _leave(self, group: WeightGroup, module: torch.nn.Module, arguments: Any, output: Any) -> None:
        self._lanes.leave(group)

    def _bring_experts(self, group: WeightGroup) -> None:
        read = self.experts.bring(group, self._wanted.pop(group, ()))
        self.bytes_read += read if group.moved() else 0

    def _bring(self, group: WeightGroup) -> None:
        import torch

        if group.experts:
            try:
                return self._bring_experts(group)
            except BaseException:
                self.experts.abandon(group)
                raise
        if not group.among:
            self._take_guess(group)
        if group not in self._staged:
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
        if not group.among:
            self._guess_next(group)

    def _take_guess(self, group: WeightGroup) -> None:
        """What was read ahead is this group, or is let go."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead is not group:
            self._staged[ahead][1].exception()  # until its thread is done with the buffer
            self._release(ahead)

    def _guess_next(self, group: WeightGroup) -> None:
        """Read ahead what came after this group the last time."""
        if self._last is not None:
            self._successor[self._last] = group
        self._last, upcoming = group, self._successor[group]
        if upcoming not in self._staged:
            self._start(upcoming)
            self._ahead = upcoming

    def _drop(self, group: WeightGroup) -> None:
        if group.experts:
            return self.experts.drop(group)
        for slot in group.slots:
            slot.detach()
        self._release(group)

    def _start(self, group: WeightGroup) -> None:
        way, free = self._way(group.device), self._free[group.device]
        arena = free.pop() if free else Arena(group.device)
        self._staged[group] = arena, self._thread.submit(self._stage, group, arena, way)

    def _way(self, device: torch.device) -> AbstractContextManager[Copy]:
        """How the thread that reads ahead copies to a device what goes on from here."""
        if device.type != "cuda":
            return nullcontext(copy_at_once)
        if device not in self._crossings:
            self._crossings[device] = Crossing(device)
        return self._crossings[device].after_this()

    def _stage(self, group: WeightGroup, arena: Arena, way: AbstractContextManager[Copy]) -> list[Staged]:
        import torch

        self.files.populate(group.sources)
        with torch.inference_mode(False), torch.no_grad(), way as copy:
            arena.reserve(size for slot in group.slots for size in slot.scratch(group.device))
            return [slot.stage(self.files, group.device, arena.take, copy) for slot in group.slots]

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
        if output is None:
            return None
        moved = output.to(group.device, table.dtype)
        table.check([moved], [output])
        return moved


def cut_into_groups(model: torch.nn.Module, slots: Mapping[str, Slot], homes: Homes) -> list[WeightGroup]:
    """Group the slots that are streamed by the block they belong to. A block of one of the model's no-split classes is
    one group, but for the experts in it. Elsewhere each module is one, with its direct weights alone. A block whose
    weights live in several places is cut further. slots: by parameter name."""
    whole = INDIVISIBLE.union(getattr(model, "_no_split_modules", None) or ())
    places = {name: (homes.execution(name), homes.placement.device_of(name) == "disk") for name in slots}
    by_module: dict[torch.nn.Module, list[str]] = defaultdict(list)
    for name, slot in slots.items():
        by_module[slot.module].append(name)

    def alike(names: Sequence[str]) -> bool:
        return len({places[name] for name in names}) == 1

    def under(module: torch.nn.Module) -> list[str]:
        return [name for found in module.modules() for name in by_module.get(found, ())]

    stacked = {module: _held_in_one(module, [slots[name] for name in names]) for module, names in by_module.items()}
    stacked = {module: count for module, count in stacked.items() if count and alike(by_module[module])}
    listed = {module: count for module, count in _listed_experts(model) if alike(under(module))}
    taken = {name for module in (*stacked, *listed) for name in under(module)}

    def cut(module: torch.nn.Module, inside: bool = False) -> Iterator[tuple[torch.nn.Module, list[str]]]:
        if module in stacked or module in listed:
            yield module, under(module)
            return
        within = [] if inside else [name for name in under(module) if name not in taken]
        if type(module).__name__ in whole and within and alike(within):
            yield module, within
            inside = True
        elif not inside and (own := by_module.get(module)):
            yield module, own
        for child in module.children():
            yield from cut(child, inside)

    return [
        WeightGroup(
            module, tuple(slots[name] for name in names), *places[names[0]],
            experts=stacked.get(module, 0), among=listed.get(module, 0),
        )
        for module, names in dict(cut(model)).items()
    ]  # fmt: skip


def _held_in_one(module: torch.nn.Module, slots: Sequence[Slot]) -> int:
    """How many experts the module holds in one, if each can be brought without the others; else 0."""
    shapes = [tuple(slot.placeholder.shape) for slot in slots]
    count = stacked_experts(type(module).__name__, shapes)
    return count if all(slot.entry(0) for slot in slots) else 0


def _listed_experts(model: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, int]]:
    """Experts that are modules of their own, and how many there are beside each other."""
    for name, module in model.named_modules():
        children = [child for child in module.children() if any(True for _ in child.parameters())]
        if not module._parameters and len(children) > 1 and lists_experts(name, type(module).__name__):
            yield from ((child, len(children)) for child in children)


def _outside_experts(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return all modules but those of experts, to which rows come in another number each time."""
    experts = {inner for module, _ in _listed_experts(model) for inner in module.modules()}
    return [module for module in model.modules() if module not in experts]


def follow_devices(model: torch.nn.Module, homes: Homes, tables: Collection[torch.nn.Module] = ()) -> None:
    """Bring the inputs of each module that the map names to where it computes; caches place their own tensors.
    tables: embeddings that lie away, whose rows `_look_up` brings to where they lie."""
    from accelerate.utils import send_to_device

    def bring(device: torch.device, module: torch.nn.Module, arguments: Any, named: Any) -> tuple[Any, Any]:
        return send_to_device(arguments, device), send_to_device(named, device)

    for name, module in model.named_modules():
        if name in homes.placement.device_map and module not in tables:
            module.register_forward_pre_hook(partial(bring, homes.execution(name)), with_kwargs=True)

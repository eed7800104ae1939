"""Experts of a mixture, brought one by one: those that the tokens of a pass chose, and no others.

Many classes hold the experts of a layer in one: parameters of which each entry is an expert's. Their module gets memory
in the shape of all experts, and of that only the entries of chosen experts are filled, so it computes what it always
does, whatever way it goes through them. Memory that nobody writes to is none: pages come with the first touch.

    forward of experts:  which are chosen → fill those → attach → compute → detach → keep those that are used most

The most often used ones stay beside it, as many as there is room for, and are copied in from there.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from bigpipe.bigmodel.architecture import CHOSEN, experts_per_token, repeats, visited_share
from bigpipe.bigmodel.checkpoint import MappedFiles

from .slots import Slot, WeightGroup

if TYPE_CHECKING:
    import torch

READERS = 4
"""Experts that are read at a time: a disk is faster with several requests."""
INPUTS_BY_EXPERT = frozenset({"Llama4TextExperts"})
"""Modules that take a block of rows for each expert, zeros where a token did not choose it. Zeros give zeros."""
Key = TypeVar("Key")


class MostUsed(Generic[Key]):
    """What stays in memory: of all that is used, what is used most often, as much as there is room for."""

    def __init__(self, room: int) -> None:
        self.room = self.free = room
        """Bytes."""
        self._uses: Counter[Key] = Counter()
        self._sizes: dict[Key, int] = {}
        self._order: list[tuple[int, int, Key]] = []
        """A heap of (uses when it was put here, a number that is never the same, key)."""
        self._puts = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._sizes

    def use(self, key: Key, nbytes: int) -> tuple[bool, list[Key]]:
        """Count a use. Return whether the key stays, and what makes room for it: what was used less often."""
        self._uses[key] += 1
        if key in self._sizes:
            return True, []
        gone: list[Key] = []
        while self.free < nbytes:
            least = self._least()
            if least is None or self._uses[least] >= self._uses[key]:
                return False, gone
            self.free += self._sizes.pop(least)
            gone.append(least)
        self.free -= nbytes
        self._sizes[key] = nbytes
        self._put(key)
        return True, gone

    def _put(self, key: Key) -> None:
        self._puts += 1
        heapq.heappush(self._order, (self._uses[key], self._puts, key))

    def _least(self) -> Key | None:
        while self._order:
            uses, _, key = self._order[0]
            if key in self._sizes and uses == self._uses[key]:
                return key
            heapq.heappop(self._order)
            if key in self._sizes:
                self._put(key)
        return None


@dataclass(slots=True)
class Shelf:
    """Memory in the shape of all experts of a module."""

    tensors: Sequence[torch.Tensor]
    """By slot; windows into the files where these serve as the memory."""
    filled: set[int] = field(default_factory=set)


class ExpertWeights:
    """Fills the experts of groups that hold all theirs in one."""

    def __init__(self, files: MappedFiles) -> None:
        self._files = files
        self._shelves: dict[WeightGroup, Shelf] = {}
        self._free: dict[object, list[Sequence[torch.Tensor]]] = defaultdict(list)
        """By layout: memory that no group is using."""
        self.most_used: MostUsed[tuple[WeightGroup, int]] = MostUsed(0)
        self._kept: dict[tuple[WeightGroup, int], Sequence[torch.Tensor]] = {}
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="bigpipe-experts")

    def keep(self, room: int) -> None:
        """Let so many bytes of experts stay between passes."""
        self.most_used = MostUsed(room)

    def bring(self, group: WeightGroup, wanted: Iterable[int]) -> int:
        """Attach the group with at least these experts filled. Return the stored bytes of those that were brought and
        were not here. Raise StageFailed where the disk fails."""
        shelf = self._shelves.get(group)
        if shelf is None:
            shelf = self._shelves[group] = self._open(group)
        missing = sorted(set(wanted) - shelf.filled)
        jobs = [self._threads.submit(self._fill, group, shelf, expert) for expert in missing]
        wait(jobs)
        read = sum(job.result() for job in jobs)
        shelf.filled.update(missing)
        return read

    def drop(self, group: WeightGroup) -> None:
        """Detach; what is used most often stays."""
        shelf = self._shelves.pop(group)
        for slot in group.slots:
            slot.detach()
        for expert in shelf.filled:
            self._let_go(group, shelf, expert)
        if any(slot.scratch(group.device) for slot in group.slots):
            self._free[_layout(group)].append(shelf.tensors)

    def abandon(self, group: WeightGroup) -> None:
        """Detach a group that could not be brought; what may still be written to its memory harms nobody."""
        self._shelves.pop(group, None)
        for slot in group.slots:
            slot.detach()

    def _open(self, group: WeightGroup) -> Shelf:
        import torch

        free = self._free[_layout(group)]
        with torch.inference_mode(False):  # they outlive the forward they were read for
            tensors = free.pop() if free else [self._memory(slot, group.device) for slot in group.slots]
            for slot, tensor in zip(group.slots, tensors, strict=True):
                slot.attach({slot.attribute: tensor})
        return Shelf(tensors)

    def _memory(self, slot: Slot, device: torch.device) -> torch.Tensor:
        """Zeros, which take no memory of a CPU before they are written over."""
        import numpy as np
        import torch

        if slot.windowed(device):
            return next(iter(slot.read(self._files).values()))
        shape = slot.placeholder.shape
        if device.type != "cpu":
            return torch.zeros(shape, dtype=slot.dtype, device=device)
        nbytes = math.prod(shape) * slot.dtype.itemsize
        return torch.from_numpy(np.zeros(nbytes, np.uint8)).view(slot.dtype).reshape(shape)

    def _fill(self, group: WeightGroup, shelf: Shelf, expert: int) -> int:
        import torch

        kept = self._kept.get((group, expert))
        sources = [slot.entry(expert) for slot in group.slots]
        with torch.inference_mode(False), torch.no_grad():
            if kept is None:
                self._files.populate([source for found in sources for source in found])
            for place, (slot, tensor) in enumerate(zip(group.slots, shelf.tensors, strict=True)):
                if kept is not None and not slot.windowed(group.device):
                    tensor[expert].copy_(kept[place])
                elif not slot.windowed(group.device):
                    _lay(tensor[expert], map(self._files.window, sources[place]))
                    slot.check([tensor[expert]], map(self._files.window, sources[place]))
                    self._files.drop(sources[place])
        return 0 if kept is not None else sum(source.nbytes for found in sources for source in found)

    def _let_go(self, group: WeightGroup, shelf: Shelf, expert: int) -> None:
        import torch

        nbytes = sum(tensor[expert].nbytes for tensor in shelf.tensors)
        stays, gone = self.most_used.use((group, expert), nbytes)
        for other, number in gone:
            del self._kept[other, number]
            self._forget(other, number)
        if not stays:
            self._forget(group, expert)
        elif (group, expert) not in self._kept:
            with torch.inference_mode(False):
                self._kept[group, expert] = [
                    tensor if slot.windowed(group.device) else tensor[expert].clone()
                    for slot, tensor in zip(group.slots, shelf.tensors, strict=True)
                ]

    def _forget(self, group: WeightGroup, expert: int) -> None:
        """Of files that serve as the memory, drop the pages."""
        windows = [slot for slot in group.slots if slot.windowed(group.device)]
        if group.evict:
            self._files.drop([source for slot in windows for source in slot.entry(expert)])


def _layout(group: WeightGroup) -> object:
    return group.device, tuple((slot.placeholder.shape, slot.dtype) for slot in group.slots)


def _lay(entry: torch.Tensor, parts: Iterator[torch.Tensor]) -> None:
    """The parts' elements, one after the other."""
    flat, filled = entry.view(-1), 0
    for part in parts:
        flat[filled : filled + part.numel()].copy_(part.reshape(-1))
        filled += part.numel()


def chosen_experts(class_name: str, count: int, arguments: Iterable[object]) -> set[int]:
    """Return which of `count` experts a forward with these arguments uses; all of them where they do not tell.

    Told by a tensor of integers (the experts of each token; a number that is no expert's is nobody's), by a list of the
    rows for each expert, or by the rows themselves.
    """
    import torch

    for value in arguments:
        if isinstance(value, torch.Tensor) and not value.is_floating_point() and value.dtype != torch.bool:
            return {expert for expert in torch.unique(value).tolist() if 0 <= expert < count}
        if isinstance(value, list) and len(value) == count and all(type(rows) is int for rows in value):
            return {expert for expert, rows in enumerate(value) if rows}
        if isinstance(value, torch.Tensor) and class_name in INPUTS_BY_EXPERT:
            return set(value.reshape(count, -1).ne(0).any(1).nonzero().flatten().tolist())
    return set(range(count))


def moved_by_a_token(model: Any, groups: Iterable[WeightGroup], experts: ExpertWeights) -> int:
    """Return the stored bytes that a forward over one token is expected to move, once what stays is there."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None
    chosen = experts_per_token({name: getattr(text, name, None) for name in CHOSEN})
    always, among, size = 0, Counter[int](), 0
    names = {module: name for name, module in model.named_modules()}
    told = config.to_dict() if hasattr(config, "to_dict") else {}
    for group in groups:
        if count := group.experts or group.among:
            among[count] += group.moved()
            size += _nbytes(group) if group.experts else 0
        else:
            always += group.moved() * repeats(told, names.get(group.module, ""))
    kept = min(1.0, experts.most_used.room / max(size, 1))
    return always + int((1 - kept) * sum(n * visited_share(count, chosen) for count, n in among.items()))


def _nbytes(group: WeightGroup) -> int:
    """Of all experts, where they compute."""
    return sum(math.prod(slot.placeholder.shape) * slot.dtype.itemsize for slot in group.slots)

"""What cannot be split of a model, as the exact placement sees it: sizes, shared weights, and what may be streamed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .budget import buffers
from .devices import Caps, Device
from .tree import Tree


@dataclass(frozen=True, slots=True)
class Unit:
    name: str
    nbytes: int
    """Its own, without what it shares."""
    shared: int = 0
    """Bytes of storages that other units use too; the unit lies where they lie."""
    table: bool = False
    cached: int = 0
    """Bytes of keys and values, on whatever device it computes."""
    staying: int = 0
    """Bytes that stay there although it is streamed: `cached`, and buffers that no checkpoint holds."""
    experts: int = 0
    """Of its bytes, those of experts, which are brought one by one."""

    @property
    def moved(self) -> int:
        """Bytes that pass when it is streamed."""
        return 0 if self.table else self.nbytes + self.shared

    @property
    def passing(self) -> tuple[int, int]:
        """Bytes that pass when it is streamed: all but its experts, and its experts."""
        return self.moved - self.experts, self.experts


def units_of(tree: Tree) -> list[Unit]:
    """Return the units in the model's order; those without bytes are left out."""
    layers = list(tree.layers([""]))
    users = Counter(storage for layer in layers for storage in tree.storages(layer))
    units = []
    for layer in layers:
        storages = tree.storages(layer)
        shared = sum(tree.nbytes.get(storage, 0) for storage in storages if users[storage] > 1)
        own = sum(tree.nbytes.get(storage, 0) for storage in storages if users[storage] == 1)
        if own or shared:
            kept, experts = (tree.cached[layer], tree.staying[layer]), tree.passing(layer)[1]
            units.append(Unit(layer, own, shared, tree.is_table(layer), *kept, experts))
    return units


def groups_of(tree: Tree, units: Sequence[Unit]) -> list[tuple[frozenset[int], int]]:
    """Return (numbers of the units that must lie together, bytes they share)."""
    groups: list[tuple[frozenset[int], frozenset[str]]] = []
    for number, unit in enumerate(units):
        if unit.shared:
            joined = [group for group in groups if group[1] & tree.storages(unit.name)]
            members = frozenset({number}).union(*(members for members, _ in joined))
            storages = tree.storages(unit.name).union(*(storages for _, storages in joined))
            groups = [*(group for group in groups if group not in joined), (members, storages)]
    return [
        (members, tree.union_size(units[n].name for n in members) - sum(units[n].nbytes for n in members))
        for members, _ in groups
    ]


def streamable_units(
    units: Sequence[Unit], pinned: Mapping[int, Device], left: Caps, devices: Sequence[Device]
) -> Iterator[tuple[list[bool], int]]:
    """Yield choices of units that may be streamed, and the bytes that the first device keeps for them.

    All up to each size. Through a GPU one alone takes less, so that each is tried where all others may stay. pinned:
    number of a unit → where it must lie; what must lie away is streamed. left: bytes of each device. devices: those
    that compute, the one that runs what is streamed first.
    """
    main = devices[0]
    away = [units[number] for number, home in pinned.items() if home not in devices and units[number].moved]
    if main == "cpu":
        for room in _sizes((unit.moved for unit in away), (unit.moved for unit in units)):
            yield [unit.moved <= room for unit in units], room
        return
    rests, experts = (
        _sizes((unit.passing[part] for unit in away), (unit.passing[part] for unit in units)) for part in (0, 1)
    )
    for rest, shelf in itertools.product(rests, experts):
        within = [unit.passing[0] <= rest and unit.passing[1] <= shelf for unit in units]
        yield within, buffers(main, [(rest, 0), (0, shelf)])
    if len(away) == 1:
        yield [not unit.moved for unit in units], buffers(main, [away[0].passing])
    if away:
        return
    there = sum(unit.nbytes + unit.cached for unit in units if unit.moved)
    free = sum(left[device] for device in devices)
    for number, alone in enumerate(units):
        taken = there - alone.nbytes - alone.cached + alone.staying + alone.moved
        if alone.moved and number not in pinned and taken <= free:
            yield [not unit.moved or unit is alone for unit in units], buffers(main, [alone.passing])


def _sizes(must: Iterable[int], found: Iterable[int]) -> list[int]:
    """The largest of what must pass, and all that are larger."""
    least = max(must, default=0)
    return sorted({least, *(size for size in found if size > least)})

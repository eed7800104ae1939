"""The placement with the fewest predicted seconds per token, exactly.

Units (what cannot be split) keep the model's order: those that lie on GPUs fill them one after the other, and any may
be left to the CPU's memory or the disk and be streamed through the first GPU in use. The seconds of a token are those
of reading every weight from where it lies, and of handing activations on wherever the device changes. An embedding
table that lies in RAM or on disk gives up its rows there and is never streamed. The keys and values of a unit lie where
it computes: with it, or on the first GPU in use if it is streamed.

A dynamic program over the units: what matters of a prefix is its seconds, how far the GPUs are filled, what the first
one holds, and what is left to CPU and disk; prefixes that are worse in all of these than another are dropped, and so
are those that cannot beat the best complete answer known. It is solved for each first GPU, each largest unit that may
be streamed (room is kept for that one), and each device for the weights that several units share. Beyond `EXACT` units
no more than `WIDTH` prefixes are kept after each: exact still where there are no more, as with stacks of equal layers.
"""

from __future__ import annotations

import itertools
import math
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from bigpipe.fit import fits

from .budget import MemoryBudget
from .devices import Device
from .speeds import Speeds
from .tree import Tree

TIERS: tuple[Device, Device] = ("cpu", "disk")
BEAM = 24
"""Prefixes kept per unit in the quick first pass that finds a bound."""
EXACT = 16
WIDTH = 2000


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

    @property
    def moved(self) -> int:
        """Bytes that pass when it is streamed."""
        return 0 if self.table else self.nbytes + self.shared


@dataclass(frozen=True, slots=True)
class Solution:
    devices: dict[str, Device]
    seconds: float
    """Per token, predicted."""


Filled = tuple[int, int, float]
"""Index of the device being filled, bytes on it, bytes on the first device."""


@dataclass(slots=True)
class Prefix:
    """A placement of the first units."""

    seconds: float
    gpu: int
    """Index of the resident device being filled."""
    used: int
    """Bytes on it."""
    load: int
    """Bytes on the first device: what lies there, and what stays there of what is streamed through it."""
    left: tuple[int, int]
    """Bytes left to the CPU, to the disk."""
    at: Device | None
    """Where the last unit computed."""
    idle: bool = False
    """The first device holds no unit yet. It must, or another one would run what is streamed."""
    best: float = 0.0
    """Seconds of the whole, at the least."""
    device: Device | None = None
    before: Prefix | None = None

    @property
    def filled(self) -> Filled:
        return self.gpu, self.used if self.gpu else self.load, self.load

    def assignment(self) -> list[Device]:
        found: list[Device] = []
        prefix: Prefix | None = self
        while prefix is not None and prefix.device is not None:
            found.append(prefix.device)
            prefix = prefix.before
        return found[::-1]


def units_of(tree: Tree) -> list[Unit]:
    """Units in the model's order; those without bytes are left out."""
    layers = list(tree.layers([""]))
    users: dict[str, int] = {}
    for layer in layers:
        for storage in tree.storages(layer):
            users[storage] = users.get(storage, 0) + 1
    units = []
    for layer in layers:
        storages = tree.storages(layer)
        shared = sum(tree.nbytes.get(storage, 0) for storage in storages if users[storage] > 1)
        own = sum(tree.nbytes.get(storage, 0) for storage in storages if users[storage] == 1)
        if own or shared:
            units.append(Unit(layer, own, shared, tree.is_table(layer), tree.cached(layer), tree.staying(layer)))
    return units


def solve(tree: Tree, budget: MemoryBudget, speeds: Speeds) -> Solution | None:
    """The best placement within the caps, or None where there is none."""
    units = units_of(tree)
    groups = _groups(tree, units)
    if budget.gpus:
        found = _best(units, groups, budget.caps, speeds, [budget.gpus[first:] for first in range(len(budget.gpus))])
        if found is not None:
            return found
    caps = budget.without(budget.gpus).caps
    return _best(units, groups, caps, speeds, [("cpu",)] if "cpu" in caps else [])


def _groups(tree: Tree, units: Sequence[Unit]) -> list[tuple[frozenset[int], int]]:
    """(numbers of the units that must lie together, bytes they share)."""
    groups: list[tuple[set[int], set[str]]] = []
    for number, unit in enumerate(units):
        if not unit.shared:
            continue
        storages = set(tree.storages(unit.name))
        members = {number}
        for other in [group for group in groups if group[1] & storages]:
            groups.remove(other)
            members |= other[0]
            storages |= other[1]
        groups.append((members, storages))
    return [(frozenset(members), _shared_bytes(tree, [units[n] for n in members])) for members, _ in groups]


def _shared_bytes(tree: Tree, units: Sequence[Unit]) -> int:
    return tree.union_size([unit.name for unit in units]) - sum(unit.nbytes for unit in units)


def _best(
    units: Sequence[Unit],
    groups: Sequence[tuple[frozenset[int], int]],
    caps: Mapping[Device, int | None],
    speeds: Speeds,
    residents: Iterable[Sequence[Device]],
) -> Solution | None:
    best: Solution | None = None
    for devices in residents:
        homes = [*devices, *(d for d in ("cpu", "disk") if d in caps and d not in devices)]
        for chosen in itertools.product(homes, repeat=len(groups)):
            pinned = {number: home for (members, _), home in zip(groups, chosen, strict=True) for number in members}
            shared = {home: 0 for home in homes}
            for (_, nbytes), home in zip(groups, chosen, strict=True):
                shared[home] += nbytes
            for problem in _problems(units, pinned, shared, caps, speeds, devices):
                found = problem.solve(best.seconds if best else float("inf"))
                best = found or best
    return best


def _problems(
    units: Sequence[Unit],
    pinned: Mapping[int, Device],
    shared: Mapping[Device, int],
    caps: Mapping[Device, int | None],
    speeds: Speeds,
    devices: Sequence[Device],
) -> Iterator[Problem]:
    """One for each size of the largest unit that may be streamed, the smallest first."""
    main = devices[0]
    must = max((units[n].moved for n, home in pinned.items() if home not in devices), default=0)
    for room in sorted({0, *(unit.moved for unit in units)}):
        if room < must:
            continue
        left = {device: _less(cap, shared.get(device, 0)) for device, cap in caps.items()}
        left[main] = _less(left[main], room)
        if all(cap is None or cap >= 0 for cap in left.values()):
            yield Problem(units, pinned, left, speeds, tuple(devices), room)


def _less(cap: int | None, size: int) -> int | None:
    return None if cap is None else cap - size


class Fillable:
    """The most value that units of these (bytes, value) bring into a room: less where they are few and large."""

    MOST = 20_000

    def __init__(self, units: Iterable[tuple[int, int]]) -> None:
        counts = Counter(units)
        self.total = sum(value * count for (_, value), count in counts.items())
        self.whole = sum(size * count for (size, _), count in counts.items())
        self.free = sum(value * count for (size, value), count in counts.items() if not size)
        self.rate = max((value / size for size, value in counts if size), default=0.0)
        best = {0: 0}
        for (size, value), count in counts.items():
            if len(best) * (count + 1) > self.MOST:
                best = {}
                break
            for held, worth in list(best.items()):
                for number in range(1, count + 1):
                    filled = held + size * number
                    best[filled] = max(best.get(filled, 0), worth + value * number)
        self.sizes = sorted(best)
        self.values = list(itertools.accumulate((best[size] for size in self.sizes), max))

    def of(self, room: int | None) -> int:
        if room is None or room >= self.whole:
            return self.total
        if room < 0:
            return 0
        if not self.sizes:
            return min(self.total, self.free + math.ceil(room * self.rate))
        return self.values[bisect_right(self.sizes, room) - 1]


class Problem:
    """Placing the units with the devices, the shared weights and the room for streaming given."""

    def __init__(
        self,
        units: Sequence[Unit],
        pinned: Mapping[int, Device],
        caps: Mapping[Device, int | None],
        speeds: Speeds,
        devices: tuple[Device, ...],
        room: int,
    ) -> None:
        self.units = units
        self.pinned = pinned
        self.caps = dict(caps)
        self.speeds = speeds
        self.devices = devices
        self.main = devices[0]
        self.room = room
        for number, home in pinned.items():
            here = home in devices
            self.caps[home] = _less(self.caps[home], units[number].nbytes + (units[number].cached if here else 0))
            self.caps[self.main] = _less(self.caps[self.main], 0 if here else units[number].staying)
        # Bytes still to come after each unit; pinned ones are taken off the caps already.
        moved = [0 if number in pinned else unit.moved for number, unit in enumerate(units)]
        self._rest = _still_to_come(moved)
        free = [unit for number, unit in enumerate(units) if number not in pinned]
        self._fillable = Fillable((unit.moved + unit.cached, unit.moved) for unit in free)
        self._offloadable = Fillable((unit.moved, unit.moved) for unit in free)
        self._streamable = Fillable((unit.staying, unit.moved) for unit in free if unit.moved <= room)
        cached = [0 if number in pinned else unit.cached for number, unit in enumerate(units)]
        self._to_cache = _still_to_come(cached)
        self._whole = [self._fillable.of(self.caps[device]) for device in self.devices]
        # Seconds per byte: they are asked for half a million times
        self._from_cpu = speeds.streamed("cpu", self.main, 2**40) / 2**40
        self._from_disk = speeds.streamed("disk", self.main, 2**40) / 2**40
        self._here = speeds.resident(self.main, 2**40) / 2**40
        self._loss = min(self._from_cpu, self._from_disk) - self._here
        self._kept = Fillable((unit.moved, unit.staying) for unit in free if unit.moved <= room)
        staying = [0 if number in pinned or unit.moved > room else unit.staying for number, unit in enumerate(units)]
        self._to_keep = _still_to_come(staying)

    def solve(self, bound: float) -> Solution | None:
        """Better than `bound` seconds, or None."""
        start = self._start()
        least = self._least(start, 0, counted=True)
        if least >= bound or any(cap is not None and cap < 0 for cap in self.caps.values()):
            return None
        quick = self._search(bound, counted=True, beam=BEAM)
        bound = quick.seconds if quick else bound
        if least == self._least(start, 0, counted=False):
            # What CPU and disk hold seems not to matter, and without counting it there is much less to compare.
            relaxed = self._search(bound, counted=False)
            if relaxed is None or self._holds(relaxed):
                return relaxed or quick
        return self._search(bound, counted=True) or quick

    def _start(self) -> Prefix:
        idle = self.main != "cpu" and self.main not in self.pinned.values()
        return Prefix(0.0, 0, 0, 0, (0, 0), None, idle)

    def _holds(self, solution: Solution) -> bool:
        held: dict[Device, int] = {}
        for number, unit in enumerate(self.units):
            if number not in self.pinned:
                held[solution.devices[unit.name]] = held.get(solution.devices[unit.name], 0) + unit.nbytes
        return all((cap := self.caps[device]) is None or size <= cap for device, size in held.items())

    def _search(self, bound: float, *, counted: bool, beam: int | None = None) -> Solution | None:
        width = beam or (WIDTH if len(self.units) > EXACT else sys.maxsize)
        prefixes = [self._start()]
        for number, unit in enumerate(self.units):
            made = [new for prefix in prefixes for new in self._extend(prefix, number, unit, counted)]
            for new in made:
                new.best = new.seconds + self._least(new, number + 1, counted)
            prefixes = self._undominated([new for new in made if new.best < bound], number + 1, bound)
            if len(prefixes) > width:
                prefixes = sorted(prefixes, key=lambda prefix: prefix.best)[:width]
        best = min((prefix for prefix in prefixes if not prefix.idle), key=lambda p: p.seconds, default=None)
        if best is None:
            return None
        names = [unit.name for unit in self.units]
        return Solution(dict(zip(names, best.assignment(), strict=True)), best.seconds)

    def _extend(self, prefix: Prefix, number: int, unit: Unit, counted: bool) -> Iterator[Prefix]:
        home = self.pinned.get(number)
        if home is not None:
            yield self._moved_on(prefix, unit, home)
            return
        for index in range(prefix.gpu, 1 if prefix.idle else len(self.devices)):
            size = unit.nbytes + unit.cached
            used = size + (prefix.load if index == 0 else prefix.used if index == prefix.gpu else 0)
            if fits(used, self.caps[self.devices[index]]):
                new = self._moved_on(prefix, unit, self.devices[index])
                new.gpu, new.used = index, used
                new.load, new.idle = (used, False) if index == 0 else (prefix.load, prefix.idle)
                yield new
        load = prefix.load + unit.staying
        if unit.moved > self.room or not fits(load, self.caps[self.main]):
            return
        for place, tier in enumerate(TIERS):
            if tier not in self.caps or tier in self.devices:
                continue
            new = self._moved_on(prefix, unit, tier)
            new.load = load
            if counted:
                left = list(prefix.left)
                left[place] += unit.nbytes
                if not fits(left[place], self.caps[tier]):
                    continue
                new.left = (left[0], left[1])
            yield new

    def _moved_on(self, prefix: Prefix, unit: Unit, device: Device) -> Prefix:
        at, seconds = self.cost(unit, device)
        hop = self.speeds.hop if prefix.at not in (None, at) else 0.0
        seconds += prefix.seconds + hop
        return Prefix(
            seconds, prefix.gpu, prefix.used, prefix.load, prefix.left, at, prefix.idle, device=device, before=prefix
        )

    def cost(self, unit: Unit, device: Device) -> tuple[Device, float]:
        """(where it computes, seconds)."""
        if unit.table:
            return ("cpu" if device in ("cpu", "disk") else device), 0.0
        nbytes = unit.nbytes + unit.shared
        if device in self.devices:
            return device, self.speeds.resident(device, nbytes)
        return self.main, self.speeds.streamed(device, self.main, nbytes)

    def _least(self, prefix: Prefix, number: int, counted: bool) -> float:
        """Seconds that the rest takes at least.

        With so many GPUs more, there is room for so much more and the rest is streamed; none can be better than the
        best of these.
        """
        rest = self._rest[number]
        used = prefix.used if prefix.gpu else prefix.load
        room = self._fillable.of(_less(self.caps[self.devices[prefix.gpu]], used))
        if self._to_cache[number] and not fits(self._to_cache[number], self._room_to_compute(prefix)):
            return math.inf
        # Where keys and values of what is streamed find no room on the first device, it cannot be streamed
        most = self._streamable.of(_less(self.caps[self.main], prefix.load))
        seconds = self._streaming(rest - room, most, prefix, counted)
        there = 0 if prefix.at == self.devices[prefix.gpu] else 1  # the hop to one of them may be behind us
        for more, whole in enumerate(self._whole[prefix.gpu + 1 :], 1):
            if room >= rest:
                break
            room += whole
            hops = (more - there) * self.speeds.hop
            seconds = min(seconds, hops + self._streaming(rest - room, most, prefix, counted))
        return seconds + rest * self._here

    def _room_to_compute(self, prefix: Prefix) -> int | None:
        """Bytes left on all devices that compute: what is still to come has its keys and values on one of them."""
        rooms = [_less(self.caps[self.main], prefix.load)]
        rooms += [_less(self.caps[device], 0) for device in self.devices[max(prefix.gpu, 1) :]]
        known = [room for room in rooms if room is not None]
        return sum(known) - (prefix.used if prefix.gpu else 0) if len(known) == len(rooms) else None

    def _streaming(self, nbytes: int, most: int, prefix: Prefix, counted: bool) -> float:
        """Seconds by which streaming takes longer than having: from the CPU as far as it has room, else from disk."""
        if nbytes <= 0:
            return 0.0
        if nbytes > most:
            return math.inf
        on_cpu = 0
        if self.main != "cpu" and "cpu" in self.caps:
            cap = self.caps["cpu"]
            on_cpu = min(nbytes, self._offloadable.of(_less(cap, prefix.left[0]) if counted else None))
        return on_cpu * self._from_cpu + (nbytes - on_cpu) * self._from_disk - nbytes * self._here

    def _undominated(self, prefixes: list[Prefix], number: int, bound: float) -> list[Prefix]:
        """Without those that another prefix beats in seconds and in room, at the same place or a hop cheaper."""
        buckets: dict[object, list[Prefix]] = {}
        for prefix in prefixes:
            buckets.setdefault((prefix.left, prefix.idle), []).append(prefix)
        return [prefix for bucket in buckets.values() for prefix in self._front(bucket, number, bound)]

    def _front(self, bucket: list[Prefix], number: int, bound: float) -> list[Prefix]:
        bucket.sort(key=lambda prefix: (prefix.seconds, prefix.filled))
        fronts: dict[Device | None, list[Filled]] = {}
        kept: list[Prefix] = []
        cheaper = 0
        furthest: list[Filled] = []
        for prefix in bucket:
            while cheaper < len(kept) and kept[cheaper].seconds + self.speeds.hop <= prefix.seconds:
                _join(furthest, kept[cheaper].filled)
                cheaper += 1
            front = fronts.setdefault(prefix.at, [])
            gpu, used, _ = prefix.filled
            here = gpu, used, self._harmless(prefix, number, bound)
            if not any(_is_less_full(there, here) for there in (*furthest, *front)):
                _join(front, prefix.filled)
                kept.append(prefix)
        return kept

    def _harmless(self, prefix: Prefix, number: int, bound: float) -> float:
        """The load of the first device up to which another prefix has room for all that this one may still stream."""
        cap, kept = self.caps[self.main], self._to_keep[number]
        if cap is None:
            return math.inf
        if kept and self._loss > 0 and bound < math.inf:
            time = bound - prefix.seconds - self._rest[number] * self._here
            kept = min(kept, self._kept.of(math.ceil(time / self._loss)))
        return max(prefix.load, cap - kept)


def _still_to_come(sizes: Sequence[int]) -> list[int]:
    """What is left after each unit, from before the first one on."""
    return [*itertools.accumulate(reversed(sizes), initial=0)][::-1]


def _is_less_full(one: Filled, other: Filled) -> bool:
    return one[:2] <= other[:2] and one[2] <= other[2]


def _join(front: list[Filled], new: Filled) -> None:
    front[:] = [*(old for old in front if not _is_less_full(new, old)), new]

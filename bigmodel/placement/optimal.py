"""The placement with the fewest predicted seconds per token, exactly.

Units (what cannot be split) keep the model's order: those that lie on GPUs fill them one after the other, and any may
be left to the CPU's memory or the disk and be streamed through the first GPU in use. The seconds of a token are those
of reading every weight from where it lies, and of handing activations on wherever the device changes. An embedding
table that lies in RAM or on disk gives up its rows there and is never streamed. The keys and values of a unit lie where
it computes: with it, or on the first GPU in use if it is streamed. There room is kept for what passes: see
`budget.buffers`.

A dynamic program over the units: what matters of a prefix is its seconds, how far the GPUs are filled, what the first
one holds, and what is left to CPU and disk; prefixes that are worse in all of these than another are dropped, and so
are those that cannot beat the best complete answer known. It is solved for each first GPU, each largest unit that may
be streamed and each one that is streamed alone (room is kept for these), and each device for the weights that several
units share. Beyond `EXACT` units no more than about `PREFIXES` are made: what is dropped for that is remembered by the
fewest seconds it might have led to, so that an answer says whether it was proved to be the fastest.
"""

from __future__ import annotations

import itertools
import math
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .budget import MemoryBudget
from .devices import Caps, Device
from .speeds import Speeds
from .tree import Tree
from .units import Unit, groups_of, streamable_units, units_of

TIERS: tuple[Device, Device] = ("cpu", "disk")
BEAM = 24
"""Prefixes kept per unit in the quick first pass that finds a bound."""
EXACT = 16
"""Units up to which every prefix is kept that may lead to the fastest placement."""
PREFIXES = 200_000
"""Made at the most beyond so many units, and more only where no placement is known yet."""
CHOICES = 4
"""Prefixes that mostly come of one: on the same GPU, the next one, CPU, disk."""


@dataclass(frozen=True, slots=True)
class Solution:
    devices: dict[str, Device]
    seconds: float
    """Per token, predicted."""
    least: float = 0.0
    """No placement takes fewer: as many as `seconds` where this one is proved to be the fastest."""
    prefixes: int = 0
    """Made by the search."""

    def describe(self) -> str:
        slower = self.seconds / self.least - 1 if self.least else 0.0
        if slower < 1e-9:
            return "proved to be the fastest"
        return f"not proved to be the fastest: at most {max(slower, 1e-3):.1%} slower, and the search ended there"


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


def solve(tree: Tree, budget: MemoryBudget, speeds: Speeds, *, limit: int | None = None) -> Solution | None:
    """The best placement within the caps that the search finds, or None where it finds none.

    limit: of prefixes; None: none up to `EXACT` units, else `PREFIXES`.
    """
    units = units_of(tree)
    if limit is None:
        limit = PREFIXES if len(units) > EXACT else sys.maxsize
    gpus = [budget.gpus[first:] for first in range(len(budget.gpus))]
    found = _best(_problems(tree, units, budget.caps, speeds, gpus), limit)
    if found.solution is None:
        caps = budget.without(budget.gpus).caps
        alone = _best(_problems(tree, units, caps, speeds, [("cpu",)] if "cpu" in caps else []), limit)
        found = Found(alone.solution, found.made + alone.made, min(found.dropped, alone.dropped))
    best = found.solution
    return replace(best, least=min(best.seconds, found.dropped), prefixes=found.made) if best else None


def _best(problems: Iterable[Problem], limit: int) -> Found:
    """Each problem quickly, the most promising first; then thoroughly, as far as the limit goes."""
    ordered = sorted(problems, key=lambda problem: problem.least)
    best: Solution | None = None
    made, least = 0, math.inf
    for thorough, problem in itertools.product((False, True), ordered):
        bound = best.seconds if best else math.inf
        if problem.least >= bound:
            continue
        dropped = problem.least
        if made < limit or best is None:
            found = problem.search(bound, limit - made if thorough else 0)
            best = found.solution or best
            made, dropped = made + found.made, found.dropped
        least = min(least, dropped) if thorough else least
    return Found(best, made, least)


def _problems(
    tree: Tree, units: Sequence[Unit], caps: Caps, speeds: Speeds, residents: Iterable[Sequence[Device]]
) -> Iterator[Problem]:
    """One for each first device, each device of shared weights, and each choice of units that may be streamed."""
    groups = groups_of(tree, units)
    for devices in residents:
        homes = [*devices, *(tier for tier in TIERS if tier in caps and tier not in devices)]
        for chosen in itertools.product(homes, repeat=len(groups)):
            pinned: dict[int, Device] = {}
            left = {**caps}
            for (members, nbytes), home in zip(groups, chosen, strict=True):
                pinned |= dict.fromkeys(members, home)
                left[home] -= nbytes
            for streamable, room in streamable_units(units, pinned, left, devices):
                given = {**left, devices[0]: left[devices[0]] - room}
                yield Problem(units, pinned, given, speeds, tuple(devices), streamable)


class Fillable:
    """The most value that units of these (bytes, value) bring into a room: in whole units where few sums of them are
    different, else with a part of one."""

    MOST = 20_000

    def __init__(self, units: Iterable[tuple[int, int]]) -> None:
        counts = Counter(units)
        self.total = sum(value * count for (_, value), count in counts.items())
        self.whole = sum(size * count for (size, _), count in counts.items())
        best = {0: 0}
        for (size, value), count in counts.items():
            if len(best) * (count + 1) > self.MOST:
                break
            for held, worth in list(best.items()):
                for number in range(1, count + 1):
                    filled = held + size * number
                    best[filled] = max(best.get(filled, 0), worth + value * number)
        else:
            self.sizes = sorted(best)
            self.values = list(itertools.accumulate((best[size] for size in self.sizes), max))
            self.rates = [0.0] * len(best)
            return
        ordered = sorted(counts, key=lambda unit: unit[1] / unit[0] if unit[0] else math.inf, reverse=True)
        self.sizes = [0, *itertools.accumulate(size * counts[size, value] for size, value in ordered)]
        self.values = [0, *itertools.accumulate(value * counts[size, value] for size, value in ordered)]
        self.rates = [*(value / size if size else 0.0 for size, value in ordered), 0.0]

    def of(self, room: float) -> int:
        if room >= self.whole:
            return self.total
        if room < 0:
            return 0
        last = bisect_right(self.sizes, room) - 1
        return self.values[last] + math.ceil((room - self.sizes[last]) * self.rates[last])


@dataclass(frozen=True, slots=True)
class Found:
    """What one search came to."""

    solution: Solution | None
    made: int = 0
    """Prefixes."""
    dropped: float = math.inf
    """The fewest seconds that a prefix might have led to that was dropped for want of room in the search."""


class Problem:
    """Placing the units with the devices, the shared weights and the room for streaming given."""

    def __init__(
        self,
        units: Sequence[Unit],
        pinned: Mapping[int, Device],
        caps: Caps,
        speeds: Speeds,
        devices: tuple[Device, ...],
        streamable: Sequence[bool],
    ) -> None:
        """caps: without what the first device keeps for streaming. streamable: which of the units may be streamed."""
        self.units = units
        self.pinned = pinned
        self.caps = dict(caps)
        self.speeds = speeds
        self.devices = devices
        self.main = devices[0]
        self.streamable = streamable
        self.start = Prefix(0.0, 0, 0, 0, (0, 0), None, idle=self.main != "cpu" and self.main not in pinned.values())
        for number, home in pinned.items():
            here = home in devices
            self.caps[home] -= units[number].nbytes + (units[number].cached if here else 0)
            self.caps[self.main] -= 0 if here else units[number].staying
        self._next = [self._candidates(index) for index in range(len(devices))]
        # Bytes still to come after each unit; pinned ones are taken off the caps already
        numbered = [(unit, number not in pinned, streamable[number]) for number, unit in enumerate(units)]
        self._rest = _still_to_come(unit.moved if free else 0 for unit, free, _ in numbered)
        self._to_compute = _still_to_come(
            0 if not free else unit.cached if small else unit.nbytes + unit.cached for unit, free, small in numbered
        )
        self._to_keep = _still_to_come(unit.staying if free and small else 0 for unit, free, small in numbered)
        movable = [unit for unit, free, small in numbered if free and small]
        free = [unit for unit, free, _ in numbered if free]
        self._fillable = Fillable((unit.moved + unit.cached, unit.moved) for unit in free)
        self._offloadable = Fillable((unit.moved, unit.moved) for unit in free)
        self._most_streamed = Fillable((unit.staying, unit.moved) for unit in movable)
        self._whole = [self._fillable.of(self.caps[device]) for device in self.devices]
        everything = sum(unit.nbytes for unit in free)
        # What a tier holds that has room for everything need not be counted, and prefixes differ in less
        self._scarce = [tier for tier in TIERS if everything > self.caps.get(tier, math.inf)]
        # Seconds per byte: they are asked for half a million times
        self._from_cpu = speeds.streamed("cpu", self.main, 2**40) / 2**40
        self._from_disk = speeds.streamed("disk", self.main, 2**40) / 2**40
        self._here = speeds.resident(self.main, 2**40) / 2**40
        self.least = math.inf if min(self.caps.values()) < 0 else self._least(self.start, 0)

    def _candidates(self, index: int) -> list[int]:
        """Devices to go on with after this one: one is passed over only for a larger one, which saves a hop."""
        caps = [self.caps[device] for device in self.devices]
        later = range(index + 1, len(caps))
        return [index, *(n for n in later if self.pinned or all(caps[n] > cap for cap in caps[index + 1 : n]))]

    def search(self, bound: float, limit: int = 0) -> Found:
        """Better than `bound` seconds. limit: of prefixes, of which `BEAM` are kept after each unit at the least."""
        prefixes, made, dropped = [self.start], 0, math.inf
        for number, unit in enumerate(self.units):
            new = [longer for prefix in prefixes for longer in self._extend(prefix, number, unit)]
            made += len(new)
            for prefix in new:
                prefix.best = prefix.seconds + self._least(prefix, number + 1)
            prefixes = self._undominated([prefix for prefix in new if prefix.best < bound], number + 1)
            width = max(BEAM, (limit - made) // (CHOICES * (len(self.units) - number)))
            if len(prefixes) > width:
                prefixes.sort(key=lambda prefix: prefix.best)
                dropped = min(dropped, prefixes[width].best)
                del prefixes[width:]
        best = min((prefix for prefix in prefixes if not prefix.idle), key=lambda p: p.seconds, default=None)
        if best is None:
            return Found(None, made, dropped)
        names = [unit.name for unit in self.units]
        return Found(Solution(dict(zip(names, best.assignment(), strict=True)), best.seconds), made, dropped)

    def _extend(self, prefix: Prefix, number: int, unit: Unit) -> Iterator[Prefix]:
        home = self.pinned.get(number)
        if home is not None:
            yield self._moved_on(prefix, unit, home)
            return
        for index in (0,) if prefix.idle else self._next[prefix.gpu]:
            size = unit.nbytes + unit.cached
            used = size + (prefix.load if index == 0 else prefix.used if index == prefix.gpu else 0)
            if used <= self.caps[self.devices[index]]:
                new = self._moved_on(prefix, unit, self.devices[index])
                new.gpu, new.used = index, used
                new.load, new.idle = (used, False) if index == 0 else (prefix.load, prefix.idle)
                yield new
        load = prefix.load + unit.staying
        if not self.streamable[number] or load > self.caps[self.main]:
            return
        for place, tier in enumerate(TIERS):
            if tier not in self.caps or tier in self.devices:
                continue
            new = self._moved_on(prefix, unit, tier)
            new.load = load
            if tier in self._scarce:
                cpu, disk = prefix.left
                new.left = (cpu, disk + unit.nbytes) if place else (cpu + unit.nbytes, disk)
                if new.left[place] > self.caps[tier]:
                    continue
            yield new

    def _moved_on(self, prefix: Prefix, unit: Unit, device: Device) -> Prefix:
        at, seconds = self._cost(unit, device)
        seconds += prefix.seconds + (self.speeds.hop if prefix.at not in (None, at) else 0.0)
        return Prefix(
            seconds, prefix.gpu, prefix.used, prefix.load, prefix.left, at, prefix.idle, device=device, before=prefix
        )

    def _cost(self, unit: Unit, device: Device) -> tuple[Device, float]:
        """(where it computes, seconds)."""
        if unit.table:
            return ("cpu" if device in ("cpu", "disk") else device), 0.0
        nbytes = unit.nbytes + unit.shared
        if device in self.devices:
            return device, self.speeds.resident(device, nbytes)
        return self.main, self.speeds.streamed(device, self.main, nbytes)

    def _least(self, prefix: Prefix, number: int) -> float:
        """Seconds that the rest takes at least.

        With so many GPUs more, there is room for so much more and the rest is streamed; none can be better than the
        best of these.
        """
        rest = self._rest[number]
        used = prefix.used if prefix.gpu else prefix.load
        room = self._fillable.of(self.caps[self.devices[prefix.gpu]] - used)
        if self._to_compute[number] and self._to_compute[number] > self._room_to_compute(prefix):
            return math.inf
        # Where keys and values of what is streamed find no room on the first device, it cannot be streamed
        most = self._most_streamed.of(self.caps[self.main] - prefix.load)
        seconds = self._streaming(rest - room, most, prefix)
        there = 0 if prefix.at == self.devices[prefix.gpu] else 1  # the hop to one of them may be behind us
        for more, whole in enumerate(self._whole[prefix.gpu + 1 :], 1):
            if room >= rest:
                break
            room += whole
            hops = (more - there) * self.speeds.hop
            seconds = min(seconds, hops + self._streaming(rest - room, most, prefix))
        return seconds + rest * self._here

    def _room_to_compute(self, prefix: Prefix) -> float:
        """Bytes left on all devices that compute, for keys and values still to come and what is too large to stream."""
        later = sum(self.caps[device] for device in self.devices[max(prefix.gpu, 1) :])
        return self.caps[self.main] - prefix.load + later - (prefix.used if prefix.gpu else 0)

    def _streaming(self, nbytes: int, most: int, prefix: Prefix) -> float:
        """Seconds by which streaming takes longer than having: from the CPU as far as it has room, else from disk."""
        if nbytes <= 0:
            return 0.0
        if nbytes > most:
            return math.inf
        on_cpu = 0
        if self.main != "cpu" and "cpu" in self.caps:
            on_cpu = min(nbytes, self._offloadable.of(self.caps["cpu"] - prefix.left[0]))
        return on_cpu * self._from_cpu + (nbytes - on_cpu) * self._from_disk - nbytes * self._here

    def _undominated(self, prefixes: list[Prefix], number: int) -> list[Prefix]:
        """Without those that another prefix beats in seconds and in room, at the same place or a hop cheaper."""
        buckets: dict[object, list[Prefix]] = {}
        for prefix in prefixes:
            buckets.setdefault((prefix.left, prefix.idle), []).append(prefix)
        # However full the first device is, up to here it has room for all that may still stay there of what is streamed
        harmless = self.caps[self.main] - self._to_keep[number]
        return [prefix for bucket in buckets.values() for prefix in self._front(bucket, harmless)]

    def _front(self, bucket: list[Prefix], harmless: float) -> list[Prefix]:
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
            gpu, used, load = prefix.filled
            if not any(_is_less_full(there, (gpu, used, max(load, harmless))) for there in (*furthest, *front)):
                _join(front, prefix.filled)
                kept.append(prefix)
        return kept


def _still_to_come(sizes: Iterable[int]) -> list[int]:
    """What is left after each unit, from before the first one on."""
    return [*itertools.accumulate(reversed([*sizes]), initial=0)][::-1]


def _is_less_full(one: Filled, other: Filled) -> bool:
    return one[:2] <= other[:2] and one[2] <= other[2]


def _join(front: list[Filled], new: Filled) -> None:
    front[:] = [*(old for old in front if not _is_less_full(new, old)), new]

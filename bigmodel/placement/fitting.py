"""Why a placement does not fit, and the smallest change under which it does: each is tried before it is named."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from bigpipe.errors import DoesNotFit, UsageError
from bigpipe.fit import Cure, Misfit, Need, as_fields, lacking, nearest, totals
from bigpipe.machine import Machine
from bigpipe.sizes import counted, exact_size, format_size

from .budget import MemoryBudget, memory_of
from .devices import Device, devices_of, named
from .placement import Placement, PlacementRequest
from .tree import Tree

Attempt = Callable[[PlacementRequest], Placement]
"""Places the same model as asked; raises UsageError or DoesNotFit."""


ROUNDS = 4
"""Changes that are put together until a request fits."""


def over_a_cap(
    needs: Mapping[Device, Need], budget: MemoryBudget, max_memory: Mapping[int | str, Any]
) -> Misfit | None:
    """The first device of a map somebody wrote that holds more than its cap; the change is that of all of them, by the
    keys of `max_memory`, one of which may stand for several."""
    over = lacking(totals(needs), budget.memory)
    if not over:
        return None
    first = next(iter(over))
    need, cap = needs[first], int(budget.memory.get(first, 0))
    keys = {device: key for key in max_memory for device in devices_of(key)}
    sizes: dict[int | str, int] = {}
    for device in over:
        key = keys.get(device, device)
        sizes[key] = max(sizes.get(key, 0), needs[device].total)
    change = {f"max_memory.{key}": size_text(size) for key, size in sizes.items()}
    return Misfit(
        f"device_map puts {need} on {named(first)}; max_memory leaves it {format_size(cap)}",
        Cure(change, f"{as_fields(change)}, or move parts elsewhere"),
    )


def too_small(
    tree: Tree, budget: MemoryBudget, request: PlacementRequest, works: Callable[[MemoryBudget], bool]
) -> Misfit:
    """Names the entry of `max_memory` whose raise adds the fewest bytes (one, or all GPUs' alike), and one to add."""
    room = "" if budget.room == math.inf else f"; there is room for {format_size(int(budget.room))}"
    layer = max(tree.size[layer] for layer in tree.layers([""]))
    cause = f"the model's weights and buffers take {format_size(tree.size[''])}, its largest layer {format_size(layer)}"
    if request.max_memory is None:
        return Misfit(f"{cause}{room} beside what generating takes", "quantize first, or give more devices")
    change = _smallest_raise(tree.size[""], budget, request.max_memory, works)
    added = [d for d in ("cpu", "disk") if d not in budget.memory and works(budget.given({d: math.inf}))][:1]
    words = ([as_fields(change)] if change else []) + [f"add {device} to max_memory" for device in added]
    return Misfit(cause + room, Cure(change, ", or ".join(words) or "raise max_memory"))


def _smallest_raise(
    total: int, budget: MemoryBudget, max_memory: Mapping[int | str, Any], works: Callable[[MemoryBudget], bool]
) -> dict[str, str]:
    """Key of `max_memory` → size, of the raise that adds the fewest bytes; {} where none is enough."""
    entries: dict[tuple[int | str, ...], list[Device]] = {(key,): devices_of(key) for key in max_memory}
    gpus = [key for key in max_memory if devices_of(key)[0] in budget.gpus]
    if len(gpus) > 1 and len({budget.memory[gpu] for gpu in budget.gpus}) == 1:
        entries = {keys: devices for keys, devices in entries.items() if keys[0] not in gpus}
        entries[tuple(gpus)] = list(budget.gpus)
    raises: dict[tuple[int | str, ...], tuple[int, int]] = {}
    for keys, devices in entries.items():
        cap = int(budget.memory[devices[0]])

        def holds(size: int, devices: list[Device] = devices) -> bool:
            return works(budget.given(dict.fromkeys(devices, size)))

        if size := nearest(2 * total, cap, holds, step=max(1, total >> 14)):
            raises[keys] = ((size - cap) * len(devices), size)
    best = min(raises, key=lambda keys: raises[keys][0], default=())
    return {f"max_memory.{key}": size_text(raises[best][1]) for key in best}


def size_text(size: int, *, up: bool = True) -> str:
    """Rounded to a tenth of the unit, as it may be written into `max_memory`."""
    unit, name = (2**30, "GiB") if size >= 2**30 else (2**20, "MiB") if size >= 2**20 else (1, "")
    tenths = math.ceil(size / unit * 10) if up else size * 10 // unit
    return f"{tenths / 10:.1f}{name}" if name else f"{size}B" if size else "0"


def find_misfits(
    request: PlacementRequest, placement: Placement | None, machine: Machine, attempt: Attempt | None = None
) -> tuple[Misfit, ...]:
    """Return what the machine lacks for the placement; None: the model is not known yet, and nothing can be tried."""
    if missing := _missing_gpus(request, placement, machine):
        return (_missing(request, machine, missing, attempt),)
    rooms = memory_of(machine, share=1)
    over = lacking(totals(placement.needs), rooms) if placement else {}
    if placement is None or attempt is None or not over:
        return ()
    device, need = next((device, placement.needs[device]) for device in over)
    gpu = next((f" ({gpu.name})" for gpu in machine.gpus if gpu.index == device), "")
    others = f"; {len(over) - 1} more lack room" if len(over) > 1 else ""
    cause = f"needs {format_size(need.total)} on {named(device)}{gpu}, which has {format_size(int(rooms[device]))}"
    tokens = f"{request.batch_size} × {request.sequence_length} tokens"
    cure = Trial(machine, attempt).cure(request, placement, over)
    return (Misfit(f"{cause}: {need} at {tokens}{others}", cure),)


@dataclass(frozen=True, slots=True)
class Trial:
    """What else would fit a machine: each change is tried with a placement of its own."""

    machine: Machine
    attempt: Attempt

    def holds(self, request: PlacementRequest) -> bool:
        try:
            placement = self.attempt(request)
        except (DoesNotFit, UsageError):
            return False
        return not lacking(totals(placement.needs), memory_of(self.machine, share=1))

    def misfits(self, request: PlacementRequest) -> tuple[Misfit, ...]:
        """What is said of a request. Raise UsageError for one that says nothing."""
        try:
            return find_misfits(request, self.attempt(request), self.machine, self.attempt)
        except DoesNotFit as error:
            return (Misfit.of(error),)

    def completed(self, request: PlacementRequest, change: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the change with what is to be changed besides until it fits; {} where nothing helps."""
        for _ in range(ROUNDS):
            try:
                further = self.misfits(request.changed(change))
            except UsageError:
                return {}
            if not further:
                return change
            if not further[0].change:
                return {}
            change = _joined(request, change, further[0].change)
        return {}

    def cured(self, request: PlacementRequest, misfit: Misfit) -> Misfit:
        """Return what is said of a request that cannot be placed, with a change that was tried on this machine."""
        if request.max_memory is None:
            return replace(misfit, cure=self.smaller_work(request) or misfit.cure)
        if not misfit.change or _missing_gpus(request, None, self.machine):  # it is placed for another machine
            return misfit
        fitting = self.completed(request, misfit.change)
        if fitting == misfit.change:
            return misfit
        cure = Cure(fitting) if fitting else "quantize first, move parts elsewhere, or give more devices"
        return replace(misfit, cure=cure)

    def smaller_work(self, request: PlacementRequest, *options: str) -> Cure | None:
        """The largest batch that fits, or the longest sequences that do."""
        for option in options or ("batch_size", "sequence_length"):

            def holds(value: int, option: str = option) -> bool:
                return self.holds(request.changed({option: value}))

            asked = getattr(request, option)
            if asked > 1 and (found := nearest(1, asked, holds, step=max(1, asked >> 6))):
                return Cure({option: found})
        return None

    def cure(self, request: PlacementRequest, placement: Placement, over: Collection[Device]) -> Cure | str:
        """A smaller batch, else less of the weights on what is too full, else shorter sequences."""
        if cure := self.smaller_work(request, "batch_size"):
            return cure
        caps = self._lowered(request, placement.needs, over)
        disk = {"max_memory.disk": size_text(sum(placement.weights.values()))}
        for change in (caps, {**caps, **disk}):
            if caps and self.holds(request.changed(change)):
                return Cure(change, f"{as_fields(change)}; other devices take the rest")
        shorter = self.smaller_work(request, "sequence_length")
        return shorter or "quantize first, give more devices, or plan for another --machine"

    def _lowered(
        self, request: PlacementRequest, needs: Mapping[Device, Need], over: Collection[Device]
    ) -> dict[str, str]:
        """Entries of `max_memory` whose devices then hold no more than they have; {} for a map somebody wrote."""
        rooms = memory_of(self.machine)
        caps: dict[str, str] = {}
        for key in request.max_memory or {} if request.mode else ():
            full = [device for device in devices_of(key) if device in over]
            sizes = [int(rooms[d]) - needs[d].total + needs[d].weights + needs[d].streaming for d in full]
            if sizes:
                caps[f"max_memory.{key}"] = size_text(max(0, min(sizes)), up=False)
        return caps


def _joined(request: PlacementRequest, one: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    """Both changes as one: entries of `max_memory`, or where it is given as a whole, the whole."""
    both = {**one, **then}
    if "max_memory" not in both:
        return both
    whole = request.changed(one).changed(then).max_memory
    return {**{option: value for option, value in both.items() if "." not in option}, "max_memory": whole}


def _missing_gpus(request: PlacementRequest, placement: Placement | None, machine: Machine) -> list[int]:
    """The GPUs that are used or given memory, and are not there."""
    keys = [key for key, size in (request.max_memory or {}).items() if size]
    if isinstance(request.device_map, Mapping):
        keys += request.device_map.values()
    asked = [device for key in keys for device in devices_of(key)]
    used = placement.device_map.values() if placement else ()
    return sorted({d for d in (*asked, *used) if isinstance(d, int)} - {gpu.index for gpu in machine.gpus})


def _missing(request: PlacementRequest, machine: Machine, missing: list[int], attempt: Attempt | None) -> Misfit:
    count = len(machine.gpus)
    has = f"{machine.name} has {counted(count, 'GPU') if count else 'no GPU'}"
    numbers = ", ".join(map(str, missing))
    written = request.device_map if isinstance(request.device_map, Mapping) else {}
    if mapped := [name for name, device in written.items() if devices_of(device)[0] in missing]:
        there, names = f"a GPU below {count}, " if count else "", ", ".join(name or '""' for name in mapped)
        cure = f"map {names} to {there}cpu or disk"
        return Misfit(f"device_map names GPU {numbers}; {has}", cure, f"device_map.{mapped[0]}")
    cause = f"max_memory names GPU {numbers}; {has}"
    change = _without(request.max_memory or {}, missing)
    if attempt is None:
        return Misfit(cause, Cure(change, f"{as_fields(change)}; the rest is known once the model's headers are"))
    trial = Trial(machine, attempt)
    if fitting := trial.completed(request, change):
        homes = " and ".join(map(named, attempt(request.changed(fitting)).weights))
        return Misfit(cause, Cure(fitting, f"{as_fields(fitting)}; the model fits on {homes}"))
    further = trial.misfits(request.changed(change))
    cure = " and ".join(str(misfit.cure) for misfit in further)
    return Misfit(cause, f"{as_fields(change)}, and {cure}", field=next(iter(change)))


def _without(max_memory: Mapping[int | str, Any], missing: Collection[Device]) -> dict[str, Any]:
    """The change that leaves these devices out: 0 for each key of them alone; where a range names others too, all of
    `max_memory` with such ranges cut."""
    named_by = {key: devices_of(key) for key in max_memory}
    gone = {f"max_memory.{key}": 0 for key, devices in named_by.items() if set(devices) <= set(missing)}
    cut = {
        key: [device for device in devices if device not in missing]
        for key, devices in named_by.items()
        if f"max_memory.{key}" not in gone
    }
    if all(len(devices) == len(named_by[key]) for key, devices in cut.items()):
        return gone
    sizes = {key: size if isinstance(size, str) else exact_size(size) for key, size in max_memory.items()}
    return {"max_memory": {part: sizes[key] for key, devices in cut.items() for part in _spelled(str(key), devices)}}


def _spelled(key: str, devices: list[Device]) -> list[str]:
    """The devices as keys: as they were written where they are all of a key's, else as ranges."""
    if devices == devices_of(key):
        return [key]
    numbers = sorted(device for device in devices if isinstance(device, int))
    starts = [number for number in numbers if number - 1 not in numbers]
    ends = [number for number in numbers if number + 1 not in numbers]
    return [str(first) if first == last else f"{first}-{last}" for first, last in zip(starts, ends, strict=True)]

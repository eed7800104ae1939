"""Why a placement does not fit, and the smallest change under which it does: each is tried before it is named."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from bigpipe.errors import DoesNotFit, UsageError
from bigpipe.fit import Cure, Misfit, Need, as_fields, lacking, nearest, totals
from bigpipe.machine import Machine
from bigpipe.sizes import counted, format_size

from .budget import MemoryBudget, memory_of
from .devices import Device, devices_of, named
from .placement import Placement, PlacementRequest
from .tree import Tree

Attempt = Callable[[PlacementRequest], Placement]
"""Places the same model as asked; raises UsageError or DoesNotFit."""


def over_a_cap(needs: Mapping[Device, Need], budget: MemoryBudget) -> Misfit | None:
    """The first device of a map somebody wrote that holds more than its cap."""
    for device in lacking(totals(needs), budget.memory):
        need, cap = needs[device], int(budget.memory.get(device, 0))
        change = {f"max_memory.{device}": size_text(need.total)}
        return Misfit(
            f"device_map puts {need} on {named(device)}; max_memory leaves it {format_size(cap)}",
            Cure(change, f"{as_fields(change)}, or move parts elsewhere"),
        )
    return None


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
    change: dict[str, Any] = {
        f"max_memory.{key}": 0 for key in request.max_memory or {} if set(devices_of(key)) & set(missing)
    }
    without = request.changed(change)
    if attempt is None:
        return Misfit(cause, Cure(change, f"{as_fields(change)}; the rest is known once the model's headers are"))
    try:
        tried = attempt(without)
        further = find_misfits(without, tried, machine, attempt)
    except DoesNotFit as error:
        further = (Misfit.of(error),)
    if further:
        return Misfit(cause, Cure({**change, **further[0].change}, f"{as_fields(change)}, and {further[0].cure}"))
    return Misfit(cause, Cure(change, f"{as_fields(change)}; the model fits {' and '.join(map(str, tried.weights))}"))

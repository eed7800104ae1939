"""How many bytes each device may hold."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from bigpipe.machine import Machine

from .devices import Device, is_computing, main_of
from .headroom import Headroom

RAM_SHARE = 0.8
"""Of a machine's RAM, what may be filled where nobody says how much."""


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes per device. A device that is not in it, or has 0 bytes, is not used."""

    memory: Mapping[Device, int | None]
    """None: no limit."""
    headroom: Headroom | None = None
    """What generating takes of it; None: it is for weights and buffers alone."""

    @cached_property
    def caps(self) -> Mapping[Device, int | None]:
        """What is left for weights, buffers and cache, in the order of preference: GPUs by number, CPU, disk."""
        taken = self.headroom or Headroom()
        gpus = sorted(device for device in self.memory if isinstance(device, int))
        caps: dict[Device, int | None]
        caps = {gpu: _less(self.memory[gpu], taken.activations + taken.runtime) for gpu in gpus}
        runs_on_cpu = not any(cap != 0 for cap in caps.values())
        caps["cpu"] = _less(self.memory.get("cpu", 0), taken.activations if runs_on_cpu else 0)
        caps["disk"] = self.memory.get("disk", 0)
        return {device: cap for device, cap in caps.items() if cap != 0}

    @property
    def gpus(self) -> tuple[int, ...]:
        return tuple(device for device in self.caps if isinstance(device, int))

    @property
    def room(self) -> int | None:
        """Bytes of all devices together; None without a limit."""
        return _together(self.caps.values())

    @property
    def room_to_compute(self) -> int | None:
        """Bytes of the devices that compute, where all keys and values lie; None without a limit."""
        return _together(cap for device, cap in self.caps.items() if is_computing(device, self.main))

    @property
    def main(self) -> Device:
        return main_of(self.caps)

    def without(self, devices: Collection[Device]) -> MemoryBudget:
        return replace(self, memory={device: size for device, size in self.memory.items() if device not in devices})

    def given(self, caps: Mapping[Device, int | None]) -> MemoryBudget:
        """The same with other sizes for these devices."""
        return replace(self, memory={**self.memory, **caps})


def memory_of(machine: Machine) -> dict[Device, int | None]:
    """What a machine has, not what happens to be free: a placement must not depend on the moment."""
    return {**{gpu.index: gpu.memory for gpu in machine.gpus}, "cpu": int(machine.memory * RAM_SHARE), "disk": None}


def _together(caps: Iterable[int | None]) -> int | None:
    sizes = list(caps)
    return None if None in sizes else sum(size for size in sizes if size is not None)


def _less(cap: int | None, size: int) -> int | None:
    return None if cap is None else max(0, cap - size)

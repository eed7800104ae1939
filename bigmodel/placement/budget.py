"""How many bytes of weights and buffers each device may hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bigpipe.errors import UsageError
from bigpipe.sizes import size_of

Device = int | Literal["cpu", "disk"]
"""A GPU by its number, counted from 0 within one process; the CPU's memory; the disk."""

_RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")
_MOST_GPUS = 4096


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes per device in the order of preference: GPUs by number, CPU, disk. A device not in it is not used."""

    caps: Mapping[Device, int | None]
    """None: no limit."""

    @property
    def gpus(self) -> tuple[int, ...]:
        return tuple(device for device in self.caps if isinstance(device, int))

    @property
    def devices(self) -> tuple[Device, ...]:
        return tuple(self.caps)

    @property
    def room(self) -> int | None:
        """Bytes of all devices together; None without a limit."""
        known = [cap for cap in self.caps.values() if cap is not None]
        return sum(known) if len(known) == len(self.caps) else None

    @property
    def main(self) -> Device:
        """The device that runs what is offloaded: the first GPU, else the CPU."""
        return next(iter(self.gpus), "cpu")


def read_budget(
    max_memory: Mapping[int | str, int | str] | None, headroom: Mapping[Device, int] | None = None
) -> Budget:
    """Caps from what a user wrote, or from this machine if None, less `headroom` bytes per device.

    Keys: GPU numbers, ranges of them ("1-7"), cpu, disk. Values: bytes or sizes ("10GiB"). A device with 0 bytes is
    not used. Left out altogether, the disk is there without a limit. Raises UsageError.
    """
    caps = _detect() if max_memory is None else _parse(max_memory)
    for device, size in (headroom or {}).items():
        cap = caps.get(device)
        if cap is not None:
            caps[device] = max(0, cap - size)
    return ordered_budget({device: cap for device, cap in caps.items() if cap != 0})


def ordered_budget(caps: Mapping[Device, int | None]) -> Budget:
    order: list[Device] = [*sorted(device for device in caps if isinstance(device, int)), "cpu", "disk"]
    return Budget({device: caps[device] for device in order if device in caps})


def _parse(max_memory: Mapping[int | str, int | str]) -> dict[Device, int | None]:
    caps: dict[Device, int | None] = {}
    for key, value in max_memory.items():
        size = size_of(f"max_memory of {key}", value)
        for device in devices_of(key):
            if device in caps:
                raise UsageError(f"max_memory gives device {device} twice", "give each device once")
            caps[device] = size
    return caps


def devices_of(key: int | str) -> list[Device]:
    """The devices that a key of `max_memory` names. Raises UsageError."""
    if key in ("cpu", "disk"):
        return ["cpu"] if key == "cpu" else ["disk"]
    match = _RANGE.fullmatch(str(key).strip())
    if match is None:
        raise UsageError(f"{key!r} is not a device", "name a GPU (0), a range of GPUs (1-7), cpu or disk")
    first, last = int(match[1]), int(match[2] or match[1])
    if not first <= last < _MOST_GPUS:
        raise UsageError(f"{key!r} is not a range of GPUs", "give the lower number first: 1-7")
    return list(range(first, last + 1))


def _detect() -> dict[Device, int | None]:
    """Free bytes of each GPU and of memory, now; the disk without a limit, as offloading writes nothing there."""
    import psutil

    host: dict[Device, int | None] = {"cpu": psutil.virtual_memory().available, "disk": None}
    return host | _detect_gpus()


def _detect_gpus() -> dict[Device, int | None]:
    try:
        import pynvml
    except ImportError:
        return {}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return {}
    handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    return {index: int(pynvml.nvmlDeviceGetMemoryInfo(handle).free) for index, handle in enumerate(handles)}

"""Devices by name: GPUs, the CPU's memory, the disk."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Literal

from bigpipe.errors import UsageError
from bigpipe.sizes import size_of

Device = int | Literal["cpu", "disk"]
"""A GPU by its number, counted from 0 within one process; the CPU's memory; the disk."""
Caps = Mapping[Device, float]
"""Bytes per device; inf without a limit."""

_RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")
_MOST_GPUS = 4096


def main_of(devices: Collection[Device]) -> Device:
    """The device that runs what is offloaded: the first GPU, else the CPU."""
    return min((device for device in devices if isinstance(device, int)), default="cpu")


def is_computing(device: Device, main: Device) -> bool:
    """Do the layers that lie on this device compute there? Others pass through `main`."""
    return isinstance(device, int) or device == main


def named(device: Device) -> str:
    return f"GPU {device}" if isinstance(device, int) else f"the {'CPU' if device == 'cpu' else device}"


def read_max_memory(max_memory: Mapping[int | str, int | str]) -> dict[Device, float]:
    """Bytes per device from what somebody wrote.

    Keys: GPU numbers, ranges of them ("1-7"), cpu, disk. Values: bytes or sizes ("10GiB"). Raises UsageError.
    """
    if not isinstance(max_memory, Mapping):
        raise UsageError(f"max_memory is {max_memory!r}", "give sizes by device: {0: 22GiB, cpu: 48GiB}")
    caps: dict[Device, float] = {}
    for key, value in max_memory.items():
        size = size_of(f"max_memory of {key}", value)
        for device in devices_of(key):
            if device in caps:
                raise UsageError(f"max_memory gives device {device} twice", "give each once", field=f"max_memory.{key}")
            caps[device] = size
    return caps


def devices_of(key: int | str) -> list[Device]:
    """The devices that a key of `max_memory` names, torch's names and devices too. Raises UsageError."""
    text = str(key).strip()
    if text in ("cpu", "disk"):
        return ["cpu"] if text == "cpu" else ["disk"]
    match = _RANGE.fullmatch("0" if text == "cuda" else text.removeprefix("cuda:"))
    if match is None:
        raise UsageError(f"{text!r} is not a device", "name a GPU (0, cuda:0), a range of GPUs (1-7), cpu or disk")
    first, last = int(match[1]), int(match[2] or match[1])
    if not first <= last < _MOST_GPUS:
        raise UsageError(f"{key!r} is not a range of GPUs", "give the lower number first: 1-7")
    return list(range(first, last + 1))


def one_device(key: int | str) -> Device:
    """Return the device that an entry of a device map names."""
    found = devices_of(key)
    if len(found) != 1:
        raise UsageError(f"{key!r} is more than one device", "give one GPU, cpu or disk")
    return found[0]

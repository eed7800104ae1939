"""The hardware at hand: what this process may use of it, as limits of containers and visible devices have it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import UsageError
from .files import free_space, read_file
from .names import Given

DOCTOR_FORMAT = "bigpipe.doctor/1"
LARGEST = 2**20
"""Bytes of a description."""
MAKE_ONE = "make one there with `bigpipe doctor --json > FILE`"
DRIVER = Path("/dev/nvidiactl")
"""A device that Linux shows where NVIDIA's driver is loaded."""
WINDOWS_DRIVER = Path("/dev/dxg")
"""The same under WSL, whoever made the GPU."""
CGROUPS = Path("/sys/fs/cgroup")
MEMORY = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, as torch will number it."""

    index: int
    """Its number for torch."""
    name: str
    """As its driver calls it."""
    memory: int
    """Bytes that can be had: all, without what the driver and the firmware keep for themselves."""
    free: int
    """Bytes that nobody holds."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The hardware a plan is made for: this machine, or one described by `doctor --json`. Sizes in bytes."""

    name: str
    """Its name in the network."""
    cpus: int
    """Cores that a process here may use."""
    memory: int
    """Total RAM."""
    memory_available: int
    """RAM that can be had now."""
    disk_free: int
    """On the file system of the store."""
    gpus: tuple[Gpu, ...] = ()
    """In torch's order."""


MACHINE = Given(
    (Machine,), "a Machine, such as bigpipe.machine.read_machine(FILE) of a file by `bigpipe doctor --json`"
)


def detect(store_root: Path) -> Machine:
    """This machine, memory and CPUs as a cgroup or an affinity mask leaves them. `disk_free` is for `store_root`, which
    need not exist yet. Without a GPU driver there are no GPUs."""
    total, available = _memory()
    folders = _cgroup_folders()
    limit, used = memory_limit(folders)
    if limit is not None and limit < total:
        total, available = limit, max(0, min(available, limit - used))
    return Machine(
        name=os.uname().nodename,
        cpus=max(1, math.ceil(min(cores(), cpu_limit(folders)))),
        memory=total,
        memory_available=available,
        disk_free=free_space(store_root),
        gpus=_gpus(os.environ),
    )


def machine_from_json(data: Any) -> Machine:
    """The inverse of `dataclasses.asdict`; a whole `doctor --json` document is understood too. Raises UsageError."""
    from pydantic import TypeAdapter, ValidationError

    if not isinstance(data, Mapping):
        raise UsageError("not a description of a machine", MAKE_ONE)
    if data.get("schema", DOCTOR_FORMAT) != DOCTOR_FORMAT:
        raise UsageError(f"{data['schema']!r} does not describe a machine", MAKE_ONE)
    try:
        return TypeAdapter(Machine).validate_python(data.get("machine", {}) if "schema" in data else data)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise UsageError(f"not a description of a machine: {wrong}", MAKE_ONE) from error


def read_machine(path: Path) -> Machine:
    """The machine that a file written by `bigpipe doctor --json` describes. Raises UsageError."""
    try:
        return machine_from_json(json.loads(read_file(path, LARGEST)))
    except (OSError, ValueError, RecursionError, UsageError) as error:
        cause = error.cause if isinstance(error, UsageError) else error
        raise UsageError(f"{path}: {cause}", MAKE_ONE) from error


def _memory() -> tuple[int, int]:
    """Bytes in all, and bytes that can be had without swapping. Where Linux says both (proc(5)) psutil, which would say
    the same, is not imported: that takes longer than all other looks at the machine."""
    with contextlib.suppress(OSError, KeyError):
        told = dict(re.findall(r"^(\w+): +(\d+) kB$", MEMORY.read_text(encoding="ascii"), re.MULTILINE))
        total, available = int(told["MemTotal"]) * 1024, int(told["MemAvailable"]) * 1024
        return total, min(available, total)
    import psutil

    memory = psutil.virtual_memory()
    return memory.total, memory.available


def memory_limit(folders: Sequence[Path]) -> tuple[int | None, int]:
    """The tightest limit in these cgroup folders and what is used of it, in bytes; (None, 0) where there is none.

    Used leaves out inactive file pages, which the kernel drops before it kills anything. cgroup v2 names come first,
    then v1's.
    """
    tightest: tuple[int | None, int] = (None, 0)
    for folder in folders:
        for limit_name, usage_name, inactive in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = _number(folder / limit_name)
            if limit is None or (tightest[0] is not None and limit >= tightest[0]):
                continue
            dropped = _keyed(folder / "memory.stat").get(inactive, 0)
            tightest = limit, max(0, (_number(folder / usage_name) or 0) - dropped)
    return tightest


def cpu_limit(folders: Sequence[Path]) -> float:
    """CPUs that the tightest quota in these cgroup folders allows; infinity where there is none."""
    limits = [math.inf]
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
            limits.append(int(quota) / int(period))
        quota_v1, period_v1 = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
        if quota_v1 and period_v1 and quota_v1 > 0:
            limits.append(quota_v1 / period_v1)
    return min(limits)


def visible_gpus(gpus: Sequence[tuple[Gpu, str]], visible: str | None) -> tuple[Gpu, ...]:
    """Those of (gpu, uuid) that CUDA_VISIBLE_DEVICES leaves, numbered as torch will number them. A list ends at its
    first entry that names no device, as in CUDA's own reading."""
    if visible is None:
        return tuple(gpu for gpu, _ in gpus)
    chosen: list[Gpu] = []
    for entry in (part.strip() for part in visible.split(",")):
        found = next((gpu for gpu, uuid in gpus if entry and (entry == str(gpu.index) or uuid.startswith(entry))), None)
        if found is None:
            break
        chosen.append(replace(found, index=len(chosen)))
    return tuple(chosen)


def unasked_driver() -> bool:
    """Return whether NVIDIA's driver is loaded here and what asks it, nvidia-ml-py, is not installed."""
    return DRIVER.exists() and find_spec("pynvml") is None


def _gpus(environment: Mapping[str, str]) -> tuple[Gpu, ...]:
    # Without a driver, importing the bindings is time spent for nothing.
    if sys.platform == "linux" and not (DRIVER.exists() or WINDOWS_DRIVER.exists()):
        return ()
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no package, no driver, no rights: no GPUs to plan with
        return ()
    try:
        found = [_gpu(pynvml, index) for index in range(pynvml.nvmlDeviceGetCount())]
    except pynvml.NVMLError:
        return ()
    finally:
        pynvml.nvmlShutdown()
    return visible_gpus(found, environment.get("CUDA_VISIBLE_DEVICES"))


def _gpu(nvml: Any, index: int) -> tuple[Gpu, str]:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    total, free = _gpu_memory(nvml, handle)
    texts = nvml.nvmlDeviceGetName(handle), nvml.nvmlDeviceGetUUID(handle)
    name, uuid = (value.decode() if isinstance(value, bytes) else value for value in texts)  # bytes: older drivers
    return Gpu(index, name, total, free), uuid


def _gpu_memory(nvml: Any, handle: Any) -> tuple[int, int]:
    """Bytes that can be had, and bytes that nobody holds. NVML's `total` is all that is soldered on; what is reserved
    of it its second version alone tells (nvmlMemory_v2_t, since driver 510)."""
    with contextlib.suppress(AttributeError, TypeError, nvml.NVMLError):
        memory = nvml.nvmlDeviceGetMemoryInfo(handle, version=nvml.nvmlMemory_v2)
        return int(memory.total) - int(memory.reserved), int(memory.free)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    return int(memory.total), int(memory.free)


def cores() -> int:
    """Return how many this process may run on, whatever share of them is its."""
    return len(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else os.cpu_count() or 1


def _cgroup_folders() -> list[Path]:
    """The cgroups of this process and those above them, whose limits count as well (cgroups(7))."""
    folders: list[Path] = []
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            top = CGROUPS if not controllers else CGROUPS / controllers
            folder = top / path.lstrip("/")
            # In a container the path may be the host's; the container's own limits then lie at the top.
            folders += [place for place in (folder, *folder.parents) if place.is_relative_to(top)]
    return list(dict.fromkeys(folders))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _keyed(path: Path) -> dict[str, int]:
    with contextlib.suppress(OSError, ValueError):
        return {name: int(value) for name, value in map(str.split, path.read_text(encoding="ascii").splitlines())}
    return {}

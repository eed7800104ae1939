"""How fast bytes move and hops are, which `optimal` weighs placements by: measured once, remembered, or guessed.

RAM and disk are measured in the calling process in a fraction of a second; GPUs in a child process, since only torch
reaches them. Speeds decide between placements by their ratios, so one rough measurement will do.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bigpipe.bigmodel.memo import recall, remember
from bigpipe.environment import inherited
from bigpipe.files import FileWriter, forget_cached, partial_name
from bigpipe.machine import Machine
from bigpipe.sizes import format_transfer

BLOCK = 64 * 2**20
"""Bytes moved at a time: more than caches hold."""
ROUNDS = 3
"""The fastest one counts: what else runs can only slow a round down."""
CHILD_SECONDS = 120
ANSWER_VERSION = 1


@dataclass(frozen=True, slots=True)
class Speeds:
    """Bytes per second, and seconds per hop. The defaults are of an ordinary machine; only ratios decide.

    A token is decoded by reading every weight once, so reading speed is computing speed.
    """

    gpu: float = 1.0e12
    """A GPU reading its own memory."""
    link: float = 2.0e10
    """From RAM to a GPU."""
    ram: float = 2.0e10
    """A CPU reading its memory."""
    disk: float = 1.5e9
    hop: float = 3.0e-5
    """Seconds to hand activations from one device to another."""

    def resident(self, device: object, nbytes: int) -> float:
        """Seconds to compute with weights that lie where they compute."""
        return nbytes / (self.ram if device == "cpu" else self.gpu)

    def streamed(self, home: object, runner: object, nbytes: int) -> float:
        """Seconds to compute with weights that pass from `home` (cpu or disk) through `runner`."""
        return max(nbytes / self.path(home, runner), self.resident(runner, nbytes))

    def path(self, home: object, runner: object) -> float:
        """Bytes per second from `home` (cpu or disk) to `runner`."""
        path = self.disk if home == "disk" else self.link
        return path if runner == "cpu" else min(path, self.link)

    def describe(self) -> str:
        named = {"GPU memory": self.gpu, "link": self.link, "RAM": self.ram, "disk": self.disk}
        return ", ".join(f"{name} {format_transfer(speed)}/s" for name, speed in named.items())


def speeds_of(machine: Machine, memo: Path) -> Speeds | None:
    """Return this machine's speeds, measured once and kept in `memo`; of another machine nothing is known (None)."""
    if machine.name != os.uname().nodename:
        return None
    file = memo / "speeds" / f"{machine.name}.json"
    known = recall(file)
    key = [ANSWER_VERSION, [gpu.name for gpu in machine.gpus]]
    if isinstance(known, dict) and known.get("key") == key:
        with suppress(TypeError, KeyError):
            return Speeds(**known["speeds"])
    speeds = measure(memo, with_gpus=bool(machine.gpus))
    remember(file, {"key": key, "speeds": asdict(speeds)})
    return speeds


def measure(folder: Path, *, with_gpus: bool) -> Speeds:
    """All that can be measured; defaults for the rest. `folder` lies on the disk that counts."""
    speeds = Speeds(ram=memory_speed())
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        speeds = replace(speeds, disk=disk_speed(folder))
    if with_gpus:
        speeds = replace(speeds, **_ask_gpus())
    return speeds


def _fastest(move: Callable[[], object], nbytes: int) -> float:
    """Bytes per second."""
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        move()
        seconds.append(time.perf_counter() - started)
    return nbytes / max(min(seconds), 1e-9)


def memory_speed() -> float:
    """What all cores together move: bytes read and bytes written, as copies do both."""
    cores = max(1, min(len(os.sched_getaffinity(0)), 8))
    share = BLOCK // cores
    buffers = [(ctypes.create_string_buffer(share), ctypes.create_string_buffer(share)) for _ in range(cores)]
    with ThreadPoolExecutor(cores) as pool:

        def copy() -> None:  # memmove lets go of the interpreter's lock
            list(pool.map(lambda pair: ctypes.memmove(pair[0], pair[1], share), buffers))

        copy()  # touches every page
        return _fastest(copy, 2 * share * cores)


def disk_speed(folder: Path) -> float:
    """Reading a file that the page cache was told to forget. Raises OSError where there is no room for one."""
    path, buffer = partial_name(folder / "speed"), bytearray(8 * 2**20)

    def read() -> None:
        forget_cached(path)
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    with FileWriter(path) as writer:
        writer.write(os.urandom(2**20) * (BLOCK // 2**20), 0)
        writer.settle()
    try:
        return _fastest(read, BLOCK)
    finally:
        path.unlink()


def _ask_gpus() -> dict[str, float]:
    """Of `gpu`, `link` and `hop` what a child with torch can measure; nothing where it fails."""
    with suppress(TypeError, ValueError):
        answer = ask_child(__name__)
        return {name: float(answer[name]) for name in ("gpu", "link", "hop") if name in answer}
    return {}


def ask_child(module: str) -> dict[str, Any]:
    """Return the JSON object that running a module of ours prints, in a process that may import torch; an empty one
    where it fails."""
    package = Path(__file__).parents[3]
    with suppress(OSError, ValueError, IndexError, subprocess.SubprocessError):
        path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH", "")]))
        environment = {**inherited(os.environ), "PYTHONPATH": path}
        child = subprocess.run(
            [sys.executable, "-P", "-m", module], env=environment, capture_output=True,
            stdin=subprocess.DEVNULL, timeout=CHILD_SECONDS, check=True,
        )  # fmt: skip
        answer = json.loads(child.stdout.splitlines()[-1])
        return answer if isinstance(answer, dict) else {}
    return {}


def measure_gpus() -> dict[str, float]:
    """In a process that may import torch: the slowest GPU's memory, its link to pinned RAM, and a hop between two."""
    import torch

    if not torch.cuda.is_available():
        return {}
    size = 4 * BLOCK
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    memory, link = [], []
    for number in range(torch.cuda.device_count()):
        here = torch.empty(size, dtype=torch.uint8, device=f"cuda:{number}")
        there = torch.empty_like(here)
        memory.append(_timed(partial(there.copy_, here), number, 2 * size))
        link.append(_timed(partial(here.copy_, pinned, non_blocking=True), number, size))
    found = {"gpu": min(memory), "link": min(link)}
    if torch.cuda.device_count() > 1:
        small = torch.empty(16384, dtype=torch.uint8, device="cuda:0")
        found["hop"] = 1 / _timed(partial(small.to, "cuda:1"), 1, 1)
    return found


def _timed(move: Callable[[], object], number: int, nbytes: int) -> float:
    import torch

    def finish() -> None:
        move()
        torch.cuda.synchronize(number)

    finish()
    return _fastest(finish, nbytes)


if __name__ == "__main__":
    print(json.dumps(measure_gpus()))  # noqa: T201 the answer to the parent

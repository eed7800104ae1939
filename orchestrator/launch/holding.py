"""A process that takes memory, says how much it has, and holds it until it is told to end: what `plan --probe` starts.

    python -m bigpipe.orchestrator.launch.holding '{"RAM": 1000000, "GPU 0": 2000000}'

It prints a line of JSON for each piece that it has, `{"device", "held"}`, one with `failed` where there is no more, and
`{"done": true}`; then it waits until its standard input ends, as it does when its parent is gone. It is the one that
the kernel kills where memory runs out. RAM comes last: what torch and CUDA's libraries fill of it is part of it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigpipe.errors import UsageError
from bigpipe.fit import out_of_memory
from bigpipe.machine import detect
from bigpipe.orchestrator.launch.lifeline import stand_in_for_parent
from bigpipe.orchestrator.launch.processes import resident

RAM = "RAM"
PIECE = 64 * 2**20
"""Bytes that are taken at a time."""


def gpu_name(index: int) -> str:
    """Return what a GPU is called here."""
    return f"GPU {index}"


def main(asked: str) -> None:
    """asked: JSON, device → bytes."""
    stand_in_for_parent()
    kept: list[list[Any]] = []
    for device, size in sorted(json.loads(asked).items(), key=lambda item: item[0] == RAM):
        kept.append([])
        try:
            (_take_ram if device == RAM else _take_gpu)(device, size, kept[-1])
        except Exception as error:  # a driver, a device or a package that is not as it should be too: it is told why
            told = str(error).partition("\n")[0] or type(error).__name__
            _say(device=device, failed=told if out_of_memory(error) else f"{type(error).__name__}: {told}")
    _say(done=True)
    sys.stdin.read()


def _say(**told: Any) -> None:
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()


def _fill(device: str, size: int, own: Callable[[], int], take: Callable[[int], object], kept: list[Any]) -> None:
    """own: bytes that this process has on the device. Takes pieces until these are `size`."""
    while True:
        _say(device=device, held=min(held := own(), size))
        if held >= size:
            return
        kept.append(take(min(PIECE, size - held)))


def _take_ram(device: str, size: int, kept: list[Any]) -> None:
    """Pages of no file, each of them written to."""
    base = resident(os.getpid())
    _fill(device, size, lambda: base + sum(map(len, kept)), lambda length: bytearray(b"\1") * length, kept)


def _take_gpu(device: str, size: int, kept: list[Any]) -> None:
    """What the driver and torch take of the device themselves counts: it is asked before they do."""
    index = int(device.rpartition(" ")[2])
    before = next((gpu.free for gpu in detect(Path()).gpus if gpu.index == index), None)
    if before is None:
        raise UsageError(f"there is no GPU {index} here", "plan for this machine")
    import torch

    place = torch.device("cuda", index)

    def own() -> int:
        return int(before - torch.cuda.mem_get_info(place)[0])

    _fill(device, size, own, lambda length: torch.ones(max(length, 2**21), dtype=torch.uint8, device=place), kept)


if __name__ == "__main__":
    main(sys.argv[1])

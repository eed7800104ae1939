"""How many bytes each device may hold, and how many it must hold under a device map."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from bigpipe.fit import Need
from bigpipe.machine import Machine

from .devices import Caps, Device, is_computing, main_of
from .headroom import Headroom
from .tree import Tree, prefixes

Homes = Mapping[str, Device]
"""Tensor → where it lies."""

RAM_SHARE = 0.8
"""Of a machine's RAM, what may be filled where nobody says how much."""


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes per device. A device that is not in it, or has 0 bytes, is not used."""

    memory: Caps
    headroom: Headroom | None = None
    """What generating takes of it; None: it is for weights and buffers alone."""

    @cached_property
    def caps(self) -> Caps:
        """What is left for weights, buffers and cache, in the order of preference: GPUs by number, CPU, disk."""
        taken = self.headroom or Headroom()
        on_host = taken.activations + taken.casting
        gpus = sorted(device for device in self.memory if isinstance(device, int))
        caps: dict[Device, float] = {gpu: self.memory[gpu] - taken.activations - taken.runtime for gpu in gpus}
        runs_on_cpu = not any(cap > 0 for cap in caps.values())
        caps["cpu"] = self.memory.get("cpu", 0) - (on_host if runs_on_cpu else 0)
        caps["disk"] = self.memory.get("disk", 0)
        return {device: cap for device, cap in caps.items() if cap > 0}

    @property
    def gpus(self) -> tuple[int, ...]:
        return tuple(device for device in self.caps if isinstance(device, int))

    @property
    def room(self) -> float:
        """Bytes of all devices together."""
        return sum(self.caps.values())

    @property
    def room_to_compute(self) -> float:
        """Bytes of the devices that compute, where all keys and values lie."""
        return sum(cap for device, cap in self.caps.items() if is_computing(device, self.main))

    @property
    def main(self) -> Device:
        return main_of(self.caps)

    def without(self, devices: Collection[Device]) -> MemoryBudget:
        return replace(self, memory={device: size for device, size in self.memory.items() if device not in devices})

    def given(self, caps: Caps) -> MemoryBudget:
        """The same with other sizes for these devices."""
        return replace(self, memory={**self.memory, **caps})


def memory_of(machine: Machine, *, share: float = RAM_SHARE) -> dict[Device, float]:
    """What a machine has, not what happens to be free: a placement must not depend on the moment."""
    return {**{gpu.index: gpu.memory for gpu in machine.gpus}, "cpu": int(machine.memory * share), "disk": math.inf}


def homes_of(tree: Tree, devices: Mapping[str, Device]) -> dict[str, Device]:
    """Tensor name → where it lies; without those that the map does not cover."""
    return {tensor: device for tensor in tree.tensors if (device := home_of(devices, tensor)) is not None}


def home_of(devices: Mapping[str, Device], name: str) -> Device | None:
    return next((devices[part] for part in reversed(list(prefixes(name))) if part in devices), None)


def weights_of(tree: Tree, homes: Homes) -> dict[Device, int]:
    """Device → bytes of weights and buffers as accelerate counts them; GPUs by number, then cpu and disk. What is tied
    counts once on each device that a map gives one of its names."""
    weights: Counter[Device] = Counter()
    for storage, device in {(tree.storage(tensor), device): None for tensor, device in homes.items()}:
        weights[device] += tree.nbytes.get(storage, 0)
    return dict(sorted(weights.items(), key=lambda item: (isinstance(item[0], str), item[0])))


def needs_of(tree: Tree, devices: Mapping[str, Device], headroom: Headroom | None) -> dict[Device, Need]:
    """Device → what it must hold under a device map. headroom: what generating takes besides; None: weights and
    buffers alone count.

    What is streamed passes through the first GPU of the map, though it gives it nothing that has bytes, else the CPU.
    Its keys and values stay there, and with `headroom` so do its buffers that no checkpoint holds.
    """
    homes, main = homes_of(tree, devices), main_of(devices.values())
    weights = Counter(weights_of(tree, homes))
    cache: Counter[Device] = Counter()
    if headroom is not None:
        for tensor, size in headroom.cache.items():
            cache[homes[tensor] if is_computing(homes[tensor], main) else main] += size
        for tensor in tree.made:
            if not is_computing(homes[tensor], main):
                weights[homes[tensor]] -= tree.nbytes[tensor]
                weights[main] += tree.nbytes[tensor]
    streaming = buffers(main, _passing(tree, homes, main))
    if headroom is not None:
        streaming += headroom.casting
    found: dict[Device, Need] = {}
    for device in {**weights, **cache, main: 0}:
        computing = headroom is not None and is_computing(device, main)
        found[device] = Need(
            weights=weights[device],
            kv_cache=cache[device],
            activations=headroom.activations if headroom and computing else 0,
            runtime=headroom.runtime if headroom and isinstance(device, int) else 0,
            streaming=streaming if device == main else 0,
        )
    return {device: need for device, need in found.items() if need.total}


def _passing(tree: Tree, homes: Homes, main: Device) -> list[tuple[int, int]]:
    """Bytes of each layer that pass through the device that runs it, see `Tree.passing`; tables do not."""
    layers = (
        [tensor for tensor in tree.tensors_of(layer) if not is_computing(homes.get(tensor, main), main)]
        for layer in tree.layers([""])
        if not tree.is_table(layer)
    )
    return [tree.passing_of(tensors) for tensors in layers if tensors]


def buffers(main: Device, layers: Collection[tuple[int, int]]) -> int:
    """Return the bytes that the device that runs them keeps for layers that pass through it.

    A CPU computes with the file's pages of one layer. On a GPU one layer computes while the next one comes, each in
    memory that is used again and again, so that both come to be as large as the largest; experts are brought once their
    layer's turn has come, and have one place. layers: of each its bytes but for its experts, and those of its experts.
    """
    if main == "cpu":
        return max(map(sum, layers), default=0)
    rest, experts = (max((layer[part] for layer in layers), default=0) for part in (0, 1))
    return min(len(layers), 2) * rest + experts

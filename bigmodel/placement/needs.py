"""What each device must hold under a device map."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from bigpipe.fit import Need

from .devices import Device, is_computing, main_of
from .headroom import Headroom
from .tree import Tree, prefixes

Homes = Mapping[str, Device]


def homes_of(tree: Tree, devices: Mapping[str, Device]) -> dict[str, Device]:
    """Tensor name → where it lies; without those that the map does not cover."""
    return {tensor: device for tensor in tree.tensors if (device := home_of(devices, tensor)) is not None}


def home_of(devices: Mapping[str, Device], name: str) -> Device | None:
    return next((devices[part] for part in reversed(list(prefixes(name))) if part in devices), None)


def weights_of(tree: Tree, homes: Homes) -> dict[Device, int]:
    """Device → bytes of weights and buffers as accelerate counts them; GPUs by number, then cpu and disk."""
    weights: Counter[Device] = Counter()
    for storage, size in tree.nbytes.items():
        if storage in homes:
            weights[homes[storage]] += size
    return dict(sorted(weights.items(), key=lambda item: (isinstance(item[0], str), item[0])))


def needs_of(tree: Tree, homes: Homes, headroom: Headroom | None) -> dict[Device, Need]:
    """Device → what it must hold. headroom: what generating takes besides; None: weights and buffers alone count.

    What is streamed passes through the first GPU in use, else the CPU. Its keys and values stay there, and with
    `headroom` so do its buffers that no checkpoint holds.
    """
    weights = Counter(weights_of(tree, homes))
    main = main_of(weights)
    cache: Counter[Device] = Counter()
    if headroom is not None:
        for tensor, size in headroom.cache.items():
            cache[homes[tensor] if is_computing(homes[tensor], main) else main] += size
        for tensor in tree.made:
            if not is_computing(homes[tensor], main):
                weights[homes[tensor]] -= tree.nbytes[tensor]
                weights[main] += tree.nbytes[tensor]
    streaming = _largest_streamed(tree, homes, main)
    found: dict[Device, Need] = {}
    for device in {**weights, **cache, **({main: 0} if streaming else {})}:
        computing = headroom is not None and is_computing(device, main)
        found[device] = Need(
            weights=weights[device],
            kv_cache=cache[device],
            activations=headroom.activations if headroom and computing else 0,
            runtime=headroom.runtime if headroom and isinstance(device, int) else 0,
            streaming=streaming if device == main else 0,
        )
    return {device: need for device, need in found.items() if need.total}


def _largest_streamed(tree: Tree, homes: Homes, main: Device) -> int:
    """Bytes of the largest layer that passes through the device that runs it; tables do not."""
    layers = (
        [tensor for tensor in tree.tensors_of(layer) if not is_computing(homes.get(tree.storage(tensor), main), main)]
        for layer in tree.layers([""])
        if not tree.is_table(layer)
    )
    return max(map(tree.union_size, layers), default=0)

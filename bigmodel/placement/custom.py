"""A device map that somebody wrote, checked against the model."""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from bigpipe.errors import UsageError, first_few

from .devices import Device, one_device
from .tree import Tree, prefixes


def read_device_map(tree: Tree, device_map: Mapping[str, int | str]) -> dict[str, Device]:
    """The map with its devices checked. Raises UsageError on unknown names, and listing all that is not covered."""
    devices = {name: one_device(device) for name, device in device_map.items()}
    known = {part for tensor in tree.tensors for part in prefixes(tensor)}
    known.update(module.name for module in tree.architecture.modules)
    unknown = [name for name in devices if name not in known]
    if unknown:
        raise UsageError(
            "device_map names parts that the model does not have: " + first_few([_suggest(n, known) for n in unknown]),
            "a key is a module or tensor of the model, or a prefix of one up to a dot",
        )
    missing = _uncovered(tree, devices)
    if missing:
        raise UsageError(
            f"device_map gives no device to {first_few(missing)}",
            'add them, or give everything that is not listed a device with the key ""',
        )
    return devices


def _uncovered(tree: Tree, devices: Mapping[str, Device]) -> list[str]:
    """The largest parts of which nothing has a device, and the tensors that lack one elsewhere."""
    bare = [t for t in tree.tensors if not any(part in devices for part in prefixes(t))]
    touched = {part for name in devices for part in prefixes(name)}
    tops = [next((part for part in prefixes(tensor) if part not in touched), tensor) for tensor in bare]
    return list(dict.fromkeys(tops))


def _suggest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"{name} (did you mean {close[0]}?)" if close else name

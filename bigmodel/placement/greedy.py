"""Fills devices in the model's order, part by part, as accelerate's `infer_auto_device_map` does.

The parts come in the model's order; one that does not fit the device at hand is split, and if it cannot be, the next
device is taken. A device that streams what was offloaded keeps room for the largest layer still to come.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from .devices import Caps, Device, is_computing, main_of
from .tree import Tree


@dataclass
class Filling:
    """Where parts went. `left` is what no device had room for."""

    devices: dict[str, Device] = field(default_factory=dict)
    used: Counter[Device] = field(default_factory=Counter)
    """Bytes."""
    reserved: Counter[Device] = field(default_factory=Counter)
    left: list[str] = field(default_factory=list)


def fill(tree: Tree, caps: Caps, streaming: frozenset[Device], *, returning: bool = False) -> Filling:
    """caps: in order of preference; what fits nowhere is `left`.

    streaming: devices that keep room for the largest layer that may follow. returning: each part tries every device
    from the first again, instead of only those from where the last part went.
    """
    return _Run(tree, caps, streaming, returning).run()


class _Run:
    def __init__(self, tree: Tree, caps: Caps, streaming: frozenset[Device], returning: bool) -> None:
        self.tree = tree
        self.caps = caps
        self.order = list(caps)
        self.main = main_of(caps)
        self.streaming = streaming
        self.returning = returning
        self.queue = deque(tree.split(""))
        self.filling = Filling()
        self.position = 0
        self.largest, self.largest_names = self._largest_layers()

    def run(self) -> Filling:
        while self.queue:
            part = self.queue.popleft()
            self._forget(part)
            if not any(self._put(part, device) or self._break_up(part, device) for device in self._candidates()):
                self._pass_on(part)
        return self.filling

    def _candidates(self) -> list[Device]:
        return self.order[: self.position + 1] if self.returning else self.order[self.position : self.position + 1]

    def _room(self, device: Device) -> float:
        """Bytes left on the device for parts."""
        reserve = max(self.largest, self.filling.reserved[device]) if device in self.streaming else 0
        return self.caps[device] - reserve - self.filling.used[device]

    def _load(self, device: Device, *parts: str) -> int:
        """Bytes that the device must hold for the parts: where they compute, their keys and values too."""
        size = self.tree.union_size(parts) if len(parts) > 1 else self.tree.size[parts[0]]
        return size + sum(self.tree.cached[part] for part in parts) if is_computing(device, self.main) else size

    def _put(self, part: str, device: Device) -> bool:
        """Puts the part and all that is tied to it on the device, if they fit together."""
        tied = self._tied_parts(part)
        size = self._load(device, part, *tied)
        if size > self._room(device):
            return False
        self.filling.used[device] += size
        for name in (part, *tied):
            self.filling.devices[name] = device
        for name in tied:
            self.queue.remove(name)
            self._forget(name)
        return True

    def _tied_parts(self, part: str) -> list[str]:
        """Parts of the queue that hold a tensor tied to one in `part`."""
        ties = self.tree.ties(part)
        found = [next((p for p in self.queue if t == p or t.startswith(f"{p}.")), None) for t in ties]
        return list(dict.fromkeys(name for name in found if name is not None))

    def _break_up(self, part: str, device: Device) -> bool:
        """Replaces the part, or a part tied to it where that is what is too big for the device, by its pieces."""
        room, load = self._room(device), self._load(device, part)
        tied = self._tied_parts(part)
        if tied and load <= room:
            for name in filter(self.tree.can_split, tied):
                index = self.queue.index(name)
                self.queue.remove(name)
                for piece in reversed(self.tree.split(name)):
                    self.queue.insert(index, piece)
                self.queue.appendleft(part)
                self.largest, self.largest_names = self._largest_layers()
                return True
        if load >= room and self.tree.can_split(part):
            self.queue.extendleft(reversed(self.tree.split(part)))
            self.largest, self.largest_names = self._largest_layers()
            return True
        return False

    def _pass_on(self, part: str) -> None:
        """Goes to the next device with the same part; after the last one the part is left."""
        if self.position >= len(self.order):
            self.filling.left.append(part)
            return
        device = self.order[self.position]
        if device in self.streaming:
            held = self.filling.reserved[device]
            self.filling.reserved[device] = max(held, self.largest, self._largest_layer(part))
        self.position += 1
        self.queue.appendleft(part)

    def _forget(self, part: str) -> None:
        """A part at hand no longer counts among the layers still to come."""
        inside = f"{part}."
        self.largest_names = [n for n in self.largest_names if n != part and not n.startswith(inside)]
        if not self.largest_names:
            self.largest, self.largest_names = self._largest_layers()

    def _largest_layers(self) -> tuple[int, list[str]]:
        layers = list(self.tree.layers(self.queue))
        largest = max((self.tree.size[layer] for layer in layers), default=0)
        return largest, [layer for layer in layers if self.tree.size[layer] == largest]

    def _largest_layer(self, part: str) -> int:
        return max((self.tree.size[layer] for layer in self.tree.layers([part])), default=0)

"""Fills devices in the model's order, part by part, as accelerate's `infer_auto_device_map` does.

The parts come in the model's order; one that does not fit the device at hand is split, and if it cannot be, the next
device is taken. A device that streams what was offloaded keeps room for the largest layer still to come, or a GPU for
two of that size, as `budget.buffers` asks where layers are streamed.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from .budget import buffers
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


def fill(
    tree: Tree, caps: Caps, streaming: frozenset[Device], *, twice: bool = False, returning: bool = False
) -> Filling:
    """caps: in order of preference; what fits nowhere is `left`.

    streaming: devices that keep room for the largest layer that may follow; twice: of these a GPU for two, one of which
    comes while the other computes. returning: each part tries every device from the first again, instead of only those
    from where the last part went.
    """
    return _Run(tree, caps, streaming, twice, returning).run()


Peaks = tuple[int, int, int]
"""Of several layers the most bytes of one, of one that is streamed but for its experts, and of a layer's experts."""


class _Run:
    def __init__(self, tree: Tree, caps: Caps, streaming: frozenset[Device], twice: bool, returning: bool) -> None:
        self.tree = tree
        self.caps = caps
        self.order = list(caps)
        self.main = main_of(caps)
        self.streaming = streaming
        self.twice = twice
        self.returning = returning
        self.queue = deque(tree.split(""))
        self.filling = Filling()
        self.position = 0
        self.peaks: Peaks
        self.peak_names: tuple[set[str], ...]
        """Of the layers still to come, those that are as large: what was taken out may have been the last of them."""
        self._look_ahead()

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
        reserve = max(self._kept(device, self.peaks), self.filling.reserved[device]) if device in self.streaming else 0
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
                self._look_ahead()
                return True
        if load >= room and self.tree.can_split(part):
            self.queue.extendleft(reversed(self.tree.split(part)))
            self._look_ahead()
            return True
        return False

    def _pass_on(self, part: str) -> None:
        """Goes to the next device with the same part; after the last one the part is left."""
        if self.position >= len(self.order):
            self.filling.left.append(part)
            return
        device = self.order[self.position]
        if device in self.streaming:
            peaks = _joined(self.peaks, self._peaks(self.tree.layers([part])))
            self.filling.reserved[device] = max(self.filling.reserved[device], self._kept(device, peaks))
        self.position += 1
        self.queue.appendleft(part)

    def _forget(self, part: str) -> None:
        """A part at hand no longer counts among the layers still to come."""
        inside = f"{part}."
        for names in self.peak_names:
            names.difference_update([name for name in names if name == part or name.startswith(inside)])
        if not all(self.peak_names):
            self._look_ahead()

    def _kept(self, device: Device, peaks: Peaks) -> int:
        """Bytes that a device keeps for layers that may follow."""
        size, rest, experts = peaks
        return max(size, buffers(device, [(rest, 0), (0, experts)])) if self.twice and device != "cpu" else size

    def _look_ahead(self) -> None:
        layers = list(self.tree.layers(self.queue))
        self.peaks = self._peaks(layers)
        sizes = {layer: self._sizes(layer) for layer in layers}
        self.peak_names = tuple(
            {layer for layer in layers if sizes[layer][number] == peak} for number, peak in enumerate(self.peaks)
        )

    def _peaks(self, layers: Iterable[str]) -> Peaks:
        peaks = (0, 0, 0)
        for layer in layers:
            peaks = _joined(peaks, self._sizes(layer))
        return peaks

    def _sizes(self, layer: str) -> Peaks:
        return self.tree.size[layer], *self.tree.passing(layer)


def _joined(one: Peaks, other: Peaks) -> Peaks:
    return max(one[0], other[0]), max(one[1], other[1]), max(one[2], other[2])

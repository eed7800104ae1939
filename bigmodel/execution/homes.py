"""What a device map means on this machine: where each weight lives and where it computes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from bigpipe.bigmodel.placement import Placement, one_device
from bigpipe.errors import DoesNotFit, UsageError

if TYPE_CHECKING:
    import torch

DeviceMap = Mapping[str, int | str]
"""Module or parameter name → home. The longest name that leads to a weight decides; "" is the rest."""


class Homes:
    """A placement on this machine. first_gpu: added to its GPU numbers, which count from 0 for each rank.

    Raise DoesNotFit for a GPU that this machine lacks.
    """

    def __init__(self, placement: Placement, first_gpu: int = 0) -> None:
        self.placement = placement
        self.first_gpu = first_gpu
        self.main = self._main()
        """Where everything without a GPU of its own computes."""

    def execution(self, name: str) -> torch.device:
        """Return where the module or parameter computes: its GPU, else the first GPU of the map, else the CPU."""
        import torch

        home = self.placement.device_of(name)
        return torch.device("cuda", home + self.first_gpu) if isinstance(home, int) else self.main

    def check_covers(self, names: Iterable[str]) -> None:
        """Raise UsageError, listing what no entry of the map leads to."""
        missing = [name for name in names if not self.covers(name)]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise UsageError(
                f"the device map covers no device for {', '.join(missing[:5])}{more}",
                'add an entry for each, or "": cpu for all the rest',
            )

    def covers(self, name: str) -> bool:
        try:
            self.placement.device_of(name)
        except KeyError:
            return False
        return True

    def _main(self) -> torch.device:
        import torch

        gpus = sorted(
            home + self.first_gpu for home in set(self.placement.device_map.values()) if isinstance(home, int)
        )
        if not gpus:
            return torch.device("cpu")
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpus[-1] >= found:
            raise DoesNotFit(
                f"the device map names GPU {gpus[-1]}, and this machine has {found or 'none'}",
                "place the model for this machine's devices, for example with max_memory: {cpu: …, disk: …}",
            )
        return torch.device("cuda", gpus[0])


def as_placement(placement: Placement | DeviceMap | None) -> Placement:
    """Return the placement that a device map means; without one, everything in RAM.

    Raise UsageError for a device that has no such name, or a mode in place of a map.
    """
    if isinstance(placement, Placement):
        return placement
    if isinstance(placement, str):
        raise UsageError(
            f"placement {placement!r} is neither a Placement nor a map",
            f"pass bigpipe.place(…, device_map={placement!r}) for a mode, or a map such as {{'': 'disk'}}",
        )
    written = {"": "cpu"} if placement is None else placement
    device_map = {name: one_device(home) for name, home in written.items()}
    return Placement(device_map=device_map, weights={}, max_memory={}, strategy="custom")
